r"""One More Step: an extra step before the first, from pure noise to the noised picture that a model was trained on.

Hu, Zheng, Zheng, Wang, Cham, "One More Step: A Versatile Plug-and-Play Module for Rectifying Diffusion Schedule Flaws
and Enhancing Low-Frequency Controls", CVPR 2024, arXiv 2311.15744. At the last training time of Stable Diffusion a
little of the picture is left, A = `alphas_cumprod` = 0.0047, but sampling starts from noise that has nothing of one,
so that all pictures come out of medium brightness. A small network without a time, told the prompt, makes of noise n
the velocity at A = 0, v = -x0, and

.. math::
    x_T = -\sqrt{A}\, v + \sqrt{1 - A}\, z, \qquad v = v_\varnothing + w\,(v_c - v_\varnothing)

with fresh noise z is where any pipeline then starts, A being that of its first time. The prompt and the scale w of
this step are its own: they choose brightness and colours. (As a scheduler, to be put in with one line, it would cost a
call of the large network whose result is thrown away, and would not know the prompt.)

Differences from the released program (commit b662f84; written from the equations, not from its code): z is multiplied
by the standard deviation, as the posterior at A = 0 has it, where theirs takes the variance (`variance_as_std`); n is
never scaled; for schedulers in units of sigma x_T is divided by sqrt(A), whatever their `init_noise_sigma`; w = 1
costs one call, not two; several pictures a prompt work.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["NO_SIGNAL", "OneMoreStepPipeline", "encoders_of", "initial_sample", "load_timeless_unet", "text_states"]

logger = logging.getLogger(__name__)

NO_SIGNAL = 1e-6
"""The largest A that is none: schedulers that can't have 0 at zero terminal SNR have 2^-24 there."""
PUBLISHED = "oms_module"  # what the authors' repositories call the network
HUB_OPTIONS = ("cache_dir", "revision", "token", "local_files_only")


