"""The one training loop: devices, precision, accumulation, masks, checkpoints, resume and logging, on accelerate.

A job is an objective, `Objective`, which turns ``(step, shard)`` into losses. Data, noise and times come from
`sfumato.randomness`, so the loop has nothing random of its own: a run that was killed resumes to the same bits on the
CPU, and the result does not depend on how many processes share a batch, or spread the weights among them with FSDP2
(`sfumato.sharding`). What an objective carries from step to step
(a discriminator, the last attack) it shows as tensors, and the checkpoints keep them: `StatefulObjective`. One whose
terms have a gradient each, that are not simply added, is a `SurgicalObjective`.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ProjectConfiguration
from tqdm.auto import tqdm

from sfumato import checkpoints, storage
from sfumato.settings import check_seed, check_types
from sfumato.sharding import Structure, blocks_of, is_spread, local, locals_of, named_parameters, spread_like, whole

__all__ = [
    "MaskedUpdate",
    "NonFiniteLossError",
    "Objective",
    "Shard",
    "StatefulObjective",
    "SurgicalObjective",
    "TrainingConfig",
    "make_accelerator",
    "preflight",
    "train",
]

_STRETCH = 1 << 17
LARGEST_LEARNING_RATE = 1e36  # Adam divides it by 0.1 at first, and float32 ends at 3.4e38


@dataclass(frozen=True)
class Shard:
    """One of `count` equal slices of a global batch."""

    index: int
    count: int

    def of(self, size: int) -> range:
        """Give this shard's positions in a batch of `size` samples, which `count` must divide."""
        share = size // self.count
        return range(self.index * share, (self.index + 1) * share)


class Objective(Protocol):
    """What a method minimises; all that the loop knows of it."""

    batch_size: int

    def losses(self, model: torch.nn.Module, step: int, shard: Shard) -> Mapping[str, torch.Tensor]:
        """Give the named terms of the loss, scalars whose sum is minimised, averaged over the shard.

        Args:
            model: The network being trained, wrapped by accelerate.
            step: The optimiser step, from 0.
            shard: The slice of the step's global batch to use.
        """
        ...


@runtime_checkable
class StatefulObjective(Protocol):
    """An objective that changes with the steps; `losses` itself must not change it."""

    def after_step(self, model: torch.nn.Module, step: int, shards: Sequence[Shard]) -> None:
        """Move on, once the optimiser has stepped.

        Args:
            model: The network being trained, wrapped by accelerate.
            step: The step just taken.
            shards: This process's slices of its batch, one for each accumulation pass.
        """
        ...

    def state(self) -> Mapping[str, torch.Tensor]:
        """Give all that changes, as tensors that are the state itself: resuming writes into them."""
        ...


@runtime_checkable
class SurgicalObjective(Protocol):
    """An objective that makes one gradient of those of its terms."""

    def combine(self, gradients: Mapping[str, list[torch.Tensor]]) -> list[torch.Tensor]:
        """Give the gradient to step with.

        Args:
            gradients: Term to its gradient over the whole batch, a tensor for each trained parameter, clipped to
                `max_grad_norm` each.
        """
        ...


