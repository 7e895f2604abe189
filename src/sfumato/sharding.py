"""Weights that accelerate spreads over processes with FSDP2: what each holds, whole tensors of it, and back again.

A spread weight is a `DTensor`, of which every process has a slice. What is done element by element (masks, averages,
distances) is done to the slices; what leaves the run (checkpoints, results) is put together, by all processes at once.
Everything here takes ordinary tensors as well, and gives them back as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = [
    "Structure",
    "blocks_of",
    "is_spread",
    "local",
    "locals_of",
    "named_parameters",
    "reshard",
    "spread_like",
    "whole",
]

_WRAPPER = "_checkpoint_wrapped_module."


def local(values: torch.Tensor) -> torch.Tensor:
    """Give what this process holds of a tensor, without a gradient; to change it is to change the tensor."""
    held: Any = values.detach()
    return held.to_local() if isinstance(values, DTensor) else held


def locals_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give what this process holds of named tensors; see `local`."""
    return {name: local(values) for name, values in tensors.items()}


@torch.no_grad()
def whole(values: torch.Tensor) -> torch.Tensor:
    """Put a tensor together; all processes must call it."""
    held: Any = values.detach()
    return held.full_tensor() if isinstance(values, DTensor) else held


def spread_like(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Spread a whole tensor, which every process has, as another of its shape is; one that is spread stays so."""
    values = values.to(like.device)
    if not isinstance(like, DTensor) or isinstance(values, DTensor):
        return values
    return distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None)


def is_spread(model: torch.nn.Module) -> bool:
    """Whether a model's weights are spread."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def blocks_of(model: torch.nn.Module) -> list[str]:
    """Name the classes that a model and its parts say should stay in one piece, as far as it has any of them.

    Without those that hold its input embeddings, as accelerate spreads these by themselves.
    """
    named = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    return sorted({type(module).__name__ for module in model.modules() if embeddings not in module.modules()} & named)


def reshard(model: torch.nn.Module) -> None:
    """Let go of weights that were gathered for a forward pass: the next one gathers them anew."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def named_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Name the parameters of a model, spread or not, as they were before accelerate prepared it."""
    reshard(model)
    return {name.replace(_WRAPPER, ""): parameter for name, parameter in model.named_parameters()}


class Structure:
    """What modules are made of, to give a model back its own once its weights need no longer be spread.

    FSDP2 changes the classes, the parameters, the hooks and the attributes of a model in place, activation
    checkpointing by accelerate its modules, and autocast its forward; there is no public way back.

    Args:
        model: The network, before accelerate prepares it.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = [
            (
                module,
                type(module),
                dict(module._modules),
                {n: set(hooks) for n, hooks in _hooks(module)},
                set(vars(module)),
            )
            for module in model.modules()
        ]

    def restore(self) -> None:
        """Put spread weights together, in place, and undo the rest; all processes must call it."""
        reshard(self._modules[0][0])
        for module, kind, children, hooks, attributes in self._modules:
            if type(module) is not kind:
                module.__class__ = kind
            module._modules.update(children)
            for name, parameter in module._parameters.items():
                if isinstance(parameter, DTensor):
                    module._parameters[name] = torch.nn.Parameter(whole(parameter), parameter.requires_grad)
            for name, present in _hooks(module):
                for key in [key for key in present if key not in hooks[name]]:
                    del present[key]
            for name in set(vars(module)) - attributes:  # the state of FSDP2, which can't be copied, and a forward
                delattr(module, name)


def _hooks(module: torch.nn.Module) -> list[tuple[str, dict[int, object]]]:
    return [(name, hooks) for name, hooks in vars(module).items() if "_hooks" in name and isinstance(hooks, dict)]
