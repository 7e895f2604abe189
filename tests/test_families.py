import shutil

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, PNDMPipeline, PNDMScheduler, UNet2DModel

import sfumato
from sfumato.families import StableDiffusion, assets_folder, family_of
from sfumato.randomness import generator_for


@pytest.fixture(scope="module")
def atelier():
    return sfumato.load("atelier")


@pytest.fixture(scope="module")
def family(atelier):
    return family_of(atelier)


def test_atelier_is_a_stock_pipeline_in_float32(atelier):
    from diffusers import StableDiffusionPipeline

    assert type(atelier) is StableDiffusionPipeline
    assert all(module.dtype == torch.float32 for module in (atelier.unet, atelier.vae, atelier.text_encoder))


def test_stock_diffusers_loads_atelier_without_help_from_us():
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(assets_folder() / "atelier", dtype=torch.float32)
    image = pipe("a photo of a red bag", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (32, 32)


def test_any_local_folder_loads(atelier, tmp_path):
    atelier.save_pretrained(tmp_path / "copy")
    copy = sfumato.load(tmp_path / "copy")
    assert torch.equal(copy.unet.conv_in.weight, atelier.unet.conv_in.weight)


def test_embedded_weights_are_small_and_free_of_pickle():
    files = [path for path in assets_folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") <= 20_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".md", ".png", ".txt"}


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
    assert torch.allclose(together, alone, atol=1e-4)


def test_parameter_subsets_are_what_they_say(family):
    kv = family.trainable_parameters("xattn-kv")
    assert set(kv) < set(family.trainable_parameters("xattn")) < set(family.trainable_parameters("full"))
    assert all("attn2.to_k" in name or "attn2.to_v" in name for name in kv)
    both = family.trainable_parameters("xattn") + family.trainable_parameters("noxattn")
    assert sorted(both) == sorted(family.trainable_parameters("full"))


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


def test_model_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no model folder"):
        sfumato.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="name is empty"):
        sfumato.load("")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        sfumato.load(tmp_path)


def test_truncated_weights_are_named_before_anything_is_built(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(assets_folder() / "atelier", folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors is corrupt or cut short"):
        sfumato.load(folder)
