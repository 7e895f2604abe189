r"""What a model still knows of the pictures that the original drew for some prompts.

The denoising loss on them,

.. math::
    \ell_i(\theta) = E_{x \sim \text{original}(c_i),\, t,\, \epsilon}\; \|\text{target}_t(x, \epsilon)
    - f_\theta(x_t, t, c_i)\|^2 ,

with the same pictures, times and noise for every model that is compared: small where the concept survived.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline

from sfumato.families import family_of
from sfumato.randomness import generator_for, randn_for

__all__ = ["DenoisingResidual"]

PICTURE_STREAM, NOISE_STREAM = 400, 401


class DenoisingResidual:
    """Per-prompt denoising loss of any model on pictures that one model, the original, drew.

    Args:
        pipe: The original.
        prompts: ``N`` prompts.
        pictures: Pictures of each.
        times: Times of each picture, evenly spread over the noise schedule.
        num_inference_steps: Sampler steps of a picture.
        guidance_scale: Guidance scale of a picture.
        batch_size: Pictures at a time.
        seed: Seeds the pictures and the noise.
        legacy_scaled_noise: Compare predictions with a thousandth of their target, as the released code of Fan et al.
            (arXiv 2403.07362) does, which measures how large a prediction is rather than how wrong.
        legacy_first_prompt: Ask for the prompt of the first of every four pictures, the batches of the released code,
            whatever the other three show.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        prompts: Sequence[str],
        *,
        pictures: int = 2,
        times: int = 10,
        num_inference_steps: int = 20,
        guidance_scale: float = 7.5,
        batch_size: int = 32,
        seed: int = 0,
        legacy_scaled_noise: bool = False,
        legacy_first_prompt: bool = False,
    ) -> None:
        if not prompts:
            raise ValueError("There are no prompts to measure: give at least one.")
        for name, value in (("pictures", pictures), ("times", times), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        family = family_of(pipe)
        self.prompts, self.pictures, self.batch_size = tuple(prompts), pictures, batch_size
        self.target_scale = 1e-3 if legacy_scaled_noise else 1.0
        self.captions = [prompt for prompt in prompts for _ in range(pictures)]
        count = len(self.captions)
        self.asked = [self.captions[k - k % 4 if legacy_first_prompt else k] for k in range(count)]
        self.latents = torch.cat(
            [
                family.generate(
                    self.captions[start : start + batch_size],
                    [
                        generator_for(seed, PICTURE_STREAM, k)
                        for k in range(start, min(start + batch_size, len(self.captions)))
                    ],
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    latents_only=True,
                ).float()
                for start in range(0, len(self.captions), batch_size)
            ]
        )  # (N * pictures, C, H, W)
        last = family.num_train_timesteps - 1
        # as in the middle of `times` equal parts: neither pure noise nor a clean picture tells models apart
        self.timesteps = [round((k + 0.5) * last / times) for k in range(times)]
        keys = [(seed, NOISE_STREAM, k, t) for t in range(times) for k in range(len(self.captions))]
        noise = randn_for(keys, family.latent_shape)
        self.noise = noise.view(times, len(self.captions), *noise.shape[1:]).to(self.latents)

    @torch.no_grad()
    def __call__(self, pipe: DiffusionPipeline) -> torch.Tensor:
        """Give the losses ``(N,)`` of a model, float64, on the CPU."""
        family = family_of(pipe)
        losses = torch.zeros(len(self.captions), dtype=torch.float64)
        for start in range(0, len(self.captions), self.batch_size):
            rows = slice(start, start + self.batch_size)
            conditioning = family.encode_prompts(self.asked[rows])
            for number, timestep in enumerate(self.timesteps):
                latents, noise = (
                    values.to(family.device) for values in (self.latents[rows], self.noise[number, rows])
                )
                times = torch.full((len(latents),), timestep, device=family.device)
                noisy = family.add_noise(latents, noise, times)
                target = self.target_scale * family.target(latents, noise, times)
                error = family.ask(family.denoiser, noisy, times, conditioning) - target
                losses[rows] += error.double().square().flatten(1).mean(1).cpu()
        return losses.view(len(self.prompts), self.pictures).mean(1) / len(self.timesteps)
