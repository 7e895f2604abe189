"""Draw the pictures of ``docs/schedulers``: ``python docs/pictures/schedulers.py [NAME ...]``.

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
    BELMScheduler,
    DDCMScheduler,
    MinorityGuidanceScheduler,
    RDDMScheduler,
    TimeShiftScheduler,
    atelier,
)
from sfumato.evaluation.report import label_rows, picture_grid
from sfumato.families import latent_space_of
from sfumato.loading import assets_folder
from sfumato.pipelines.restoration import degraded_start
from sfumato.restoration.degradations import Degradation

IMAGES = Path(__file__).parents[1] / "images" / "schedulers"
GARMENTS = list(atelier.GARMENTS)
CHOSEN = ("120-", "027-", "054-", "079-", "103-", "148-", "196-", "217-")  # renders, by the start of their names


def seeded(seed: int = 0) -> torch.Generator:
    """A generator for a drawing."""
    return torch.Generator().manual_seed(seed)


def real_pictures() -> tuple[torch.Tensor, list[str], list[str]]:
    """Test renders ``(B, 3, 32, 32)`` in [0, 1], their captions, and the same with another colour."""
    folder, colours = assets_folder() / "renders", list(atelier.COLOURS)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["file_name"].startswith(CHOSEN)]
    space = latent_space_of(loaded("atelier"))
    pictures = space.preprocess([Image.open(folder / row["file_name"]).convert("RGB") for row in rows])
    other = [colours[(colours.index(row["colour"]) + 2) % len(colours)] for row in rows]
    new = [row["text"].replace(row["colour"], colour) for row, colour in zip(rows, other, strict=True)]
    return pictures, [row["text"] for row in rows], new


def loaded(name: str) -> Any:
    """An embedded pipeline without progress bars."""
    pipe = sfumato.load(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sheet(rows: Mapping[str, torch.Tensor], scale: int = 2) -> Image.Image:
    """One row of pictures for each label; grey pictures become RGB, smaller ones are enlarged to the largest."""
    size = max(row.shape[-1] for row in rows.values())
    squares = [F.interpolate(row.float().expand(-1, 3, -1, -1), size=size).clamp(0, 1) for row in rows.values()]
    return label_rows(picture_grid(torch.stack(squares), scale=scale), list(rows))


def garments(scheduler_class: Any, steps: int, **settings: Any) -> torch.Tensor:
    """Ten garments of the pixel model, from the same noise whatever the scheduler."""
    pipe = loaded("atelier-pixel")
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, **settings)
    return pipe(list(range(10)), num_inference_steps=steps, generator=seeded(1), output_type="pt").images


def time_shift() -> Image.Image:
    """Five steps of DDIM, with and without the shift, and of other solvers, beside a hundred."""
    return sheet(
        {
            "DDIM, 5 steps": garments(DDIMScheduler, 5),
            "with time shift": garments(TimeShiftScheduler, 5),
            "F-PNDM, 5 steps": garments(TimeShiftScheduler, 5, solver="f_pndm", window=0),
            "DPM-Solver++, 5 steps": garments(TimeShiftScheduler, 5, solver="dpmsolver++", window=0),
            "DDIM, 100 steps": garments(DDIMScheduler, 100),
        },
        scale=3,
    )


def bdia() -> Image.Image:
    """A round trip to noise and back, by BDIA and by DDIM."""
    pipe = loaded("atelier")
    pictures, captions, _ = real_pictures()
    settings = {"num_inference_steps": 20, "guidance_scale": 3.0}
    found = sfumato.invert(pipe, pictures, captions, scheduler="bdia", **settings)
    stock = sfumato.invert(pipe, pictures, captions, scheduler="ddim", **settings)
    return sheet(
        {
            "encoded": latent_space_of(pipe).decode(found.clean_latents, pictures.shape[-2:]),
            "noise found": found.latents[:, :3] / 6 + 0.5,
            "drawn again": found.sample(pipe),
            "by DDIM": stock.sample(pipe),
        }
    )


def belm() -> Image.Image:
    """Five steps of DDIM and of O-BELM beside a hundred."""
    trailing = {"timestep_spacing": "trailing"}
    return sheet(
        {
            "DDIM, 5 steps": garments(DDIMScheduler, 5, **trailing),
            "O-BELM, 5 steps": garments(BELMScheduler, 5, clip_sample=False, **trailing),
            "DDIM, 100 steps": garments(DDIMScheduler, 100, **trailing),
        },
        scale=3,
    )


def edict() -> Image.Image:
    """The colour of real pictures changed, by EDICT and by BDIA."""
    pipe = loaded("atelier")
    pictures, captions, new = real_pictures()
    return sheet(
        {
            "real picture": pictures,
            "edited": sfumato.edit(pipe, pictures, captions, new, scheduler="edict").images,
            "by BDIA": sfumato.edit(pipe, pictures, captions, new, scheduler="bdia").images,
        }
    )


@torch.no_grad()
def ddcm() -> Image.Image:
    """The colour of real pictures changed in a stock pipeline; the source branch comes back."""
    pipe = loaded("atelier")
    pictures, captions, new = real_pictures()
    space = latent_space_of(pipe)
    source = space.encode(pictures)
    pipe.scheduler = DDCMScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.set_source(source)
    noise = torch.randn(source.shape, generator=seeded())
    drawn = pipe(
        [*captions, *new], latents=noise.repeat(2, 1, 1, 1), num_inference_steps=15, guidance_scale=2.0, eta=1.0,
        generator=seeded(1), output_type="pt",
    ).images  # fmt: skip
    count = len(pictures)
    return sheet({"real picture": pictures, "source branch": drawn[:count], "target branch": drawn[count:]})


def edit_friendly_ddpm() -> Image.Image:
    """The colour of real pictures changed, with three draws of the noise."""
    pipe = loaded("atelier")
    pictures, captions, new = real_pictures()
    rows = {"real picture": pictures}
    for seed in range(3):
        edited = sfumato.edit(pipe, pictures, captions, new, scheduler="ddpm", generator=seeded(seed))
        rows["drawn again"] = edited.reconstructions
        rows[f"edited, seed {seed}"] = edited.images
    return sheet(rows)


def fixed_point() -> Image.Image:
    """A round trip with one and with five iterations a step."""
    pipe = loaded("atelier")
    pictures, captions, _ = real_pictures()
    rows = {}
    for name, label in (("ddim", "K = 1 (DDIM)"), ("fixed-point", "K = 5")):
        found = sfumato.invert(pipe, pictures, captions, scheduler=name, guidance_scale=3.0)
        encoded = latent_space_of(pipe).decode(found.clean_latents, pictures.shape[-2:])
        again = found.sample(pipe)
        rows |= {"encoded": encoded, label: again, f"error, {label[:5]}": 4 * (again - encoded).abs()}
    return sheet(rows)


def minority_guidance() -> Image.Image:
    """Garments without guidance, towards the rarest class, and by Boost-and-Skip, from the same noise."""
    pipe = loaded("atelier")
    stock, rows = pipe.scheduler.config, {}
    for label, settings in (
        ("plain sampling", {"guidance_scale": 0.0}),
        ("classifier", {"guidance_scale": 10.0}),
        ("Boost-and-Skip", {"guidance_scale": 0.0, "boost": 2.0, "skip_steps": 2}),
    ):
        pipe.scheduler = MinorityGuidanceScheduler.from_config(stock, **settings)
        pipe.scheduler.set_classifier(sfumato.load("atelier-minority"))
        rows[label] = pipe(
            [f"a {garment}" for garment in GARMENTS], num_inference_steps=25, guidance_scale=3.0,
            generator=[seeded(seed) for seed in range(len(GARMENTS))], output_type="pt",
        ).images  # fmt: skip
    return sheet(rows)


def rddm() -> Image.Image:
    """States of the chain between an enlarged small picture with noise and the clean one."""
    clean = 2 * real_pictures()[0][:1] - 1
    degraded = degraded_start(Degradation("sr").apply(clean, [(0,)]).picture, 4)
    noise, shares, rows = torch.randn(clean.shape, generator=seeded()), (1.0, 0.8, 0.6, 0.4, 0.2, 0.0), {}
    for total in (0.01, 1.0):
        scheduler = RDDMScheduler(sum_scale=total)
        times = [max(round(share * 1000) - 1, 0) for share in shares]
        states = [scheduler.add_noise(clean, noise, torch.tensor([time]), degraded) for time in times]
        rows[f"S = {total:g}"] = torch.cat(states) / 2 + 0.5
    return sheet(rows, scale=3)


def resshift() -> Image.Image:
    """The states of ``atelier-sr`` as it enlarges small pictures in four steps."""
    pipe = loaded("atelier-sr")
    pictures = real_pictures()[0][:5]
    small = Degradation("sr").apply(2 * pictures - 1, [(index,) for index in range(len(pictures))]).picture
    states, step = [], pipe.scheduler.step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        states.append(args[2])
        return step(*args, **kwargs)

    pipe.scheduler.step = recorded
    restored = pipe(small / 2 + 0.5, generator=seeded(), output_type="pt").images
    rows = {"given": small / 2 + 0.5, "start: y and noise": states[0] / 2 + 0.5}
    rows |= {f"after step {number}": states[number] / 2 + 0.5 for number in (2, 3)}
    return sheet(rows | {f"after step {len(states)}": restored, "original": pictures})


DRAWINGS: dict[str, Callable[[], Image.Image]] = {
    "time_shift": time_shift, "bdia": bdia, "belm": belm, "edict": edict, "ddcm": ddcm,
    "edit_friendly_ddpm": edit_friendly_ddpm, "fixed_point": fixed_point, "minority_guidance": minority_guidance,
    "rddm": rddm, "resshift": resshift,
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