@dataclass
class TrainingConfig:
    """How to train, whatever the objective.

    Attributes:
        steps: Optimiser steps.
        learning_rate: Peak learning rate.
        optimizer: ``"adam"``, ``"adamw"`` or ``"sgd"``.
        weight_decay: Decoupled weight decay; ``"adamw"`` and ``"sgd"`` only.
        lr_schedule: ``"constant"`` or ``"cosine"`` (to zero at the last step).
        warmup_steps: Steps of linear warm-up.
        max_grad_norm: Clip the global gradient norm to this; None does not clip.
        gradient_accumulation_steps: Split each process's share of a batch into so many passes.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``; weights and optimiser stay float32.
        gradient_checkpointing: Recompute the denoiser's activations in the backward pass.
        ema_decay: Keep an exponential moving average of the weights, which becomes the result; None keeps none.
        seed: Seeds the objective's data, noise and times.
        checkpoint_every: Steps between checkpoints; 0 keeps only the last.
        keep_checkpoints: How many checkpoints to keep.
        log_with: ``"tensorboard"`` or another accelerate tracker, or None.
    """

    steps: int = 1000
    learning_rate: float = 1e-5
    optimizer: str = field(default="adam", metadata={"choices": ["adam", "adamw", "sgd"]})
    weight_decay: float = 0.0
    lr_schedule: str = field(default="constant", metadata={"choices": ["constant", "cosine"]})
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    gradient_accumulation_steps: int = 1
    mixed_precision: str = field(default="no", metadata={"choices": ["no", "bf16", "fp16"]})
    gradient_checkpointing: bool = False
    ema_decay: float | None = None
    seed: int = 0
    checkpoint_every: int = 500
    keep_checkpoints: int = 1
    log_with: str | None = None

    def __post_init__(self) -> None:
        """Check values that would only fail after the long work has begun."""
        check_types(self)
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if not 0 < self.learning_rate <= LARGEST_LEARNING_RATE:
            raise ValueError(
                f"`learning_rate` must be a positive number of at most {LARGEST_LEARNING_RATE:g}, beyond which a step "
                f"overflows float32, got {self.learning_rate}."
            )
        if self.weight_decay and self.optimizer == "adam":
            raise ValueError("`weight_decay` needs optimizer='adamw' or 'sgd': adam would mix it into the moments.")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(f"`max_grad_norm` must be above 0, or None for no clipping, got {self.max_grad_norm}.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must lie in [0, 1), or be None for no average, got {self.ema_decay}.")
        check_seed(self.seed)

    def learning_rate_at(self, step: int) -> float:
        """Give the learning rate of a step: a pure function, so resuming needs no scheduler state."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        decay = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.lr_schedule == "cosine" else 1.0
        return self.learning_rate * warm * decay


_LEAST = {
    "steps": 1, "weight_decay": 0, "warmup_steps": 0, "gradient_accumulation_steps": 1, "checkpoint_every": 0,
    "keep_checkpoints": 1,
}  # fmt: skip
_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


class NonFiniteLossError(RuntimeError):
    """The loss, its gradient or a weight became NaN or infinite; no such weights are saved."""


class MaskedUpdate:
    """Keep masked-out weights bit-identical through any optimiser, by masking the update and not only the gradient.

    Gradients are masked before each step, so moments never learn of masked-out weights, and without weight decay and
    moments from elsewhere their update is an exact zero. Otherwise they are put back after each step; then only the
    masked-out values are kept, not a second copy of the model.

    Args:
        optimizer: The optimiser whose parameters are masked.
        masks: Parameter to `bool` tensor of its shape; False is frozen. Parameters without a mask train freely.
        restore: False masks the gradients alone: what else the optimiser does, as weight decay, moves every weight.

    Attributes:
        outside: Parameter to a `bool` tensor, True where it must not move, of what this process holds of it.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        masks: Mapping[torch.nn.Parameter, torch.Tensor],
        restore: bool = True,
    ) -> None:
        self.outside = {parameter: ~local(spread_like(mask, parameter)) for parameter, mask in masks.items()}
        optimizer.register_step_pre_hook(self._mask_gradients)
        if restore and (optimizer.state or any(group["weight_decay"] for group in optimizer.param_groups)):
            self._frozen = {parameter: local(parameter)[out].clone() for parameter, out in self.outside.items()}
            optimizer.register_step_post_hook(self._restore)

    def _mask_gradients(self, *_: Any) -> None:
        for parameter, outside in self.outside.items():
            if parameter.grad is not None:
                _zero(local(parameter.grad), outside)

    @torch.no_grad()
    def _restore(self, *_: Any) -> None:
        for parameter, outside in self.outside.items():
            local(parameter).masked_scatter_(outside, self._frozen[parameter])


