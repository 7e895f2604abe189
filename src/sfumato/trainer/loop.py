"""The one training loop: passes, checkpoints, resume and logging, on accelerate.

A job is an objective, `Objective`, which turns ``(step, shard)`` into losses. Data, noise and times come from
`sfumato.randomness`, so the loop has nothing random of its own: a run that was killed resumes to the same bits on the
CPU, and the result does not depend on how many processes share a batch, or spread the weights among them. What an
objective carries from step to step (a discriminator, the last attack) it shows as tensors, and the checkpoints keep
them: `StatefulObjective`. One whose terms have a gradient each, that are not simply added, is a `SurgicalObjective`.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sfumato import storage
from sfumato.attention import attention, check_attention
from sfumato.progress import Track
from sfumato.sharding import local, locals_of, spread_like, trained_parameters
from sfumato.trainer import checkpoints
from sfumato.trainer.config import FREE_SETTINGS, TrainingConfig
from sfumato.trainer.devices import make_accelerator
from sfumato.trainer.objective import Objective, Shard, StatefulObjective
from sfumato.trainer.optimizers import check_optimizer
from sfumato.trainer.update import GradientUpdate, Update
from sfumato.trainer.zero import ZeroUpdate

__all__ = ["NonFiniteLossError", "checkpoint_space", "preflight", "train"]

logger = logging.getLogger(__name__)

_SCALE = {"grad_scaler.scale": "scale", "grad_scaler.growth_tracker": "_growth_tracker"}
"""Names in a checkpoint, and in the state of torch's scaler."""


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
    parameters = trained_parameters(model)
    if not parameters:
        raise ValueError("No parameter requires a gradient, so there is nothing to train.")
    half = [name for name, p in parameters.items() if p.dtype != torch.float32]
    if half:
        dtype = parameters[half[0]].dtype
        raise ValueError(f"Trained weights must be float32, {half[0]} is {dtype}; use model.float().")
    check_attention(config.attention, model, accelerator.device)
    check_optimizer(config.optimizer, accelerator)
    shards = accelerator.num_processes * config.gradient_accumulation_steps
    if batch_size % shards:
        raise ValueError(
            f"A batch of {batch_size} can't be shared equally by {accelerator.num_processes} processes x "
            f"{config.gradient_accumulation_steps} accumulation steps; use a multiple of {shards}."
        )
    training = {name: value for name, value in asdict(config).items() if name not in FREE_SETTINGS}
    full = json.loads(json.dumps({**(identity or {}), "training": training, "batch_size": batch_size}))
    if output_dir is not None:
        storage.check_disk_space(output_dir, checkpoint_space(model, config))
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


def checkpoint_space(model: torch.nn.Module, config: TrainingConfig) -> int:
    """Give the bytes that the checkpoints of a run need at the most, one of them being written.

    Args:
        model: The network, with the parameters that are trained requiring gradients.
        config: How to train it.

    Returns:
        Those of weights, two moments and the average, if there is one; what an objective carries comes on top.
    """
    size = sum(4 * parameter.numel() for parameter in trained_parameters(model).values())
    return (3 + (config.ema_decay is not None)) * size * (config.keep_checkpoints + 1)


