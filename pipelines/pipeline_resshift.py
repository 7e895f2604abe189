r"""ResShift: restore pictures in 4 to 15 steps of a chain that starts from the degraded picture.

Yue, Wang, Loy, "ResShift: Efficient Diffusion Model for Image Super-resolution by Residual Shifting", NeurIPS 2023,
arXiv 2307.12348, and "Efficient Diffusion Model for Image Restoration by Residual Shifting", TPAMI 2024,
arXiv 2403.07319. With y the degraded picture at the size of the result (encoded, for latent models), the chain starts
from y with noise, and each step replaces a share of it by the clean picture that the network sees in it,

.. math::
    x_T = y + \kappa \sqrt{\eta_T}\, z, \qquad
    x_j = \frac{\eta_j}{\eta_i} x_i + \frac{\eta_i - \eta_j}{\eta_i}\, f(x_i, i, y)
        + \kappa \sqrt{\frac{\eta_j}{\eta_i} (\eta_i - \eta_j)}\, z,

with the schedule of ``ResShiftScheduler``. Super-resolution, inpainting, denoising and deblurring differ in what the
network was trained on, in `scale`, and in the mask.

Differences from the released program (commit 3ce1d81; written from the papers, not from its code): a ``UNet2DModel``
in place of one with Swin blocks, given the picture itself where theirs has a small encoder of it (folded into channels
if it is larger than the chain's grid); pixels as well as latents; tiles are blended at each step, with one noise for
the whole picture; nothing is drawn for the last step, where theirs draws noise and drops it.
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

__all__ = ["ResShiftPipeline"]


class ResShiftPipeline(RestorationPipeline):
    """Restore pictures with a network that was trained by residual shifting.

        pipe = ResShiftPipeline(unet, ResShiftScheduler(4, 0.2, latent_space=False, clip_sample=True), scale=4)
        pipe(Image.open("small.png")).images[0]

    Args:
        unet: The network. Of (C + K) * patch_size^2 channels: C of the chain, K of the condition (`network_input`).
        scheduler: The ``ResShiftScheduler`` that it was trained with, whose ``num_train_timesteps`` are the steps.
        vae: The autoencoder in whose latents the chain runs; None for a chain of pixels.
        scale: Size of the result over that of the picture: 4 for x4 super-resolution, 1 where the size stays.
        patch_size: Blocks of this side are folded into channels for the network.
        masked: Whether the network fills holes, and is given a mask of them beside the picture.
        conditioned: Whether the network is given the degraded picture (and mask); otherwise the chain's state alone.
        prediction_type: Of the scheduler that the network was trained with, which is kept in the pipeline's folder;
            None takes that of `scheduler`, others are refused.
        num_train_timesteps: Likewise.
        chain: Likewise, what else of that scheduler's config the network is bound to, by name.

    Raises:
        ValueError: If network, scheduler and settings do not fit together.
    """

    _sampler = "ResShiftScheduler"

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | VQModel | None = None,
        scale: int = 1,
        patch_size: int = 1,
        masked: bool = False,
        conditioned: bool = True,
        prediction_type: str | None = None,
        num_train_timesteps: int | None = None,
        chain: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self._register(
            scale=scale, patch_size=patch_size, masked=masked, conditioned=conditioned,
            prediction_type=prediction_type, num_train_timesteps=num_train_timesteps, chain=chain,
        )  # fmt: skip

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        mask_image: Any = None,
        num_inference_steps: int | None = None,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        tile_batch_size: int = 16,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Restore pictures, ``B`` of them.

        Args:
            image: The degraded pictures: PIL image of any mode, array ``(h, w, C)`` or ``(B, h, w, C)``, tensor
                ``(C, h, w)`` or ``(B, C, h, w)``, or a list of such, of any sizes; floats in [0, 1], bytes or 16-bit
                integers. Grey pictures come back grey; transparency is put back, resized. Those of one size run
                together.
            mask_image: For a network that fills holes: white is filled, from one half on, and what is not stays to
                the bit (as far as `output_type` holds it). One for all pictures or one for each, of their sizes.
            num_inference_steps: Steps; None takes those of training. Fewer start with less noise than in training:
                see ``ResShiftScheduler.set_timesteps``.
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
            The restored pictures, in the order of the call.

        Raises:
            ValueError: If an argument is out of range, does not fit the pictures, or a picture can't be read.
        """
        check_output_type(output_type)
        pictures = read_pictures(image)
        masks = self._read_masks(mask_image, pictures)
        tiling = Tiling(tile_size, tile_overlap, tile_batch_size)
        restored = self._restore(pictures, masks, generator, latents, tiling, num_inference_steps)
        images = join_pictures(restored, output_type, pictures)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_components(self) -> None:
        super()._check_components()
        config, latent = self.scheduler.config, self.vae is not None
        if config.normalize_input and config.latent_space != latent:
            raise ValueError(
                f"The chain runs in {'latents' if latent else 'pixels, as there is no `vae`'}, but the scheduler's"
                f" `latent_space` is {config.latent_space}, which scales what the network is given otherwise: make it"
                f" with latent_space={latent}."
            )

    def _chain(self) -> Chain:
        return Chain(("min_noise_level", "kappa", "power", "etas_end", "normalize_input"))

    def _networks(self) -> dict[str, int]:
        return {"unet": 1}

    def _sample(
        self, degraded: Tensor | None, noise: Tensor, predict: Any, generator: Generators, bar: Any, **settings: Any
    ) -> Tensor:
        assert degraded is not None
        state = self.scheduler.initial_sample(degraded, noise)
        for timestep in self.scheduler.timesteps:
            output = predict(state, timestep)
            state = self.scheduler.step(output, timestep, state, degraded, generator=generator, return_dict=False)[0]
            bar.update()
        return state
