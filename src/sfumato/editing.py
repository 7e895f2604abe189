"""``sfumato invert`` and ``sfumato edit``: a picture's file in; latents, pictures and figures in a folder out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image, UnidentifiedImageError

import sfumato
from sfumato import storage
from sfumato.evaluation.report import picture_grid
from sfumato.families import latent_space_of
from sfumato.inversion import Edit, Inversion, edit_inverted, invert, make_sampler
from sfumato.settings import check_device

__all__ = ["EditingConfig", "run_edit"]


@dataclass
class EditingConfig:
    """What to invert or edit, and how.

    Attributes:
        image: A picture's file, or the folder or file of an earlier inversion, which is then not repeated.
        output: Folder for the results; it must be new or empty.
        prompt: What the picture shows.
        target_prompt: What it is to show; None only inverts and reconstructs.
        model: Embedded model, folder or Hub id.
        scheduler: Name of an invertible scheduler.
        options: Settings of the scheduler, such as ``{"exact": True}``.
        num_inference_steps: Steps of the schedule.
        strength: Share of the steps to take.
        guidance_scale: Guidance towards the target prompt; of the inversion too if there is no other.
        source_guidance_scale: Guidance of the inversion and the reconstruction.
        seed: Seeds the noise of a stochastic scheduler.
        device: Where to run, or None for an accelerator if there is one.
    """

    image: str
    output: str
    prompt: str = ""
    target_prompt: str | None = None
    model: str = "atelier"
    scheduler: str = "bdia"
    options: Mapping[str, Any] | None = None
    num_inference_steps: int = 50
    strength: float = 1.0
    guidance_scale: float = 1.0
    source_guidance_scale: float | None = None
    seed: int = 0
    device: str | None = None


def run_edit(config: EditingConfig) -> dict[str, Any]:
    """Invert a picture, draw it again, and with the target prompt if there is one; write all of it.

    Args:
        config: What and how.

    Returns:
        The figures, which are also in ``figures.json``, beside ``inversion.safetensors`` and ``comparison.png``.

    Raises:
        FileExistsError: If the output folder holds something.
        FileNotFoundError: If there is no such picture.
        ValueError: If it can't be read as one, or the settings are impossible.
    """
    check_device(config.device)
    output = Path(config.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} already holds something. Choose a new or empty output folder.")
    earlier = _earlier(Path(config.image))
    picture = None if earlier else _read_picture(Path(config.image))
    pipe = sfumato.load(config.model)
    pipe.to(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found = earlier or _invert(pipe, picture, config)
    result = edit_inverted(pipe, found, config.target_prompt, config.guidance_scale)
    figures = _figures(config, result)
    with storage.atomic_directory(output) as partial:
        found.save(partial / "inversion.safetensors")
        _comparison(result, config.target_prompt is not None).save(partial / "comparison.png")
        for name, pictures in (("edited", result.images), ("reconstructed", result.reconstructions)):
            if name == "reconstructed" or config.target_prompt is not None:
                picture_grid(pictures[:1, None], scale=1).save(partial / f"{name}.png")
        storage.write_text(partial / "figures.json", json.dumps(figures, indent=1))
    return figures


def _earlier(path: Path) -> Inversion | None:
    file = path / "inversion.safetensors" if path.is_dir() else path
    return Inversion.load(file) if file.suffix == ".safetensors" else None


def _read_picture(path: Path) -> Image.Image:
    if not path.is_file():
        raise FileNotFoundError(f"There is no picture {path}.")
    try:
        return Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} can't be read as a picture ({error}).") from error


def _invert(pipe: DiffusionPipeline, picture: Any, config: EditingConfig) -> Inversion:
    latent_space_of(pipe)
    scale = config.guidance_scale if config.source_guidance_scale is None else config.source_guidance_scale
    return invert(
        pipe, picture, config.prompt, scheduler=make_sampler(pipe, config.scheduler, **(config.options or {})),
        num_inference_steps=config.num_inference_steps, strength=config.strength, guidance_scale=scale,
        generator=torch.Generator().manual_seed(config.seed),
    )  # fmt: skip


def _figures(config: EditingConfig, result: Edit) -> dict[str, Any]:
    found = result.inversion
    return {
        "scheduler": found.scheduler_class.__name__,
        "prompt": found.prompt[0],
        "target_prompt": config.target_prompt,
        "num_inference_steps": found.num_inference_steps,
        "guidance_scale": found.guidance_scale,
        "latent_error": result.latent_error,
        "autoencoder_psnr": result.autoencoder_psnr,
        "reconstruction_psnr": result.reconstruction_psnr,
        "condition_number": found.condition_number,
        "noise": asdict(found.noise),
    }


def _comparison(result: Edit, edited: bool) -> Image.Image:
    """One row a picture: original, through the autoencoder, reconstructed from the noise, edited."""
    columns = [result.originals, result.autoencoded, result.reconstructions, *([result.images] if edited else [])]
    pictures = torch.stack([column.cpu() for column in columns], dim=1)
    return picture_grid(pictures, scale=max(1, 256 // pictures.shape[-1]), gap=8)
