r"""How a family's models are noised, and what they predict: the diffusion process and the flow.

Times are integers k of a table of N levels, the least noisy first, whatever the model is told of them:

.. math::
    \text{diffusion:}\quad z_k = \sqrt{\bar\alpha_k}\, x_0 + \sqrt{1 - \bar\alpha_k}\, \epsilon, \quad t = k ;
    \qquad \text{flow:}\quad z_k = (1 - \sigma_k)\, x_0 + \sigma_k\, \epsilon, \quad t = 1000\, \sigma_k .

A diffusion model predicts the noise, x_0, or the velocity
:math:`\sqrt{\bar\alpha}\, \epsilon - \sqrt{1 - \bar\alpha}\, x_0` (Salimans and Ho, arXiv 2202.00512); a flow the
velocity :math:`\epsilon - x_0` (Esser et al., arXiv 2403.03206).
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler

__all__ = ["Diffusion", "Flow", "Process", "process_of"]


class Process(Protocol):
    """A table of noise levels and what the model says at them. Latents are ``(B, C, H, W)``, times ``(B,)``."""

    prediction_type: str
    """``"epsilon"``, ``"v_prediction"``, ``"sample"`` or ``"flow"``."""

    @property
    def levels(self) -> int:
        """The length of the table."""
        ...

    def scales(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of x_0 and of the noise at times, float64, ``(B,)`` each."""
        ...

    def model_times(self, timesteps: torch.Tensor) -> torch.Tensor:
        """What the denoiser is told of times, ``(B,)``."""
        ...

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the denoiser should predict of `latents` with `noise` in them."""
        ...

    def split(
        self, prediction: torch.Tensor, latents: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean latents and noise, of noisy latents and what the denoiser predicts of them."""
        ...

    def inference_timesteps(self, num_inference_steps: int) -> torch.Tensor:
        """The descending times ``(N,)`` that a sampler visits, on the CPU."""
        ...


class Diffusion:
    """Variance-preserving diffusion.

    Args:
        scheduler: A diffusers scheduler with ``alphas_cumprod``.
    """

    def __init__(self, scheduler: Any) -> None:
        self.prediction_type = scheduler.config.get("prediction_type", "epsilon")
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                f"Prediction type {self.prediction_type!r} is not one of 'epsilon', 'v_prediction', 'sample'; fix "
                "`prediction_type` in the scheduler's config."
            )
        self.config = scheduler.config
        self.alphas_cumprod: torch.Tensor = scheduler.alphas_cumprod.double().cpu()

    @property
    def levels(self) -> int:
        """The length of the table."""
        return len(self.alphas_cumprod)

    def scales(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give the square roots of alpha_bar and of 1 - alpha_bar."""
        alphas = self.alphas_cumprod.to(timesteps.device)[timesteps]
        return alphas.sqrt(), (1 - alphas).sqrt()

    def model_times(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Give the times themselves."""
        return timesteps

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Give the noise, the velocity, or the latents."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        signal, sigma = _spread(self.scales(timesteps), latents)
        return signal * noise - sigma * latents

    def split(
        self, prediction: torch.Tensor, latents: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Solve for both."""
        signal, sigma = _spread(self.scales(timesteps), latents)
        if self.prediction_type == "epsilon":
            return (latents - sigma * prediction) / signal, prediction
        if self.prediction_type == "sample":
            return prediction, (latents - signal * prediction) / sigma
        return signal * latents - sigma * prediction, signal * prediction + sigma * latents

    def inference_timesteps(self, num_inference_steps: int) -> torch.Tensor:
        """Give the times of a DDIM sampler of the scheduler's config."""
        scheduler = DDIMScheduler.from_config(self.config)
        scheduler.set_timesteps(num_inference_steps)
        return scheduler.timesteps.long().cpu()


class Flow:
    """Rectified flow.

    Args:
        scheduler: A ``FlowMatchEulerDiscreteScheduler``, or one of its config.
        tokens: Tokens of a picture, on which the levels depend if the scheduler shifts them with the resolution.
    """

    prediction_type = "flow"

    def __init__(self, scheduler: Any, tokens: int) -> None:
        config = scheduler.config
        self._length = config.num_train_timesteps
        grid = torch.arange(1, self._length + 1, dtype=torch.float64) / self._length
        if config.get("use_dynamic_shifting"):
            low, high = config.base_image_seq_len, config.max_image_seq_len
            slope = (config.max_shift - config.base_shift) / (high - low)
            shift = config.base_shift + slope * (tokens - low)
            self.shift = math.exp(shift) if config.get("time_shift_type", "exponential") == "exponential" else shift
        else:
            self.shift = config.get("shift", 1.0)
        self.sigmas = self.shift * grid / (1 + (self.shift - 1) * grid)

    @property
    def levels(self) -> int:
        """The length of the table."""
        return self._length

    def scales(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Give 1 - sigma and sigma."""
        sigmas = self.sigmas.to(timesteps.device)[timesteps]
        return 1 - sigmas, sigmas

    def model_times(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Give sigma times the number of levels, float32."""
        return (self._length * self.sigmas.to(timesteps.device)[timesteps]).float()

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Give the velocity, which is the same at all times."""
        return noise - latents

    def split(
        self, prediction: torch.Tensor, latents: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Follow the velocity to both ends."""
        signal, sigma = _spread(self.scales(timesteps), latents)
        return latents - sigma * prediction, latents + signal * prediction

    def inference_timesteps(self, num_inference_steps: int) -> torch.Tensor:
        """Give evenly spaced times; their levels are shifted as the table is."""
        grid = torch.linspace(self._length, self._length / num_inference_steps, num_inference_steps)
        return grid.round().long().clamp(min=1) - 1


def process_of(scheduler: Any, tokens: int, *, flow: bool, label: str) -> Process:
    """Find the process of a pipeline's scheduler.

    Args:
        scheduler: The pipeline's.
        tokens: See `Flow`.
        flow: Whether the family's models are flows.
        label: Of the family, for the error.

    Raises:
        ValueError: If the scheduler is of the other kind.
    """
    name, config = type(scheduler).__name__, scheduler.config
    # sfumato's own have every process's settings and say which holds; of stock ones only flows have these
    of_flows = config["process"] == "flow" if "process" in config else "shift" in config
    if flow:
        if not of_flows:
            raise ValueError(
                f"{name} is no flow-matching scheduler, {label} needs one; set pipe.scheduler = "
                "FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder='scheduler')."
            )
        return Flow(scheduler, tokens)
    if of_flows or getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(
            f"{name} has no betas (a flow-matching scheduler or EDM's), {label} needs them; set pipe.scheduler = "
            "DDIMScheduler.from_pretrained(model, subfolder='scheduler')."
        )
    return Diffusion(scheduler)


def _spread(scales: tuple[torch.Tensor, torch.Tensor], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales ``(B,)`` as factors of latents ``(B, C, H, W)``, in their dtype."""
    signal, sigma = (scale.view(-1, *[1] * (like.ndim - 1)).to(like) for scale in scales)
    return signal, sigma
