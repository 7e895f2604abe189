"""The embedded networks, untrained: what ``train_atelier.py`` trains and ``atelier_release.py`` packs.

Sizes are chosen so that all weights together stay under 20 MB in float16 and one step takes well under a second on two
CPU cores.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sfumato import atelier
from sfumato.randomness import rng_for

PROMPT_LENGTH = 24


class AutoencoderLoss(nn.Module):
    """The autoencoder and its loss in one forward pass, so that accelerate sees a single module."""

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, pictures: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """Give the three terms for pictures ``(B, 3, 32, 32)`` in [-1, 1] and noise ``(B, 4, 8, 8)``."""
        posterior = self.autoencoder.encode(pictures).latent_dist
        restored = self.autoencoder.decode(posterior.mean + posterior.std * noise).sample
        return {
            "l2": F.mse_loss(restored, pictures),
            "l1": 0.5 * F.l1_loss(restored, pictures),
            "kl": 1e-6 * posterior.kl().mean(),
        }


class TextToLatent(nn.Module):
    """The denoiser and its text encoder as one module, trained together."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Predict the noise in latents ``(B, 4, 8, 8)`` at timesteps ``(B,)`` for tokens ``(B, L)``."""
        return self.unet(latents, timesteps, self.text_encoder(tokens).last_hidden_state).sample


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Give token ids ``(B, PROMPT_LENGTH)``."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Learn a byte-level BPE in which each word of the captions is one token and any other text can be spelled."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    rng = rng_for(0)
    captions = [
        atelier.caption(dict(garment=garment, **style, **colour), rng)
        for garment in (*atelier.GARMENTS, *atelier.SYNONYMS.values())
        for style in ({}, *({"style": word} for word in atelier.STYLES))
        for colour in ({}, *({"colour": word} for word in atelier.COLOURS))
        for _ in range(4)
    ] + [atelier.caption({"style": s, "colour": c}, rng) for s in atelier.STYLES for c in atelier.COLOURS]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=4096, min_frequency=2, end_of_word_suffix="</w>", show_progress=False)
    )
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    pieces = alphabet + [f"{letter}</w>" for letter in alphabet] + ["".join(pair) for pair in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=PROMPT_LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_autoencoder() -> AutoencoderKL:
    """Build the untrained autoencoder: three resolutions, 32x32x3 to 8x8x4."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64), layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=32,
    )  # fmt: skip


def make_denoiser(tokenizer: CLIPTokenizer) -> TextToLatent:
    """Build the untrained denoiser and text encoder."""
    width = 96
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=PROMPT_LENGTH, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, projection_dim=width,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(64, 128), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=width, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip
    return TextToLatent(unet, text_encoder)


def make_pixel_denoiser() -> UNet2DModel:
    """Build the untrained class-conditional pixel network; class 10 is the null class."""
    return UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, block_out_channels=(32, 64, 96), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16, norm_num_groups=8, num_class_embeds=len(atelier.GARMENTS) + 1,
    )  # fmt: skip


def latent_schedule() -> DDIMScheduler:
    """The schedule of the latent model.

    Stable Diffusion's curve, but ending lower: noise hides the mean of 8x8 latents less well than that of 64x64.
    Trailing spacing starts sampling where the noise is purest, as Lin et al. (arXiv 2305.08891) recommend.
    """
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.02, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, timestep_spacing="trailing",
    )  # fmt: skip


def pixel_schedule() -> DDPMScheduler:
    """The schedule of the pixel model: the linear betas of Ho et al."""
    return DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=True)
