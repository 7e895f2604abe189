"""A tiny Stable Diffusion pipeline with random weights, and its example sets."""

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sfumato.families import StableDiffusion
from sfumato.loading import assets_folder
from sfumato.unlearning.examples import Examples


def make_tiny_pipe(prediction_type="epsilon"):
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(assets_folder() / "atelier" / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=2, sample_size=8,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        prediction_type=prediction_type,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@pytest.fixture
def tiny_pipe():
    return make_tiny_pipe()


@pytest.fixture
def tiny_pipe_v():
    return make_tiny_pipe("v_prediction")


@pytest.fixture
def family(tiny_pipe):
    return StableDiffusion(tiny_pipe)


@pytest.fixture
def forget():
    return _examples(6, ("a sneaker", "a red sneaker"), seed=1)


@pytest.fixture
def retain():
    return _examples(5, ("a bag", "a coat", "a shirt"), seed=2)


def _examples(count, prompts, seed):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(count, 4, 4, 4, generator=generator)
    return Examples(mean, 0.1 * torch.ones_like(mean), tuple(prompts[k % len(prompts)] for k in range(count)))
