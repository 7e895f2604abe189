r"""Trajectories of the original model, walked once and used at every level: states with what the model says of them.

A guided DDIM run asks the denoiser twice at every level; a bank of runs keeps the answers that it needs anyway,

.. math::
    (z_t,\; t,\; \epsilon^*(z_t, t, \varnothing),\; \epsilon^*(z_t, t, c)), \qquad
    \hat\epsilon = \epsilon^*(z_t, t, \varnothing) + g\,[\epsilon^*(z_t, t, c) - \epsilon^*(z_t, t, \varnothing)],
    \qquad z_{t'} = \sqrt{\bar\alpha_{t'}}\,\hat x_0 + \sqrt{1 - \bar\alpha_{t'}}\,\hat\epsilon ,

where the released code of ESD and of what is built on it starts a new run for every sample, keeps the state of one
level and asks the original model again. The bank is exact for objectives whose states come from the original model.
Where they come from the model being trained, `TrainedTrajectories` walks them again every so many steps, and asks the
original model about them.

The released code pairs a state with a time that is up to two levels noisier (its sampler leaves out the first level
and stops one early); here a state has the time it was walked to, and `legacy_level_mismatch` brings the mismatch back.

N trajectories of L levels take 12 bytes times N x L x the size of a latent: 9.8 MB each for Stable Diffusion 1.4 with
50 levels, on the CPU, and as much on the disk while the run lasts; a third more with a `Walker.source`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from accelerate import Accelerator

from sfumato import storage
from sfumato.concepts import Concept
from sfumato.families import Family
from sfumato.progress import Track
from sfumato.randomness import generator_for, permuted_indices, randn_for
from sfumato.unlearning.examples import PromptTable
from sfumato.unlearning.task import Task, TrainedConfig

__all__ = [
    "Bank",
    "States",
    "TrainedTrajectories",
    "Trajectories",
    "TrajectoryConfig",
    "Walker",
    "bank_facts",
    "erasing_target",
    "find_trajectories",
    "shuffled_states",
]

Key = tuple[int, ...]


@dataclass
class TrajectoryConfig(TrainedConfig):
    """What every method that trains on the model's own trajectories can be told; their configs inherit it.

    Attributes:
        trajectories_per_prompt: Trajectories for each prompt of the concept.
        trajectory_steps: Levels of a trajectory.
        trajectory_guidance: Guidance scale g of the trajectories.
        trajectory_batch_size: Trajectories walked at a time.
        refresh_every: Where the model being trained walks the trajectories: steps between two walks. 1 is exact, more
            is cheaper and uses states that are up to so many steps old.
        legacy_level_mismatch: Pair states with the times that the released code pairs them with.
        legacy_latent_scale: Side of the latents over the model's own; 2 walks at 1024 pixels a model of 512, as the
            released script of ESD does with Stable Diffusion 1.4.
        direction: Guide away from ``"prompt"``, each of the concept's prompts as a whole, or from ``"name"``, the
            concept's bare name, so that what else a prompt says keeps its meaning; see `erasing_target`.
    """

    trajectories_per_prompt: int = 4
    trajectory_steps: int = 50
    trajectory_guidance: float = 3.0
    trajectory_batch_size: int = 8
    refresh_every: int = 1
    legacy_level_mismatch: bool = False
    legacy_latent_scale: int = 1
    direction: str = field(default="prompt", metadata={"choices": ["prompt", "name"]})

    def __post_init__(self) -> None:
        """Check the types and ranges."""
        super().__post_init__()
        for name in ("trajectories_per_prompt", "trajectory_batch_size", "refresh_every", "legacy_latent_scale"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not 2 <= self.trajectory_steps <= 1000:
            raise ValueError(f"`trajectory_steps` must lie in [2, 1000], got {self.trajectory_steps}.")

    def names(self, concept: Concept) -> dict[str, str] | None:
        """Give the `Walker.source` that `direction` needs."""
        return dict(zip(concept.prompts, concept.names, strict=True)) if self.direction == "name" else None


class States(NamedTuple):
    """Some states of some trajectories, on the model's device.

    Attributes:
        latents: ``(B, C, H, W)``, float32.
        timesteps: Their times ``(B,)``.
        prompts: What each trajectory shows.
        said: What the original model predicts of them (the noise, or a velocity), ``(B, C, H, W)`` each, float32:
            under ``"empty"``, the empty prompt, under ``"prompt"``, their own, and under ``"source"``, the walker's
            `source` for it.
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    prompts: list[str]
    said: Mapping[str, torch.Tensor]


