"""The one training loop: devices, precision, accumulation, masks, checkpoints, resume and logging, on accelerate.

A job is an objective, `Objective`, which turns ``(step, shard)`` into losses. Data, noise and times come from
`sfumato.randomness`, so the loop has nothing random of its own: a run that was killed resumes to the same bits on the
CPU, and the result does not depend on how many processes share a batch, or spread the weights among them with FSDP2
(`sfumato.sharding`). What an objective carries from step to step
(a discriminator, the last attack) it shows as tensors, and the checkpoints keep them: `StatefulObjective`. One whose
terms have a gradient each, that are not simply added, is a `SurgicalObjective`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
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
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ProjectConfiguration

from sfumato import checkpoints, storage
from sfumato.attention import ATTENTION, attention, check_attention
from sfumato.masked_update import MaskedUpdate, zero_where
from sfumato.progress import Track
from sfumato.settings import check_seed, check_types
from sfumato.sharding import Structure, blocks_of, is_spread, local, locals_of, named_parameters, spread_like, whole

__all__ = [
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

logger = logging.getLogger(__name__)

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
        optimizer: ``"adam"``, ``"adamw"`` or ``"sgd"``; ``"adam8bit"`` and ``"adamw8bit"`` keep moments in 8 bits
            (bitsandbytes, on CUDA).
        weight_decay: Decoupled weight decay; ``"adamw"``, ``"adamw8bit"`` and ``"sgd"`` only.
        lr_schedule: ``"constant"`` or ``"cosine"`` (to zero at the last step).
        warmup_steps: Steps of linear warm-up.
        max_grad_norm: Clip the global gradient norm to this; None does not clip.
        gradient_accumulation_steps: Split each process's share of a batch into so many passes.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``; weights and optimiser stay float32.
        gradient_checkpointing: Recompute the denoiser's activations in the backward pass.
        attention: Who computes attention: ``"sdpa"`` (torch, by the kernel it chooses), its kernels ``"math"``,
            ``"flash"``, ``"efficient"`` or ``"cudnn"``, or ``"xformers"``.
        ema_decay: Keep an exponential moving average of the weights, which becomes the result; None keeps none.
        seed: Seeds the objective's data, noise and times.
        checkpoint_every: Steps between checkpoints; 0 keeps only the last.
        keep_checkpoints: How many checkpoints to keep.
        log_with: ``"tensorboard"`` or another accelerate tracker, or None.
    """

    steps: int = 1000
    learning_rate: float = 1e-5
    optimizer: str = field(default="adam", metadata={"choices": ["adam", "adamw", "sgd", "adam8bit", "adamw8bit"]})
    weight_decay: float = 0.0
    lr_schedule: str = field(default="constant", metadata={"choices": ["constant", "cosine"]})
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    gradient_accumulation_steps: int = 1
    mixed_precision: str = field(default="no", metadata={"choices": ["no", "bf16", "fp16"]})
    gradient_checkpointing: bool = False
    attention: str = field(default="sdpa", metadata={"choices": ATTENTION})
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
        if self.weight_decay and self.optimizer in ("adam", "adam8bit"):
            raise ValueError("`weight_decay` needs optimizer='adamw' or 'sgd': adam would mix it into the moments.")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(f"`max_grad_norm` must be above 0, or None for no clipping, got {self.max_grad_norm}.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must lie in [0, 1), or be None for no average, got {self.ema_decay}.")
        check_seed(self.seed)

    @property
    def largest_norm(self) -> float:
        """What the gradient's norm is clipped to; infinite if it is not."""
        return math.inf if self.max_grad_norm is None else self.max_grad_norm

    def learning_rate_at(self, step: int) -> float:
        """Give the learning rate of a step: a pure function, so resuming needs no scheduler state."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        decay = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.lr_schedule == "cosine" else 1.0
        return self.learning_rate * warm * decay


_LEAST = {
    "steps": 1, "weight_decay": 0, "warmup_steps": 0, "gradient_accumulation_steps": 1, "checkpoint_every": 0,
    "keep_checkpoints": 1,
}  # fmt: skip
_FREE = {
    "gradient_accumulation_steps", "gradient_checkpointing", "attention", "checkpoint_every", "keep_checkpoints",
    "log_with",
}  # fmt: skip
"""What a resumed run may change, for instance because memory did not suffice: it does not change the result."""
_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}
_EIGHT_BIT = {"adam8bit": "Adam8bit", "adamw8bit": "AdamW8bit"}


class NonFiniteLossError(RuntimeError):
    """The loss, its gradient or a weight became NaN or infinite; no such weights are saved."""


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
        model, objective.batch_size, config, accelerator=accelerator, output_dir=folder, identity=identity,
        resume=resume,
    )  # fmt: skip
    with attention(config.attention, model):
        run = _Run(model, objective, config, accelerator, masks or {}, restore_masked)
        checkpoint = checkpoints.newest(folder) if resume and folder else None
        start, history = run.restore(checkpoint) if checkpoint is not None else (0, list[dict[str, float]]())
        steps = Track(
            range(start, config.steps), description, shown=accelerator.is_main_process, start=start,
            rehearsed=slice(-3, -1),  # late, as an objective may do more then; but it prepares no step after the last
        )  # fmt: skip
        began = time.perf_counter()
        for step in steps:
            row = run.step(step)
            history.append({**row, "seconds": time.perf_counter() - began})
            steps.say(loss=f"{row['loss']:.4f}")
            if accelerator.trackers:
                accelerator.log({name: value for name, value in row.items() if name != "step"}, step=step)
            if step + 1 == config.steps or (config.checkpoint_every and (step + 1) % config.checkpoint_every == 0):
                run.check_health(step)
                if folder is not None:
                    run.save(folder, step + 1, run_identity, history)
                    if on_checkpoint is not None:
                        on_checkpoint()
        run.finish()
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
            float32, the attention or the optimiser does not work there, or the checkpoint to resume from is of
            another run.
        ImportError: If an optional package for them is missing.
        OSError: If the checkpoints would not fit on the disk.
    """
    parameters = _trained(model)
    if not parameters:
        raise ValueError("No parameter requires a gradient, so there is nothing to train.")
    half = [name for name, p in parameters.items() if p.dtype != torch.float32]
    if half:
        dtype = parameters[half[0]].dtype
        raise ValueError(f"Trained weights must be float32, {half[0]} is {dtype}; use model.float().")
    check_attention(config.attention, model, accelerator.device)
    if config.optimizer in _EIGHT_BIT:
        _check_eight_bits(accelerator)
    shards = accelerator.num_processes * config.gradient_accumulation_steps
    if batch_size % shards:
        raise ValueError(
            f"A batch of {batch_size} can't be shared equally by {accelerator.num_processes} processes x "
            f"{config.gradient_accumulation_steps} accumulation steps; use a multiple of {shards}."
        )
    training = {name: value for name, value in asdict(config).items() if name not in _FREE}
    full = json.loads(json.dumps({**(identity or {}), "training": training, "batch_size": batch_size}))
    if output_dir is not None:
        size = sum(4 * p.numel() for p in parameters.values())
        copies = 3 + (config.ema_decay is not None)  # weights, two moments, average
        storage.check_disk_space(output_dir, copies * size * (config.keep_checkpoints + 1))
        checkpoint = checkpoints.newest(output_dir) if resume else None
        if checkpoint is not None:
            checkpoints.check_same_run(checkpoint, full)
            earlier = checkpoints.processes_of(checkpoint)
            if earlier != accelerator.num_processes and accelerator.is_main_process:
                logger.warning(
                    f"{checkpoint} is of a run of {earlier} processes, now there are {accelerator.num_processes}: the "
                    "result will be the same but for rounding."
                )
    return full