@torch.no_grad()
def _zero(values: torch.Tensor, where: torch.Tensor) -> None:
    """Set values to zero, in place, where a `bool` tensor says so.

    On the CPU by their bit patterns, a stretch that the cache holds at a time: there `masked_fill_` branches at every
    entry, which for a mask without a pattern takes ten times as long.
    """
    if values.device.type != "cpu" or values.dtype != torch.float32 or not values.is_contiguous():
        values.masked_fill_(where, 0)
        return
    bits, flags = values.view(-1).view(torch.int32), where.reshape(-1).view(torch.int8)
    scratch = torch.empty(min(_STRETCH, bits.numel()), dtype=torch.int32)
    for some, chosen in zip(bits.split(_STRETCH), flags.split(_STRETCH), strict=True):
        kept = scratch[: len(some)].copy_(chosen).sub_(1)  # all bits where it is kept, none where not
        some.bitwise_and_(kept)


def train(
    model: torch.nn.Module,
    objective: Objective,
    config: TrainingConfig,
    *,
    output_dir: str | Path | None = None,
    masks: Mapping[str, torch.Tensor] | None = None,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    accelerator: Accelerator | None = None,
    description: str = "train",
    on_checkpoint: Callable[[], None] | None = None,
    restore_masked: bool = True,
) -> list[dict[str, float]]:
    """Train the parameters of a model that require gradients, in place.

    Args:
        model: The network; its trained parameters must be float32.
        objective: What to minimise.
        config: How.
        output_dir: Where checkpoints and tracker logs go; None writes nothing.
        masks: Parameter name to `bool` mask; False entries keep their bits. See `MaskedUpdate`.
        resume: Continue from the newest checkpoint in `output_dir`; from the start if there is none.
        identity: What makes this run this run (base model, concept, method); a checkpoint with another is refused.
        accelerator: The process group to use; made from `config` if None.
        description: The progress bar's label.
        on_checkpoint: Called on every process after each checkpoint.
        restore_masked: Hold masked weights through whatever the optimiser does; see `MaskedUpdate`.

    Returns:
        One row a step: ``step``, ``loss``, each named term, ``learning_rate``, ``seconds`` since the start.

    Raises:
        NonFiniteLossError: If the loss or its gradient is NaN or infinite at a step, or a weight, or the loss once
            more, when a checkpoint is due. The weights of every checkpoint that is kept are finite, as is their loss.
        ValueError: If the batch can't be shared equally, or the checkpoint is of another run.
        OSError: If the checkpoints would not fit on the disk.
    """
    accelerator = accelerator or make_accelerator(config, output_dir)
    folder = Path(output_dir) if output_dir is not None else None
    run_identity = preflight(
        model,
        objective.batch_size,
        config,
        accelerator=accelerator,
        output_dir=folder,
        identity=identity,
        resume=resume,
    )
    if config.gradient_checkpointing and hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing()  # type: ignore[operator]
    model.to(accelerator.device)
    structure, optimizer = Structure(model), _make_optimizer(_trained(model), config)
    if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap is None:
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = blocks_of(model)  # accelerate wants all of them
    wrapped, prepared = accelerator.prepare(model, optimizer)
    parameters = _trained(model)  # FSDP2 has put others in their places
    movable = {parameters[name]: mask for name, mask in (masks or {}).items()}
    outside = MaskedUpdate(optimizer, movable, restore_masked).outside if movable else {}
    average = {n: p.detach().clone() for n, p in parameters.items()} if config.ema_decay is not None else {}
    start, history = 0, list[dict[str, float]]()
    checkpoint = checkpoints.newest(folder) if resume and folder else None
    if checkpoint is not None:
        start, history = checkpoints.restore(
            checkpoint, weights=parameters, optimizer=optimizer, average=average, state=_state_of(objective)
        )
    bar = tqdm(
        range(start, config.steps), desc=description, initial=start, total=config.steps,
        disable=not accelerator.is_main_process,
    )  # fmt: skip
    began = time.perf_counter()
    for step in bar:
        row = _step(wrapped, prepared, objective, config, accelerator, step, parameters, outside)
        _move_average(average, parameters, config, step)
        history.append({**row, "seconds": time.perf_counter() - began})
        bar.set_postfix(loss=f"{row['loss']:.4f}")
        if accelerator.trackers:
            accelerator.log({name: value for name, value in row.items() if name != "step"}, step=step)
        due = step + 1 == config.steps or (config.checkpoint_every and (step + 1) % config.checkpoint_every == 0)
        if due:
            _check_health(wrapped, objective, config, accelerator, step, [*parameters.values(), *average.values()])
        if due and folder is not None:
            checkpoints.save(
                folder, step + 1, identity=run_identity, weights=parameters, optimizer=optimizer, average=average,
                state=_state_of(objective), history=history, keep=config.keep_checkpoints,
                write=accelerator.is_main_process,
            )  # fmt: skip
        if due and folder is not None and on_checkpoint is not None:
            on_checkpoint()
    for name, value in average.items():
        local(parameters[name]).copy_(local(value))
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # gives the model its own forward back
    structure.restore()
    accelerator.wait_for_everyone()
    if accelerator.trackers:
        accelerator.end_training()
    return history