def _state_of(objective: Objective) -> Mapping[str, torch.Tensor]:
    return objective.state() if isinstance(objective, StatefulObjective) else {}


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
        how = GradientUpdate if accelerator.deepspeed_plugin is None else ZeroUpdate
        self.update: Update = how(model, objective, config, accelerator, masks, restore_masked)
        self.parameters = self.update.parameters
        keeps = config.ema_decay is not None
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()} if keeps else {}

    @property
    def _shards(self) -> list[Shard]:
        """This process's slices of a batch, one for each pass."""
        passes, processes = self.config.gradient_accumulation_steps, self.accelerator.num_processes
        return [Shard(k * processes + self.accelerator.process_index, passes * processes) for k in range(passes)]

    def step(self, step: int) -> dict[str, float]:
        """Step over the global batch; the weights do not change if the loss is not finite."""
        shards, sums = self._shards, dict[str, torch.Tensor]()
        for shard in shards:
            with self.update.passing(last=shard is shards[-1]):
                terms = self._terms(step, shard)
                self.update.add({name: term / len(shards) for name, term in terms.items()})
            for name, term in {**terms, "loss": _total(terms)}.items():
                sums[name] = sums.get(name, 0) + term.detach() / len(shards)
        means = self.accelerator.reduce(torch.stack(list(sums.values())), "mean").tolist()
        rate = self.config.learning_rate_at(step)
        row = {"step": float(step), **dict(zip(sums, means, strict=True)), "learning_rate": rate}
        if not all(math.isfinite(value) for value in means):
            self.update.discard()
            raise _diverged(f"The loss became {row['loss']} at step {step}")
        norm = self.update.step(rate)
        if self.config.mixed_precision != "fp16" and not math.isfinite(norm):  # fp16's scaler skips these
            raise _diverged(f"The gradient became {norm} at step {step}")
        if isinstance(self.objective, StatefulObjective):
            self.objective.after_step(self.update.model, step, shards)
            self.update.notice_weights()
        self._move_average(step)
        return row

    def _terms(self, step: int, shard: Shard) -> dict[str, torch.Tensor]:
        with self.accelerator.autocast():
            terms = self.objective.losses(self.update.model, step, shard)
        return {name: term.float() for name, term in terms.items()}

    def _move_average(self, step: int) -> None:
        """Move the average towards the weights, faster while the run is young."""
        if self.average:
            decay = min(self.config.ema_decay or 0.0, (2 + step) / (11 + step))
            average, weights = (list(locals_of(tensors).values()) for tensors in (self.average, self.parameters))
            torch._foreach_lerp_(average, weights, 1 - decay)

    @torch.no_grad()
    def check_health(self, step: int) -> None:
        """Refuse weights that are about to be saved if an update has ruined them: they or their loss not finite."""
        total = _total(self._terms(step, self._shards[0]))
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
            folder, steps, identity=identity, weights=self.parameters, moments=self.update.moments(),
            average=self.average, state={**_state_of(self.objective), **self._scale()}, history=history,
            keep=self.config.keep_checkpoints, processes=self.accelerator.num_processes,
            write=self.accelerator.is_main_process,
        )  # fmt: skip

    def restore(self, checkpoint: Path) -> tuple[int, list[dict[str, float]]]:
        """Read a checkpoint; gives the step to go on from, and the history so far."""
        stored = checkpoints.load(checkpoint, {name: values.shape for name, values in self.parameters.items()})
        self.update.load_weights(stored.weights)
        self.update.load_moments(stored.moments)
        for name, value in stored.average.items():
            local(self.average[name]).copy_(local(spread_like(value, self.average[name])))
        state, scaler = _state_of(self.objective), self.accelerator.scaler
        for name in set(stored.state) - _SCALE.keys():
            local(state[name]).copy_(stored.state[name])
        if scaler is not None and _SCALE.keys() <= stored.state.keys():
            scale = {key: stored.state[name].item() for name, key in _SCALE.items()}
            scaler.load_state_dict({**scaler.state_dict(), **scale})
        return stored.step, stored.history

    def _scale(self) -> dict[str, torch.Tensor]:
        """What fp16 multiplies the loss by, and since how many steps that has gone well."""
        kept = {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
        return {name: torch.tensor(kept[key]) for name, key in _SCALE.items() if key in kept}

    def finish(self) -> None:
        """Leave the average, if there is one, in the weights, and the model as it came; all processes must call it."""
        for name, value in self.average.items():
            local(self.parameters[name]).copy_(local(value))
        self.update.finish()
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:  # not `end_training`, which ends the process group
            tracker.finish()


def _total(terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(terms.values())).sum()


def _diverged(what: str) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"{what}; stopped, and nothing of it was saved: the last checkpoint, if there is one, is from before. Try a "
        "smaller learning rate, max_grad_norm=1, or mixed_precision='no'."
    )
