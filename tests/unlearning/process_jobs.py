"""Several runs, one after the other, in one group of processes: ``process_jobs.py FOLDER NAME,...``."""

import atexit
import copy
import json
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

import sfumato
from sfumato.unlearning.methods import METHODS

SMALL = {
    "forget_examples": 8, "retain_examples": 8, "anchor_examples": 8, "example_steps": 2, "example_batch_size": 4,
    "batch_size": 4, "retain_batch_size": 4, "steps": 4, "learning_rate": 1e-4, "optimizer": "adam",
    "checkpoint_every": 2, "trajectories_per_prompt": 1, "trajectory_steps": 4, "retain_trajectories": 4,
    "discriminator_warmup": 2, "warmup_rounds": 1, "attack_steps": 2, "verify": False,
}  # fmt: skip
RUNS = {
    "salun": ("salun", {"steps": 8}),
    "salun-average": ("salun", {"mask_ratio": 1.0, "ema_decay": 0.9, "gradient_accumulation_steps": 2}),
    "salun-adapters": ("salun", {"mask_ratio": 1.0, "adapter_rank": 4}),
    "salun-decay": ("salun", {"optimizer": "adamw", "weight_decay": 0.5, "max_grad_norm": 1e-3}),
    "salun-resumed": ("salun", {}),
    "salun-zero-mask": ("salun", {"mask_ratio": 0.0, "optimizer": "adamw", "weight_decay": 0.5}),
    "esd": ("esd", {"log_with": "tensorboard", "steps": 8}),
    "esd-sgd": ("esd", {"optimizer": "sgd", "learning_rate": 1e-2}),
    "esd-trained": ("esd", {"trajectories": "trained", "refresh_every": 2}),
    "advunlearn": ("advunlearn", {}),
    "advunlearn-denoiser": ("advunlearn", {"train": "denoiser", "parameters": "xattn"}),
    "doco": ("doco", {}),
    "concept_ablation": ("concept_ablation", {"frozen_teacher": True}),
    "proximal": ("proximal", {"schedule": "fixed"}),
    "gradient_ascent": ("gradient_ascent", {}),
}


class Killed(Exception):
    """Stands for a run that ends in the middle."""


def main(folder: Path, names: list[str]) -> None:
    """Make runs, each in its own folder, and note how each was spread over the processes."""
    from sfumato.sharding import is_spread
    from sfumato.trainer.update import GradientUpdate
    from sfumato.trainer.zero import ZeroUpdate

    how: dict[str, str] = {}
    taken: list[str] = []
    killing: list[str] = []

    def watched(step, kind):
        def taking(update, rate):
            how[name] = kind or ("fsdp2" if is_spread(update.model) else "ddp")
            taken.append(name)
            if killing and taken.count(name) == 4:
                raise Killed
            return step(update, rate)

        return taking

    GradientUpdate.step = watched(GradientUpdate.step, None)
    ZeroUpdate.step = watched(ZeroUpdate.step, "deepspeed")
    for name in names:
        method, settings = RUNS[name]
        known = {field for cls in METHODS[method].configs for field in cls.__dataclass_fields__} | {"verify"}
        small = {key: value for key, value in SMALL.items() if key in known}
        pipe = sfumato.load("atelier")
        call = {"output_dir": folder / name, **small, **settings}
        if method == "doco" and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            try:
                sfumato.unlearn(pipe, "sneaker", method, **call)
            except ValueError as error:
                assert "Gradient surgery does not work with DeepSpeed" in str(error)
                continue
            raise AssertionError("DoCo ran with DeepSpeed")
        if name == "salun-resumed":
            killing.append(name)
            try:
                sfumato.unlearn(pipe, "sneaker", method, **call)
            except Killed:
                killing.clear()
            call["resume"] = True
        if name == "esd" and os.environ.get("RANK") == "1":
            time.sleep(2)  # it must find the folder free all the same: no other process may have begun to write
        result = sfumato.unlearn(pipe, "sneaker", method, **call)
        assert name != "salun-resumed" or taken.count(name) == 6  # three steps, and half a fourth, then the last two
        for before, after in ((pipe.unet, result.unet), (pipe.text_encoder, result.text_encoder)):
            copy.deepcopy(after)  # it is a model like any other
            pairs = zip(before.modules(), after.modules(), strict=True)
            assert all(type(a) is type(b) and set(vars(b)) <= set(vars(a)) for a, b in pairs)
            pairs = zip(before.parameters(), after.parameters(), strict=True)
            assert all(set(vars(b)) <= set(vars(a)) for a, b in pairs)
    (folder / "how.json").write_text(json.dumps(how))


if __name__ == "__main__":
    atexit.register(lambda: dist.is_initialized() and os._exit(3))  # runs after all that is registered later
    main(Path(sys.argv[1]), sys.argv[2].split(","))
