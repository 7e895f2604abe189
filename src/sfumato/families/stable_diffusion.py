"""Stable Diffusion 1.x, 2.x and XL: CLIP text encoders, `UNet2DConditionModel`, `AutoencoderKL`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch

from sfumato.families.family import Conditioning, Segment, Subsets, TextFamily

__all__ = ["StableDiffusion", "StableDiffusionXL"]


def _outside_blocks(name: str) -> bool:
    """Whether a parameter belongs to the time embedding or to the layers that make the output."""
    outside = ("time_embedding.", "add_embedding.", "conv_norm_out.", "conv_out.")
    return name.startswith(outside) or ".time_emb_proj." in name


UNET: Subsets = {
    "full": lambda name: True,
    "xattn": lambda name: "attn2" in name,
    "xattn-kv": lambda name: "attn2.to_k" in name or "attn2.to_v" in name,
    "selfattn": lambda name: "attn1" in name,
    "noxattn": lambda name: "attn2" not in name and not _outside_blocks(name),
    "notime": lambda name: not _outside_blocks(name),
    "text": lambda name: "attn2.to_k" in name or "attn2.to_v" in name,
}
TEXT_ENCODER: Subsets = {"full": lambda name: "embeddings" not in name}


class StableDiffusion(TextFamily):
    """Stable Diffusion 1.x and 2.x: one text encoder.

    Args:
        pipe: A ``StableDiffusionPipeline``; it is read, never changed.
    """

    label, denoiser_name = "Stable Diffusion", "unet"
    subsets: ClassVar[Mapping[str, Subsets]] = {"denoiser": UNET, "text_encoder": TEXT_ENCODER}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts; cut to the text encoder's length as the stock pipeline does.

        Args:
            prompts: ``B`` prompts; ``""`` is the unconditional one.

        Returns:
            ``{"encoder_hidden_states": (B, tokens, width)}`` on the pipeline's device.
        """
        embeddings, _ = self.pipe.encode_prompt(
            list(prompts), self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeddings}

    def predict(
        self, denoiser: torch.nn.Module, latents: torch.Tensor, model_times: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """Run a denoiser; see `Family.predict`."""
        return denoiser(latents, model_times, **conditioning).sample

    def segments(self, prompts: Sequence[str]) -> list[Segment]:
        """Where each prompt's own tokens stand: behind the start token."""
        numbers, counts = self._tokenize(self.pipe.tokenizer, prompts)
        own = [row[1 : 1 + count] for row, count in zip(numbers.tolist(), counts.tolist(), strict=True)]
        return [Segment(0, numbers.shape[1], 1, own)]

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        """What a method may change: ``"denoiser"`` and ``"text_encoder"``."""
        return {"denoiser": self.denoiser, "text_encoder": self.pipe.text_encoder}

    def tokenize(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut prompts into tokens as the stock pipeline does.

        Args:
            prompts: ``B`` prompts.

        Returns:
            Token numbers ``(B, T)``, with the start, the end and padding, and how many each prompt has itself
            ``(B,)``, at most ``T - 2``; on the pipeline's device.
        """
        return self._tokenize(self.pipe.tokenizer, prompts)

    def _tokenize(self, tokenizer: Any, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        texts = [self.pipe.maybe_convert_prompt(prompt, tokenizer) for prompt in prompts]
        length = tokenizer.model_max_length
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        counts = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        return tokens.input_ids.to(self.device), torch.tensor([len(ids) - 2 for ids in counts], device=self.device)

    def spell(self, tokens: Sequence[int]) -> str:
        """Give the text of token numbers, as somebody would have to type it; starts, ends and padding are left out."""
        text: str = self.pipe.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text.strip()

    @property
    def ordinary_tokens(self) -> list[int]:
        """The numbers of the tokens that are words or pieces of words."""
        special = set(self.pipe.tokenizer.all_special_ids)
        return [number for number in range(len(self.token_table)) if number not in special]

    @property
    def plain_token(self) -> int:
        """The number of some token that is a word: what stands for one of which only the embedding is known."""
        special = set(self.pipe.tokenizer.all_special_ids)
        return next(number for number in range(len(special) + 1) if number not in special)

    @property
    def token_table(self) -> torch.Tensor:
        """The embeddings of all tokens, ``(vocabulary, width)``, float32, without a gradient."""
        return _table_of(self.pipe.text_encoder)

    def embed_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Give the embeddings ``(B, T, width)`` of what `tokenize` gave, float32, without a gradient."""
        return self.token_table[tokens]

    def encode_embeddings(
        self, encoder: torch.nn.Module, tokens: torch.Tensor, embeddings: torch.Tensor
    ) -> Conditioning:
        """Encode prompts of which the token embeddings are given, so that a gradient can reach these.

        transformers' CLIP takes no embeddings itself, so they take the place of what its (public) input embedding
        gives; the encoder adds the positions.

        Args:
            encoder: `parts`' text encoder, a copy of it, or one wrapped by accelerate.
            tokens: Their numbers ``(B, T)``, see `tokenize`; they tell the shape, and where the end token stands, at
                which some encoders look: where an embedding is put in, `plain_token` goes into the numbers.
            embeddings: ``(B, T, width)``.

        Returns:
            As `encode_prompts`.
        """
        bare: Any = getattr(encoder, "module", encoder)
        layer = bare.get_input_embeddings()
        hook = layer.register_forward_hook(lambda *_: embeddings.to(layer.weight.dtype))
        try:
            return {"encoder_hidden_states": encoder(tokens)[0]}
        finally:
            hook.remove()

    def _arguments(self, conditioning: Conditioning, empty: Conditioning) -> dict[str, torch.Tensor]:
        return {
            "prompt_embeds": conditioning["encoder_hidden_states"].to(self.dtype),
            "negative_prompt_embeds": empty["encoder_hidden_states"],
        }

    def _options(self) -> dict[str, Any]:
        return {"requires_safety_checker": self.pipe.config.get("requires_safety_checker", False)}


class TextEncoders(torch.nn.Module):
    """Both text encoders of SDXL as one part.

    Args:
        first: CLIP ViT-L.
        second: OpenCLIP ViT-bigG, with a projection.
    """

    def __init__(self, first: torch.nn.Module, second: torch.nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return next(self.parameters()).dtype

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode token numbers ``(B, T, 2)``: hidden states ``(B, T, sum of widths)``, pooled ``(B, projection)``."""
        first = self.first(tokens[..., 0], output_hidden_states=True)
        second = self.second(tokens[..., 1], output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second[0]


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL: two text encoders side by side, the second also pooled; sizes are told as at native size.

    The part ``"text_encoder"`` is both encoders, and a token's embedding is that of one beside that of the other.

    Args:
        pipe: A ``StableDiffusionXLPipeline`` with both text encoders; it is read, never changed.
    """

    label = "Stable Diffusion XL"
    encoders: ClassVar[Sequence[str]] = ("text_encoder", "text_encoder_2")
    subsets: ClassVar[Mapping[str, Subsets]] = {
        "denoiser": UNET,
        "text_encoder": TEXT_ENCODER,
    }

    def trainable_parameters(self, subset: str, part: str = "denoiser") -> list[str]:
        """Name the parameters of a part; see `Family.trainable_parameters`.

        Of the first text encoder the last layer and what comes behind it are left out: the pipeline takes the hidden
        states before them, so that they would never have a gradient.
        """
        names = super().trainable_parameters(subset, part)
        if part != "text_encoder":
            return names
        last = f"layers.{self.pipe.text_encoder.config.num_hidden_layers - 1}."
        unused = ("final_layer_norm.", last)
        return [name for name in names if not (name.startswith("first.") and any(part in name for part in unused))]

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts.

        Args:
            prompts: ``B`` prompts; ``""`` is the unconditional one (zeros, if the model was trained so).

        Returns:
            ``encoder_hidden_states`` ``(B, tokens, width)``, ``text_embeds`` ``(B, projection)`` and ``time_ids``
            ``(B, 6)``.
        """
        embeddings, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if self.pipe.config.get("force_zeros_for_empty_prompt"):
            named = torch.tensor([bool(prompt) for prompt in prompts], device=pooled.device)
            embeddings, pooled = embeddings * named[:, None, None], pooled * named[:, None]
        return self._told(embeddings, pooled)

    def predict(
        self, denoiser: torch.nn.Module, latents: torch.Tensor, model_times: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """Run a denoiser; see `Family.predict`."""
        added = {name: conditioning[name] for name in ("text_embeds", "time_ids")}
        return denoiser(latents, model_times, conditioning["encoder_hidden_states"], added_cond_kwargs=added).sample

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        """What a method may change: ``"denoiser"`` and ``"text_encoder"``, which is both."""
        both = TextEncoders(self.pipe.text_encoder, self.pipe.text_encoder_2)
        return {"denoiser": self.denoiser, "text_encoder": both}

    def tokenize(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut prompts into tokens: ``(B, T, 2)``, which differ in the padding; see `StableDiffusion.tokenize`."""
        tokens, counts = self._tokenize(self.pipe.tokenizer, prompts)
        other, others = self._tokenize(self.pipe.tokenizer_2, prompts)
        if not torch.equal(counts, others):
            raise ValueError("The two tokenizers cut the prompts differently; attacks need one vocabulary.")
        return torch.stack([tokens, other], -1), counts

    @property
    def token_table(self) -> torch.Tensor:
        """The embeddings of all tokens, ``(vocabulary, sum of widths)``, float32, without a gradient."""
        return torch.cat([_table_of(self.pipe.text_encoder), _table_of(self.pipe.text_encoder_2)], 1)

    def embed_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Give the embeddings ``(B, T, sum of widths)`` of what `tokenize` gave, float32, without a gradient."""
        tables = _table_of(self.pipe.text_encoder), _table_of(self.pipe.text_encoder_2)
        return torch.cat([table[tokens[..., k]] for k, table in enumerate(tables)], -1)

    def encode_embeddings(
        self, encoder: torch.nn.Module, tokens: torch.Tensor, embeddings: torch.Tensor
    ) -> Conditioning:
        """Encode prompts of which the token embeddings are given; see `StableDiffusion.encode_embeddings`."""
        bare: Any = getattr(encoder, "module", encoder)
        layers = [part.get_input_embeddings() for part in (bare.first, bare.second)]
        halves = embeddings.split([layer.weight.shape[1] for layer in layers], -1)
        with ExitStack() as hooks:
            for layer, half in zip(layers, halves, strict=True):
                given = half.to(layer.weight.dtype)
                hooks.callback(layer.register_forward_hook(lambda *_, given=given: given).remove)
            return self._told(*encoder(tokens))

    def _told(self, embeddings: torch.Tensor, pooled: torch.Tensor) -> Conditioning:
        """Conditioning of embeddings: with the sizes that the stock pipeline tells at the native size."""
        sizes = torch.tensor([*self.image_size, 0, 0, *self.image_size], device=pooled.device, dtype=pooled.dtype)
        return {
            "encoder_hidden_states": embeddings, "text_embeds": pooled, "time_ids": sizes.expand(len(pooled), -1)
        }  # fmt: skip

    def _arguments(self, conditioning: Conditioning, empty: Conditioning) -> dict[str, torch.Tensor]:
        return {
            **super()._arguments(conditioning, empty),
            "pooled_prompt_embeds": conditioning["text_embeds"].to(self.dtype),
            "negative_pooled_prompt_embeds": empty["text_embeds"],
        }

    def _components_of(self, part: str, module: torch.nn.Module) -> dict[str, torch.nn.Module]:
        if part != "text_encoder":
            return super()._components_of(part, module)
        both: Any = module
        return {"text_encoder": both.first, "text_encoder_2": both.second}

    def _options(self) -> dict[str, Any]:
        names = ("force_zeros_for_empty_prompt", "add_watermarker")
        return {name: self.pipe.config[name] for name in names if name in self.pipe.config}


def _table_of(encoder: Any) -> torch.Tensor:
    """The embeddings of a text encoder's tokens, ``(vocabulary, width)``, float32, without a gradient."""
    weight: torch.Tensor = encoder.get_input_embeddings().weight
    return weight.detach().float()
