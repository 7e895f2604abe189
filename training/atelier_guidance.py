"""Train what steers the embedded models, and pack it: ``python training/atelier_guidance.py --run R --output O``.

That is One More Step for ``atelier``, and a classifier for minority guidance for ``atelier`` and for
``atelier-pixel``. What the folder of the run lacks is trained first (each takes about an hour on a CPU core), and a
run that was killed goes on. The weights are float16, and small enough to ship.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato import storage
from sfumato.arguments import make_parser
from sfumato.guidance.job import JobConfig, train_guidance
from sfumato.guidance.networks import NetworkConfig
from sfumato.jobs import check_same_settings, is_finished
from sfumato.releasing.guidance import release_guidance
from sfumato.settings import check_ranges, check_types
from sfumato.trainer import TrainingConfig
from sfumato.training.minority_classifier import Minority, MinorityConfig
from sfumato.training.one_more_step import OneMoreStep, OneMoreStepConfig

LICENCE = "apache-2.0"
STEPS, PICTURES = 3000, 12000
CLASSES, REPEATS = 20, 3
NAMES = ("atelier-one-more-step", "atelier-minority", "atelier-pixel-minority")


@dataclass
class PackConfig:
    """What to pack.

    Attributes:
        run: Folder for the training runs.
        output: Folder for the packed networks, one folder each; new or empty.
        names: Which of them, comma-separated.
        steps: Of training, each.
        pictures: That are scored for a classifier, and learned from.
        classes: Of a classifier.
        repeats: Draws of the noise for a score.
        data_dir: Folder with Fashion-MNIST's four files; None looks for Debian's package, then the Hub.
    """

    run: str
    output: str
    names: str = ",".join(NAMES)
    steps: int = STEPS
    pictures: int = PICTURES
    classes: int = CLASSES
    repeats: int = REPEATS
    data_dir: str | None = None

    def __post_init__(self) -> None:
        """Check the settings of all before the first."""
        check_types(self)
        check_ranges(self, {"steps": 1, "pictures": 2, "classes": 2, "repeats": 1})
        unknown = set(self.names.split(",")) - set(NAMES)
        if unknown:
            raise ValueError(f"There is no {sorted(unknown)[0]!r} to pack; choose from {', '.join(NAMES)}.")


def jobs_of(config: PackConfig) -> dict[str, tuple[Any, dict[str, Any], NetworkConfig]]:
    """Give each network's method, what of its job is not the default, and its shape."""
    minority = MinorityConfig(classes=config.classes, repeats=config.repeats)
    scored = {"pictures": config.pictures}
    made: tuple[tuple[Any, dict[str, Any], NetworkConfig], ...] = (
        (OneMoreStep(OneMoreStepConfig()), {}, NetworkConfig(norm_num_groups=32)),
        (Minority(minority), scored, NetworkConfig()),
        (Minority(minority), {**scored, "model": "atelier-pixel"}, NetworkConfig(channels=[32, 64, 128])),
    )
    return {name: job for name, job in zip(NAMES, made, strict=True) if name in config.names.split(",")}


def training_of(method: Any, steps: int) -> TrainingConfig:
    """Give the settings of training: of the classifiers the paper's rate, and decay of the weights."""
    rate, decay = (3e-4, 0.05) if isinstance(method, Minority) else (1e-3, 0.0)
    return TrainingConfig(
        steps=steps, learning_rate=rate, optimizer="adamw", weight_decay=decay, lr_schedule="cosine",
        warmup_steps=min(200, steps // 10), max_grad_norm=1.0, ema_decay=0.999, checkpoint_every=250,
    )  # fmt: skip


def train_once(
    method: Any, folder: Path, given: dict[str, Any], network: NetworkConfig, training: TrainingConfig
) -> None:  # fmt: skip
    """Train a network, unless the folder holds it already.

    Args:
        method: What is trained.
        folder: Of the run; one that was killed goes on.
        given: Settings of the job.
        network: Its shape.
        training: How to train.

    Raises:
        ValueError: If the folder holds one that was trained by other settings.
    """
    job = JobConfig(output=str(folder), save_dtype="float16", resume=folder.exists(), **given)
    if not is_finished(folder):
        train_guidance(method, job, network, training)
        return
    asked = {"job": job, "method": method.settings, "network": network, "training": training}
    check_same_settings(folder, asked)


def pack(config: PackConfig) -> list[Path]:
    """Train what is missing, and pack all; gives the folders."""
    output = storage.check_output_dir(config.output)
    chosen = jobs_of(config)
    for name, (method, given, network) in chosen.items():
        training = training_of(method, config.steps)
        train_once(method, Path(config.run) / name, {**given, "data_dir": config.data_dir}, network, training)
    return [
        release_guidance(Path(config.run) / name, output / name, license=LICENCE, code=False) for name in chosen
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Pack from a command line."""
    parser = make_parser(PackConfig, description=__doc__.splitlines()[0])
    try:
        for folder in pack(parser.parse_args_into_dataclasses(arguments)[0]):
            print(folder)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
