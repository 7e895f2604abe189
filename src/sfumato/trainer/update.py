"""How losses become a step of the weights, on one process, on several (DDP), or with weights spread over them (FSDP2).

What DeepSpeed spreads has its own ways: `sfumato.trainer.zero`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from accelerate import Accelerator

from sfumato.sharding import Structure, blocks_of, is_spread, local, spread_like, trained_parameters, whole
from sfumato.trainer.config import TrainingConfig
from sfumato.trainer.masked_update import MaskedUpdate, zero_where
from sfumato.trainer.objective import Objective, SurgicalObjective
from sfumato.trainer.optimizers import make_optimizer
from sfumato.trainer.surgery import Surgeon, check_surgery

__all__ = ["GradientUpdate", "Update"]

Tensors = Mapping[str, torch.Tensor]


class Update(Protocol):
    """A model on its devices, and how it takes a step: some passes, each within `passing`, then `step`.

    Attributes:
        model: The network, as an objective is to call it.
        parameters: What is trained of it, by the names it came with.
    """

    model: torch.nn.Module
    parameters: dict[str, torch.nn.Parameter]

    def passing(self, *, last: bool) -> AbstractContextManager[None]:
        """Surround a pass; the processes need only meet in the last one of a step."""
        ...

    def add(self, terms: Tensors) -> None:
        """Add the gradient of a pass, whose loss is the sum of the terms."""
        ...

    def step(self, learning_rate: float) -> float:
        """Step, unless the gradient is known not to be finite; gives its norm before it was clipped."""
        ...

    def discard(self) -> None:
        """Forget the gradients of the passes so far."""
        ...

    def moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Give the optimiser's state, ``index.key`` of a parameter by its place; all processes must go through it."""
        ...

    def load_moments(self, moments: Tensors) -> None:
        """Take over the optimiser's state of a checkpoint."""
        ...

    def load_weights(self, weights: Tensors) -> None:
        """Take over the weights of a checkpoint."""
        ...

    def notice_weights(self) -> None:
        """Go on from the weights as they are, which something else than a step has changed."""
        ...

    def finish(self) -> None:
        """Give the model back as it came, but for its weights; all processes must call it."""
        ...


class GradientUpdate:
    """See `Update`: gradients in the parameters' `.grad`, and an optimiser of torch over the parameters.

    Args:
        model: The network, changed in place.
        objective: What to minimise.
        config: How.
        accelerator: The process group.
        masks: Parameter name to `bool` mask.
        restore_masked: See `MaskedUpdate`.
    """

    def __init__(
        self, model: torch.nn.Module, objective: Objective, config: TrainingConfig, accelerator: Accelerator,
        masks: Tensors, restore_masked: bool,
    ) -> None:  # fmt: skip
        self._config, self._accelerator = config, accelerator
        self._structure = Structure(model)
        self._optimizer = make_optimizer(list(trained_parameters(model).values()), config, spread=accelerator.is_fsdp2)
        if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap is None:
            accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = blocks_of(model)  # accelerate wants all
        self.model, self._stepper = accelerator.prepare(model, self._optimizer)
        self.parameters = trained_parameters(model)  # FSDP2 has put others in their places
        movable = {self.parameters[name]: mask for name, mask in masks.items()}
        self._outside = MaskedUpdate(self._optimizer, movable, restore_masked).outside if movable else {}
        self._surgeon = self._make_surgeon(objective) if isinstance(objective, SurgicalObjective) else None

    def _make_surgeon(self, objective: Objective) -> Surgeon:
        check_surgery(self._config, self._accelerator)
        return Surgeon(
            objective, list(self.parameters.values()), self._accelerator, outside=self._outside,
            limit=self._largest_norm, spread=is_spread(self.model),
        )  # fmt: skip

    @property
    def _largest_norm(self) -> float:
        return math.inf if self._config.max_grad_norm is None else self._config.max_grad_norm

    def passing(self, *, last: bool) -> AbstractContextManager[None]:
        """See `Update`."""
        meets = last if self._surgeon is None else self._surgeon.spread
        return nullcontext() if meets else self._accelerator.no_sync(self.model)

    def add(self, terms: Tensors) -> None:
        """See `Update`."""
        if self._surgeon is not None:
            self._surgeon.add(terms)
        else:
            self._accelerator.backward(torch.stack(list(terms.values())).sum())

    def step(self, learning_rate: float) -> float:
        """See `Update`. The scaler of fp16 does what a gradient that is not finite asks for by itself."""
        norm = self._clip() if self._surgeon is None else self._surgeon.operate()
        if self._config.mixed_precision == "fp16" or math.isfinite(norm):
            for group in self._stepper.param_groups:
                group["lr"] = learning_rate
            self._stepper.step()
        self.discard()
        return norm

    def _clip(self) -> float:
        """Clip the gradient of what may move; gives the norm that it had."""
        if self._config.max_grad_norm is not None:  # else the step's own hook is early enough
            for parameter, outside in self._outside.items():
                if parameter.grad is not None:
                    zero_where(local(parameter.grad), outside)
        norm = self._accelerator.clip_grad_norm_(self.model.parameters(), self._largest_norm)
        return 0.0 if norm is None else float(whole(torch.as_tensor(norm)))

    def discard(self) -> None:
        """See `Update`."""
        self._stepper.zero_grad()

    def moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Update`. Not from `state_dict`, in which bitsandbytes hides what it keeps in 8 bits."""
        ordered = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        tables = set[int]()  # of 8-bit values, which parameters have in common, and files of tensors must not
        for index, parameter in enumerate(ordered):
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if value is None:
                    continue
                shared = torch.is_tensor(value) and id(value) in tables
                tables.add(id(value))
                yield f"{index}.{key}", value.clone() if shared else torch.as_tensor(value)

    def load_moments(self, moments: Tensors) -> None:
        """See `Update`. Counts of steps become whole numbers again where they were: torch's own are not."""
        entries: dict[int, dict[str, torch.Tensor | int]] = {}
        trained = list(self.parameters.values())
        for name, value in moments.items():
            index, key = name.split(".", 1)
            entry, like = entries.setdefault(int(index), {}), trained[int(index)]
            if value.ndim == 0 and not value.is_floating_point():
                entry[key] = int(value)
            else:
                entry[key] = spread_like(value, like) if value.shape == like.shape else value
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": entries})

    def load_weights(self, weights: Tensors) -> None:
        """See `Update`."""
        for name, value in weights.items():
            local(self.parameters[name]).copy_(local(spread_like(value, self.parameters[name])))

    def notice_weights(self) -> None:
        """See `Update`: there is nothing to do."""

    def finish(self) -> None:
        """See `Update`."""
        self._accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # gives the model its own forward back
        self._structure.restore()