def erasing_target(said: Mapping[str, torch.Tensor], erased: str, away: str, eta: float) -> torch.Tensor:
    r"""Give what a state should be seen as once a concept c is erased from a prompt f.

    .. math::
        T = \epsilon^*(z_t, t, f) - (1 + \eta)\,[\epsilon^*(z_t, t, c) - \epsilon^*(z_t, t, \varnothing)] ;

    with f = c it is :math:`\epsilon^*(\varnothing) - \eta\,[\epsilon^*(c) - \epsilon^*(\varnothing)]`: ESD's targets
    (Gandikota et al., arXiv 2303.07345); that every prompt of the concept be an f, and its bare name c, is ours.

    Args:
        said: As in `States`, ``(B, C, H, W)`` each, with ``"empty"``.
        erased: Which of it is said under f.
        away: Which of it is said under c.
        eta: How far to guide away.

    Returns:
        What should be predicted, ``(B, C, H, W)``.
    """
    return said[erased] - (1 + eta) * (said[away] - said["empty"])


class Bank(Protocol):
    """Trajectories, whoever walks them."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """What each trajectory shows."""
        ...

    @property
    def levels(self) -> int:
        """States of a trajectory."""
        ...

    def at(self, rows: np.ndarray, levels: np.ndarray, wanted: Sequence[str]) -> States:
        """Give the states of trajectories `rows` at `levels`, both ``(B,)``, with the `wanted` predictions."""
        ...


@dataclass(frozen=True)
class Trajectories:
    """A bank of trajectories of the original model.

    Attributes:
        prompts: What each shows, ``N`` of them.
        timesteps: ``(N, L)``, the noisiest first.
        latents: ``(N, L, C, H, W)``, float32, on the CPU.
        said: See `States`; ``(N, L, C, H, W)`` each, float32, on the CPU.
        device: Where states are wanted.
    """

    prompts: tuple[str, ...]
    timesteps: torch.Tensor
    latents: torch.Tensor
    said: Mapping[str, torch.Tensor]
    device: torch.device

    @property
    def levels(self) -> int:
        """States of a trajectory."""
        return self.timesteps.shape[1]

    @property
    def megabytes(self) -> float:
        """What the bank takes."""
        return sum(t.numel() * t.element_size() for t in (self.latents, self.timesteps, *self.said.values())) / 1e6

    def at(self, rows: np.ndarray, levels: np.ndarray, wanted: Sequence[str]) -> States:
        """Give states with predictions; see `Bank`."""
        place = torch.from_numpy(np.asarray(rows)), torch.from_numpy(np.asarray(levels))
        said = {name: self.said[name][place].to(self.device) for name in wanted}
        prompts = [self.prompts[row] for row in rows]
        return States(self.latents[place].to(self.device), self.timesteps[place].to(self.device), prompts, said)


def shuffled_states(bank: Bank, seed: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Read an endless sequence of shuffled passes over all states: rows and levels, ``(count,)`` each."""
    index = permuted_indices(seed, len(bank.prompts) * bank.levels, start, count)
    return index // bank.levels, index % bank.levels


