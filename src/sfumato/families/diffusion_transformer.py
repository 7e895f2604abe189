"""Text-to-image transformers: Stable Diffusion 3 and 3.5, Flux.1, PixArt-alpha and -sigma."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline

from sfumato.families.family import Conditioning, Segment, Subsets, TextFamily
from sfumato.families.latent_space import LatentSpace, PackedLatentSpace

__all__ = ["Flux", "PixArt", "StableDiffusion3"]


def _joint_text(name: str) -> bool:
    """Whether a parameter belongs to the attention of the text's half of a block of SD 3 or Flux."""
    return any(part in name for part in (".attn.add_", ".attn.to_add_out.", ".attn.norm_added_"))


def _joint_outside(name: str) -> bool:
    """Whether a parameter of SD 3 or Flux belongs to the time embedding or to the layers that make the output."""
    return name.startswith(("time_text_embed.", "norm_out.", "proj_out."))


def _joint_self(name: str) -> bool:
    """Whether a parameter belongs to the picture's half of the attention, or to attention that both share."""
    return (".attn." in name or ".attn2." in name) and not _joint_text(name)


JOINT: Subsets = {
    "full": lambda name: True,
    "xattn": _joint_text,
    "xattn-kv": lambda name: ".attn.add_k_proj." in name or ".attn.add_v_proj." in name,
    "selfattn": _joint_self,
    "noxattn": lambda name: not _joint_text(name) and not _joint_outside(name),
    "notime": lambda name: not _joint_outside(name),
    "text": lambda name: name.startswith("context_embedder."),
}


def _pixart_outside(name: str) -> bool:
    return name.startswith(("adaln_single.", "proj_out.", "scale_shift_table"))


PIXART: Subsets = {
    "full": lambda name: True,
    "xattn": lambda name: "attn2" in name,
    "xattn-kv": lambda name: "attn2.to_k" in name or "attn2.to_v" in name,
    "selfattn": lambda name: "attn1" in name,
    "noxattn": lambda name: "attn2" not in name and not _pixart_outside(name),
    "notime": lambda name: not _pixart_outside(name),
    "text": lambda name: name.startswith("caption_projection.linear_1."),
}


