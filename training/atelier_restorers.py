"""Train the embedded restoration models, and pack them: ``python training/atelier_restorers.py --run R --output O``.

Each is ResShift in four steps on renders of Fashion-MNIST, 32x32, one for super-resolution x4 and one for inpainting.
What the folder of the run lacks is trained first (about forty minutes each on a CPU core), and a run that was killed
goes on; ``benchmarks/restoration.py`` uses the same folder, and trains what it compares by the same settings.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfumato import storage
from sfumato.arguments import make_parser
from sfumato.jobs import check_same_settings, is_finished
from sfumato.releasing.restorer import release_restorer
from sfumato.restoration.degradations import Degradation
from sfumato.restoration.job import JobConfig, Method, train_restoration
from sfumato.restoration.networks import NetworkConfig
from sfumato.trainer import TrainingConfig
from sfumato.training import resshift

EMBEDDED = {"atelier-sr": "sr", "atelier-inpaint": "inpaint"}
"""Their names, and what they restore."""

LICENCE = "apache-2.0"
STEPS = 4000


@dataclass
class PackConfig:
    """What to pack.

    Attributes:
        run: Folder for the training runs.
        output: Folder for the packed models, one folder each; new or empty.
        steps: Of training, each.
        data_dir: Folder with Fashion-MNIST's four files; None looks for Debian's package, then the Hub.
    """

    run: str
    output: str
    steps: int = STEPS
    data_dir: str | None = None


def training_of(steps: int, learning_rate: float = 1e-3, seed: int = 0) -> TrainingConfig:
    """Give the settings of training that all restoration models of 32x32 renders share."""
    return TrainingConfig(
        steps=steps, learning_rate=learning_rate, optimizer="adamw", lr_schedule="cosine",
        warmup_steps=min(200, steps // 10), max_grad_norm=1.0, ema_decay=0.999, checkpoint_every=500, seed=seed,
    )  # fmt: skip


def train_once(
    make: Callable[[NetworkConfig], Method], folder: Path, degradation: Degradation, training: TrainingConfig,
    data_dir: str | None = None,
) -> None:  # fmt: skip
    """Train a model, unless the folder holds it already.

    Args:
        make: Makes the method.
        folder: Of the run; one that was killed goes on.
        degradation: What is to be undone.
        training: How to train.
        data_dir: Folder with Fashion-MNIST's four files.

    Raises:
        ValueError: If the folder holds a model that was trained by other settings.
    """
    if not is_finished(folder):
        network = NetworkConfig()
        job = JobConfig(output=str(folder), data_dir=data_dir, save_dtype="float16", resume=folder.exists())
        train_restoration(make(network), job, degradation, network, training)
        return
    check_same_settings(folder, {"degradation": degradation, "training": training})


def pack(config: PackConfig) -> list[Path]:
    """Train what is missing, and pack all; gives the folders."""
    output = storage.check_output_dir(config.output)
    runs = {name: Path(config.run) / f"{task}-resshift-4" for name, task in EMBEDDED.items()}
    for name, task in EMBEDDED.items():
        own = resshift.ResShiftConfig(num_train_timesteps=4)
        train_once(
            lambda network, own=own: resshift.make(own, network), runs[name], Degradation(task=task),  # type: ignore[misc]
            training_of(config.steps), config.data_dir,
        )  # fmt: skip
    return [release_restorer(run, output / name, license=LICENCE, code=False) for name, run in runs.items()]


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