def preflight(
    model: torch.nn.Module,
    batch_size: int,
    config: TrainingConfig,
    *,
    accelerator: Accelerator,
    output_dir: Path | None,
    identity: Mapping[str, Any] | None,
    resume: bool,
) -> dict[str, Any]:
    """Check all that would make `train` fail, so that a job can know before its long work.

    Args:
        model: As for `train`.
        batch_size: The objective's.
        config: As for `train`, like the rest.
        accelerator: The process group.
        output_dir: Where checkpoints go.
        identity: What makes this run this run.
        resume: Whether it will be resumed.

    Returns:
        The identity that checkpoints store: the one given, with the settings of the training.

    Raises:
        ValueError: If the batch can't be shared equally, there is nothing to train, the trained weights are not
            float32, or the checkpoint to resume from is of another run.
        OSError: If the checkpoints would not fit on the disk.
    """
    parameters = _trained(model)
    if not parameters:
        raise ValueError("No parameter requires a gradient, so there is nothing to train.")
    half = [name for name, p in parameters.items() if p.dtype != torch.float32]
    if half:
        dtype = parameters[half[0]].dtype
        raise ValueError(f"Trained weights must be float32, {half[0]} is {dtype}; use model.float().")
    shards = accelerator.num_processes * config.gradient_accumulation_steps
    if batch_size % shards:
        raise ValueError(
            f"A batch of {batch_size} can't be shared equally by {accelerator.num_processes} processes x "
            f"{config.gradient_accumulation_steps} accumulation steps; use a multiple of {shards}."
        )
    full = json.loads(json.dumps({**(identity or {}), "training": asdict(config), "batch_size": batch_size}))
    if output_dir is not None:
        size = sum(4 * p.numel() for p in parameters.values())
        copies = 3 + (config.ema_decay is not None)  # weights, two moments, average
        storage.check_disk_space(output_dir, copies * size * (config.keep_checkpoints + 1))
        checkpoint = checkpoints.newest(output_dir) if resume else None
        if checkpoint is not None:
            checkpoints.check_same_run(checkpoint, full)
    return full


def _state_of(objective: Objective) -> Mapping[str, torch.Tensor]:
    return objective.state() if isinstance(objective, StatefulObjective) else {}


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in named_parameters(model).items() if parameter.requires_grad}


def make_accelerator(config: TrainingConfig, output_dir: str | Path | None = None) -> Accelerator:
    """Make the process group that `train` runs on, from a config and, under ``accelerate launch``, its environment.

    Args:
        config: Gives precision and tracker.
        output_dir: Tracker logs go to ``output_dir/logs``.

    Returns:
        The accelerator, with its trackers started.
    """
    if config.log_with and output_dir is None:
        raise ValueError(f"log_with={config.log_with!r} needs an output folder for its logs.")
    AcceleratorState._reset_state()  # else the precision of an earlier call in this process could not be left
    project = ProjectConfiguration(logging_dir=str(Path(output_dir) / "logs")) if output_dir else None
    accelerator = Accelerator(mixed_precision=config.mixed_precision, log_with=config.log_with, project_config=project)
    _spread_on_cpus(accelerator)
    if config.log_with:
        plain = {k: v for k, v in asdict(config).items() if isinstance(v, int | float | str | bool)}
        accelerator.init_trackers("sfumato", config=plain)
    return accelerator