def _check_eight_bits(accelerator: Accelerator) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("An 8-bit optimizer needs bitsandbytes: pip install bitsandbytes.")
    if accelerator.device.type != "cuda" or accelerator.is_fsdp2:
        where = "weights that FSDP2 spreads" if accelerator.is_fsdp2 else str(accelerator.device)
        raise ValueError(f"An 8-bit optimizer works on a CUDA device with whole weights, not on {where}: use 'adam'.")


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

    Raises:
        ValueError: If there are more processes than accelerators, trackers have nowhere to write, or the launcher asks
            for FSDP in its first version.
    """
    if config.log_with and output_dir is None:
        raise ValueError(f"log_with={config.log_with!r} needs an output folder for its logs.")
    if config.log_with and config.log_with not in {str(tracker) for tracker in get_available_trackers()}:
        raise ImportError(f"log_with={config.log_with!r} needs a package that is not installed, or is no tracker.")
    _check_devices()
    AcceleratorState._reset_state()  # else the precision of an earlier call in this process could not be left
    project = ProjectConfiguration(logging_dir=str(Path(output_dir) / "logs")) if output_dir else None
    accelerator = Accelerator(mixed_precision=config.mixed_precision, log_with=config.log_with, project_config=project)
    _spread_on_cpus(accelerator)
    if config.log_with:
        plain = {k: v for k, v in asdict(config).items() if isinstance(v, int | float | str | bool)}
        accelerator.init_trackers("sfumato", config=plain)
    return accelerator


def _check_devices() -> None:
    """Refuse more processes than there are accelerators, of which CUDA would only say that a number is invalid."""
    here, place = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if here and place >= here and os.environ.get("ACCELERATE_USE_CPU") != "true":
        raise ValueError(
            f"This machine has {here} CUDA devices, fewer than the {os.environ.get('LOCAL_WORLD_SIZE', place + 1)} "
            f"processes that were started on it: launch with --num_processes {here}, or with another config."
        )


def _spread_on_cpus(accelerator: Accelerator) -> None:
    """Let FSDP2 spread weights over processes without an accelerator too, as its launcher asked: not in accelerate."""
    asked = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if asked and accelerator.device.type == "cpu" and accelerator.num_processes > 1:
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("Weights are spread by FSDP2 only: set fsdp_version: 2 in accelerate's config.")


def _make_optimizer(
    parameters: Mapping[str, torch.nn.Parameter], config: TrainingConfig, *, spread: bool
) -> torch.optim.Optimizer:
    options: dict[str, Any] = {} if config.optimizer in ("adam", "adam8bit") else {"weight_decay": config.weight_decay}
    if config.optimizer in _EIGHT_BIT:
        bitsandbytes = importlib.import_module("bitsandbytes")
        return getattr(bitsandbytes.optim, _EIGHT_BIT[config.optimizer])(
            list(parameters.values()), lr=config.learning_rate, **options
        )
    fits = not (spread and config.optimizer == "sgd")  # torch has no fused SGD for weights that are spread
    options["fused"] = fits and all(parameter.device.type in ("cpu", "cuda") for parameter in parameters.values())
    return _OPTIMIZERS[config.optimizer](list(parameters.values()), lr=config.learning_rate, **options)


class _Run:
    """A model on its devices, with what changes as it trains.

    Args:
        model: The network.
        objective: What to minimise.
        config: How.
        accelerator: The process group.
        masks: Parameter name to `bool` mask.
        restore_masked: See `MaskedUpdate`.
    """

    def __init__(
        self, model: torch.nn.Module, objective: Objective, config: TrainingConfig, accelerator: Accelerator,
        masks: Mapping[str, torch.Tensor], restore_masked: bool,
    ) -> None:  # fmt: skip
        self.objective, self.config, self.accelerator = objective, config, accelerator
        if config.gradient_checkpointing and hasattr(model, "enable_gradient_checkpointing"):
            model.enable_gradient_checkpointing()  # type: ignore[operator]
        model.to(accelerator.device)
        self._structure = Structure(model)
        self._optimizer = _make_optimizer(_trained(model), config, spread=accelerator.is_fsdp2)
        if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap is None:
            accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = blocks_of(model)  # accelerate wants all
        self.model, self.optimizer = accelerator.prepare(model, self._optimizer)
        self.parameters = _trained(model)  # FSDP2 has put others in their places
        movable = {self.parameters[name]: mask for name, mask in masks.items()}
        self.outside = MaskedUpdate(self._optimizer, movable, restore_masked).outside if movable else {}
        keeps = config.ema_decay is not None
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()} if keeps else {}

    @property
    def _shards(self) -> list[Shard]:
        """This process's slices of a batch, one for each pass."""
        passes, processes = self.config.gradient_accumulation_steps, self.accelerator.num_processes
        return [Shard(k * processes + self.accelerator.process_index, passes * processes) for k in range(passes)]

    def step(self, step: int) -> dict[str, float]:
        """Step over the global batch; the weights do not change if the loss is not finite."""
        config, accelerator, shards = self.config, self.accelerator, self._shards
        surgeon = _Surgeon(self) if isinstance(self.objective, SurgicalObjective) else None
        sums: dict[str, torch.Tensor] = {}
        for number, shard in enumerate(shards):
            apart = number < len(shards) - 1 if surgeon is None else not surgeon.spread
            with accelerator.no_sync(self.model) if apart else nullcontext():
                with accelerator.autocast():
                    terms = self.objective.losses(self.model, step, shard)
                total = torch.stack([term.float() for term in terms.values()]).sum()
                if surgeon is None:
                    accelerator.backward(total / len(shards))
                else:
                    surgeon.add({name: term / len(shards) for name, term in terms.items()})
            for name, term in {**terms, "loss": total}.items():
                sums[name] = sums.get(name, 0) + term.detach().float() / len(shards)
        means = accelerator.reduce(torch.stack(list(sums.values())), "mean").tolist()
        rate = config.learning_rate_at(step)
        row = {"step": float(step), **dict(zip(sums, means, strict=True)), "learning_rate": rate}
        if not all(math.isfinite(value) for value in means):
            self.optimizer.zero_grad()
            raise _diverged(f"The loss became {row['loss']} at step {step}")
        length = self._clip() if surgeon is None else surgeon.operate()
        if config.mixed_precision != "fp16" and not math.isfinite(length):  # fp16's scaler skips these
            self.optimizer.zero_grad()
            raise _diverged(f"The gradient became {length} at step {step}")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if isinstance(self.objective, StatefulObjective):
            self.objective.after_step(self.model, step, shards)
        self._move_average(step)
        return row

    def _clip(self) -> float:
        """Clip the gradient of what may move; gives the norm that it had."""
        for parameter, outside in self.outside.items():
            if parameter.grad is not None:
                zero_where(local(parameter.grad), outside)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.largest_norm)
        return 0.0 if norm is None else float(whole(torch.as_tensor(norm)))

    def _move_average(self, step: int) -> None:
        """Move the average towards the weights, faster while the run is young."""
        if self.average:
            decay = min(self.config.ema_decay or 0.0, (2 + step) / (11 + step))
            average, weights = (list(locals_of(tensors).values()) for tensors in (self.average, self.parameters))
            torch._foreach_lerp_(average, weights, 1 - decay)

    @torch.no_grad()
    def check_health(self, step: int) -> None:
        """Refuse weights that are about to be saved if an update has ruined them: they or their loss not finite."""
        with self.accelerator.autocast():
            terms = self.objective.losses(self.model, step, self._shards[0])
        total = torch.stack([term.float() for term in terms.values()]).sum()
        weights = [*self.parameters.values(), *self.average.values()]
        sound = torch.stack([torch.isfinite(local(weight)).all() for weight in weights]).all()
        loss, share = self.accelerator.reduce(torch.stack([total, sound.to(total)]), "mean").tolist()
        if share < 1:
            raise _diverged(f"The update of step {step} left weights that are NaN or infinite")
        if not math.isfinite(loss):
            raise _diverged(f"The weights of step {step} give a loss of {loss}")

    def save(self, folder: Path, steps: int, identity: Mapping[str, Any], history: list[dict[str, float]]) -> None:
        """Write a checkpoint after so many steps; all processes must call it."""
        checkpoints.save(
            folder, steps, identity=identity, weights=self.parameters, optimizer=self._optimizer,
            average=self.average, state=_state_of(self.objective), history=history, keep=self.config.keep_checkpoints,
            processes=self.accelerator.num_processes, write=self.accelerator.is_main_process,
        )  # fmt: skip

    def restore(self, checkpoint: Path) -> tuple[int, list[dict[str, float]]]:
        """Read a checkpoint; gives the step to go on from, and the history so far."""
        return checkpoints.restore(
            checkpoint, weights=self.parameters, optimizer=self._optimizer, average=self.average,
            state=_state_of(self.objective),
        )  # fmt: skip

    def finish(self) -> None:
        """Leave the average, if there is one, in the weights, and the model as it came; all processes must call it."""
        for name, value in self.average.items():
            local(self.parameters[name]).copy_(local(value))
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # gives the model its own forward back
        self._structure.restore()
        self.accelerator.wait_for_everyone()
        if self.accelerator.trackers:
            self.accelerator.end_training()


