"""An audit in one or several processes, for test_audit.py: ``audit_job.py FOLDER``."""

import sys
from pathlib import Path

import sfumato
from sfumato.attacks.audit import attack

SETTINGS = {
    "prompts": ["a red sneaker", "a blue sneaker", "a green sneaker", "a cyan sneaker", "a red bag"],
    "tokens": 2, "times": 2, "iterations": 2, "num_inference_steps": 2, "guidance_scale": 3.0, "audit_batch_size": 2,
}  # fmt: skip


def main(folder: Path) -> None:
    """Attack a model that UCE has unlearned."""
    original = sfumato.load("atelier")
    unlearned = sfumato.unlearn(original, "sneaker", "uce", verify=False)
    attack(unlearned, original, "sneaker", output_dir=folder, **SETTINGS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
