"""Several runs one after the other in one group of processes, for test_processes.py: ``process_jobs.py FOLDER``."""

import copy
import json
import sys
from pathlib import Path

import sfumato
from sfumato.unlearning.methods import METHODS

SMALL = {
    "forget_examples": 8, "retain_examples": 8, "anchor_examples": 8, "example_steps": 2, "example_batch_size": 4,
    "batch_size": 4, "retain_batch_size": 4, "steps": 4, "learning_rate": 1e-4, "optimizer": "adam",
    "checkpoint_every": 2, "trajectories_per_prompt": 1, "trajectory_steps": 4, "retain_trajectories": 4,
    "discriminator_warmup": 2, "warmup_rounds": 1, "attack_steps": 2, "verify": False,
}  # fmt: skip
RUNS = {
    "salun": ("salun", {"steps": 20}),
    "salun-average": ("salun", {"mask_ratio": 1.0, "ema_decay": 0.9, "gradient_accumulation_steps": 2}),
    "salun-adapters": ("salun", {"mask_ratio": 1.0, "adapter_rank": 4}),
    "salun-zero-mask": ("salun", {"mask_ratio": 0.0, "optimizer": "adamw", "weight_decay": 0.5}),
    "esd": ("esd", {}),
    "esd-sgd": ("esd", {"optimizer": "sgd", "learning_rate": 1e-2}),
    "esd-trained": ("esd", {"trajectories": "trained", "refresh_every": 2}),
    "advunlearn": ("advunlearn", {}),
    "advunlearn-denoiser": ("advunlearn", {"train": "denoiser", "parameters": "xattn"}),
    "doco": ("doco", {}),
    "concept_ablation": ("concept_ablation", {"frozen_teacher": True}),
    "proximal": ("proximal", {"schedule": "fixed"}),
    "gradient_ascent": ("gradient_ascent", {}),
}


def main(folder: Path) -> None:
    """Make every run in its own folder, and note how many processes it had and whether they shared the weights."""
    import sfumato.trainer as trainer
    from sfumato.sharding import is_spread

    seen: dict[str, bool] = {}
    step = trainer._Run.step
    for name, (method, settings) in RUNS.items():

        def watched(run, number, name=name):
            seen[name] = is_spread(run.model)
            return step(run, number)

        trainer._Run.step = watched
        known = {field for cls in METHODS[method].configs for field in cls.__dataclass_fields__} | {"verify"}
        small = {key: value for key, value in SMALL.items() if key in known}
        pipe = sfumato.load("atelier")
        result = sfumato.unlearn(pipe, "sneaker", method, output_dir=folder / name, **{**small, **settings})
        for before, after in ((pipe.unet, result.unet), (pipe.text_encoder, result.text_encoder)):
            copy.deepcopy(after)  # it is a model like any other
            pairs = zip(before.modules(), after.modules(), strict=True)
            assert all(type(a) is type(b) and set(vars(b)) <= set(vars(a)) for a, b in pairs)
    (folder / "spread.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