class _Transformer(TextFamily):
    """What they share.

    Args:
        pipe: The pipeline; it is read, never changed.
    """

    denoiser_name = "transformer"

    @property
    def tokens(self) -> int:
        """How many tokens the transformer makes of one latent."""
        _, height, width = self.latent_shape
        patch = self.config.patch_size
        return (height // patch) * (width // patch)


class StableDiffusion3(_Transformer):
    """Stable Diffusion 3 and 3.5: two CLIPs and T5 (which may be missing), a joint transformer, a flow.

    Args:
        pipe: A ``StableDiffusion3Pipeline``; it is read, never changed.
    """

    label, flow = "Stable Diffusion 3", True
    encoders: ClassVar[Sequence[str]] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    subsets: ClassVar[Mapping[str, Subsets]] = {"denoiser": JOINT}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts: ``encoder_hidden_states`` ``(B, tokens, width)`` and ``pooled_projections`` ``(B, sum)``."""
        embeddings, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), None, None, device=self.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def predict(
        self, denoiser: torch.nn.Module, latents: torch.Tensor, model_times: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """Run a denoiser; see `Family.predict`."""
        return denoiser(latents, timestep=model_times, **conditioning).sample

    def segments(self, prompts: Sequence[str]) -> list[Segment]:
        """Where each prompt's own tokens stand: as CLIP cuts them, and behind these, as T5 does."""
        clip = self.pipe.tokenizer_max_length
        found = [Segment(0, clip, 1, _own_tokens(self.pipe.tokenizer, prompts, clip, marks=1))]
        if self.pipe.text_encoder_3 is not None:
            own = _own_tokens(self.pipe.tokenizer_3, prompts, T5_LENGTH, marks=0)
            found.append(Segment(clip, clip + T5_LENGTH, 0, own))
        return found

    def _arguments(self, conditioning: Conditioning, empty: Conditioning) -> dict[str, torch.Tensor]:
        dtype = self.dtype
        return {
            "prompt_embeds": conditioning["encoder_hidden_states"].to(dtype),
            "pooled_prompt_embeds": conditioning["pooled_projections"].to(dtype),
            "negative_prompt_embeds": empty["encoder_hidden_states"],
            "negative_pooled_prompt_embeds": empty["pooled_projections"],
        }


class Flux(_Transformer):
    """Flux.1: a CLIP (pooled) and T5, a joint transformer over 2x2 patches of latents, a flow.

    A picture has the size of the pipeline's ``default_sample_size``; set it lower to train on smaller ones. Models
    that were distilled from guidance are told 3.5, as diffusers' training scripts tell them.

    Args:
        pipe: A ``FluxPipeline``; it is read, never changed.
    """

    label, flow = "Flux", True
    encoders: ClassVar[Sequence[str]] = ("text_encoder", "text_encoder_2")
    subsets: ClassVar[Mapping[str, Subsets]] = {"denoiser": JOINT}
    guidance = 3.5

    @property
    def space(self) -> LatentSpace:
        """Between pictures and latents ``(B, C, h, w)``, which the pipeline packs."""
        return PackedLatentSpace(self.pipe)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent, before 2x2 patches of it become tokens."""
        side = self.pipe.default_sample_size
        return self.config.in_channels // 4, side, side

    @property
    def tokens(self) -> int:
        """How many tokens a latent becomes."""
        _, height, width = self.latent_shape
        return height * width // 4

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts: ``encoder_hidden_states`` ``(B, tokens, width)``, ``pooled_projections`` ``(B, width)``."""
        embeddings, pooled, _ = self.pipe.encode_prompt(list(prompts), None, device=self.device)
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def predict(
        self, denoiser: torch.nn.Module, latents: torch.Tensor, model_times: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """Run a denoiser on the patches; see `Family.predict`."""
        rows, columns = (side // 2 for side in latents.shape[2:])
        text = conditioning["encoder_hidden_states"]
        guidance = None
        if self.config.guidance_embeds:
            guidance = torch.full((len(latents),), self.guidance, device=latents.device)
        place = torch.zeros(rows, columns, 3, device=latents.device, dtype=latents.dtype)
        place[..., 1] += torch.arange(rows, device=latents.device)[:, None]
        place[..., 2] += torch.arange(columns, device=latents.device)
        said = denoiser(
            PackedLatentSpace.pack(latents), timestep=model_times / self.num_train_timesteps, guidance=guidance,
            img_ids=place.view(-1, 3), txt_ids=place.new_zeros(text.shape[1], 3), **conditioning,
        ).sample  # fmt: skip
        return PackedLatentSpace.unpack(said, rows, columns)

    def segments(self, prompts: Sequence[str]) -> list[Segment]:
        """Where each prompt's own tokens stand, as T5 cuts them."""
        length = self.encode_prompts([""])["encoder_hidden_states"].shape[1]
        return [Segment(0, length, 0, _own_tokens(self.pipe.tokenizer_2, prompts, length, marks=0))]

    def with_parts(self, parts: Mapping[str, torch.nn.Module]) -> DiffusionPipeline:
        """Make a pipeline with other parts; see `Family.with_parts`. It keeps ``default_sample_size``."""
        made = super().with_parts(parts)
        made.default_sample_size = self.pipe.default_sample_size
        return made

    def _arguments(self, conditioning: Conditioning, empty: Conditioning) -> dict[str, torch.Tensor]:
        dtype = self.dtype
        given = {
            "prompt_embeds": conditioning["encoder_hidden_states"].to(dtype),
            "pooled_prompt_embeds": conditioning["pooled_projections"].to(dtype),
        }
        if self.config.guidance_embeds:
            return given
        return {
            **given, "negative_prompt_embeds": empty["encoder_hidden_states"],
            "negative_pooled_prompt_embeds": empty["pooled_projections"],
        }  # fmt: skip

    def _guidance(self, scale: float, count: int, *, embedded: bool) -> dict[str, Any]:
        if self.config.guidance_embeds:
            return {"guidance_scale": scale}
        return {"true_cfg_scale": scale, **({} if embedded else {"negative_prompt": [""] * count})}

    def _grid(self, latents: torch.Tensor) -> torch.Tensor:
        _, height, width = self.latent_shape
        return PackedLatentSpace.unpack(latents, height // 2, width // 2)


class PixArt(_Transformer):
    """PixArt-alpha and -sigma: T5, a transformer with cross-attention, diffusion.

    Args:
        pipe: A ``PixArtAlphaPipeline`` or ``PixArtSigmaPipeline``; it is read, never changed.
    """

    label = "PixArt"
    subsets: ClassVar[Mapping[str, Subsets]] = {"denoiser": PIXART}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts: ``encoder_hidden_states`` ``(B, T, width)``, ``encoder_attention_mask`` ``(B, T)``."""
        embeddings, mask, _, _ = self.pipe.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device
        )
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    def predict(
        self, denoiser: torch.nn.Module, latents: torch.Tensor, model_times: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """Run a denoiser; what it says of the variance is left out. See `Family.predict`."""
        added: dict[str, torch.Tensor | None] = {"resolution": None, "aspect_ratio": None}
        bare: Any = self.denoiser
        if bare.use_additional_conditions:
            height, width = self.image_size
            sizes = torch.tensor([[height, width]], device=latents.device, dtype=latents.dtype)
            ratio = torch.tensor([[height / width]], device=latents.device, dtype=latents.dtype)
            added = {"resolution": sizes.expand(len(latents), 2), "aspect_ratio": ratio.expand(len(latents), 1)}
        said = denoiser(latents, timestep=model_times, added_cond_kwargs=added, **conditioning).sample
        return said[:, : latents.shape[1]]

    def segments(self, prompts: Sequence[str]) -> list[Segment]:
        """Where each prompt's own tokens stand, as T5 cuts them."""
        length = self.encode_prompts([""])["encoder_hidden_states"].shape[1]
        return [Segment(0, length, 0, _own_tokens(self.pipe.tokenizer, prompts, length, marks=0))]

    def _arguments(self, conditioning: Conditioning, empty: Conditioning) -> dict[str, Any]:
        return {
            "prompt_embeds": conditioning["encoder_hidden_states"].to(self.dtype),
            "prompt_attention_mask": conditioning["encoder_attention_mask"],
            "negative_prompt": None,
            "negative_prompt_embeds": empty["encoder_hidden_states"],
            "negative_prompt_attention_mask": empty["encoder_attention_mask"],
        }

    def _guidance(self, scale: float, count: int, *, embedded: bool) -> dict[str, Any]:
        return {"guidance_scale": scale, "use_resolution_binning": False}


T5_LENGTH = 256  # tokens that SD 3's pipeline gives T5


def _own_tokens(tokenizer: Any, prompts: Sequence[str], length: int, *, marks: int) -> list[list[int]]:
    """Each prompt's tokens without the marks before them and the one behind."""
    rows = tokenizer(list(prompts), truncation=True, max_length=length)["input_ids"]
    return [row[marks:-1] for row in rows]
