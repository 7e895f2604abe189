"""Draw the pictures of ``docs/methods``: ``python docs/pictures/methods.py [NAME ...] [--models FOLDER]``.

Each method forgets "sneaker" by the embedded model's own recipe, in full: a second for uce and rece, minutes for the
others. The upper row is what the model drew before, the lower what it draws after, from the same prompts and noise;
sneakers on the left, other garments on the right. Results in FOLDER are taken, and those that are missing kept there.
"worst_case" is every garment before and after the worst three were forgotten, "pruning" what pruning alone leaves.
"""

import argparse
import copy
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

import sfumato
from sfumato.concepts import vocabulary_of
from sfumato.evaluation.generation import draw
from sfumato.evaluation.report import label_rows, picture_grid
from sfumato.unlearning.methods import METHODS
from sfumato.unlearning.pruning import prune
from sfumato.unlearning.worst_case import worst_case_forget_set

IMAGES = Path(__file__).parents[1] / "images" / "methods"
CONCEPT = "sneaker"
FORGOTTEN = ["a photo of a red sneaker", "a sketch of a blue sneaker", "a silhouette of a green sneaker", "a sneaker"]
COLOURS = ["red", "yellow", "green", "cyan", "blue"]
SHARES = (0.0, 0.3, 0.5, 0.7)
KEPT = ["a photo of a red sandal", "a photo of a blue boot", "a sketch of a green bag", "a mosaic of a yellow dress"]


def forgotten(pipe: DiffusionPipeline, method: str, models: Path | None) -> DiffusionPipeline:
    """A model that has forgotten the concept, from the folder if it is there."""
    folder = None if models is None else models / method
    if folder is not None and (folder / "model_index.json").exists():
        return DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    return sfumato.unlearn(pipe, CONCEPT, method, output_dir=folder, verify=False)


def strip(before: DiffusionPipeline, after: DiffusionPipeline) -> Image.Image:
    """Two rows of pictures of the same prompts and noise."""
    rows = [draw(model, [*FORGOTTEN, *KEPT], seed=0, description=None) for model in (before, after)]
    halves = [picture_grid(torch.stack([row[some] for row in rows])) for some in (slice(4), slice(4, 8))]
    sheet = Image.new("RGB", (halves[0].width + 16 + halves[1].width, halves[0].height), "white")
    sheet.paste(halves[0], (0, 0))
    sheet.paste(halves[1], (halves[0].width + 16, 0))
    return label_rows(sheet, ["before", "after"])


def worst_case(pipe: DiffusionPipeline) -> Image.Image:
    """All garments, before and after UCE has forgotten the three that it forgets least."""
    garments = vocabulary_of(pipe).domains["garment"]
    found = worst_case_forget_set(pipe, garments, m=3)
    print(f"chosen: {', '.join(found.chosen)}; residual {found.residual:.3f}; rounds chose:")
    for names, residual in sorted(found.sets.items(), key=lambda pair: pair[1]):
        print(f"  {residual:.3f} {', '.join(names)}")
    after = sfumato.unlearn(pipe, found.chosen, "uce", verify=False)
    asked = [f"a photo of a {colour} {name}" for name, colour in zip(garments, 2 * COLOURS, strict=True)]
    rows = [draw(model, asked, seed=0, description=None) for model in (pipe, after)]
    return label_rows(picture_grid(torch.stack(rows)), ["before", "after"])


def pruning(pipe: DiffusionPipeline) -> Image.Image:
    """What the model draws when a share of its weights is set to zero, and nothing is trained."""
    rows = []
    for share in SHARES:
        pruned = copy.copy(pipe)
        pruned.unet = copy.deepcopy(pipe.unet)
        prune(pruned.unet, share)
        rows.append(draw(pruned, [*FORGOTTEN[:2], *KEPT[:3]], seed=0, description=None))
    return label_rows(picture_grid(torch.stack(rows)), [f"{share:.0%} pruned" for share in SHARES])


SHARED = {"worst_case": worst_case, "pruning": pruning}


def main() -> None:
    """Draw what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*METHODS, *SHARED]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; by default all")
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="where the unlearned models are kept")
    options = parser.parse_args()
    pipe = sfumato.load("atelier")
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name in options.names or names:
        file = IMAGES / f"{name}.png"
        sheet = SHARED[name](pipe) if name in SHARED else strip(pipe, forgotten(pipe, name, options.models))
        sheet.save(file, optimize=True)
        print(f"{file}: {file.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
