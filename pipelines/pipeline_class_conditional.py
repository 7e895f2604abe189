r"""Class-conditional generation in pixel space, with classifier-free guidance.

diffusers has pipelines for unconditional pixel models (DDPM, DDIM) and for class-conditional latent transformers
(DiT), but none for a class-conditional ``UNet2DModel``. This is one; any scheduler of ``DDPMPipeline`` works here,

.. math::
    \hat\epsilon = \epsilon(x_t, \varnothing) + w\,(\epsilon(x_t, c) - \epsilon(x_t, \varnothing)),

with the null class the last row of the class embedding (Ho and Salimans, "Classifier-Free Diffusion Guidance",
arXiv 2207.12598).
"""

from __future__ import annotations

import inspect

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

__all__ = ["ClassConditionalPipeline"]


class ClassConditionalPipeline(DiffusionPipeline):
    """Draw pictures of given classes.

    Args:
        unet: A ``UNet2DModel`` with class embeddings, of which the last is the null class.
        scheduler: Any scheduler for its prediction type.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin) -> None:
        super().__init__()
        if unet.config.num_class_embeds is None:
            raise ValueError("The UNet has no class embeddings; use DDPMPipeline for an unconditional model.")
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int] | torch.Tensor = 0,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw one picture for each label.

        Args:
            class_labels: Labels, ``B`` of them, each from 0 to the number of classes - 1.
            num_inference_steps: Sampler steps.
            guidance_scale: w; 1 is no guidance and costs one network call a step instead of two.
            eta: Noise of the DDIM family, for schedulers that take it.
            generator: Seeds the initial noise and the sampler's; a list of ``B`` seeds each picture alone.
            latents: Initial noise ``(B, C, H, W)``, drawn if None.
            output_type: ``"pil"``, ``"np"`` or ``"pt"``; the latter two give ``[0, 1]``.
            return_dict: Give an ``ImagePipelineOutput`` rather than a tuple.

        Returns:
            The pictures.

        Raises:
            ValueError: If a label is out of range.
        """
        device = self._execution_device
        labels = torch.as_tensor(class_labels, dtype=torch.long).reshape(-1)
        null = self.unet.config.num_class_embeds - 1
        if labels.numel() == 0 or labels.min() < 0 or labels.max() >= null:
            raise ValueError(f"`class_labels` must be between 0 and {null - 1}, got {labels.tolist()}.")
        labels = labels.to(device)
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (len(labels), self.unet.config.in_channels, height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have the shape {shape}, got {tuple(latents.shape)}.")
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        sample = latents.to(device, self.unet.dtype) * self.scheduler.init_noise_sigma
        accepted = inspect.signature(self.scheduler.step).parameters
        offered = {"eta": eta, "generator": generator}
        extra = {name: value for name, value in offered.items() if name in accepted}
        guided = guidance_scale != 1
        if guided:
            labels = torch.cat([torch.full_like(labels, null), labels])
        for timestep in self.progress_bar(self.scheduler.timesteps):
            model_input = self.scheduler.scale_model_input(torch.cat([sample] * 2) if guided else sample, timestep)
            prediction = self.unet(model_input, timestep, class_labels=labels, return_dict=False)[0]
            if guided:
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + guidance_scale * (conditional - unconditional)
            sample = self.scheduler.step(prediction, timestep, sample, **extra, return_dict=False)[0]
        images = (sample.float() / 2 + 0.5).clamp(0, 1).cpu()
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