def _spread_on_cpus(accelerator: Accelerator) -> None:
    """Let FSDP2 spread weights over processes without an accelerator too, as its launcher asked: not in accelerate."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.distributed_type == DistributedType.MULTI_CPU:
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("Weights are spread by FSDP2 only: set fsdp_version: 2 in accelerate's config.")


def _make_optimizer(parameters: Mapping[str, torch.nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    options: dict[str, Any] = {} if config.optimizer == "adam" else {"weight_decay": config.weight_decay}
    options["fused"] = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters.values())
    return _OPTIMIZERS[config.optimizer](list(parameters.values()), lr=config.learning_rate, **options)


def _step(
    model: torch.nn.Module,
    optimizer: Any,
    objective: Objective,
    config: TrainingConfig,
    accelerator: Accelerator,
    step: int,
    parameters: Mapping[str, torch.nn.Parameter],
    outside: Mapping[torch.nn.Parameter, torch.Tensor],
) -> dict[str, float]:
    """One optimiser step over the global batch; the weights do not change if the loss is not finite."""
    passes = config.gradient_accumulation_steps
    shards = [
        Shard(number * accelerator.num_processes + accelerator.process_index, passes * accelerator.num_processes)
        for number in range(passes)
    ]
    surgeon = None
    if isinstance(objective, SurgicalObjective):
        surgeon = _Surgeon(model, objective, config, accelerator, list(parameters.values()), outside)
    sums: dict[str, torch.Tensor] = {}
    for number, shard in enumerate(shards):
        apart = number < passes - 1 if surgeon is None else not surgeon.spread
        with accelerator.no_sync(model) if apart else nullcontext():
            with accelerator.autocast():
                terms = objective.losses(model, step, shard)
            total = torch.stack([term.float() for term in terms.values()]).sum()
            if surgeon is None:
                accelerator.backward(total / passes)
            else:
                surgeon.add({name: term / passes for name, term in terms.items()})
        for name, term in {**terms, "loss": total}.items():
            sums[name] = sums.get(name, 0) + term.detach().float() / passes
    means = accelerator.reduce(torch.stack(list(sums.values())), "mean").tolist()
    row = {"step": float(step), **dict(zip(sums, means, strict=True)), "learning_rate": config.learning_rate_at(step)}
    if not all(math.isfinite(value) for value in means):
        optimizer.zero_grad()
        raise _diverged(f"The loss became {row['loss']} at step {step}")
    limit = math.inf if config.max_grad_norm is None else config.max_grad_norm
    norm = accelerator.clip_grad_norm_(model.parameters(), limit) if surgeon is None else surgeon.operate(limit)
    length = 0.0 if norm is None else float(whole(torch.as_tensor(norm)))
    if config.mixed_precision != "fp16" and not math.isfinite(length):  # fp16's scaler skips these
        optimizer.zero_grad()
        raise _diverged(f"The gradient became {length} at step {step}")
    for group in optimizer.param_groups:
        group["lr"] = row["learning_rate"]
    optimizer.step()
    optimizer.zero_grad()
    if isinstance(objective, StatefulObjective):
        objective.after_step(model, step, shards)
    return row


class _Surgeon:
    """The gradients of an objective's terms, apart until the objective makes one of them.

    Each is added up over the passes and averaged over the processes first: a combination of averages, not an average
    of combinations, so the number of processes does not change the result. Gradients of weights that are spread over
    processes are put together, so that the objective sees the same there.
    """

    def __init__(
        self, model: torch.nn.Module, objective: SurgicalObjective, config: TrainingConfig, accelerator: Accelerator,
        parameters: list[torch.nn.Parameter], outside: Mapping[torch.nn.Parameter, torch.Tensor],
    ) -> None:  # fmt: skip
        if config.mixed_precision == "fp16":
            raise ValueError("Gradient surgery needs true gradients, which mixed_precision='fp16' scales: use bf16.")
        self.objective, self.accelerator, self.parameters, self.outside = objective, accelerator, parameters, outside
        self.spread = is_spread(model)
        self.gradients: dict[str, list[torch.Tensor]] = {}

    def add(self, terms: Mapping[str, torch.Tensor]) -> None:
        """Add the gradients of a pass; the terms share a graph."""
        for name, term in terms.items():
            parts = self._gradient_of(term.float())
            for parameter, part in zip(self.parameters, parts, strict=True):
                if parameter in self.outside:  # what can't move has no say in the surgery
                    _zero(local(part), self.outside[parameter])
            if self.spread:
                parts = [whole(part) for part in parts]
            earlier = self.gradients.get(name)
            self.gradients[name] = parts if earlier is None else list(torch._foreach_add(earlier, parts))

    def _gradient_of(self, term: torch.Tensor) -> list[torch.Tensor]:
        """The gradient of this process's share of a batch, or, as FSDP2 gives it, of all shares."""
        if not self.spread:
            found = torch.autograd.grad(term, self.parameters, retain_graph=True, allow_unused=True)
        else:
            self.accelerator.backward(term, retain_graph=True)
            found = tuple(parameter.grad for parameter in self.parameters)
            for parameter in self.parameters:
                parameter.grad = None
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]

    def operate(self, limit: float) -> float:
        """Combine the gradients into `.grad`; gives the norm of the result."""
        for name, parts in self.gradients.items():
            reduced = parts if self.spread else [self.accelerator.reduce(part, "mean") for part in parts]
            norm = torch.nn.utils.get_total_norm(reduced)
            self.gradients[name] = list(torch._foreach_mul(reduced, (limit / (norm + 1e-6)).clamp(max=1.0).item()))
        combined = self.objective.combine(self.gradients)
        for parameter, gradient in zip(self.parameters, combined, strict=True):
            parameter.grad = spread_like(gradient, parameter)
        return torch.nn.utils.get_total_norm(combined).item()