@dataclass(frozen=True)
class Walker:
    """Walks trajectories, by itself or with the other processes.

    Attributes:
        family: The original model.
        table: Embeddings of all prompts.
        config: How to walk.
        accelerator: The process group.
        source: Prompt to a third prompt to ask the original model about at its states; None asks about none.
        one_time: With `TrajectoryConfig.legacy_level_mismatch`, pair the states of a level with one time in all
            trajectories, and not in each with its own.
    """

    family: Family
    table: PromptTable
    config: TrajectoryConfig
    accelerator: Accelerator
    source: Mapping[str, str] | None = None
    one_time: bool = False

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a state."""
        channels, height, width = self.family.latent_shape
        return channels, self.config.legacy_latent_scale * height, self.config.legacy_latent_scale * width

    @property
    def grid(self) -> torch.Tensor:
        """The times of the levels ``(L,)``, the noisiest first."""
        return self.family.inference_timesteps(self.config.trajectory_steps)

    @property
    def evaluations(self) -> int:
        """Denoiser evaluations (samples that pass through it) of one trajectory with its predictions."""
        levels, asked = self.config.trajectory_steps, 2 + (self.source is not None)
        return 2 * (levels - 1) + asked * levels if self.config.legacy_level_mismatch else asked * levels

    def walk(
        self, denoiser: torch.nn.Module, prompts: Sequence[str], keys: Sequence[Key], *, teach: bool,
        description: str | None = None,
    ) -> Trajectories:  # fmt: skip
        """Walk one trajectory for each prompt; the processes share the work.

        Args:
            denoiser: Which model walks.
            prompts: ``N`` prompts.
            keys: Seed the noise that each starts from.
            teach: Keep what the original model says of the states; `denoiser` must then be the original.
            description: The progress bar's label; None shows no bar.

        Returns:
            The trajectories, the same on every process; without `teach`, without predictions.
        """
        accelerator, count = self.accelerator, len(prompts)
        shape = (count, self.config.trajectory_steps, *self.latent_shape)
        names = ("empty", "prompt", *(("source",) if self.source is not None else ())) if teach else ()
        values = {name: torch.zeros(shape) for name in ("latents", *names)}
        times = torch.stack([self._times(keys[0][:1] if self.one_time else key) for key in keys])  # (N, L)
        mine = range(accelerator.process_index, count, accelerator.num_processes)
        size = self.config.trajectory_batch_size
        most = -(-count // accelerator.num_processes)  # a denoiser that is spread must be called by all, equally often
        batches = [list(mine[i : i + size]) for i in range(0, most, size)]
        hidden = description is None or not accelerator.is_main_process
        for rows in Track(batches, description, shown=not hidden):
            asked = rows or [0]
            found = self._batch(denoiser, [prompts[k] for k in asked], [keys[k] for k in asked], times[asked], teach)
            for name, value in found.items():
                values[name][rows] = value[: len(rows)].cpu()
        if accelerator.num_processes > 1:  # each process has filled in its own rows
            for value in values.values():
                for level in range(shape[1]):
                    part = value[:, level].to(self.family.device).contiguous()
                    value[:, level] = accelerator.reduce(part, "sum").cpu()
        latents = values.pop("latents")
        if not torch.isfinite(latents).all():
            raise ValueError("The model walks to NaN or infinite latents; load it with dtype=torch.float32.")
        return Trajectories(tuple(prompts), times, latents, values, self.family.device)

    @torch.no_grad()
    def teach(self, latents: torch.Tensor, times: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Ask the original model about states ``(B, C, H, W)`` at times ``(B,)`` under `prompts`."""
        with self.accelerator.autocast():
            return self.family.ask(self.family.denoiser, latents, times, self.table(prompts))

    def asked(self, prompts: Sequence[str]) -> dict[str, list[str]]:
        """Name what the original model is asked about states of trajectories that show `prompts`; see `States`."""
        asked = {"empty": [""] * len(prompts), "prompt": list(prompts)}
        if self.source is not None:
            asked["source"] = [self.source[prompt] for prompt in prompts]
        return asked

    def _times(self, key: Key) -> torch.Tensor:
        """The times that a trajectory's states are paired with, (L,)."""
        if not self.config.legacy_level_mismatch:
            return self.grid
        levels, total = self.config.trajectory_steps, self.family.num_train_timesteps
        within = torch.rand(levels, generator=generator_for(*key, 1), dtype=torch.float64)
        return ((torch.arange(levels - 1, -1, -1) + within) * total / levels).long().clamp(max=total - 1)

    @torch.no_grad()
    def _batch(
        self, denoiser: torch.nn.Module, prompts: Sequence[str], keys: Sequence[Key], times: torch.Tensor, teach: bool
    ) -> dict[str, torch.Tensor]:
        """Walk one batch: latents, and predictions if wanted, ``(B, L, C, H, W)`` each."""
        asked = self.asked(prompts)
        if not teach:
            asked.pop("source", None)
        noise = randn_for([(*key, 0) for key in keys], self.latent_shape).to(self.family.device)
        grid, levels = self.grid, self.config.trajectory_steps
        if not self.config.legacy_level_mismatch:
            # without predictions nobody asks about the last state
            visited, said = self._descend(denoiser, noise, grid, list(asked.values()), to_the_end=teach)
            return {"latents": visited[:, :levels], **(dict(zip(asked, said, strict=True)) if teach else {})}
        guided = [asked["empty"], asked["prompt"]]
        visited, _ = self._descend(denoiser, noise, grid[1:], guided, to_the_end=True)
        visited = visited[:, [min(level + 1, levels - 1) for level in range(levels)]]  # two levels on from `grid`
        if not teach:
            return {"latents": visited}
        times = times.to(visited.device)
        answers = {
            name: torch.stack([self.teach(visited[:, k], times[:, k], texts) for k in range(levels)], 1)
            for name, texts in asked.items()
        }
        return {"latents": visited, **answers}

    def _descend(
        self, denoiser: torch.nn.Module, latents: torch.Tensor, times: torch.Tensor, asked: Sequence[Sequence[str]],
        to_the_end: bool,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:  # fmt: skip
        """DDIM from the first of `times` on: states ``(B, L + 1, C, H, W)`` and what was said under `asked`."""
        family, many = self.family, len(asked)
        conditioning = self.table([text for texts in asked for text in texts])
        each = times.to(latents.device)[:, None].expand(-1, len(latents))  # (L, B)
        following = torch.cat([each[1:], torch.zeros_like(each[:1])])  # the run ends at time 0
        visited, said = [latents], []
        for now, after in list(zip(each, following, strict=True))[: None if to_the_end else -1]:
            with self.accelerator.autocast():
                raw = family.ask(denoiser, latents.repeat(many, 1, 1, 1), now.repeat(many), conditioning)
            parts = raw.chunk(many)
            said.append(torch.stack(parts))
            clean, noise = family.split(
                parts[0] + self.config.trajectory_guidance * (parts[1] - parts[0]), latents, now
            )
            latents = family.add_noise(clean, noise, after)
            visited.append(latents)
        return torch.stack(visited, 1), list(torch.stack(said, 2))


class TrainedTrajectories:
    """Trajectories of a denoiser that is being trained, as it was at the last walk.

    Args:
        walker: Walks, and asks the original model.
        denoiser: The bare module being trained.
        start: Trajectories to begin with, the original model's; the first step trains on them as they are.
    """

    def __init__(self, walker: Walker, denoiser: torch.nn.Module, start: Trajectories) -> None:
        self._walker, self._denoiser = walker, denoiser
        self._walked = Trajectories(start.prompts, start.timesteps, start.latents, {}, start.device)

    @property
    def prompts(self) -> tuple[str, ...]:
        """What each trajectory shows."""
        return self._walked.prompts

    @property
    def levels(self) -> int:
        """States of a trajectory."""
        return self._walked.levels

    def at(self, rows: np.ndarray, levels: np.ndarray, wanted: Sequence[str]) -> States:
        """Give states with predictions, for which the original model is asked now; see `Bank`."""
        states = self._walked.at(rows, levels, ())
        asked = self._walker.asked(states.prompts)
        said = {name: self._walker.teach(states.latents, states.timesteps, asked[name]) for name in wanted}
        return states._replace(said=said)

    def refresh(self, rows: np.ndarray, key: Key) -> None:
        """Walk some trajectories again, from new noise.

        Args:
            rows: Which.
            key: Seeds the noise, with the row.
        """
        chosen = np.unique(rows)
        keys = [(*key, int(row)) for row in chosen]
        new = self._walker.walk(self._denoiser, [self.prompts[row] for row in chosen], keys, teach=False)
        self._walked.latents[chosen] = new.latents
        self._walked.timesteps[chosen] = new.timesteps

    def state(self) -> dict[str, torch.Tensor]:
        """Give what a checkpoint must keep."""
        return {"latents": self._walked.latents, "timesteps": self._walked.timesteps}


def find_trajectories(task: Task, walker: Walker, prompts: Sequence[str], name: str, stream: int) -> Trajectories:
    """Read the bank that an earlier start of this run left, or walk it and leave it for the next.

    Args:
        task: The run.
        walker: Walks.
        prompts: One for each trajectory.
        name: Of the bank's file in the run's folder of examples.
        stream: Keeps the noise of the run's banks apart.
    """
    path = task.output_dir / "examples" / f"{name}.safetensors" if task.output_dir else None
    settings = asdict(walker.config)
    key = {
        "base": {part: storage.fingerprint(module.named_parameters()) for part, module in task.family.parts.items()},
        "beside": task.identity.get("beside"), "prompts": list(prompts), "source": dict(walker.source or {}),
        "seed": task.seed, "stream": stream,
        "prediction_type": task.family.prediction_type, "grid": walker.grid.tolist(), "one_time": walker.one_time,
        **{f.name: settings[f.name] for f in fields(TrajectoryConfig) if f.name.startswith(("trajectory", "legacy"))},
    } if path is not None else {}  # fmt: skip
    stored = storage.load_tensors_of(path, key)
    if stored is not None:
        times, latents = stored.pop("timesteps"), stored.pop("latents")
        return Trajectories(tuple(prompts), times, latents, stored, task.family.device)
    if path is not None:
        per_state = (3 + (walker.source is not None)) * 4 * int(np.prod(walker.latent_shape))
        storage.check_disk_space(path.parent, len(prompts) * walker.config.trajectory_steps * per_state)
    keys = [(task.seed, stream, row) for row in range(len(prompts))]
    walked = walker.walk(task.family.denoiser, prompts, keys, teach=True, description=f"walk {name}")
    if path is not None and task.accelerator.is_main_process:
        tensors = {"timesteps": walked.timesteps, "latents": walked.latents, **walked.said}
        storage.save_tensors(path, tensors, {"key": key})
    task.note_costs()
    return walked


def bank_facts(*banks: tuple[Walker, Trajectories]) -> dict[str, Any]:
    """Say in a manifest how many trajectories were walked, and what they cost."""
    return {
        "trajectory_count": sum(len(bank.prompts) for _, bank in banks),
        "trajectory_evaluations": sum(len(bank.prompts) * walker.evaluations for walker, bank in banks),
        "trajectories_mb": round(sum(bank.megabytes for _, bank in banks), 1),
    }