class _Surgeon:
    """The gradients of an objective's terms, apart until the objective makes one of them.

    Each is added up over the passes and averaged over the processes first: a combination of averages, not an average
    of combinations, so the number of processes does not change the result. Gradients of weights that are spread over
    processes are put together, so that the objective sees the same there.
    """

    def __init__(self, run: _Run) -> None:
        if run.config.mixed_precision == "fp16":
            raise ValueError("Gradient surgery needs true gradients, which mixed_precision='fp16' scales: use bf16.")
        self.accelerator, self.parameters, self.outside = run.accelerator, list(run.parameters.values()), run.outside
        self.objective: Any = run.objective
        self.limit, self.spread = run.config.largest_norm, is_spread(run.model)
        self.gradients: dict[str, list[torch.Tensor]] = {}

    def add(self, terms: Mapping[str, torch.Tensor]) -> None:
        """Add the gradients of a pass; the terms share a graph."""
        for name, term in terms.items():
            parts = self._gradient_of(term.float())
            for parameter, part in zip(self.parameters, parts, strict=True):
                if parameter in self.outside:  # what can't move has no say in the surgery
                    zero_where(local(part), self.outside[parameter])
            if self.spread:
                parts = [whole(part) for part in parts]
            earlier = self.gradients.get(name)
            self.gradients[name] = parts if earlier is None else list(torch._foreach_add(earlier, parts))

    def _gradient_of(self, term: torch.Tensor) -> list[torch.Tensor]:
        """The gradient of this process's share of a batch, or, as FSDP2 gives it, of all shares."""
        found: Sequence[torch.Tensor | None]
        if not self.spread:
            found = torch.autograd.grad(term, self.parameters, retain_graph=True, allow_unused=True)
        else:
            self.accelerator.backward(term, retain_graph=True)
            found = [parameter.grad for parameter in self.parameters]
            for parameter in self.parameters:
                parameter.grad = None
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]

    def operate(self) -> float:
        """Combine the gradients into `.grad`; gives the norm of the result."""
        for name, parts in self.gradients.items():
            reduced = parts if self.spread else [self.accelerator.reduce(part, "mean") for part in parts]
            norm = torch.nn.utils.get_total_norm(reduced)
            self.gradients[name] = list(
                torch._foreach_mul(reduced, (self.limit / (norm + 1e-6)).clamp(max=1.0).item())
            )
        combined = self.objective.combine(self.gradients)
        for parameter, gradient in zip(self.parameters, combined, strict=True):
            # laid out as its weight is: fused optimisers on the CPU go through memory, whatever the strides
            parameter.grad = torch.empty_like(parameter)
            local(parameter.grad).copy_(local(spread_like(gradient, parameter)))
        return torch.nn.utils.get_total_norm(combined).item()


def _diverged(what: str) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"{what}; stopped, and nothing of it was saved: the last checkpoint, if there is one, is from before. Try a "
        "smaller learning rate, max_grad_norm=1, or mixed_precision='no'."
    )
