"""Edit real pictures with each inversion method: ``python benchmarks/edits.py --output edits.png``.

The colour of real test renders is changed by prompt. The judge says how often the new colour is seen and how often
garment and style are kept; the picture shows one row a method, the originals first.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

import sfumato
from sfumato import DDCMScheduler, InfEditPipeline, Judge, atelier
from sfumato.arguments import make_parser
from sfumato.evaluation.report import label_rows, picture_grid
from sfumato.families import latent_space_of
from sfumato.inversion import SCHEDULERS
from sfumato.loading import assets_folder

METHODS = (*SCHEDULERS, "infedit")
LABELS = ("original", "BDIA", "O-BELM", "EDICT", "DDIM", "fixed point", "edit-friendly DDPM", "InfEdit")


@dataclass
class EditsConfig:
    """What to edit, and how.

    Attributes:
        output: Where to write the picture; None writes none.
        pictures: How many pictures to edit.
        shown: How many of them to show.
        num_inference_steps: Steps of the schedule (InfEdit: 15).
        strength: Share of them to take (InfEdit: all).
        guidance_scale: Guidance towards the new prompt (InfEdit: 2); the old one has none.
        seed: Chooses pictures and colours, and seeds the noise.
    """

    output: str | None = None
    pictures: int = 32
    shown: int = 8
    num_inference_steps: int = 50
    strength: float = 0.8
    guidance_scale: float = 3.0
    seed: int = 0


def edited(pipe: Any, method: str, pictures: list[Image.Image], old: list[str], new: list[str], config: Any) -> Any:
    """Edit pictures; gives them as ``(B, 3, 32, 32)`` in [0, 1]."""
    generator = torch.Generator().manual_seed(config.seed)
    if method == "infedit":
        infedit = InfEditPipeline.from_pipe(pipe)
        infedit.scheduler = DDCMScheduler.from_config(pipe.scheduler.config)
        infedit.set_progress_bar_config(disable=True)
        return infedit(pictures, old, new, generator=generator, output_type="pt").images
    return sfumato.edit(
        pipe, pictures, old, new, scheduler=method, num_inference_steps=config.num_inference_steps,
        strength=config.strength, guidance_scale=config.guidance_scale, generator=generator,
    ).images  # fmt: skip


def main(config: EditsConfig) -> None:
    """Edit, judge, draw."""
    pipe = sfumato.load("atelier")
    pipe.set_progress_bar_config(disable=True)
    judge, folder = Judge.load(assets_folder() / "judge"), assets_folder() / "renders"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed)).tolist()
    chosen = [rows[i] for i in order[: config.pictures]]
    colours = list(atelier.COLOURS)
    wanted = [colours[(colours.index(row["colour"]) + 1 + k % 5) % 6] for k, row in enumerate(chosen)]
    new = [row["text"].replace(row["colour"], colour) for row, colour in zip(chosen, wanted, strict=True)]
    pictures = [Image.open(folder / row["file_name"]).convert("RGB") for row in chosen]
    strips = [latent_space_of(pipe).preprocess(pictures)]
    results = []
    for method in METHODS:
        strips.append(edited(pipe, method, pictures, [row["text"] for row in chosen], new, config).cpu())
        words = judge.describe(strips[-1])
        changed = sum(word["colour"] == colour for word, colour in zip(words, wanted, strict=True))
        kept = sum(
            word["garment"] == row["garment"] and word["style"] == row["style"]
            for word, row in zip(words, chosen, strict=True)
        )
        results.append({"method": method, "changed": changed, "kept": kept, "pictures": len(chosen)})
        print(f"{method:12} colour changed {changed}/{len(chosen)}, garment and style kept {kept}/{len(chosen)}")
    print(json.dumps(results))
    if config.output:
        grid = picture_grid(torch.stack([strip[: config.shown] for strip in strips]))
        label_rows(grid, LABELS).save(config.output)


if __name__ == "__main__":
    main(make_parser(EditsConfig, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0])