@torch.no_grad()
def _check_health(
    model: torch.nn.Module,
    objective: Objective,
    config: TrainingConfig,
    accelerator: Accelerator,
    step: int,
    weights: Sequence[torch.Tensor],
) -> None:
    """Refuse weights that are about to be saved if an update has ruined them: they and their loss must be finite."""
    shards = accelerator.num_processes * config.gradient_accumulation_steps
    with accelerator.autocast():
        terms = objective.losses(model, step, Shard(accelerator.process_index, shards))
    total = torch.stack([term.float() for term in terms.values()]).sum()
    sound = torch.stack([torch.isfinite(local(weight)).all() for weight in weights]).all()
    loss, share = accelerator.reduce(torch.stack([total, sound.to(total)]), "mean").tolist()
    if share < 1:
        raise _diverged(f"The update of step {step} left weights that are NaN or infinite")
    if not math.isfinite(loss):
        raise _diverged(f"The weights of step {step} give a loss of {loss}")


def _diverged(what: str) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"{what}; stopped, and nothing of it was saved: the last checkpoint, if there is one, is from before. Try a "
        "smaller learning rate, max_grad_norm=1, or mixed_precision='no'."
    )


def _move_average(
    average: Mapping[str, torch.Tensor],
    parameters: Mapping[str, torch.nn.Parameter],
    config: TrainingConfig,
    step: int,
) -> None:
    """Move the average towards the weights, faster while the run is young."""
    if average:
        decay = min(config.ema_decay or 0.0, (2 + step) / (11 + step))
        current = locals_of(parameters)
        torch._foreach_lerp_(list(locals_of(average).values()), list(current.values()), 1 - decay)
