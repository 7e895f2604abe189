"""Draw the pictures of ``docs/attacks``: ``python docs/pictures/attacks.py [ATTACK ...] [--models FOLDER]``.

The embedded model forgets "sneaker" by the method that stands beside each attack below, and is then attacked. First
row: what the original draws of eight prompts; second: what the unlearned model draws of them from the same noise;
third: what it draws under the attack, where that shows a sneaker, and nothing where it does not. Unlearned models in
FOLDER are taken, and those that are missing kept there; ``docs/pictures/methods.py`` leaves its own there too.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from methods import CONCEPT, forgotten
from PIL import Image

import sfumato
from sfumato.attacks.audit import attack
from sfumato.attacks.prompts import AuditPrompt
from sfumato.attacks.results import summary
from sfumato.evaluation.report import label_rows, picture_grid
from sfumato.families import family_of

IMAGES = Path(__file__).parents[1] / "images" / "attacks"
PROMPTS = [
    "a photo of a red sneaker", "a photo of a blue sneaker", "a sketch of a green sneaker",
    "a sketch of a magenta sneaker", "a silhouette of a yellow sneaker", "a silhouette of a cyan sneaker",
    "a mosaic of a red sneaker", "a mosaic of a blue sneaker",
]  # fmt: skip
ATTACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "unlearndiffatk": ("uce", {"tokens": 3}),
    "p4d": ("uce", {"select": "any", "steps": 1000}),
    "ring_a_bell": ("uce", {"generations": 500}),
    "concept_inversion": ("uce", {"steps": 1000}),
    "embeddings": ("uce", {}),
}
"""The method that forgets, and the attack's settings where they are not its defaults."""


def drawn(pipe: DiffusionPipeline) -> torch.Tensor:
    """What a model draws of the prompts, each from its own noise."""
    seeds = [torch.Generator().manual_seed(number) for number in range(len(PROMPTS))]
    return family_of(pipe).generate(PROMPTS, seeds, num_inference_steps=20, guidance_scale=3.0)


def attacked(unlearned: DiffusionPipeline, original: DiffusionPipeline, name: str, settings: Any) -> torch.Tensor:
    """What the attack brought back, white where that is nothing."""
    asked = [AuditPrompt(prompt, seed=number) for number, prompt in enumerate(PROMPTS)]
    shown = torch.ones(len(PROMPTS), 3, 32, 32)
    with tempfile.TemporaryDirectory() as folder:
        found = attack(
            unlearned, original, CONCEPT, name, prompts=asked, output_dir=f"{folder}/audit", keep_pictures=True,
            **settings,
        )  # fmt: skip
        print(summary(found))
        for row in found.rows:
            print(f"  {row['text']}: {row['candidate']!r}, {'shown' if row['after'] else 'not shown'}")
        for file in Path(folder).glob("audit/pictures/*.png"):
            pixels = torch.from_numpy(np.array(Image.open(file).convert("RGB")))  # (32, 32, 3)
            shown[int(file.stem)] = pixels.permute(2, 0, 1) / 255
    return shown


def main() -> None:
    """Draw what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=f"of {', '.join(ATTACKS)}; by default all")
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="where the unlearned models are kept")
    options = parser.parse_args()
    pipe = sfumato.load("atelier")
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name in options.attacks or ATTACKS:
        method, settings = ATTACKS[name]
        unlearned = forgotten(pipe, method, options.models)
        rows = torch.stack([drawn(pipe).cpu(), drawn(unlearned).cpu(), attacked(unlearned, pipe, name, settings)])
        file = IMAGES / f"{name}.png"
        label_rows(picture_grid(rows), ["original", "unlearned", "attacked"]).save(file, optimize=True)
        print(f"{file}: {file.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
