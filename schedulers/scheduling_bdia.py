"""BDIA: bi-directional integration approximation, the exactly invertible DDIM at one network call a step.

Zhang, Lewis, Kleijn, "Exact Diffusion Inversion via Bi-directional Integration Approximation", ECCV 2024,
arXiv 2307.10829. With u the noisier and s the cleaner neighbour of time t, and Phi(t -> .) the DDIM step from x_t:

    sample   x_s = Phi(t -> s) + gamma (x_u - Phi(t -> u))
    invert   x_u = Phi(t -> u) + (x_s - Phi(t -> s)) / gamma

The first step is DDIM's. Exact for every gamma in (0, 1]; an inversion multiplies errors by about 1 / gamma a step.
gamma = 1 amplifies nothing, gamma = 0 is DDIM. For EDM and flow matching Phi is the Euler step, or, with `solver`,
Heun's; the authors released no program for EDM that would tell which increments theirs takes.
Deviations from the released programs (commit d4c9518): neighbours come from the list of times, so that any spacing and
number of steps will do; eta, half applied there, must be 0; an inversion begins with a step from time 0, where theirs
begins with a call at a negative time whose result has no weight. Their grids: `timestep_spacing="leading"` and
`set_alpha_to_one=False` with `steps_offset=0` (editing) or 1 (text to image).
"""

from typing import Literal

import numpy as np
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .coupled import TwoStepMixin
from .heun import HeunMixin
from .levels import Level
from .noise_schedule import check_choices, require_fraction
from .reversible import LatentPair, ReversibleSchedulerOutput

__all__ = ["BDIAScheduler", "LatentPair", "ReversibleSchedulerOutput"]


class BDIAScheduler(HeunMixin, TwoStepMixin, SchedulerMixin, ConfigMixin):
    """Exactly invertible DDIM, Euler for flows and EDM (BDIA, arXiv 2307.10829), at one network call a step.

    Stands in for stock schedulers: `pipe.scheduler = BDIAScheduler.from_config(pipe.scheduler.config)`. To invert,
    hand a pipeline with `BDIAScheduler.from_config(..., inverse=True)` clean latents; then `pair` holds both latents
    that [`~BDIAScheduler.set_pair`] of the sampling scheduler asks for. `sfumato.invert` does all of that.

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
        gamma (`float`): Weight of the backward integration, in [0, 1]. 1 for inversion; smaller values, such as 0.5 at
            ten steps, draw better pictures in few steps; 0 is DDIM.
        exact (`bool`): Keep the states on a grid, so that inversion gives back every bit (`torch.equal`), whatever the
            precision of the network; see `coupled.py`. Without it states are float64 and come back to rounding.
        solver (`str`): The increments Phi: `"euler"` (DDIM for models with betas) or `"heun"`, of second order, at
            three network calls a step; see `heun.py`. Flux's image-to-image pipeline takes calls for steps: give it
            `1 - (1 - strength) / 3`.

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
        gamma: float = 1.0,
        exact: bool = False,
        solver: Literal["euler", "heun"] = "euler",
    ) -> None:
        require_fraction("gamma", gamma)
        check_choices(self.config, solver=("euler", "heun"))
        self._start()

    def _gain(self, noisy: Level, now: Level, clean: Level) -> float:
        return self.config.gamma
