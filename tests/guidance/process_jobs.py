"""Both trainings one after the other in one group of processes: ``process_jobs.py FASHION_MNIST FOLDER``."""

import sys
from pathlib import Path

from sfumato.guidance.job import JobConfig, train_guidance
from sfumato.guidance.networks import NetworkConfig
from sfumato.trainer import TrainingConfig
from sfumato.training import minority_classifier
from sfumato.training.minority_classifier import Minority, MinorityConfig
from sfumato.training.one_more_step import OneMoreStep, OneMoreStepConfig

HOW = {
    "steps": 4, "learning_rate": 1e-2, "optimizer": "sgd", "ema_decay": 0.9, "max_grad_norm": 1.0,
    "checkpoint_every": 2,
}  # fmt: skip
"""Not Adam, which takes whole steps for gradients that are rounding alone."""


def main(data: str, folder: Path) -> None:
    """Make each run in its own folder."""
    minority_classifier.AT_ONCE = 8  # so that both processes have some to score
    runs = {
        "step": (OneMoreStep(OneMoreStepConfig(caption_dropout=0.1)), "atelier"),
        "pixels": (Minority(MinorityConfig(classes=4, repeats=1)), "atelier-pixel"),
    }
    for name, (method, model) in runs.items():
        network = NetworkConfig(channels=[8, 16], norm_num_groups=4, attention_head_dim=8)
        job = JobConfig(str(folder / name), model, data_dir=data, pictures=24, batch_size=8)
        train_guidance(method, job, network, TrainingConfig(**HOW))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