class OneMoreStepPipeline(DiffusionPipeline):
    """Start a Stable Diffusion pipeline, 1, 2 or XL, one step earlier.

        pipe = OneMoreStepPipeline.from_pretrained("h1t/oms_b_openclip_xl", base=pipe)
        pipe("a cave at night", num_inference_steps=20, oms_prompt="black", oms_guidance_scale=2.0).images

    Args:
        unet: The network of the step, of which the time is without effect; see `load_timeless_unet`.
        text_encoder: Encodes its prompts; None takes the text encoder of `base`, of Stable Diffusion XL both.
        tokenizer: Likewise.
        text_encoder_2: A second one, of modules that are told both of Stable Diffusion XL.
        tokenizer_2: Likewise.
        base: The pipeline that draws, with its own latent space: modules for Stable Diffusion 1 and 2 do not fit XL.
            It is not saved with the step.

    Raises:
        ValueError: If the widths of the text encoder and the network differ, or `base` is missing when it is called.
    """

    _optional_components = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]  # noqa: RUF012
    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet"

    def __init__(
        self, unet: UNet2DConditionModel, text_encoder: Any = None, tokenizer: Any = None, text_encoder_2: Any = None,
        tokenizer_2: Any = None, base: DiffusionPipeline | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_modules(
            unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )  # fmt: skip
        self.base: Any = base

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> OneMoreStepPipeline:
        """Load a step from a folder or the Hub: one of ours, or in the layout that the authors have published.

        Of one that ships this file the installed one is used, and no code of it is run.

        Args:
            pretrained_model_name_or_path: The folder or id.
            **kwargs: `base`, and what ``DiffusionPipeline.from_pretrained`` takes.
        """
        folder = _published(pretrained_model_name_or_path, kwargs)
        if folder is None:
            return super().from_pretrained(_without_code(pretrained_model_name_or_path, kwargs), **kwargs)
        dtype = kwargs.get("torch_dtype", kwargs.get("dtype", torch.float32))
        unet = load_timeless_unet(folder / PUBLISHED, variant=kwargs.get("variant"), dtype=dtype)
        return cls(unet, **_encoders(folder, dtype, kwargs.get("variant")), base=kwargs.get("base"))

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As in `ConfigMixin`; a folder that ships the code of this class is read with the class itself."""
        found = super().load_config(*args, **kwargs)
        index = found[0] if isinstance(found, tuple) else found
        if _named(index) == cls.__name__:
            index["_class_name"] = cls.__name__
        return found

    def to(self, *args: Any, **kwargs: Any) -> OneMoreStepPipeline:
        """Move the step and the pipeline that draws, or change their dtype; see `DiffusionPipeline.to`."""
        super().to(*args, **kwargs)
        if self.base is not None:
            self.base.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        oms_prompt: str | list[str] | None = None,
        oms_guidance_scale: float = 1.0,
        one_more_step: bool = True,
        variance_as_std: bool = False,
        num_inference_steps: int = 50,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Draw.

        Args:
            prompt: What to draw, for the pipeline; and for the step unless that has its own. None goes with
                ``prompt_embeds`` and `oms_prompt`.
            oms_prompt: Of the step: one, or one for each prompt.
            oms_guidance_scale: w; 1 is no guidance.
            one_more_step: Whether to make the step: without, this is the pipeline that draws.
            variance_as_std: Multiply z by 1 - A, as the released program does.
            num_inference_steps: Of the pipeline that draws.
            num_images_per_prompt: Pictures of each prompt.
            height: In pixels; the pipeline's own by default.
            width: Likewise.
            generator: Seeds n, z and the sampler's noise; a list of as many as pictures seeds each alone.
            **kwargs: Of the pipeline that draws, `timesteps` and `sigmas` among them.

        Returns:
            What the pipeline that draws returns. A schedule whose first time has no signal left needs no such step;
            that is said, and the step left out.

        Raises:
            ValueError: If there is no pipeline that draws or it is another than Stable Diffusion, its scheduler has no
                betas (a flow) or starts from other noise, latents or no prompt are given, or the prompts of the step
                are not as many.
        """
        base = self.base
        _check_base(base)
        drawing = {
            "num_inference_steps": num_inference_steps, "num_images_per_prompt": num_images_per_prompt,
            "height": height, "width": width, "generator": generator, **kwargs,
        }  # fmt: skip
        if not one_more_step:
            return base(prompt, **drawing)
        if kwargs.get("latents") is not None:
            raise ValueError("The step makes the latents: drop `latents`, or set one_more_step=False.")
        device = base._execution_device
        own = _told(prompt, oms_prompt, kwargs.get("prompt_embeds"))
        given = {name: kwargs[name] for name in ("timesteps", "sigmas") if kwargs.get(name) is not None}
        alpha, unit = self._first_alpha(num_inference_steps, device, **given)
        if alpha <= NO_SIGNAL:
            logger.warning("The schedule starts without any signal already: one more step has nothing to mend.")
            return base(prompt, **drawing)
        told = [text for text in own for _ in range(num_images_per_prompt)]
        shape = (len(told), self.unet.config.in_channels, *self._sides(height, width))
        noise = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        velocity = self.predict(noise, told, oms_guidance_scale)
        fresh = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        start = initial_sample(velocity, fresh, alpha, variance_as_std=variance_as_std)
        drawing["latents"] = (start * unit).to(base.unet.dtype)
        return base(prompt, **drawing)

    @torch.no_grad()
    def predict(self, noise: Tensor, prompts: list[str], guidance_scale: float = 1.0) -> Tensor:
        """Give v for noise n.

        Args:
            noise: n, ``(B, C, h, w)``.
            prompts: ``B`` of them.
            guidance_scale: w.

        Returns:
            Of the shape of the noise; -v is the picture that the step has in mind, as latents.
        """
        guided = guidance_scale != 1
        told = self.encode([*([""] * len(prompts) if guided else []), *prompts]).to(noise.dtype)
        seen = torch.cat([noise, noise]) if guided else noise
        found = self.unet(seen, 0, encoder_hidden_states=told, return_dict=False)[0]
        if not guided:
            return found
        without, with_it = found.chunk(2)
        return without + guidance_scale * (with_it - without)

    def _first_alpha(self, steps: int, device: Any, **given: Any) -> tuple[float, float]:
        """A at the first time of the run, and what x_T is multiplied by before the pipeline scales it itself."""
        scheduler = self.base.scheduler
        retrieve_timesteps(scheduler, steps, device, **given)
        scale, sigmas = float(scheduler.init_noise_sigma), getattr(scheduler, "sigmas", None)
        if sigmas is None:
            if scale != 1:
                raise ValueError(
                    f"{type(scheduler).__name__} begins with noise of the deviation {scale:g}, and the step makes"
                    " noise of the deviation 1: leave out one of the two (`boost=1`, or `one_more_step=False`)."
                )
            return float(scheduler.alphas_cumprod[int(scheduler.timesteps[0])]), 1.0
        alpha = 1 / (1 + float(sigmas[0]) ** 2)
        return alpha, 1.0 if scale == 1 else alpha**-0.5 / scale

    def _sides(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width of latents."""
        size, factor = self.base.unet.config.sample_size, self.base.vae_scale_factor
        usual = (size, size) if isinstance(size, int) else tuple(size)
        return (usual[0] if height is None else height // factor), (usual[1] if width is None else width // factor)

    def encode(self, prompts: list[str]) -> Tensor:
        """Give what the network is told: the last hidden states, or of two text encoders the last but one.

        Args:
            prompts: ``B`` of them.

        Returns:
            ``(B, tokens, width)``.

        Raises:
            ValueError: If the text encoder is not the one that the network was trained with.
        """
        source = self if self.text_encoder is not None else self.base
        (_, encoder), *second = encoders_of(source)
        told = text_states([(self.tokenizer or self.base.tokenizer, encoder), *second], prompts)
        if told.shape[-1] != self.unet.config.cross_attention_dim:
            raise ValueError(
                f"The network of the step is told states of the width {self.unet.config.cross_attention_dim}, and its"
                f" text encoder gives {told.shape[-1]}: load the step with the encoder that it was trained with."
            )
        return told


def _check_base(base: Any) -> None:
    """Raise a ValueError unless a step can begin a run of a pipeline."""
    if base is None:
        raise ValueError("There is nothing to draw with: load the step with `base`, a Stable Diffusion pipeline.")
    if getattr(base, "unet", None) is None or not hasattr(base, "vae_scale_factor"):
        raise ValueError(f"One More Step is for Stable Diffusion 1, 2 and XL, and `base` is a {type(base).__name__}.")
    name, config = type(base.scheduler).__name__, base.scheduler.config
    flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if flow or name.startswith("FlowMatch"):
        raise ValueError(f"{name} is set up for a flow, which starts from pure noise as it should, and needs no step.")
    if not hasattr(base.scheduler, "alphas_cumprod"):
        raise ValueError(f"{name} has no schedule of betas, whose end the step mends: use a scheduler that has.")


def _told(prompt: str | list[str] | None, own: str | list[str] | None, embeds: Tensor | None) -> list[str]:
    """What the step is told of each prompt of a run."""
    if prompt is None and (own is None or embeds is None):
        raise ValueError("Pass `prompt`; or `prompt_embeds`, and `oms_prompt`, as the step has its own text encoder.")
    prompts = [""] * len(embeds) if prompt is None and embeds is not None else _listed(prompt)
    told = prompts if own is None else _listed(own)
    if not prompts or len(told) not in (1, len(prompts)):
        raise ValueError(f"`oms_prompt` must be one, or one for each of {len(prompts)} prompts, got {len(told)}.")
    return told * len(prompts) if len(told) == 1 else told


def _listed(prompts: str | list[str] | None) -> list[str]:
    return [prompts] if isinstance(prompts, str) else list(prompts or [])


def encoders_of(pipe: Any) -> list[tuple[Any, Any]]:
    """Give the tokenizers and text encoders of a Stable Diffusion pipeline, or of a step: one pair, or two."""
    pairs = [(pipe.tokenizer, pipe.text_encoder)]
    if getattr(pipe, "text_encoder_2", None) is not None:
        pairs.append((pipe.tokenizer_2, pipe.text_encoder_2))
    return pairs


@torch.no_grad()
def text_states(encoders: list[tuple[Any, Any]], prompts: list[str]) -> Tensor:
    """Give what the network of a step is told of prompts.

    Args:
        encoders: As `encoders_of` gives them.
        prompts: ``B`` of them.

    Returns:
        The last hidden states, or of two encoders the last but one, side by side, ``(B, tokens, width)``.
    """
    states = []
    for tokenizer, encoder in encoders:
        tokens = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids.to(encoder.device)
        found = encoder(tokens, output_hidden_states=True)
        states.append(found.last_hidden_state if len(encoders) == 1 else found.hidden_states[-2])
    return torch.cat(states, dim=-1)


def initial_sample(velocity: Tensor, noise: Tensor, alpha: float, *, variance_as_std: bool = False) -> Tensor:
    """Give x_T, in the units of betas.

    Args:
        velocity: v, ``(B, C, h, w)``.
        noise: z, of the same shape.
        alpha: A.
        variance_as_std: Multiply z by 1 - A, as the released program does, in the place of its root.
    """
    return -(alpha**0.5) * velocity + (1 - alpha) ** (1.0 if variance_as_std else 0.5) * noise


def load_timeless_unet(
    folder: str | Path, *, variant: str | None = None, dtype: torch.dtype = torch.float32
) -> UNet2DConditionModel:
    """Load a network that has no time, as the authors publish them, as a stock one that is told a time in vain.

    Args:
        folder: Holds ``config.json`` and safetensors.
        variant: Of the weights, as ``fp16``.
        dtype: Of the result.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If weights are missing, or there are some that no such network has.
    """
    folder, ending = Path(folder), f".{variant}" if variant else ""
    file = folder / f"diffusion_pytorch_model{ending}.safetensors"
    if not file.is_file() or not (folder / "config.json").is_file():
        raise FileNotFoundError(f"There is no config.json, or no {file.name}, in {folder}.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    unet = UNet2DConditionModel.from_config(known)
    missing, unexpected = unet.load_state_dict(load_file(file), strict=False)
    lost = [name for name in missing if not name.startswith("time_embedding.") and ".time_emb_proj." not in name]
    if lost or unexpected:
        raise ValueError(f"{file} does not fit its config.json: {(lost + unexpected)[0]}.")
    with torch.no_grad():
        for name, value in unet.named_parameters():
            if name in missing:
                value.zero_()
    return unet.to(dtype).eval()


def _published(name: Any, kwargs: dict[str, Any]) -> Path | None:
    """The folder of a step in the authors' layout; None of other folders."""
    if Path(name).is_dir():
        return Path(name) if (Path(name) / PUBLISHED).is_dir() else None
    if not str(name).startswith("h1t/"):
        return None
    wanted = [f"{PUBLISHED}/*", "oms_*/config.json"]
    options = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
    return Path(snapshot_download(str(name), allow_patterns=wanted, ignore_patterns=["*.bin", "*.ckpt"], **options))


def _named(index: dict[str, Any]) -> Any:
    """The class that a ``model_index.json`` is of; where its file lies in the folder, a pair says both."""
    named = index.get("_class_name")
    return named[-1] if isinstance(named, list) and named else named


def _without_code(name: Any, kwargs: dict[str, Any]) -> Any:
    """A step on the Hub as a folder, if it ships its code, which diffusers would look for there and run."""
    if Path(name).is_dir():
        return name
    options = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
    if not isinstance(DiffusionPipeline.load_config(str(name), **options).get("_class_name"), list):
        return name
    return snapshot_download(str(name), ignore_patterns=["*.py", "*.bin", "*.ckpt"], **options)


def _encoders(folder: Path, dtype: torch.dtype, variant: str | None) -> dict[str, Any]:
    """Text encoders and tokenizers of a step in the authors' layout, which names where they are."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    file = folder / "oms_text_encoder" / "config.json"
    if not file.is_file():
        return {}
    place = json.loads(file.read_text(encoding="utf-8"))
    source = str(place["_name_or_path"])
    options = {"torch_dtype": dtype, "use_safetensors": True, **({"variant": variant} if variant else {})}
    if "SDXL" in str(place.get("_class_name")):
        return {
            "text_encoder": CLIPTextModel.from_pretrained(source, subfolder="text_encoder", **options),
            "tokenizer": CLIPTokenizer.from_pretrained(source, subfolder="tokenizer"),
            "text_encoder_2": CLIPTextModelWithProjection.from_pretrained(
                source, subfolder="text_encoder_2", **options
            ),
            "tokenizer_2": CLIPTokenizer.from_pretrained(source, subfolder="tokenizer_2"),
        }
    inner = {"subfolder": str(place["subfolder"])} if "subfolder" in place else {}
    told = json.loads((folder / "oms_tokenizer" / "config.json").read_text(encoding="utf-8"))
    cut = {"subfolder": str(told["subfolder"])} if "subfolder" in told else {}
    return {
        "text_encoder": CLIPTextModel.from_pretrained(source, **inner, **options),
        "tokenizer": CLIPTokenizer.from_pretrained(str(told["_name_or_path"]), **cut),
    }
