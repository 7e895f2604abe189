"""Weights that accelerate spreads over processes with FSDP2: what each holds, whole tensors of it, and back again.

A spread weight is a `DTensor`, of which every process has a slice. What is done element by element (masks, averages,
distances) is done to the slices; what leaves the run (checkpoints, results) is put together, by all processes at once.
Everything here takes ordinary tensors as well, and gives them back as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

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
    "trained_parameters",
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


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Name the parameters of a model that require gradients; see `named_parameters`."""
    return {name: parameter for name, parameter in named_parameters(model).items() if parameter.requires_grad}


class Structure:
    """What modules are made of, to give a model back its own once its weights need no longer be spread.

    FSDP2 changes the classes, the parameters, the hooks and the attributes of a model in place, DeepSpeed its
    parameters and its hooks, activation checkpointing by accelerate its modules, and autocast its forward; there is no
    public way back.

    Args:
        model: The network, before accelerate prepares it.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = [_Made.of(module) for module in model.modules()]

    def restore(self) -> None:
        """Put spread weights together, in place, and undo the rest; all processes must call it."""
        reshard(self._modules[0].module)
        for made in self._modules:
            made.restore()


class _Made(NamedTuple):
    """A module, and what it is made of."""

    module: torch.nn.Module
    kind: type
    children: dict[str, torch.nn.Module | None]
    hooks: dict[str, set[int]]
    attributes: set[str]
    notes: dict[str, set[str]]
    """Attributes of its parameters."""

    @classmethod
    def of(cls, module: torch.nn.Module) -> _Made:
        return cls(
            module,
            type(module),
            dict(module._modules),
            {name: set(hooks) for name, hooks in _hooks(module)},
            set(vars(module)),
            {name: set(vars(values)) for name, values in module._parameters.items() if values is not None},
        )

    def restore(self) -> None:
        module = self.module
        if type(module) is not self.kind:
            module.__class__ = self.kind
        module._modules.update(self.children)
        for name, notes in self.notes.items():
            parameter: Any = module._parameters[name]
            if isinstance(parameter, DTensor) or set(vars(parameter)) - notes:
                module._parameters[name] = torch.nn.Parameter(whole(parameter).clone(), parameter.requires_grad)
        for name, present in _hooks(module):
            for key in [key for key in present if key not in self.hooks[name]]:
                del present[key]
        for name in set(vars(module)) - self.attributes:  # the state of FSDP2, which can't be copied, and a forward
            delattr(module, name)


def _hooks(module: torch.nn.Module) -> list[tuple[str, dict[int, object]]]:
    return [(name, hooks) for name, hooks in vars(module).items() if "_hooks" in name and isinstance(hooks, dict)]
