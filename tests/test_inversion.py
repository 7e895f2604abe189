import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

import sfumato
from sfumato import BDIAScheduler, BELMScheduler
from sfumato.inversion import Inversion, edit, invert, make_sampler, noise_statistics
from sfumato.loading import assets_folder

RENDERS = assets_folder() / "renders"
EXACT = ("bdia", "belm", "edict")


@pytest.fixture(scope="module")
def atelier():
    pipe = sfumato.load("atelier")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def real():
    """Real test renders and their captions."""
    rows = [json.loads(line) for line in (RENDERS / "metadata.jsonl").read_text().splitlines()][5::170]
    return [Image.open(RENDERS / row["file_name"]).convert("RGB") for row in rows], [row["text"] for row in rows]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("scheduler", EXACT)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0, 7.5])
def test_real_pictures_come_back_whatever_the_guidance(atelier, real, scheduler, guidance_scale):
    found = invert(atelier, *real, scheduler=scheduler, num_inference_steps=11, guidance_scale=guidance_scale)
    assert relative(found.sample_latents(atelier), found.clean_latents) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("scheduler_class", "options"), [(BDIAScheduler, {}), (BDIAScheduler, {"gamma": 0.9}), (BELMScheduler, {})]
)
def test_exact_inversion_of_real_pictures_keeps_every_bit(real, scheduler_class, options, dtype):
    pipe = sfumato.load("atelier", dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    scheduler = scheduler_class.from_config(pipe.scheduler.config, exact=True, **options)
    found = invert(pipe, *real, scheduler=scheduler, num_inference_steps=12, guidance_scale=7.5)
    assert found.clean_latents.dtype == dtype
    assert torch.equal(found.sample_latents(pipe), found.clean_latents)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("scheduler", [*EXACT, "ddim", "fixed-point"])
def test_every_family_is_inverted_through_its_own_pipeline(tiny, kind, scheduler):
    model = tiny(kind, BDIAScheduler)
    pipe, stock = model.pipe, model.kind.stock()
    pipe.scheduler = stock
    arguments = {
        key: value for key, value in model.kind.call.items() if key not in ("height", "width", "guidance_scale")
    }
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = invert(pipe, image, scheduler=scheduler, num_inference_steps=6, guidance_scale=2.0, **arguments)
    assert pipe.scheduler is stock
    assert found.sample(pipe).shape == image.shape
    if scheduler in EXACT:
        assert relative(found.sample_latents(pipe), found.clean_latents) <= 1e-6


@pytest.mark.parametrize("scheduler", [*EXACT, "ddim", "fixed-point", "ddpm"])
def test_strength_leaves_the_noisiest_steps_out(atelier, real, scheduler):
    generator = torch.Generator().manual_seed(0)
    found = invert(atelier, *real, scheduler=scheduler, num_inference_steps=10, strength=0.5, generator=generator)
    assert found.scheduler_config["skip_steps"] == 5
    limit = 1e-6 if scheduler in EXACT else 0.2
    assert relative(found.sample_latents(atelier), found.clean_latents) <= limit


def test_a_batch_is_inverted_like_its_pictures_one_by_one(atelier, real):
    pictures, prompts = real
    together = invert(atelier, pictures, prompts, num_inference_steps=8, guidance_scale=3.0)
    alone = invert(atelier, pictures[1], prompts[1], num_inference_steps=8, guidance_scale=3.0)
    assert relative(together.latents[1:2], alone.latents) <= 1e-4


def test_inversion_survives_the_disk_bit_for_bit(atelier, real, tmp_path):
    for name, options in (("bdia", {"exact": True}), ("edict", {}), ("ddpm", {})):
        scheduler = make_sampler(atelier, name, **options)
        found = invert(
            atelier, *real, scheduler=scheduler, num_inference_steps=6, generator=torch.Generator().manual_seed(0)
        )
        again = Inversion.load(found.save(tmp_path / f"{name}.safetensors"))
        assert torch.equal(again.sample_latents(atelier), found.sample_latents(atelier))
        assert again.noise == found.noise and again.prompt == found.prompt


def test_edit_changes_what_it_is_told_to_and_says_what_the_autoencoder_costs(atelier):
    image = Image.open(RENDERS / "120-sandal-photo-red.png")
    result = edit(atelier, image, "a photo of a red sandal", "a photo of a green sandal", num_inference_steps=30)
    judge = sfumato.Judge.load(assets_folder() / "judge")
    seen = {domain: judge.domains[domain][index] for domain, (index,) in judge.predict(result.images).items()}
    assert seen == {"garment": "sandal", "style": "photo", "colour": "green"}
    assert result.latent_error <= 1e-6
    assert result.reconstruction_psnr == pytest.approx(result.autoencoder_psnr, abs=1e-3)
    assert 20 < result.autoencoder_psnr < 60


def test_statistics_of_noise_tell_it_from_something_else():
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    white, red = noise_statistics(noise), noise_statistics(0.5 * (noise + noise.roll(1, -1)))
    assert abs(white.mean) < 0.05 and abs(white.std - 1) < 0.05 and abs(white.correlation) < 0.05
    assert white.distance < 1.5 * white.expected_distance < red.distance
    assert red.correlation > 0.4 and red.std < 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheduler": "nonsense"}, "Unknown scheduler 'nonsense'"),
        ({"scheduler": DDIMScheduler()}, "DDIMScheduler can't be inverted"),
        ({"scheduler": BDIAScheduler}, "BDIAScheduler is a class"),
        ({"prompt": None}, "`prompt` must be a text or a list of texts"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, "one for each of the 1 pictures, got 2"),
        ({"height": 32}, "`height` is not for the caller to give"),
        ({"strength": 0.0}, "strength"),
        ({"strength": 1.5}, "strength"),
        ({"num_inference_steps": 4, "strength": 0.25}, "at least 2 steps"),
        ({"scheduler": "ddpm", "strength": 0.25}, "at least 2 steps"),
        ({"num_inference_steps": 1}, "at least 2 steps"),
        ({"prompt": ["one", "two"]}, "one each"),
        ({"image": 2 * torch.ones(1, 3, 32, 32)}, r"in \[0, 1\]"),
        ({"image": torch.full((1, 3, 32, 32), float("nan"))}, "not finite"),
    ],
)
def test_impossible_inversions_are_refused_before_any_network_call(atelier, arguments, message):
    def forbidden(*_):
        raise AssertionError("the network was called")

    hook = atelier.unet.register_forward_pre_hook(forbidden)
    call = {"image": Image.new("RGB", (32, 32)), "prompt": "", "num_inference_steps": 5, **arguments}
    try:
        with pytest.raises(ValueError, match=message):
            invert(atelier, call.pop("image"), call.pop("prompt"), **call)
    finally:
        hook.remove()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_pictures_of_any_mode_and_size_are_taken(atelier, real, mode):
    picture = real[0][0].convert(mode).resize((45, 37))
    found = invert(atelier, picture, "", num_inference_steps=3)
    assert found.images.shape == (1, 3, 32, 40)
    assert found.sample(atelier).shape == (1, 3, 32, 40)


