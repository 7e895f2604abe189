"""Train the classifier of minority guidance (Um et al., ICLR 2024, arXiv 2301.12334) for a model.

accelerate launch training/minority_classifier.py --model MODEL --data FOLDER --output out/
accelerate launch --num_processes 8 -m sfumato.training.minority_classifier --model atelier --output out/

Pictures x0 are scored by `sfumato.minority_scores`, their scores divided into L classes of as many pictures each, and
a classifier of noisy latents learns the classes, t uniform over the model's times:

    x_t  = sqrt(A_t) x0 + sqrt(1 - A_t) noise
    loss = mean of -log p(y(x0) | x_t, t)

Of each class a share is held out, on which the result is measured. Differences from the paper: the whole network is
trained, where theirs stands behind a frozen classifier of ImageNet; the learning rate falls along a cosine, theirs
along a line; pictures are not cropped at random, as latents can't be. The scores are kept in ``scores.safetensors`` of
the output folder. The result is what ``MinorityClassifier.from_pretrained("out/")`` loads. ``--help`` lists every
setting.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sfumato import storage
from sfumato.families import Family
from sfumato.guidance.card import CLASSIFIER
from sfumato.guidance.job import PARTS_FOLDER, SCORES_FILE, Materials, main
from sfumato.guidance.networks import NetworkConfig, make_classifier
from sfumato.guidance.pictures import Captioned
from sfumato.minority import minority_labels, minority_scores, minority_thresholds
from sfumato.pipelines.minority_classifier import POOLS, MinorityClassifier
from sfumato.progress import Track
from sfumato.randomness import randint_for, rng_for
from sfumato.restoration.scores import find_distance
from sfumato.settings import check_ranges, check_types
from sfumato.trainer import Shard
from sfumato.unlearning.examples import Examples
from sfumato.unlearning.noising import noised, noisy_batch

TRAINED, HELD_OUT, BAND = 831, 832, 4  # keys that keep the random streams apart
BANDS = 5  # of the times, each measured apart
AT_ONCE = 512  # pictures that are scored in one part; a process has every so-manyth part


class MinorityObjective:
    """Cross-entropy of the classes, at random times.

    Args:
        family: The model's.
        examples: What to learn from.
        labels: Their classes, ``(N,)``.
        batch_size: Pictures of a step.
        seed: Seeds everything.
    """

    def __init__(
        self, family: Family, examples: Examples, labels: torch.Tensor, batch_size: int, seed: int
    ) -> None:  # fmt: skip
        self.family, self.examples, self.labels = family, examples, labels
        self.batch_size, self.seed = batch_size, seed

    def losses(self, model: nn.Module, step: int, shard: Shard) -> Mapping[str, torch.Tensor]:
        """See `sfumato.trainer.Objective`."""
        batch = noisy_batch(
            self.family, self.examples, self.batch_size, step, shard, seed=self.seed, stream=TRAINED
        )  # fmt: skip
        classes = self.labels[torch.from_numpy(batch.rows)].to(batch.noisy.device)
        return {"cross_entropy": F.cross_entropy(model(batch.noisy, batch.timesteps).float(), classes)}


@dataclass
class MinorityConfig:
    """What is particular to the classifier.

    Attributes:
        classes: L; the last is that of the rarest pictures.
        timestep: At which pictures are scored; None is 605 of 1,000.
        repeats: Draws of the noise for a score.
        distance: Of the score: ``lpips:vgg``, ``judge`` or the like; None is the L2 norm.
        score_batch_size: Pictures that are scored at a time.
        held_out: The share of each class that is held out.
        pool: How the network makes one vector of a map: ``"attention"`` or ``"average"``.
    """

    classes: int = 100
    timestep: int | None = None
    repeats: int = 5
    distance: str | None = None
    score_batch_size: int = 32
    held_out: float = 0.05
    pool: str = field(default="attention", metadata={"choices": POOLS})

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_types(self)
        check_ranges(self, {"classes": 2, "timestep": 0, "repeats": 1, "score_batch_size": 1})
        if not 0 < self.held_out < 1:
            raise ValueError(f"`held_out` must lie between 0 and 1, got {self.held_out}.")


class Minority:
    """The method, for `sfumato.guidance.job`.

    Args:
        settings: Its config.
    """

    name = CLASSIFIER

    def __init__(self, settings: MinorityConfig) -> None:
        self.settings = settings
        self._labels, self._thresholds = torch.empty(0), list[float]()

    def check(self, family: Family, pictures: Captioned) -> None:
        """Refuse flows, which the guidance is not for, and fewer pictures than two for each class."""
        if family.flow:
            raise ValueError(
                f"{family.label} is a flow, and minority guidance is for models of DDPM's kind: its scheduler,"
                " MinorityGuidanceScheduler, takes no flow. `sfumato.draw_minority` does without a classifier."
            )
        if len(pictures.captions) < 2 * self.settings.classes:
            raise ValueError(
                f"{self.settings.classes} classes need at least two pictures each, one of which is held out; there are"
                f" {len(pictures.captions)}: give more, or choose fewer `classes`."
            )
        time = self.settings.timestep
        if time is not None and time >= family.num_train_timesteps:
            raise ValueError(f"`timestep` must be below the model's {family.num_train_timesteps} times, got {time}.")
        if self.settings.distance is not None:
            find_distance(self.settings.distance)  # says what is missing before pictures are encoded

    def network(self, family: Family, config: NetworkConfig) -> Any:
        """Make a network for the model's latents."""
        return make_classifier(config, family.latent_shape, self.settings.classes, self.settings.pool)

    def objective(self, materials: Materials) -> MinorityObjective:
        """Score the pictures, divide them into classes, and leave out those that are held out."""
        scores = score_pictures(self.settings, materials)
        self._thresholds = minority_thresholds(scores, self.settings.classes).tolist()
        self._labels = minority_labels(scores, self.settings.classes)
        trained, _ = stratified(self._labels, self.settings.held_out, materials.seed)
        return MinorityObjective(
            materials.family, part_of(materials.examples, trained), self._labels[trained], materials.batch_size,
            materials.seed,
        )  # fmt: skip

    def result(self, model: Any, family: Family) -> MinorityClassifier:
        """Give the classifier, with the record of its classes' scores."""
        model.register_to_config(thresholds=self._thresholds)
        return model

    @torch.no_grad()
    def measure(self, model: Any, materials: Materials) -> dict[str, Any]:
        """Say how often, and how far, the classes of held-out pictures are missed, by bands of times."""
        _, rows = stratified(self._labels, self.settings.held_out, materials.seed)
        family, bands = materials.family, []
        width = -(-family.num_train_timesteps // BANDS)
        for first in range(0, family.num_train_timesteps, width):
            behind = min(first + width, family.num_train_timesteps)
            apart = [
                (self._apart(model, materials, some, range(first, behind)))
                for some in rows.split(materials.batch_size)
            ]
            missed = torch.cat(apart).float()
            bands.append(
                {
                    "from": first, "to": behind - 1, "accuracy": float((missed == 0).float().mean()),
                    "distance": float(missed.mean()),
                }
            )  # fmt: skip
        return {"held_out": len(rows), "bands": bands}

    def _apart(self, model: Any, materials: Materials, rows: torch.Tensor, band: range) -> torch.Tensor:
        """How many classes the network is off, for pictures noised to a time of a band each, ``(B,)``."""
        family, keys = materials.family, [(materials.seed, HELD_OUT, int(row)) for row in rows]
        batch = noised(family, materials.examples, rows.numpy(), keys)
        times = band.start + randint_for([(*key, BAND) for key in keys], len(band)).to(family.device)
        found = model(family.add_noise(batch.clean, batch.noise, times), times).argmax(1)
        return (found.cpu() - self._labels[rows]).abs()


def score_pictures(settings: MinorityConfig, materials: Materials) -> torch.Tensor:
    """Score pictures; the processes share the work, and parts that an earlier start of the run has scored are kept.

    Args:
        settings: How.
        materials: Which.

    Returns:
        ``(N,)``, the same on every process.
    """
    family, accelerator, count = materials.family, materials.accelerator, len(materials.examples)
    how = {"timestep": settings.timestep, "repeats": settings.repeats, "distance": settings.distance}
    key, file = {**materials.facts, **how, "seed": materials.seed}, materials.folder / SCORES_FILE
    parts = materials.folder / PARTS_FOLDER
    stored = storage.load_tensors_of(file, key)
    accelerator.wait_for_everyone()  # none writes before all have looked
    if stored is not None:
        return stored["scores"]
    distance = None if settings.distance is None else find_distance(settings.distance, family.device)
    scores = torch.zeros(count, device=family.device)
    starts = range(0, count, AT_ONCE)[accelerator.process_index :: accelerator.num_processes]
    for start in Track(starts, "minority scores", shown=accelerator.is_main_process):
        some = range(start, min(start + AT_ONCE, count))
        part, part_key = parts / f"{start}.safetensors", {**key, "first": start, "behind": some.stop}
        kept = storage.load_tensors_of(part, part_key)
        if kept is None:
            found = minority_scores(
                family.pipe, materials.pictures.take(some), materials.pictures.captions[start : some.stop],
                timestep=settings.timestep, repeats=settings.repeats, distance=distance, seed=materials.seed,
                batch_size=settings.score_batch_size, first=start, progress=False,
            )  # fmt: skip
            kept = {"scores": found}
            storage.save_tensors(part, kept, {"key": part_key})
        scores[start : some.stop] = kept["scores"].to(scores)
    whole: torch.Tensor = accelerator.reduce(scores, "sum").cpu()  # each process has filled in its own
    if accelerator.is_main_process:
        storage.save_tensors(file, {"scores": whole}, {"key": key})
        shutil.rmtree(parts)
    accelerator.wait_for_everyone()
    return whole


def stratified(labels: torch.Tensor, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide rows into those to train on and those to hold out, in each class alike.

    Args:
        labels: ``(N,)``.
        share: Of each class that is held out: at least one row, and never all.
        seed: Chooses them.

    Returns:
        Rows to train on, and rows that are held out, both ascending.
    """
    held_out = []
    for label in labels.unique().tolist():
        rows = torch.nonzero(labels == label).flatten().numpy()
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        held_out.append(rng_for(seed, HELD_OUT, label).permutation(rows)[:count])
    chosen = np.sort(np.concatenate(held_out))
    return torch.from_numpy(np.setdiff1d(np.arange(len(labels)), chosen)), torch.from_numpy(chosen)


def part_of(examples: Examples, rows: torch.Tensor) -> Examples:
    """Give some of the examples."""
    return Examples(examples.mean[rows], examples.std[rows], tuple(examples.prompts[row] for row in rows.tolist()))


TRAINING = {
    "steps": 60000, "learning_rate": 3e-4, "optimizer": "adamw", "weight_decay": 0.05, "lr_schedule": "cosine",
    "batch_size": 256, "checkpoint_every": 1000,
}  # fmt: skip
"""How to train, in the place of the defaults of `TrainingConfig`: the paper's settings, but for the schedule."""


if __name__ == "__main__":
    main(Minority, MinorityConfig, TRAINING, __doc__.splitlines()[0])
