"""Steps with DeepSpeed's ZeRO, which spreads the optimiser's state (stage 1) and the gradients (stage 2).

[Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020, arXiv:1910.02054]
Every process has the whole weights, in float32, and a slice of their moments. DeepSpeed has hooks in the backward pass
that take the gradients away, so masks apply to them before, and what weight decay did is taken back after each step.
Precision is autocast's, as everywhere here: DeepSpeed's own would turn all weights into half precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedType

from sfumato.sharding import Structure, trained_parameters
from sfumato.trainer.config import TrainingConfig
from sfumato.trainer.masked_update import zero_where
from sfumato.trainer.objective import Objective, SurgicalObjective
from sfumato.trainer.optimizers import make_optimizer
from sfumato.trainer.surgery import check_surgery

__all__ = ["ZeroAccelerator", "ZeroUpdate"]

Tensors = Mapping[str, torch.Tensor]

_DTYPES = {"no": None, "bf16": torch.bfloat16}


class ZeroAccelerator(Accelerator):
    """A process group with DeepSpeed's engine, which leaves mixed precision to autocast.

    Args:
        precision: ``"no"`` or ``"bf16"``.
        **arguments: Of `Accelerator`.

    Raises:
        ValueError: If the precision needs a loss scaler, or the launcher asks for another stage than 1 or 2, or for
            DeepSpeed's own half precision.
    """

    def __init__(self, precision: str, **arguments: Any) -> None:
        if precision not in _DTYPES:
            raise ValueError(f"DeepSpeed trains with mixed_precision='no' or 'bf16' here, not {precision!r}.")
        super().__init__(mixed_precision="no", **arguments)
        self._dtype = _DTYPES[precision]
        if self.device.type == "cpu":
            _run_on_cpus()
        asked = self.deepspeed_plugin.deepspeed_config
        stage = asked["zero_optimization"]["stage"]
        if stage not in (1, 2):
            raise ValueError(
                f"DeepSpeed runs with zero_stage 1 or 2 here, not {stage}: to spread the weights too, use "
                "training/launch/fsdp2.yaml."
            )
        half = [name for name in ("bf16", "fp16") if asked.get(name, {}).get("enabled") is True]
        if half:
            raise ValueError(f"Leave {half[0]} out of DeepSpeed's config: precision is the job's --mixed_precision.")

    def autocast(self, *_: Any, **__: Any) -> AbstractContextManager[Any]:
        """Compute in the precision that was asked for."""
        return torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None)


def _run_on_cpus() -> None:
    """Let DeepSpeed spread over processes without an accelerator too, as its launcher asked: not in accelerate."""
    plugin = DeepSpeedPlugin()
    AcceleratorState._shared_state |= {"deepspeed_plugins": plugin, "distributed_type": DistributedType.DEEPSPEED}
    plugin.select(_from_accelerator_state=True)


class ZeroUpdate:
    """See `sfumato.trainer.update.Update`; gradients and moments are where DeepSpeed keeps them.

    Args:
        model: The network, changed in place.
        objective: What to minimise.
        config: How.
        accelerator: A `ZeroAccelerator`.
        masks: Parameter name to `bool` mask.
        restore_masked: See `MaskedUpdate`.

    Raises:
        ValueError: If the objective combines gradients by itself.
    """

    def __init__(
        self, model: torch.nn.Module, objective: Objective, config: TrainingConfig, accelerator: Accelerator,
        masks: Tensors, restore_masked: bool,
    ) -> None:  # fmt: skip
        if isinstance(objective, SurgicalObjective):
            check_surgery(config, accelerator)
        self._structure = Structure(model)
        accelerator.deepspeed_plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=1,  # for its log alone
            train_batch_size=accelerator.num_processes,
            gradient_accumulation_steps=1,  # passes are divided, and counted, by the loop
            gradient_clipping=config.max_grad_norm or 0.0,
            zero_force_ds_cpu_optimizer=False,  # torch's steps on the CPU too, where moments are left to it
        )
        optimizer = make_optimizer(list(trained_parameters(model).values()), config, spread=False)
        prepared: tuple[Any, Any] = accelerator.prepare(model, optimizer)
        self.model, self._engine = prepared[0], prepared[0]
        self._optimizer = self._engine.optimizer.optimizer
        self.parameters = trained_parameters(model)
        self._outside = {self.parameters[name]: ~mask.to(accelerator.device) for name, mask in masks.items()}
        self._hooks = [p.register_hook(partial(_masked, out)) for p, out in self._outside.items()]
        holds = restore_masked and config.weight_decay
        self._frozen = {p: p.detach()[out].clone() for p, out in self._outside.items()} if holds else {}

    def passing(self, *, last: bool) -> AbstractContextManager[None]:
        """See `Update`."""
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def add(self, terms: Tensors) -> None:
        """See `Update`."""
        self._engine.backward(torch.stack(list(terms.values())).sum())

    def step(self, learning_rate: float) -> float:
        """See `Update`. DeepSpeed knows the norm, and clips to it, within its step."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        for parameter, values in self._frozen.items():
            parameter.data.masked_scatter_(self._outside[parameter], values)
        return float(self._engine.get_global_grad_norm())

    def discard(self) -> None:
        """See `Update`."""
        self._engine.optimizer.zero_grad()

    def _states(self) -> dict[str, torch.Tensor]:
        """What the optimiser keeps of its only parameter, this process's slice of all."""
        return self._optimizer.state[self._optimizer.param_groups[0]["params"][0]]

    def moments(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Update`."""
        zero = import_module("deepspeed.utils")
        flat = self._optimizer.param_groups[0]["params"][0]
        for index, parameter in enumerate(self.parameters.values()):
            for key, value in self._states().items():
                if torch.is_tensor(value) and value.shape == flat.shape:
                    yield f"{index}.{key}", zero.safe_get_full_optimizer_state(parameter, key).cpu()
                elif value is not None:
                    yield f"{index}.{key}", torch.as_tensor(value).clone()

    def load_moments(self, moments: Tensors) -> None:
        """See `Update`."""
        flat, states = self._optimizer.param_groups[0]["params"][0], self._states()
        parameters = list(self.parameters.values())
        for name, value in moments.items():
            index, key = name.split(".", 1)
            parameter: Any = parameters[int(index)]
            if value.shape != parameter.shape or not parameter.shape:
                states[key] = value
                continue
            place = parameter._hp_mapping  # where the slice of this process has something of it, or None
            kept = states.setdefault(key, torch.zeros_like(flat))
            if place is not None:
                here, there = place.hp_fragment_address, place.lp_fragment_address
                kept.narrow(0, here.start, here.numel).copy_(value.reshape(-1).narrow(0, there.start, there.numel))

    def load_weights(self, weights: Tensors) -> None:
        """See `Update`."""
        for name, value in weights.items():
            self.parameters[name].data.copy_(value)
        self.notice_weights()

    def notice_weights(self) -> None:
        """See `Update`: the optimiser steps from a slice that is its own."""
        zero = import_module("deepspeed.utils")
        for parameter in self.parameters.values():
            zero.safe_set_full_fp32_param(parameter, parameter.detach())

    def finish(self) -> None:
        """See `Update`."""
        for hook in self._hooks:
            hook.remove()
        self._structure.restore()
        self._engine.destroy()


def _masked(outside: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Give a gradient without what it has outside a mask."""
    kept = gradient.clone()
    zero_where(kept, outside)
    return kept
