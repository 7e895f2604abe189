"""Draw the pictures of ``docs/pipelines``: ``python docs/pictures/pipelines.py [NAME ...]``.

All are outputs of the embedded models from fixed seeds; without names, all are drawn, in a few minutes. Real pictures
are test renders, which no embedded model was trained on.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from PIL import Image

import sfumato
from sfumato import (
    DDCMScheduler,
    InfEditPipeline,
    MinorityGuidancePipeline,
    MinorityGuidanceScheduler,
    atelier,
)
from sfumato.evaluation.report import label_rows, picture_grid
from sfumato.families import latent_space_of
from sfumato.loading import assets_folder
from sfumato.restoration.degradations import Degradation

IMAGES = Path(__file__).parents[1] / "images" / "pipelines"
GARMENTS = list(atelier.GARMENTS)
CHOSEN = ("120-", "027-", "054-", "079-", "103-", "148-", "196-", "217-")  # renders, by the start of their names


def loaded(name: str, **settings: Any) -> Any:
    """An embedded pipeline without progress bars."""
    pipe = sfumato.load(name, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(count: int) -> list[torch.Generator]:
    """A generator for each picture."""
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def real_pictures() -> tuple[torch.Tensor, list[dict[str, str]]]:
    """Test renders ``(B, 3, 32, 32)`` in [0, 1], and what is known of each."""
    folder = assets_folder() / "renders"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["file_name"].startswith(CHOSEN)]
    files = [Image.open(folder / row["file_name"]).convert("RGB") for row in rows]
    return latent_space_of(loaded("atelier")).preprocess(files), rows


def sheet(rows: Mapping[str, torch.Tensor], scale: int = 2) -> Image.Image:
    """One row of pictures for each label; grey pictures become RGB, smaller ones are enlarged to the largest."""
    size = max(row.shape[-1] for row in rows.values())
    squares = [F.interpolate(row.float().expand(-1, 3, -1, -1), size=size).clamp(0, 1) for row in rows.values()]
    return label_rows(picture_grid(torch.stack(squares), scale=scale), list(rows))


def class_conditional() -> Image.Image:
    """Ten garments from the same noise, guided more and more."""
    pipe, labels = loaded("atelier-pixel"), list(range(len(GARMENTS)))
    return sheet(
        {
            f"w = {scale:g}": pipe(
                labels, num_inference_steps=50, guidance_scale=scale, generator=seeds(10), output_type="pt"
            ).images
            for scale in (1.0, 2.0, 4.0)
        },
        scale=3,
    )


def infedit() -> Image.Image:
    """Real pictures given another colour and another garment, with attention control and without."""
    stock, (pictures, rows) = loaded("atelier"), real_pictures()
    pipe = InfEditPipeline.from_pipe(stock)
    pipe.scheduler = DDCMScheduler.from_config(stock.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    colours = list(atelier.COLOURS)
    old = [row["text"] for row in rows]
    following = [colours[(colours.index(row["colour"]) + 2) % len(colours)] for row in rows]
    colour = [text.replace(row["colour"], new) for text, row, new in zip(old, rows, following, strict=True)]
    garment = [text.replace(row["garment"], "bag") for text, row in zip(old, rows, strict=True)]

    def edited(new: list[str], **settings: Any) -> torch.Tensor:
        return pipe(pictures, old, new, generator=seeds(len(new)), output_type="pt", **settings).images

    return sheet(
        {
            "real picture": pictures,
            "another colour": edited(colour),
            "a bag": edited(garment),
            "a bag, no control": edited(garment, attention_control=False),
        }
    )


def minority_guidance() -> Image.Image:
    """Garments from the same noise, plain and led to rare samples through the denoiser."""
    pipe, rows = loaded("atelier"), {}
    for label, scale in (("plain sampling", 0.0), ("self-guidance", 1.0)):
        scheduler = MinorityGuidanceScheduler.from_config(
            pipe.scheduler.config, guidance_scale=scale, scale_by_variance=False
        )
        rare = MinorityGuidancePipeline(base=pipe, scheduler=scheduler)
        rows[label] = rare(
            [f"a {garment}" for garment in GARMENTS], num_inference_steps=25, guidance_scale=3.0, generator=seeds(10),
            output_type="pt",
        ).images  # fmt: skip
    return sheet(rows)


def one_more_step() -> Image.Image:
    """Garments whose colour the prompt does not name, plain and with a step that is told one."""
    base = loaded("atelier")
    base.scheduler = DDIMScheduler.from_config(base.scheduler.config, timestep_spacing="leading")
    pipe = loaded("atelier-one-more-step", base=base)
    prompts = [f"a photo of a {garment}" for garment in GARMENTS]

    def drawn(**settings: Any) -> torch.Tensor:
        return pipe(
            prompts, num_inference_steps=4, guidance_scale=3.0, generator=seeds(10), output_type="pt", **settings
        ).images  # fmt: skip

    rows = {"without the step": drawn(one_more_step=False)}
    for colour in ("red", "yellow", "blue"):
        rows[f"something {colour}"] = drawn(oms_prompt=f"something {colour}", oms_guidance_scale=4.0)
    return sheet(rows)


def resshift() -> Image.Image:
    """Small pictures enlarged, and holes filled."""
    pictures, keys = real_pictures()[0], [(index,) for index in range(len(CHOSEN))]
    small = Degradation("sr").apply(2 * pictures - 1, keys).picture / 2 + 0.5
    cut, mask = Degradation("inpaint").apply(2 * pictures - 1, keys)
    generators = {"generator": seeds(len(pictures)), "output_type": "pt"}
    return sheet(
        {
            "8x8": small,
            "atelier-sr": loaded("atelier-sr")(small, **generators).images,
            "holes": cut / 2 + 0.5,
            "atelier-inpaint": loaded("atelier-inpaint")(cut / 2 + 0.5, mask, **generators).images,
            "original": pictures,
        }
    )


DRAWINGS: dict[str, Callable[[], Image.Image]] = {
    "class_conditional": class_conditional, "infedit": infedit, "minority_guidance": minority_guidance,
    "one_more_step": one_more_step, "resshift": resshift,
}  # fmt: skip


def main() -> None:
    """Draw what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(DRAWINGS)}; by default all")
    options = parser.parse_args()
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name in options.names or DRAWINGS:
        file = IMAGES / f"{name}.png"
        small = DRAWINGS[name]().quantize(256, kmeans=4, dither=Image.Dither.NONE)  # 256 colours, for a small file
        small.save(file, optimize=True)
        print(f"{file}: {file.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
