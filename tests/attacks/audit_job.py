"""An audit in one or several processes, for test_audit.py: ``audit_job.py FOLDER ATTACK``."""

import sys
from pathlib import Path

import sfumato
from sfumato.attacks.audit import attack

SETTINGS = {
    "prompts": ["a red sneaker", "a blue sneaker", "a green sneaker", "a cyan sneaker", "a red bag"],
    "num_inference_steps": 2, "guidance_scale": 3.0, "audit_batch_size": 2,
}  # fmt: skip
ATTACKS = {
    "unlearndiffatk": {"tokens": 2, "times": 2, "iterations": 2},
    "concept_inversion": {"pictures": 2, "steps": 2, "batch": 2, "start": "bag"},
}


def main(folder: Path, method: str) -> None:
    """Attack a model that UCE has unlearned."""
    original = sfumato.load("atelier")
    unlearned = sfumato.unlearn(original, "sneaker", "uce", verify=False)
    attack(unlearned, original, "sneaker", method, output_dir=folder, **SETTINGS, **ATTACKS[method])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
