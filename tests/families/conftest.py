"""Tiny pipelines of every family with random weights and text encoders, built from configs."""

import copy
from functools import cache

import diffusers
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

import sfumato
from sfumato.pipelines.pipeline_class_conditional import ClassConditionalPipeline

WORDS = (
    "a",
    "of",
    "photo",
    "picture",
    "image",
    "painting",
    "drawing",
    "sneaker",
    "red",
    "bag",
    "coat",
    "dog",
    "house",
)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def clip_tokenizer():
    tokenizer = copy.deepcopy(sfumato.load("atelier").tokenizer)
    tokenizer.model_max_length = 16
    return tokenizer


def t5_tokenizer():
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{word: 3 + k for k, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def clip(tokenizer, projected=False, width=8):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=width, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5():
    return T5EncoderModel(T5Config(vocab_size=3 + len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=2, sample_size=16,
        shift_factor=0.1,
    )  # fmt: skip


def unet(width, **kwargs):
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width, **kwargs,
    )  # fmt: skip


def sd(prediction_type="epsilon"):
    tokenizer = clip_tokenizer()
    return diffusers.StableDiffusionPipeline(
        vae=vae(), text_encoder=clip(tokenizer), tokenizer=tokenizer, unet=unet(8),
        scheduler=diffusers.DDIMScheduler(**BETAS, prediction_type=prediction_type), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl():
    tokenizer = clip_tokenizer()
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip(tokenizer), text_encoder_2=clip(tokenizer, projected=True, width=12),
        tokenizer=tokenizer, tokenizer_2=clip_tokenizer(), scheduler=diffusers.EulerDiscreteScheduler(**{
            name: value for name, value in BETAS.items() if name != "clip_sample"}),
        unet=unet(
            20, addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=36
        ),
    )  # fmt: skip


def sd3():
    tokenizer = clip_tokenizer()
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=14,
            pos_embed_max_size=8,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(),
        text_encoder=clip(tokenizer, projected=True, width=6), tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer, projected=True), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


def flux(guided=False):
    tokenizer = clip_tokenizer()
    pipe = diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
            guidance_embeds=guided,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae(),
        text_encoder=clip(tokenizer), tokenizer=tokenizer, text_encoder_2=t5(), tokenizer_2=t5_tokenizer(),
    )  # fmt: skip
    pipe.default_sample_size = 8
    return pipe


def pixart():
    return diffusers.PixArtSigmaPipeline(
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
            out_channels=8, cross_attention_dim=16, caption_channels=16, use_additional_conditions=False,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(**{k: v for k, v in BETAS.items() if k != "clip_sample"}),
        vae=vae(), text_encoder=t5(), tokenizer=t5_tokenizer(),
    )  # fmt: skip


def dit():
    return diffusers.DiTPipeline(
        transformer=diffusers.DiTTransformer2DModel(
            sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
            out_channels=8, num_embeds_ada_norm=1000,
        ),
        vae=vae(), scheduler=diffusers.DDIMScheduler(**BETAS), id2label={0: "tench", 1: "goldfish, Carassius"},
    )  # fmt: skip


def ddpm():
    return ClassConditionalPipeline(
        diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=5,
        ),
        diffusers.DDPMScheduler(),
    )  # fmt: skip


KINDS = {
    "sd": sd, "sd-v": lambda: sd("v_prediction"), "sdxl": sdxl, "sd3": sd3, "flux": flux,
    "flux-guided": lambda: flux(True), "pixart": pixart, "dit": dit, "ddpm": ddpm,
}  # fmt: skip


@cache
def built(kind):
    torch.manual_seed(0)
    pipe = KINDS[kind]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            for parameter in part.parameters():  # some layers start at zero, and would hide what passes through them
                torch.nn.init.normal_(parameter, std=0.2) if not parameter.any() else None
            part.eval()
    return pipe


@pytest.fixture(params=list(KINDS))
def kind(request):
    return request.param


@pytest.fixture
def pipe(kind):
    """A tiny pipeline of a kind; its weights must not be changed."""
    return built(kind)
