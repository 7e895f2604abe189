r"""InfEdit: edit a real picture by its description, without inverting it.

Xu, Huang, Pan, Ma, Chai, "Inversion-Free Image Editing with Natural Language", CVPR 2024, arXiv 2312.04965. Virtual
inversion is the scheduler's (``DDCMScheduler``: the source's known error is taken off the target's prediction),
unified attention control is in ``attention_control.py`` (layout and words come from the source, through a third
branch). Here is the loop over both, with one network call a step on the branches source, target and mutual,

.. math::
    \epsilon_b = \epsilon(x_b, \varnothing) + w_b\,(\epsilon(x_b, c_b) - \epsilon(x_b, \varnothing)), \qquad
    c = (c_{src}, c_{tgt}, c_{src}),\; w = (w_{src}, w_{tgt}, w_{src}),

and the blend of target and source where local words are given. Equal prompts and equal guidance scales give the
autoencoder's reconstruction of the picture, to the bit where the network is deterministic along its batch.

Differences from the released program (commit eaac91e; written from the paper, not from its code): batches, SDXL, the
posterior's mode in place of a draw from it, one negative prompt for all branches (there, the source has its own),
prompts aligned by longest common runs of tokens, source words looked up in the source prompt's own maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from .attention_control import AttentionControl, BlendWords, align_tokens, check_processors, controlled, find_word

__all__ = ["InfEditPipeline", "InfEditPipelineOutput"]


@dataclass
class InfEditPipelineOutput(BaseOutput):
    """Output of [`InfEditPipeline`].

    Args:
        images: ``B`` PIL images, an array ``(B, H, W, 3)`` or a tensor ``(B, 3, H, W)`` in [0, 1], or scaled latents.
        nsfw_content_detected: What the safety checker found in each, None without one.
    """

    images: Any
    nsfw_content_detected: list[bool] | None = None


class InfEditPipeline(DiffusionPipeline):
    """Edit pictures with Stable Diffusion 1.x, 2.x or XL, whose components it takes as they are.

    ``pipe = InfEditPipeline.from_pipe(sd_pipe)`` or ``InfEditPipeline(**sd_pipe.components)``, then
    ``pipe.scheduler = DDCMScheduler.from_config(pipe.scheduler.config)``.

    Args:
        vae: The autoencoder.
        text_encoder, tokenizer: The (first) text encoder and its tokenizer.
        unet: The denoiser, distilled (LCM) or not. An LCM's guidance embedding is not used, as in the paper's program.
        scheduler: A ``DDCMScheduler`` by the time of the call.
        text_encoder_2, tokenizer_2: The second ones, of SDXL.
        safety_checker, feature_extractor: Run on the results where there is one.
        image_encoder: Not used; in the components of stock pipelines.
        force_zeros_for_empty_prompt: SDXL: embed a missing negative prompt as zeros.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components = ["text_encoder_2", "tokenizer_2", "safety_checker", "feature_extractor", "image_encoder"]
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents", "prompt_embeds"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: torch.nn.Module,
        tokenizer: Any,
        unet: UNet2DConditionModel,
        scheduler: Any,
        text_encoder_2: torch.nn.Module | None = None,
        tokenizer_2: Any = None,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        force_zeros_for_empty_prompt: bool = True,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
            text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2, safety_checker=safety_checker,
            feature_extractor=feature_extractor, image_encoder=image_encoder,
        )  # fmt: skip
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)
        scale = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=scale)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> InfEditPipeline:
        """As in `DiffusionPipeline`, but says which pipelines it can start from."""
        parts = {
            name for name in ("vae", "text_encoder", "tokenizer", "unet") if getattr(pipeline, name, None) is None
        }
        if parts:
            raise ValueError(
                f"InfEditPipeline starts from a pipeline of Stable Diffusion 1.x, 2.x or XL; {type(pipeline).__name__}"
                f" has no {', '.join(sorted(parts))}."
            )
        if not {"dtype", "torch_dtype"} & set(kwargs):
            kwargs["dtype"] = pipeline.unet.dtype  # diffusers would widen the shared modules to float32
        return super().from_pipe(pipeline, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        source_prompt: str | Sequence[str],
        target_prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 15,
        strength: float = 1.0,
        source_guidance_scale: float = 1.0,
        target_guidance_scale: float = 2.0,
        attention_control: bool = True,
        cross_replace_steps: float = 0.7,
        self_replace_steps: float = 0.3,
        source_blend_words: str | Sequence[str] | None = None,
        target_blend_words: str | Sequence[str] | None = None,
        source_blend_threshold: float = 0.6,
        target_blend_threshold: float = 0.6,
        eta: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> InfEditPipelineOutput | tuple:
        """Edit ``B`` pictures, each from its source prompt to its target prompt; a single one serves all others.

        Args:
            image: The pictures: PIL, array or tensor ``(B, 3, H, W)`` in [0, 1], or a list of them, all of one size.
            source_prompt: What the pictures show.
            target_prompt: What they shall show.
            negative_prompt: Unconditional text of all branches.
            num_inference_steps: Times N at strength 1.
            strength: Part of the times to run, in (0, 1]. Below 1 the run starts from the noised picture.
            source_guidance_scale: Classifier-free guidance of the source and the mutual branch.
            target_guidance_scale: That of the target; <= 1 turns guidance off for all, at half the cost.
            attention_control: False runs plain DDCM on two branches: freer edits, at two thirds of the cost.
            cross_replace_steps: Progress up to which the target looks at the words that both prompts have as the
                source does, in [0, 1]. Larger keeps more of the picture.
            self_replace_steps: Progress up to which self-attention takes the source's layout, in [0, 1].
            source_blend_words: Words of the source prompt, separated by spaces: pixels that look at them stay. Maps
                of up to 32 x 32 queries count, from the second step on.
            target_blend_words: Words of the target prompt: pixels that do not look at them keep the mutual branch;
                without any, all may change. A word given in both moves to the target's layout with the source's look.
            source_blend_threshold: How much a pixel has to look at source words, relative to the most, in [0, 1].
            target_blend_threshold: Likewise at target words; at least 0.15 / sqrt(A), A the signal of the time.
            eta: Part of the variance that a step draws anew, in [0, 1].
            generator: Seeds the initial noise and the steps'; with a list of ``B`` a result does not depend on its
                batch.
            latents: The initial noise ``(B, C, h, w)``, drawn if None.
            output_type: ``"pil"``, ``"np"``, ``"pt"`` or ``"latent"``.
            return_dict: Give an [`InfEditPipelineOutput`] rather than a tuple.
            callback_on_step_end: Called as ``callback(pipe, step, timestep, tensors)``; what it returns replaces them.
            callback_on_step_end_tensor_inputs: Which: ``"latents"`` ``(branches * B, C, h, w)``, source, target and
                mutual branch one after the other, and ``"prompt_embeds"``, as the network gets them.

        Returns:
            The edited pictures.

        Raises:
            ValueError: If an argument is out of range, lists do not match, a blend word is not in its prompt, or the
                components are not those of a text-to-image pipeline with a ``DDCMScheduler``.
        """
        fractions = {
            "eta": eta, "cross_replace_steps": cross_replace_steps, "self_replace_steps": self_replace_steps,
            "source_blend_threshold": source_blend_threshold, "target_blend_threshold": target_blend_threshold,
        }  # fmt: skip
        blending = bool(source_blend_words or target_blend_words)
        _check_settings(fractions, output_type, blending and not attention_control)
        self._check_components(attention_control)
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"Callbacks can have {self._callback_tensor_inputs}, not {sorted(unknown)}.")
        pixels, texts = _matched(
            self._pixels(image),
            source_prompt=source_prompt, target_prompt=target_prompt, negative_prompt=negative_prompt,
            source_blend_words=source_blend_words, target_blend_words=target_blend_words,
        )  # fmt: skip
        device, branches, guided = self._execution_device, 3 if attention_control else 2, target_guidance_scale > 1
        noise = self._noise(pixels, latents, generator, device)
        self.scheduler.set_timesteps(num_inference_steps, device=device, strength=strength)
        self._interrupt, self._num_timesteps = False, len(self.scheduler.timesteps)
        control = None
        if attention_control:
            control = self._control(texts, fractions, blending, noise.shape[-2:], device)

        conditioning = self._conditioning(texts, guided, branches, pixels.shape[-2:], device)
        scales = [source_guidance_scale, target_guidance_scale, source_guidance_scale][:branches] if guided else None
        source = self._encode(pixels.to(device))
        if strength < 1:
            noise = self.scheduler.add_noise(source, noise, self.scheduler.timesteps[:1])
        state = noise.repeat(branches, 1, 1, 1)
        self.scheduler.set_source(source)
        try:
            with controlled(self.unet, control) if control else nullcontext():
                for index, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
                    if self._interrupt:
                        continue
                    if control:  # counted with the steps that a strength below 1 leaves out
                        step = num_inference_steps - self._num_timesteps + index + 1
                        control.progress = step / num_inference_steps
                    prediction = self._predict(state, timestep, conditioning, scales)
                    state = self.scheduler.step(
                        prediction, timestep, state, eta=eta, generator=generator, return_dict=False
                    )[0]
                    if control and blending and index > 0:
                        alpha = float(self.scheduler.alphas_cumprod[int(timestep)])
                        state = control.blend(state, alpha, index + 1 == self._num_timesteps)
                    if callback_on_step_end is not None:
                        tensors = {"latents": state, "prompt_embeds": conditioning["encoder_hidden_states"]}
                        chosen = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                        tensors |= callback_on_step_end(self, index, timestep, chosen) or {}
                        state, conditioning["encoder_hidden_states"] = tensors["latents"], tensors["prompt_embeds"]
        finally:
            self.scheduler.set_source(None)  # a picture is no setting: it does not outlive its call
        output = self._pictures(state.chunk(branches)[1], output_type)
        self.maybe_free_model_hooks()
        return output if return_dict else (output.images, output.nsfw_content_detected)

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked to leave out the rest of the steps, by setting `_interrupt`."""
        return self._interrupt

    # ------------------------------------------------------------ before any network runs

    def _check_components(self, attention_control: bool) -> None:
        unet, vae = self.unet, self.vae
        # By name: a scheduler loaded from the Hub is another class object of the same file.
        if type(self.scheduler).__name__ != "DDCMScheduler":
            raise ValueError(
                f"InfEdit steps with a DDCMScheduler, this pipeline has a {type(self.scheduler).__name__}: set"
                " `pipe.scheduler = DDCMScheduler.from_config(pipe.scheduler.config)`."
            )
        if unet.config.in_channels != vae.config.latent_channels:
            raise ValueError(
                f"InfEdit needs a text-to-image UNet of {vae.config.latent_channels} channels, this one takes"
                f" {unet.config.in_channels} (inpainting, depth or instruction models do)."
            )
        kind = unet.config.addition_embed_type
        if kind not in (None, "text_time") or unet.config.encoder_hid_dim_type not in (None, "text_proj"):
            raise ValueError(
                "InfEdit knows the UNets of Stable Diffusion 1.x, 2.x and XL, this one needs other inputs."
            )
        if (kind == "text_time") != (self.text_encoder_2 is not None) or self.text_encoder is None:
            raise ValueError(
                "SDXL needs two text encoders, Stable Diffusion 1.x and 2.x one (the refiner can't edit)."
            )
        if attention_control:
            check_processors(unet)

    def _pixels(self, image: Any) -> torch.Tensor:
        """The pictures as `(B, 3, H, W)` in [-1, 1], their sides whole multiples of the latents'."""
        images = list(image) if isinstance(image, list | tuple) else [image]
        sizes = {tuple(getattr(one, "size" if hasattr(one, "getbands") else "shape", ())) for one in images}
        if len(sizes) != 1:
            raise ValueError(f"`image` must be pictures of one size, got {len(images)} of {len(sizes)} sizes.")
        if hasattr(images[0], "getbands"):
            images = [one.convert("RGB") for one in images]
        elif not isinstance(images[0], torch.Tensor | np.ndarray):
            raise ValueError(f"`image` must be PIL images, tensors or arrays, got {type(images[0]).__name__}.")
        pixels = self.image_processor.preprocess(images if len(images) > 1 else images[0])
        if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.numel():
            raise ValueError(f"`image` must give RGB pictures (B, 3, H, W), got the shape {tuple(pixels.shape)}.")
        return pixels.contiguous()  # PIL's memory order would pick other kernels, and the result depend on it

    def _ids(self, prompt: str) -> list[int]:
        return self.tokenizer(prompt, truncation=True, max_length=self.tokenizer.model_max_length).input_ids

    def _noise(self, pixels: torch.Tensor, latents: Any, generator: Any, device: torch.device) -> torch.Tensor:
        """The initial noise `(B, C, h, w)`, float32 whatever the network's precision, given or drawn."""
        if isinstance(generator, list) and len(generator) != len(pixels):
            raise ValueError(
                f"`generator` must be one or a list of {len(pixels)}, one a picture, got {len(generator)}."
            )
        scale = self.image_processor.config.vae_scale_factor
        height, width = (side // scale for side in pixels.shape[-2:])
        shape = (len(pixels), self.unet.config.in_channels, height, width)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have the shape {shape}, got {tuple(latents.shape)}.")
        return latents.to(device, torch.float32)

    def _control(
        self,
        texts: dict[str, list],
        settings: dict[str, float],
        blending: bool,
        size: Sequence[int],
        device: torch.device,
    ) -> AttentionControl:
        """What the attention processors need to know of this call."""
        pairs = zip(texts["source_prompt"], texts["target_prompt"], strict=True)
        length = self.tokenizer.model_max_length
        rows = [align_tokens(self._ids(source), self._ids(target), length) for source, target in pairs]
        blend = None
        if blending:
            source, target = (self._marked(texts, branch).to(device) for branch in ("source", "target"))
            thresholds = settings["source_blend_threshold"], settings["target_blend_threshold"]
            blend = BlendWords(source, target, *thresholds)
        steps = settings["self_replace_steps"], settings["cross_replace_steps"]
        return AttentionControl(torch.tensor(rows, device=device), *steps, (size[0], size[1]), blend)

    def _marked(self, texts: dict[str, list], branch: str) -> torch.Tensor:
        """Which tokens of the prompts belong to the branch's blend words, `(B, tokens)`."""
        prompts = texts[f"{branch}_prompt"]
        marked = torch.zeros(len(prompts), self.tokenizer.model_max_length, dtype=torch.bool)
        for row, (prompt, words) in enumerate(zip(prompts, texts[f"{branch}_blend_words"], strict=True)):
            for word in (words or "").split():
                found = find_word(self._ids(prompt), self.tokenizer(word, add_special_tokens=False).input_ids)
                if not found:
                    raise ValueError(f"The word {word!r} of `{branch}_blend_words` is not in the prompt {prompt!r}.")
                marked[row, found] = True
        return marked

    # ------------------------------------------------------------ networks

    def _embed(self, prompts: list[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `(B, tokens, width)` and, for SDXL, pooled ones `(B, width)`; without it, the same twice."""
        hidden, pooled = [], torch.empty(0)
        for tokenizer, encoder in ((self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)):
            if encoder is None:
                continue
            length = tokenizer.model_max_length
            tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            masked = getattr(encoder.config, "use_attention_mask", False)
            mask = tokens.attention_mask.to(device) if masked else None
            output = encoder(
                tokens.input_ids.to(device),
                attention_mask=mask,
                output_hidden_states=self.text_encoder_2 is not None,
            )
            pooled = output[0]
            hidden.append(output[0] if self.text_encoder_2 is None else output.hidden_states[-2])
        return torch.cat(hidden, dim=-1).to(self.unet.dtype), pooled.to(self.unet.dtype)

    def _conditioning(
        self, texts: dict[str, list], guided: bool, branches: int, size: Sequence[int], device: torch.device
    ) -> dict[str, Any]:
        """The network's arguments: unconditional half if guided, then prompts of source, target, source (mutual)."""
        roles = [texts["source_prompt"], texts["target_prompt"], texts["source_prompt"]][:branches]
        parts = [self._embed(prompts, device) for prompts in roles[:2]]
        parts = [*parts, parts[0]][:branches]
        if guided:
            negative = self._embed([prompt or "" for prompt in texts["negative_prompt"]], device)
            if self.text_encoder_2 is not None and self.config.force_zeros_for_empty_prompt:
                given = torch.tensor([prompt is not None for prompt in texts["negative_prompt"]], device=device)
                negative = (negative[0] * given[:, None, None], negative[1] * given[:, None])
            parts = [negative] * branches + parts
        hidden, pooled = (torch.cat(column) for column in zip(*parts, strict=True))
        conditioning: dict[str, Any] = {"encoder_hidden_states": hidden}
        if self.text_encoder_2 is not None:
            time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=hidden.dtype, device=device)
            conditioning["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": time_ids.repeat(len(hidden), 1)}
        return conditioning

    def _predict(
        self, latents: torch.Tensor, timestep: torch.Tensor, conditioning: dict[str, Any], scales: list[float] | None
    ) -> torch.Tensor:
        """The prediction `(branches * B, C, h, w)`, float32, each branch guided by its scale."""
        model_input = self.scheduler.scale_model_input(latents, timestep).to(self.unet.dtype)
        if scales is None:
            return self.unet(model_input, timestep, **conditioning, return_dict=False)[0].float()
        prediction = self.unet(torch.cat([model_input] * 2), timestep, **conditioning, return_dict=False)[0].float()
        unconditional, conditional = prediction.chunk(2)
        weights = prediction.new_tensor(scales).repeat_interleave(len(latents) // len(scales)).reshape(-1, 1, 1, 1)
        return unconditional + weights * (conditional - unconditional)

    @contextmanager
    def _wide_vae(self) -> Iterator[torch.dtype]:
        """What the autoencoder computes in meanwhile: some overflow in half precision and say so in their config."""
        dtype = self.vae.dtype
        upcast = dtype == torch.float16 and self.vae.config.force_upcast
        try:
            if upcast:
                self.vae.to(dtype=torch.float32)
            yield self.vae.dtype
        finally:
            if upcast:
                self.vae.to(dtype=dtype)

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Scaled latents of the pictures, float32: the posterior's mode."""
        with self._wide_vae() as dtype:
            latents = self.vae.encode(pixels.to(dtype)).latent_dist.mode().float()
        return latents * self.vae.config.scaling_factor

    def _pictures(self, latents: torch.Tensor, output_type: str) -> InfEditPipelineOutput:
        if output_type == "latent":
            return InfEditPipelineOutput(images=latents)
        with self._wide_vae() as dtype:
            images = self.vae.decode((latents / self.vae.config.scaling_factor).to(dtype), return_dict=False)[0]
        nsfw, shown = None, None
        if self.safety_checker is not None:
            pil = self.image_processor.postprocess(images, output_type="pil")
            clip_input = self.feature_extractor(pil, return_tensors="pt").to(images.device).pixel_values
            images, nsfw = self.safety_checker(images=images, clip_input=clip_input.to(self.safety_checker.dtype))
            shown = [not found for found in nsfw]  # the others are zeros now, which stay as they are: black
        images = self.image_processor.postprocess(images.float(), output_type=output_type, do_denormalize=shown)
        return InfEditPipelineOutput(images=images, nsfw_content_detected=nsfw)


def _check_settings(fractions: dict[str, float], output_type: str, blends_without_maps: bool) -> None:
    for name, value in fractions.items():
        if not 0 <= value <= 1:
            raise ValueError(f"`{name}` must lie in [0, 1], got {value}.")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
    if blends_without_maps:
        raise ValueError("Blending needs the maps of attention control: drop the blend words or turn it on.")


def _matched(pixels: torch.Tensor, **texts: Any) -> tuple[torch.Tensor, dict[str, list]]:
    """Pictures and texts, as many of each as there are edits: a single one is repeated."""
    lists = {name: [text] if text is None or isinstance(text, str) else list(text) for name, text in texts.items()}
    for name, entries in lists.items():
        needed = name in ("source_prompt", "target_prompt")
        if not entries or not all(isinstance(entry, str) or (entry is None and not needed) for entry in entries):
            raise ValueError(f"`{name}` must be a text or a list of at least one, got {texts[name]!r}.")
    counts = {"image": len(pixels), **{name: len(entries) for name, entries in lists.items()}}
    batch = max(counts.values())
    if any(count not in (1, batch) for count in counts.values()):
        found = ", ".join(f"{count} of `{name}`" for name, count in counts.items() if count > 1)
        raise ValueError(f"Pictures and texts must be as many as each other, or one for all: got {found}.")
    lists = {name: entries * batch if len(entries) == 1 else entries for name, entries in lists.items()}
    return pixels.expand(batch, -1, -1, -1), lists
