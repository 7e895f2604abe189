"""Two restoration jobs one after the other in one group of processes: ``process_jobs.py PICTURES FOLDER``."""

import sys
from pathlib import Path

from sfumato.restoration.degradations import Degradation
from sfumato.restoration.job import JobConfig, train_restoration
from sfumato.restoration.networks import NetworkConfig
from sfumato.trainer import TrainingConfig
from sfumato.training import rddm, resshift

NETWORK = {"channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 8, "attention_levels": 0}
HOW = {
    "steps": 6, "learning_rate": 1e-2, "optimizer": "sgd", "ema_decay": 0.9, "max_grad_norm": 1.0,
    "checkpoint_every": 3,
}  # fmt: skip
"""Not Adam, which takes whole steps for gradients that are rounding alone."""
RUNS = {
    "resshift": (resshift, resshift.ResShiftConfig(), Degradation("inpaint"), {}),
    "rddm": (rddm, rddm.RDDMConfig(two_networks=True), Degradation("sr"), {"gradient_accumulation_steps": 2}),
}


def main(pictures: str, folder: Path) -> None:
    """Make each run in its own folder."""
    for name, (script, config, degradation, settings) in RUNS.items():
        network = NetworkConfig(**NETWORK)
        job = JobConfig(str(folder / name), data=pictures, size=32, batch_size=8, held_out_pictures=4)
        train_restoration(
            script.make(config, network), job, degradation, network, TrainingConfig(**{**HOW, **settings})
        )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
