"""Training: an objective, a config, and one loop on accelerate. The loop is in `sfumato.trainer.loop`."""

from sfumato.trainer.config import TrainingConfig
from sfumato.trainer.devices import check_tracker, make_accelerator, process_group
from sfumato.trainer.loop import NonFiniteLossError, checkpoint_space, preflight, train
from sfumato.trainer.objective import Objective, Shard, StatefulObjective, SurgicalObjective

__all__ = [
    "NonFiniteLossError",
    "Objective",
    "Shard",
    "StatefulObjective",
    "SurgicalObjective",
    "TrainingConfig",
    "check_tracker",
    "checkpoint_space",
    "make_accelerator",
    "process_group",
    "preflight",
    "train",
]
