"""Compare inversion methods on the embedded model: how exactly a picture comes back, and how true the noise found is.

python benchmarks/inversion.py

Reconstruction: real test renders are inverted and drawn again; the error is the root mean square in latents relative
to theirs, so the autoencoder's own error is not in it. Noise: latents drawn from known noise in 250 DDIM steps are
inverted in few, and the noise found is compared with the true one, by the same relative error. Some minutes on two
CPU cores.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DPMSolverMultistepInverseScheduler, DPMSolverMultistepScheduler
from PIL import Image

import sfumato
from sfumato.arguments import make_parser
from sfumato.families import latent_space_of
from sfumato.inversion import SCHEDULERS, invert
from sfumato.loading import assets_folder
from sfumato.schedulers.scheduling_bdia import BDIAScheduler

METHODS = (*SCHEDULERS, "dpmsolver++")


@dataclass
class InversionConfig:
    """What to compare.

    Attributes:
        pictures: Number of pictures.
        steps: Numbers of steps, comma-separated.
        guidance_scales: Guidance scales, comma-separated.
        seed: Chooses the pictures and seeds the noise.
    """

    pictures: int = 16
    steps: str = "10,20,50"
    guidance_scales: str = "1,3,7.5"
    seed: int = 0


def renders(count: int, seed: int) -> tuple[list[Image.Image], list[str]]:
    """Choose real test renders and their captions."""
    folder = assets_folder() / "renders"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return [Image.open(folder / rows[i]["file_name"]).convert("RGB") for i in chosen], [
        rows[i]["text"] for i in chosen
    ]


def draw(pipe: Any, scheduler: Any, latents: torch.Tensor, prompts: Sequence[str], steps: int, scale: float) -> Any:
    """Run the pipeline's own loop; gives latents."""
    usual, pipe.scheduler = pipe.scheduler, scheduler
    try:
        return pipe(
            list(prompts), latents=latents, num_inference_steps=steps, guidance_scale=scale, output_type="latent"
        ).images
    finally:
        pipe.scheduler = usual


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Root mean square error relative to that of the truth."""
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


def invert_with(pipe: Any, method: str, clean: torch.Tensor, prompts: Sequence[str], steps: int, scale: float) -> Any:
    """Invert latents; gives the noise found, and a function that draws latents from it again."""
    if method == "dpmsolver++":
        config = pipe.scheduler.config
        noise = draw(pipe, DPMSolverMultistepInverseScheduler.from_config(config), clean, prompts, steps, scale)
        forward = DPMSolverMultistepScheduler.from_config(config)
        return noise, lambda: draw(pipe, forward, noise, prompts, steps, scale)
    pictures = latent_space_of(pipe).decode(clean)
    found = invert(
        pipe, pictures, prompts, latents=clean, scheduler=method, num_inference_steps=steps, guidance_scale=scale,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return found.latents, lambda: found.sample_latents(pipe)


def main(config: InversionConfig) -> None:
    """Measure, print a table, and JSON."""
    pipe = sfumato.load("atelier")
    pipe.set_progress_bar_config(disable=True)
    pictures, prompts = renders(config.pictures, config.seed)
    space = latent_space_of(pipe)
    real = space.encode(space.preprocess(pictures))
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(config.seed + 1))
    fine = BDIAScheduler.from_config(pipe.scheduler.config, gamma=0.0)
    rows = []
    for scale in (float(value) for value in config.guidance_scales.split(",")):
        drawn = draw(pipe, fine, noise, prompts, 250, scale)
        for steps in (int(value) for value in config.steps.split(",")):
            for method in METHODS:
                reconstruction = relative(invert_with(pipe, method, real, prompts, steps, scale)[1](), real)
                found, _ = invert_with(pipe, method, drawn, prompts, steps, scale)
                row = {"guidance": scale, "steps": steps, "method": method, "reconstruction": reconstruction}
                rows.append({**row, "noise": relative(found, noise)})
                print(f"{scale:4} {steps:4} {method:12} {reconstruction:9.1e} {rows[-1]['noise']:9.3f}", flush=True)
    print(json.dumps({"pictures": config.pictures, "seed": config.seed, "rows": rows}, indent=1))


if __name__ == "__main__":
    main(make_parser(InversionConfig, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0])
