r"""RDDM: restore or draw pictures by removing a residual and noise from a chain, at once or one after the other.

Liu, Wang, Fan, Wang, Tang, Qu, "Residual Denoising Diffusion Models", CVPR 2024, arXiv 2308.13712. With y the degraded
picture at the size of the result (0 for generation), R and e what the network's heads stand for, at times t > s,

.. math::
    x_T = y + \sqrt{S}\, z, \qquad
    x_s = x_t - (A_t - A_s) R - (B_t - \sqrt{B_s^2 - v})\, e + \sqrt{v}\, z,

with the schedules of ``RDDMScheduler``, and the predicted clean picture as the last step's result. One network puts
out one or both heads, told the time t; or there are two, for R and for e, told A_t T and B_t T.

Differences from the released programs (commit e597481; written from the paper, not from their code): ``UNet2DModel``;
latents as well as pixels; pictures of any size, tiled where they are large; eta is free where there is a y.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, ImagePipelineOutput, UNet2DModel, VQModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from .restoration import Generators, RestorationPipeline
from .restoration_chain import Chain
from .restoration_pictures import check_output_type, join_pictures, read_pictures
from .restoration_tiles import Tiling

__all__ = ["RDDMPipeline"]

STEPS = 5
NOISE = (
    "beta_schedule", "beta_ratio", "sum_scale", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr",
)  # fmt: skip
TWO_HEADS = ("pred_res_noise", "pred_res_add_noise", "pred_x0_noise", "pred_x0_add_noise")


class RDDMPipeline(RestorationPipeline):
    """Restore pictures with a network trained by residual denoising, or draw new ones with one trained for that.

        pipe = RDDMPipeline(unet, RDDMScheduler(sum_scale=0.01), scale=4)
        pipe(Image.open("small.png"), num_inference_steps=5).images[0]

    Args:
        unet: The network, of one head or two as the scheduler's ``prediction_type`` says; of one if there is
            `noise_unet`. Of (C + K) * patch_size^2 channels: C of the chain, K of the condition (`network_input`).
        scheduler: The ``RDDMScheduler`` that it was trained with.
        vae: The autoencoder in whose latents the chain runs; None for a chain of pixels.
        noise_unet: A network of its own for the second head, the noise.
        scale: Size of the result over that of the picture: 4 for x4 super-resolution, 1 where the size stays.
        patch_size: Blocks of this side are folded into channels for the network.
        masked: Whether the network fills holes, and is given a mask of them beside the picture.
        conditioned: Whether the network is given the degraded picture (and mask); otherwise, as for generation, the
            chain's state alone.
        prediction_type: Of the scheduler that the network was trained with, which is kept in the pipeline's folder;
            None takes that of `scheduler`, others are refused.
        num_train_timesteps: Likewise.
        chain: Likewise, what else of that scheduler's config the network is bound to, by name.

    Raises:
        ValueError: If networks, scheduler and settings do not fit together.
    """

    model_cpu_offload_seq = "unet->noise_unet->vae"
    _optional_components = ["vae", "noise_unet"]
    _sampler = "RDDMScheduler"
    _default_steps = STEPS

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | VQModel | None = None,
        noise_unet: UNet2DModel | None = None,
        scale: int = 1,
        patch_size: int = 1,
        masked: bool = False,
        conditioned: bool = True,
        prediction_type: str | None = None,
        num_train_timesteps: int | None = None,
        chain: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, noise_unet=noise_unet)
        self._register(
            scale=scale, patch_size=patch_size, masked=masked, conditioned=conditioned,
            prediction_type=prediction_type, num_train_timesteps=num_train_timesteps, chain=chain,
        )  # fmt: skip

    @torch.no_grad()
    def __call__(
        self,
        image: Any = None,
        mask_image: Any = None,
        num_inference_steps: int = STEPS,
        eta: float = 0.0,
        two_phase: bool = False,
        batch_size: int = 1,
        height: int | None = None,
        width: int | None = None,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        tile_batch_size: int = 16,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Restore the pictures that are given, or draw new ones; ``B`` of them.

        Args:
            image: The degraded pictures: PIL image of any mode, array ``(h, w, C)`` or ``(B, h, w, C)``, tensor
                ``(C, h, w)`` or ``(B, C, h, w)``, or a list of such, of any sizes; floats in [0, 1], bytes or 16-bit
                integers. Grey pictures come back grey; transparency is put back, resized. Those of one size run
                together. None draws new pictures.
            mask_image: For a network that fills holes: white is filled, from one half on, and what is not stays to
                the bit (as far as `output_type` holds it). One for all pictures or one for each, of their sizes.
            num_inference_steps: Steps. All T of the scheduler make a run of the ancestral sampler.
            eta: Part of the noise that each step draws anew, in [0, 1]; 0 is deterministic.
            two_phase: Remove the residual in a sweep over all times, then the noise in another: twice the work.
            batch_size: How many pictures to draw, without `image`.
            height: Of pictures to draw, in pixels; None takes the size that the network was trained on.
            width: Likewise.
            tile_size: Side of the tiles that the network sees, in pixels of the result; None takes the size that it
                was trained on, if its config says that, 0 the whole picture at once. (An autoencoder is always given
                the whole; ``pipe.vae.enable_tiling()`` is its own remedy.)
            tile_overlap: By how much tiles overlap at least, in pixels of the result; None takes a quarter of them.
            tile_batch_size: Tiles that the network is given at once; 0 gives it all.
            generator: Seeds the initial noise and that of the steps; with a list of ``B`` a picture does not depend
                on what is restored beside it.
            latents: The initial noise, standard normal, ``(B, C, h, w)``, or ``(1, C, h, w)`` for the same in all,
                with ``(C, h, w) = latents_shape(height, width)`` of the pictures. Drawn if None.
            output_type: ``"pil"``, ``"np"`` ``(B, H, W, C)`` or ``"pt"`` ``(B, C, H, W)`` in [0, 1]; the latter two
                give a list if shapes differ. PIL images have 8 bits whatever came in, but those of 16 bits, grey in
                PIL, come back as ``I;16``.
            return_dict: Give an ``ImagePipelineOutput`` rather than a tuple.

        Returns:
            The restored pictures in the order of the call, or those drawn.

        Raises:
            ValueError: If an argument is out of range, does not fit the pictures, or a picture can't be read.
        """
        check_output_type(output_type)
        self._check_run(eta, two_phase)
        tiling = Tiling(tile_size, tile_overlap, tile_batch_size)
        pictures = [] if image is None else read_pictures(image)
        if image is None:
            size = self._drawn_size(batch_size, height, width, mask_image)
            found = list(self._draw(batch_size, size, generator, latents, tiling, num_inference_steps, eta, two_phase))
        else:
            masks = self._read_masks(mask_image, pictures)
            found = self._restore(
                pictures, masks, generator, latents, tiling, num_inference_steps, sweeps=1 + two_phase,
                eta=eta, two_phase=two_phase,
            )  # fmt: skip
        images = join_pictures(found, output_type, pictures)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # ------------------------------------------------------------ before any network runs

    def _chain(self) -> Chain:
        config = getattr(self.scheduler, "config", {})
        if not str(config.get("prediction_type")).startswith("pred_"):  # of DDPM, where the residual is free
            return Chain(NOISE, tables=("alphas_cumprod",))
        return Chain(("alpha_schedule", "alpha_ratio", *NOISE), tables=("alphas_cumsum", "betas2_cumsum"))

    def _networks(self) -> dict[str, int]:
        kind = self.scheduler.config.prediction_type
        heads = 1 + (kind in TWO_HEADS)
        if self.noise_unet is None:
            return {"unet": heads}
        if heads == 1:
            raise ValueError(
                f"`noise_unet` is for a prediction of two heads ({', '.join(TWO_HEADS)}), the scheduler's"
                f" prediction_type is {kind!r}, of one: leave it out."
            )
        return {"unet": 1, "noise_unet": 1}

    def _check_run(self, eta: float, two_phase: bool) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"`eta` must lie in [0, 1], got {eta}.")
        kind = self.scheduler.config.prediction_type
        if two_phase and kind not in TWO_HEADS[:2]:
            raise ValueError(
                "`two_phase` needs a head for the residual and one that tells the noise, prediction_type"
                f" {' or '.join(TWO_HEADS[:2])}, got {kind!r}."
            )
        if two_phase and eta:
            raise ValueError(f"`two_phase` draws no noise: `eta` must be 0, got {eta}.")

    def _drawn_size(self, batch_size: int, height: int | None, width: int | None, mask: Any) -> tuple[int, int]:
        """Height and width of pictures to draw."""
        if self.config.conditioned or self.config.masked or self.config.scale != 1:
            raise ValueError("This model restores pictures: give it `image`.")
        if mask is not None:
            raise ValueError("`mask_image` goes with `image`: there is no picture with holes.")
        trained = self.unet.config.sample_size
        known = trained if isinstance(trained, list | tuple) else (trained, trained)
        whole = self.config.patch_size * self.shrink
        sides = [
            side if side is not None else None if one is None else one * whole
            for side, one in zip((height, width), known, strict=True)
        ]  # fmt: skip
        for name, value in (("height", sides[0]), ("width", sides[1]), ("batch_size", batch_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a whole number from 1 on, got {value!r}.")
        return sides[0], sides[1]  # type: ignore[return-value]

    # ------------------------------------------------------------ a run

    def _draw(
        self, count: int, size: tuple[int, int], generator: Generators, latents: Tensor | None, tiling: Tiling,
        num_inference_steps: int, eta: float, two_phase: bool,
    ) -> Tensor:  # fmt: skip
        """Draw pictures ``(B, 3, H, W)`` in [0, 1]."""
        self._check_components()
        self._check_noise({size: list(range(count))}, count, generator, latents)
        shape, device = self.latents_shape(*size), self._execution_device
        tiles = self._tiles(shape, tiling)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        noise = self._noise((count, *shape), latents, generator, device)
        with self.progress_bar(total=(1 + two_phase) * len(self.scheduler.timesteps)) as bar:
            predict = self._predictor(None, tiles)
            state = self._sample(None, noise, predict, generator, bar, eta=eta, two_phase=two_phase)
        pixels = self._finished(state, *size).cpu()
        self.maybe_free_model_hooks()
        return pixels

    def _network(self, model_input: Tensor, timestep: Tensor) -> Tensor:
        if self.noise_unet is None:
            return super()._network(model_input, timestep)
        times = (time.float() for time in self.scheduler.network_times(timestep))
        heads = [
            unet(model_input.to(unet.dtype), time, return_dict=False)[0].float()
            for unet, time in zip((self.unet, self.noise_unet), times, strict=True)
        ]
        return torch.cat(heads, dim=1)

    def _sample(
        self, degraded: Tensor | None, noise: Tensor, predict: Any, generator: Generators, bar: Any, **settings: Any
    ) -> Tensor:
        scheduler = self.scheduler
        state = scheduler.initial_sample(degraded, noise)
        sweeps: Any = (scheduler.step_residual, scheduler.step_noise) if settings["two_phase"] else (scheduler.step,)
        drawn = {} if settings["two_phase"] else {"eta": settings["eta"], "generator": generator}
        for step in sweeps:
            for timestep in scheduler.timesteps:
                output = predict(state, timestep)
                state = step(output, timestep, state, degraded, **drawn, return_dict=False)[0]
                bar.update()
        return state