@pytest.mark.parametrize(
    ("image", "message"),
    [([], "no picture"), (None, "no picture"), (Image.new("RGB", (7, 32)), "at least 8 x 8"),
     ([Image.new("RGB", (32, 32)), Image.new("RGB", (40, 32))], "must have one size")],
)  # fmt: skip
def test_what_is_no_picture_is_said_so(atelier, image, message):
    with pytest.raises(ValueError, match=message):
        invert(atelier, image)


def test_a_negative_prompt_stands_for_all_pictures_and_is_kept(atelier, real, tmp_path):
    pictures, texts = real
    runs = [
        invert(
            atelier, pictures[:2], texts[:2], num_inference_steps=3, guidance_scale=3.0, negative_prompt=negative
        ) for negative in ("a bag", ["a bag", "a bag"])
    ]  # fmt: skip
    assert torch.equal(runs[0].latents, runs[1].latents)
    again = Inversion.load(runs[0].save(tmp_path / "it.safetensors"))
    assert again.pipeline_arguments == {"negative_prompt": "a bag"}
    assert relative(again.sample_latents(atelier), again.clean_latents) < 1e-6


def test_a_new_prompt_replaces_embeddings_that_were_inverted_with(atelier, real, tmp_path):
    picture, green = real[0][0], "a photo of a green sandal"
    embeddings = atelier.encode_prompt("a photo of a red sandal", "cpu", 1, False)[0]
    found = invert(atelier, picture, num_inference_steps=4, prompt_embeds=embeddings)
    loaded = Inversion.load(found.save(tmp_path / "it.safetensors"))
    assert torch.equal(loaded.pipeline_arguments["prompt_embeds"], embeddings)
    assert torch.equal(loaded.sample(atelier), found.sample(atelier))
    by_prompt = invert(atelier, picture, "a photo of a red sandal", num_inference_steps=4)
    assert torch.equal(found.sample(atelier, green), by_prompt.sample(atelier, green))
    assert not torch.equal(found.sample(atelier, green), found.sample(atelier))


