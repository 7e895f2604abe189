"""The model as it was before unlearning, at the cost of its trained weights alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sfumato.sharding import is_spread, local, named_parameters, reshard, spread_like

__all__ = ["OriginalModel"]


class OriginalModel(torch.nn.Module):
    """Call a model that is being trained with the weights it has now, at construction.

    With ``prune_ratio`` these are the weights after pruning. It shares all that is not trained, so a frozen teacher
    beside cross-attention costs 77 MB for Stable Diffusion 1.4 and not 3.4 GB; of weights that are spread over
    processes, each keeps its slices.

    Args:
        model: The bare module; its parameters that require gradients are remembered.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._remembered = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self._model = (model,)  # in a tuple, so that it is no part of this module

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return next(self._model[0].parameters()).dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the model did; without gradients, for none of these weights is trained."""
        model = self._model[0]
        with torch.no_grad():
            if not is_spread(model):
                return torch.func.functional_call(model, self._remembered, args, kwargs)
            with self._exchanged(model):
                return model(*args, **kwargs)

    @contextmanager
    def _exchanged(self, model: torch.nn.Module) -> Iterator[None]:
        """Put the remembered slices in the place of the model's, for a while; FSDP2 gathers its weights from these."""
        spread = {name: p for name, p in named_parameters(model).items() if name in self._remembered}
        for name, parameter in spread.items():
            self._remembered[name] = spread_like(self._remembered[name], parameter)
        reshard(model)
        current = {name: local(parameter).clone() for name, parameter in spread.items()}
        try:
            for name, parameter in spread.items():
                local(parameter).copy_(local(self._remembered[name]))
            yield
        finally:
            reshard(model)
            for name, parameter in spread.items():
                local(parameter).copy_(current[name])
