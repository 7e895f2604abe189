"""Model families: the only place that knows how kinds of pipelines differ; see `sfumato.families.family`."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers import DiffusionPipeline

from sfumato.families.class_conditional import ClassConditionalDDPM, DiT, class_names, class_numbers
from sfumato.families.diffusion_transformer import Flux, PixArt, StableDiffusion3
from sfumato.families.family import Conditioning, Family, Segment, TextFamily
from sfumato.families.latent_space import LatentSpace, latent_space_of
from sfumato.families.stable_diffusion import StableDiffusion, StableDiffusionXL

__all__ = [
    "FAMILIES",
    "ClassConditionalDDPM",
    "Conditioning",
    "DiT",
    "Family",
    "Flux",
    "LatentSpace",
    "PixArt",
    "Segment",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "TextFamily",
    "class_names",
    "class_numbers",
    "family_of",
    "latent_space_of",
]

FAMILIES: Mapping[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "PixArtAlphaPipeline": PixArt,
    "PixArtSigmaPipeline": PixArt,
    "DiTPipeline": DiT,
    "ClassConditionalPipeline": ClassConditionalDDPM,
}
"""The name of a pipeline's class to its family."""


def family_of(pipe: DiffusionPipeline) -> Family:
    """Find the family of a pipeline.

    Args:
        pipe: A diffusers pipeline.

    Returns:
        The adapter that the rest of the library works with.

    Raises:
        ValueError: If the family is not supported; the message names those that are.
    """
    name = type(pipe).__name__
    if name not in FAMILIES:
        raise ValueError(f"{name} is not supported yet; supported pipelines: {', '.join(FAMILIES)}.")
    return FAMILIES[name](pipe)
