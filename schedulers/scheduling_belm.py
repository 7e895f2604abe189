"""O-BELM: the two-step exactly invertible sampler of least local error, at one network call a step.

Wang et al., "BELM: Bidirectional Explicit Linear Multi-step Sampler for Exact Inversion in Diffusion Models",
NeurIPS 2024, arXiv 2410.07273. With alpha = sqrt(A), s = sqrt((1 - A) / A), u, t, c from noisy to clean, e = eps(x_t):

    sample   x_c = r^2 (alpha_c / alpha_u) x_u + (1 - r^2) (alpha_c / alpha_t) x_t - alpha_c h (1 + r) e
    invert   x_u = q^2 (alpha_u / alpha_c) x_c + (1 - q^2) (alpha_u / alpha_t) x_t + alpha_u H (1 + q) e
    H = s_u - s_t,  h = s_t - s_c,  r = h / H,  q = 1 / r

which is BDIA's rule with the gain r^2 alpha_c / alpha_u. For flows and EDM alpha = 1, s = sigma, e is the slope. The
first step is DDIM's. Where the last gap h is much smaller than the one before, q^2 is large and an inversion begins by
amplifying its errors: `condition_number` tells; `timestep_spacing="trailing"` avoids it. Deviations from the released
program (commit aa09c5e): float64; the inversion begins at time 0, the program's at time 1 (`released=True`, with
`timestep_spacing="linspace"` and `set_alpha_to_one=True`).
"""

from typing import Literal

import numpy as np
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging

from .coupled import TwoStepMixin
from .levels import Level
from .noise_schedule import noise_schedule  # noqa: F401  loading from the Hub carries along direct imports alone
from .reversible import LatentPair, ReversibleSchedulerOutput

__all__ = ["BELMScheduler", "LatentPair", "ReversibleSchedulerOutput"]

logger = logging.get_logger(__name__)

_ILL_CONDITIONED = 100.0


class BELMScheduler(TwoStepMixin, SchedulerMixin, ConfigMixin):
    """Exactly invertible second-order sampler for noise, flow and EDM models (O-BELM, arXiv 2410.07273).

    Stands in for stock schedulers: `pipe.scheduler = BELMScheduler.from_config(pipe.scheduler.config)`. To invert,
    hand a pipeline with `BELMScheduler.from_config(..., inverse=True)` clean latents; then `pair` holds both latents
    that [`~BELMScheduler.set_pair`] of the sampling scheduler asks for. `sfumato.invert` does all of that.

    Args:
        num_train_timesteps (`int`): Length T of the training schedule.
        beta_start, beta_end, beta_schedule, trained_betas: The betas, as in stock schedulers.
        clip_sample, thresholding (`bool`): Must be False by the time of `set_timesteps`: clipping can't be undone.
        set_alpha_to_one (`bool`): The last step goes to A = 1 (clean data); otherwise to A[0].
        steps_offset (`int`): Added to every time of the `"leading"` grid (Stable Diffusion: 1).
        prediction_type (`str`): `"epsilon"`, `"sample"` or `"v_prediction"`; for EDM the first or the last; for flows,
            which predict a velocity whatever it says, also `"flow_prediction"`.
        timestep_spacing (`str`): `"leading"`, `"linspace"` or `"trailing"`, as in stock schedulers.
        rescale_betas_zero_snr (`bool`): Rescale the betas to A[T - 1] = 0 (arXiv 2305.08891).
        process (`str`): `"vp"` (betas), `"flow"` or `"edm"`; `from_config` tells it from a stock config.
        shift, use_dynamic_shifting, base_shift, max_shift, base_image_seq_len, max_image_seq_len, shift_terminal: As
            in stock `FlowMatchEulerDiscreteScheduler`, for flows alone.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, time_shift_type: Likewise.
        sigma_min, sigma_max, sigma_data, sigma_schedule, rho: As in stock `EDMEulerScheduler`, for EDM alone.
        skip_steps (`int`): Leave out so many of the noisiest steps: `N - int(N * strength)` of them for a `strength`.
        inverse (`bool`): Walk from the clean end to the noise: hand a pipeline clean latents as `latents`.
        on_edit (`str`): What to do if the latents were changed between two steps, as pipelines for inpainting with a
            four-channel network do: `"raise"` an error, or `"adopt"` them, which gives up exact inversion.
        exact (`bool`): Keep the states on a grid, so that inversion gives back every bit (`torch.equal`), whatever the
            precision of the network; see `coupled.py`. Without it states are float64 and come back to rounding.
        released (`bool`): Begin an inversion with the network at time 1, as the released program does.

    Raises:
        ValueError: For a value outside what is listed above.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "epsilon",
        thresholding: bool = False,
        timestep_spacing: Literal["leading", "linspace", "trailing"] = "leading",
        rescale_betas_zero_snr: bool = False,
        process: Literal["vp", "flow", "edm"] = "vp",
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int | None = 256,
        max_image_seq_len: int | None = 4096,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: Literal["karras", "exponential"] = "karras",
        rho: float = 7.0,
        skip_steps: int = 0,
        inverse: bool = False,
        on_edit: Literal["raise", "adopt"] = "raise",
        exact: bool = False,
        released: bool = False,
    ) -> None:
        self._start()

    def _clean_time(self) -> int:
        return 1 if self.config.released else 0

    def _gain(self, noisy: Level, now: Level, clean: Level) -> float:
        if 0 in (noisy.signal, now.signal, clean.signal):
            raise ValueError(
                "O-BELM needs some signal at every time, and A = 0 at the first: use rescale_betas_zero_snr=False or "
                "start below it (steps_offset, timestep_spacing)."
            )
        ahead, behind = _ratio(now) - _ratio(clean), _ratio(noisy) - _ratio(now)
        if ahead == 0 or behind == 0:
            raise ValueError(
                "The last step of this schedule changes nothing (time 0 with set_alpha_to_one=False), and O-BELM"
                " divides by its length: use set_alpha_to_one=True, steps_offset=1 or timestep_spacing='trailing'."
            )
        return (ahead / behind) ** 2 * clean.signal / noisy.signal

    def _plan(self) -> None:
        super()._plan()
        if self.config.inverse and self.condition_number > _ILL_CONDITIONED:
            trailing = "Better take timestep_spacing='trailing'."
            advice = trailing if self.config.process == "vp" else "More steps or a greater `shift` amplify less."
            logger.warning(
                f"This inversion may amplify errors {self.condition_number:.0f} times (condition number): the round"
                f" trip is exact, but the noise it finds may lie far from the true one. {advice}"
            )


def _ratio(level: Level) -> float:
    return level.noise / level.signal