def test_named_schedulers_take_the_noise_schedule_of_the_pipeline_and_nothing_else(real):
    pipe = sfumato.load("atelier")
    pipe.set_progress_bar_config(disable=True)
    expected = invert(pipe, real[0][0], num_inference_steps=3)
    for other in (
        sfumato.TimeShiftScheduler.from_config(pipe.scheduler.config, solver="f_pndm"),
        BDIAScheduler.from_config(pipe.scheduler.config, gamma=0.5),
        sfumato.EDICTScheduler.from_config(pipe.scheduler.config, released=True),
    ):
        pipe.scheduler = other
        found = invert(pipe, real[0][0], num_inference_steps=3)
        assert torch.equal(found.latents, expected.latents) and found.scheduler_config["gamma"] == 1.0


def test_an_autoencoder_that_overflows_in_half_precision_is_widened_meanwhile(tiny):
    pipe = tiny("sdxl", BDIAScheduler)
    call = pipe.cast(torch.float16)
    with torch.no_grad():
        pipe.pipe.vae.encoder.conv_in.weight.mul_(2e5)
    picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not torch.isfinite(pipe.pipe.vae.encode(2 * picture.half() - 1).latent_dist.mean).all()
    found = invert(pipe.pipe, picture, num_inference_steps=3, guidance_scale=3.0, **call)
    assert torch.isfinite(found.latents).all() and pipe.pipe.vae.dtype == torch.float16
    assert torch.isfinite(found.sample(pipe.pipe)).all()


def test_unsupported_pipelines_are_named():
    with pytest.raises(ValueError, match="ClassConditionalPipeline can't be inverted"):
        invert(sfumato.load("atelier-pixel"), Image.new("RGB", (16, 16)))


def sfumato_command(*words):
    command = [Path(sys.executable).parent / "sfumato", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_commands_invert_and_edit_and_overwrite_nothing(tmp_path):
    picture, output = RENDERS / "120-sandal-photo-red.png", tmp_path / "inverted"
    done = sfumato_command(
        "invert", picture, "--prompt", "a photo of a red sandal", "--exact", "--num-inference-steps", 6,
        "--output", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads((output / "figures.json").read_text())
    assert figures["latent_error"] == 0 and figures["condition_number"] == 1
    assert Image.open(output / "comparison.png").width == 3 * 256 + 2 * 8
    edited = sfumato_command("edit", output, "--target-prompt", "a green sandal", "--output", tmp_path / "edited")
    assert edited.returncode == 0 and (tmp_path / "edited" / "edited.png").exists()
    again = sfumato_command("invert", picture, "--output", output)
    assert again.returncode == 1 and "already holds something" in again.stderr
    missing = sfumato_command("invert", tmp_path / "none.png", "--output", tmp_path / "new")
    assert missing.returncode == 1 and "There is no picture" in missing.stderr
    assert not (tmp_path / "new").exists()
