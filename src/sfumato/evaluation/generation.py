"""The generation pass: one picture a prompt and seed, whatever the batch it happens to be drawn in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from sfumato.families import Conditioning, family_of
from sfumato.progress import are_hidden
from sfumato.randomness import generator_for

__all__ = ["draw"]


def draw(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    num_inference_steps: int = 50,
    guidance_scale: float = 3.0,
    batch_size: int = 64,
    description: str | None = "draw",
    conditioning: Conditioning | None = None,
) -> torch.Tensor:
    """Draw one picture for each prompt.

    Args:
        pipe: The model.
        prompts: ``N`` prompts.
        seed: Picture ``k`` is seeded by ``(seed, k)``, so two models given the same call start from the same noise.
        num_inference_steps: Sampler steps.
        guidance_scale: Classifier-free guidance.
        batch_size: Pictures at a time.
        description: The progress bar's label; None shows no bar.
        conditioning: What to show in place of the prompts, as a family encodes them, ``N`` rows.

    Returns:
        Pictures ``(N, 3, H, W)`` in [0, 1], float32, on the CPU.
    """
    family = family_of(pipe)
    parts = []
    for start in tqdm(
        range(0, len(prompts), batch_size), desc=description, disable=description is None or are_hidden()
    ):
        batch = prompts[start : start + batch_size]
        generators = [generator_for(seed, start + k) for k in range(len(batch))]
        given = None
        if conditioning is not None:
            given = {name: values[start : start + batch_size] for name, values in conditioning.items()}
        pictures = family.generate(
            batch, generators, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            conditioning=given,
        )  # fmt: skip
        parts.append(pictures.cpu())
    return torch.cat(parts)
