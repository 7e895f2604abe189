from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMPipeline,
    PNDMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)

import sfumato
from sfumato.families import StableDiffusion, family_of
from sfumato.loading import assets_folder
from sfumato.randomness import generator_for


@pytest.fixture(scope="module")
def atelier():
    return sfumato.load("atelier")


@pytest.fixture(scope="module")
def family(atelier):
    return family_of(atelier)


def test_conditioning_and_prediction_are_those_of_the_stock_pipeline(atelier, family):
    conditioning = family.encode_prompts(["a red bag", ""])
    latents, timesteps = torch.randn(2, *family.latent_shape), torch.tensor([10, 700])
    stock = atelier.unet(latents, timesteps, atelier.encode_prompt(["a red bag", ""], "cpu", 1, False)[0]).sample
    assert torch.equal(family.predict(atelier.unet, latents, timesteps, conditioning), stock)


def test_noise_schedule_is_that_of_the_scheduler(atelier, family):
    latents, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    timesteps = torch.tensor([0, 400, 999])
    stock = atelier.scheduler.add_noise(latents, noise, timesteps)
    assert torch.allclose(family.add_noise(latents, noise, timesteps), stock, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_target_is_what_the_prediction_type_says(atelier, prediction_type):
    pipe = type(atelier)(**atelier.components, requires_safety_checker=False)
    pipe.scheduler = DDIMScheduler.from_config(atelier.scheduler.config, prediction_type=prediction_type)
    latents, noise, timesteps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([5, 900])
    expected = {
        "epsilon": noise, "sample": latents, "v_prediction": pipe.scheduler.get_velocity(latents, noise, timesteps)
    }  # fmt: skip
    target = StableDiffusion(pipe).target(latents, noise, timesteps)
    assert torch.allclose(target, expected[prediction_type], atol=1e-6)


def test_pictures_survive_the_autoencoder(family):
    import numpy as np
    from PIL import Image

    files = sorted((assets_folder() / "renders").glob("*.png"))[:16]
    pictures = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files]).permute(0, 3, 1, 2) / 255
    mean, std = family.encode_images(pictures)
    assert mean.shape == std.shape == (16, 4, 8, 8)
    assert 0.5 < mean.std() < 1.5 and std.mean() < 0.2
    assert (family.decode(mean) - pictures).abs().mean() < 0.05


def test_picture_does_not_depend_on_its_batch(family):
    def draw(prompts, numbers):
        return family.generate(
            prompts, [generator_for(0, k) for k in numbers], num_inference_steps=3, guidance_scale=3.0
        )

    together = draw(["a red bag", "a coat", "a boot"], [0, 1, 2])
    alone = torch.cat([draw([prompt], [k]) for k, prompt in enumerate(["a red bag", "a coat", "a boot"])])
    assert torch.allclose(together, alone, atol=5e-4)  # rounding, which differs among processors


def test_parameter_subsets_are_what_they_say(family):
    kv = family.trainable_parameters("xattn-kv")
    assert set(kv) < set(family.trainable_parameters("xattn")) < set(family.trainable_parameters("full"))
    assert all("attn2.to_k" in name or "attn2.to_v" in name for name in kv)
    without_cross_attention, without_time = map(family.trainable_parameters, ("noxattn", "notime"))
    both = [*family.trainable_parameters("xattn"), *without_cross_attention]
    assert sorted(both) == sorted(without_time)
    left_out = set(family.trainable_parameters("full")) - set(without_time)
    assert all("time_emb" in name or name.startswith(("conv_norm_out", "conv_out")) for name in left_out)
    assert all("attn1" in name for name in family.trainable_parameters("selfattn"))
    assert family.trainable_parameters("full", "text_encoder")
    assert not any("embeddings" in name for name in family.trainable_parameters("full", "text_encoder"))
    with pytest.raises(ValueError, match="subset 'xattn' of the text_encoder"):
        family.trainable_parameters("xattn", "text_encoder")


def test_subsets_of_stable_diffusion_have_the_published_sizes():
    """The sizes of the ESD paper's subsets, counted on a model without weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    sizes = dict.fromkeys(("full", "xattn", "xattn-kv", "selfattn", "noxattn"), 0.0)
    for subset in sizes:
        keep = StableDiffusion.subsets["denoiser"][subset]
        sizes[subset] = round(sum(p.numel() for name, p in unet.named_parameters() if keep(name)) / 1e6, 1)
    assert sizes == {"full": 859.5, "xattn": 44.0, "xattn-kv": 19.2, "selfattn": 49.6, "noxattn": 787.7}


def test_unsupported_family_is_named():
    pipe = PNDMPipeline(
        UNet2DModel(
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
        ),
        PNDMScheduler(),
    )
    with pytest.raises(ValueError, match="PNDMPipeline is not supported yet; supported pipelines: StableDiffusion"):
        sfumato.unlearn(pipe, "sneaker")


def test_flow_matching_scheduler_on_a_beta_model_is_refused(atelier):
    pipe = type(atelier)(
        **{**atelier.components, "scheduler": FlowMatchEulerDiscreteScheduler()}, requires_safety_checker=False
    )
    with pytest.raises(ValueError, match="flow-matching scheduler"):
        family_of(pipe)


@pytest.mark.parametrize(("half", "other"), [("unet", "text_encoder"), ("text_encoder", "unet")])
def test_mixed_dtypes_are_refused_before_the_work(half, other, tmp_path):
    pipe = sfumato.load("atelier")
    getattr(pipe, half).half()
    with pytest.raises(ValueError, match=r"must be the same; use pipe.to\(torch.float32\)"):
        sfumato.unlearn(pipe, "sneaker", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_autoencoder_may_have_a_dtype_of_its_own():
    pipe = sfumato.load("atelier")
    pipe.vae.half()
    family_of(pipe).check_dtypes()


def test_size_of_a_picture_is_what_the_autoencoder_makes_of_a_latent(family):
    assert family.image_size == tuple(family.decode(torch.zeros(1, *family.latent_shape)).shape[2:]) == (32, 32)


def test_nothing_but_a_family_looks_into_a_pipeline():
    sources = [path for path in Path(sfumato.__file__).parent.rglob("*.py") if path.parent.name != "families"]
    assert [path.name for path in sources if "family.pipe" in path.read_text()] == []
