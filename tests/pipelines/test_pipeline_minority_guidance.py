"""MinorityGuidancePipeline: the authors' program, its guidance in pipelines of diffusers, and what is refused."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image

import sfumato
from sfumato.pipelines.pipeline_minority_guidance import MinorityGuidancePipeline, self_guidance
from sfumato.schedulers.scheduling_minority_guidance import MinorityGuidanceScheduler

with np.load(Path(__file__).parent.parent / "golden" / "minority.npz") as archive:
    GOLDEN = {key: torch.from_numpy(archive[key]) for key in archive.files}
CASES = {  # every, settings of the scheduler, normalised, the share of steps after which it ends
    "var_normed_inter1": (1, {"guidance_scale": 0.4}, True, -1),
    "var_normed_inter5": (5, {"guidance_scale": 0.4}, True, -1),
    "fixed_raw_inter2": (2, {"guidance_scale": 0.2, "scale_by_variance": False}, False, -1),
    "tmid0.5": (1, {"guidance_scale": 0.4}, True, 0.5),
}


def network(x, t):
    """What the reference runs were made with."""
    return 0.3 * x * math.cos(float(t) / 5) + 0.1 * torch.sin(3 * x + float(t) / 3)


@pytest.mark.parametrize("name", CASES)
def test_guided_states_are_those_of_the_authors_program(name):
    every, settings, normalize, stop = CASES[name]
    scheduler = MinorityGuidanceScheduler(
        timestep_spacing="linspace", beta_schedule="squaredcos_cap_v2", **settings
    )  # fmt: skip
    first = scheduler.alphas_cumprod[999].item()
    assert GOLDEN["sg/alphas_cumprod"][9].item() == pytest.approx(first, rel=1e-9)
    scheduler._host[999] = GOLDEN["sg/alphas_cumprod"][9].item()  # 2e-9, and theirs is a product of rounded betas
    scheduler.set_timesteps(10)
    noises = iter(GOLDEN["sg/noises"])
    x, perturbed = next(noises), scheduler.earlier_time(0.8)
    assert perturbed == GOLDEN["sg/timestep_map"][8]
    for index, t in enumerate(scheduler.timesteps):
        left, drawn = 9 - index, next(noises)
        guided = left % every == 0 and left > stop * 10

        def guide(sample, time, guided=guided):
            if not guided:
                return None
            return self_guidance(
                network, scheduler, sample, time, perturbed, [next(noises)], normalize=normalize
            )  # fmt: skip

        scheduler.set_guide(guide)
        x = scheduler.step(network(x, t), t, x, variance_noise=drawn).prev_sample
        reference = GOLDEN[f"sg/{name}/traj"][index]
        assert (x - reference).abs().max() / reference.abs().max() < 1e-9


@pytest.fixture(scope="module")
def pixel():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipe = DDPMPipeline(unet, DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def guided(base, scale, **settings):
    scheduler = MinorityGuidanceScheduler.from_config(base.scheduler.config, guidance_scale=scale, **settings)
    return MinorityGuidancePipeline(base=base, scheduler=scheduler)


def draw(pipe, *args, seed=0, **call):
    call = {"num_inference_steps": 4, "output_type": "np", "generator": torch.Generator().manual_seed(seed), **call}
    return pipe(*args, **call).images


def test_each_normalised_gradient_has_one_as_its_largest_entry():
    scheduler = MinorityGuidanceScheduler()
    scheduler.set_timesteps(10)
    x = GOLDEN["noises"][0]
    found = self_guidance(network, scheduler, x, 500, 800, [GOLDEN["noises"][1]])
    assert torch.equal(found.abs().flatten(1).amax(1), torch.ones(4, dtype=torch.float64))


def test_the_gradient_is_that_of_the_distance_and_the_second_prediction_is_held_fixed():
    scheduler, eps = MinorityGuidanceScheduler(), 1e-6
    scheduler.set_timesteps(10)
    x, noise, step = GOLDEN["noises"][0][:1], GOLDEN["noises"][1][:1], GOLDEN["noises"][2][:1]

    def clean(x, t):
        return scheduler.predict_original(network(x, t), t, x)

    held = clean(scheduler.add_noise(clean(x, 500), noise, torch.tensor([800])), 800)
    apart = [torch.linalg.vector_norm(clean(x + sign * eps * step, 500) - held) for sign in (1, -1)]
    found = self_guidance(network, scheduler, x, 500, 800, [noise], normalize=False)
    assert torch.isclose((found * step).sum(), (apart[0] - apart[1]) / (2 * eps), rtol=1e-6)


def test_of_several_noises_the_mean_is_taken():
    scheduler = MinorityGuidanceScheduler()
    scheduler.set_timesteps(10)
    x, noises = GOLDEN["noises"][0], list(GOLDEN["noises"][1:4])
    each = [self_guidance(network, scheduler, x, 500, 800, [noise], normalize=False) for noise in noises]
    together = self_guidance(network, scheduler, x, 500, 800, noises, normalize=False)
    assert torch.allclose(together, torch.stack(each).mean(0), atol=1e-12)


def test_without_guidance_it_is_the_pipeline_itself(pixel):
    plain = guided(pixel, 0.0)
    pixel.scheduler = plain.scheduler
    expected = draw(pixel, batch_size=2)
    pixel.scheduler = DDPMScheduler()
    assert np.array_equal(draw(guided(pixel, 0.0), batch_size=2), expected)
    assert isinstance(pixel.scheduler, DDPMScheduler)  # it is put back


def test_guidance_changes_the_pictures_and_repeats(pixel):
    pipe = guided(pixel, 5.0)
    pictures = [draw(pipe, batch_size=2, guide_every=1) for _ in range(2)]
    assert np.array_equal(*pictures)
    assert not np.array_equal(pictures[0], draw(guided(pixel, 0.0), batch_size=2))
    assert pixel.unet.conv_in.weight.grad is None and not pixel.unet._forward_pre_hooks


def test_less_memory_gives_the_same_pictures(pixel):
    pictures = [draw(guided(pixel, 5.0), batch_size=1, gradient_checkpointing=g) for g in (False, True)]
    assert np.allclose(*pictures, atol=1e-6) and not pixel.unet.is_gradient_checkpointing


def test_a_distance_of_ones_own_is_used(pixel):
    seen = []

    def distance(a, b):
        seen.append((a.shape, b.requires_grad))
        return (a - b).abs().mean((1, 2, 3))

    draw(guided(pixel, 1.0), batch_size=2, guide_every=2, distance=distance)
    assert seen == [((2, 3, 8, 8), False)] * 2  # of four steps those with 2 and 0 to go


def test_text_to_image_is_guided_by_the_branch_of_the_prompt():
    atelier = sfumato.load("atelier")
    atelier.set_progress_bar_config(disable=True)
    seen = []
    handle = atelier.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((len(args[0]), kwargs["encoder_hidden_states"])), with_kwargs=True
    )
    pipe = guided(atelier, 1.0, sampler="ddim", clip_sample=False)
    plain = draw(guided(atelier, 0.0, sampler="ddim", clip_sample=False), "a photo of a red bag", seed=1)
    seen.clear()
    picture = draw(pipe, "a photo of a red bag", seed=1, guide_every=2)
    handle.remove()
    assert [count for count, _ in seen] == [2, 2, 1, 1, 2, 2, 1, 1]  # with guidance, and then the gradient's
    assert torch.equal(seen[2][1][0], seen[1][1][1]) and not torch.equal(seen[2][1][0], seen[1][1][0])
    assert not np.array_equal(picture, plain)


def test_classes_are_guided_too():
    pipe = sfumato.load("atelier-pixel")
    pipe.set_progress_bar_config(disable=True)
    call = {"class_labels": [1, 7], "guidance_scale": 2.0, "guide_every": 2}
    pictures = [draw(guided(pipe, scale), **call) for scale in (0.0, 3.0)]
    assert pictures[0].shape == (2, 16, 16, 1) and not np.array_equal(*pictures)


def test_inference_mode_changes_nothing():
    atelier = sfumato.load("atelier")
    atelier.set_progress_bar_config(disable=True)
    pipe = guided(atelier, 1.0, clip_sample=False)
    expected = draw(pipe, "a photo of a red bag", guide_every=2)
    with torch.inference_mode():
        assert np.array_equal(draw(pipe, "a photo of a red bag", guide_every=2), expected)


def test_a_classifier_that_the_scheduler_had_guides_again_afterwards(pixel):
    pipe = guided(pixel, 1.0)
    pipe.scheduler.set_classifier(lambda x, t: x.flatten(1))
    own = pipe.scheduler.guide
    draw(pipe, batch_size=1)
    assert pipe.scheduler.guide is own


def edited(atelier):
    """InstructPix2Pix with atelier's parts, and a denoiser that is told the latents of a picture."""
    torch.manual_seed(0)
    config = {**atelier.unet.config, "in_channels": 8}
    return StableDiffusionInstructPix2PixPipeline(
        atelier.vae, atelier.text_encoder, atelier.tokenizer, UNet2DConditionModel.from_config(config),
        atelier.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def test_of_three_branches_that_of_prompt_and_picture_guides():
    atelier = sfumato.load("atelier")
    pipe, seen = edited(atelier), []
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0].detach(), kwargs["encoder_hidden_states"])), with_kwargs=True
    )
    draw(
        guided(pipe, 1.0, clip_sample=False), "a photo of a red bag", image=Image.new("RGB", (32, 32), "blue"),
        guidance_scale=3.0, guide_every=1, num_inference_steps=2,
    )  # fmt: skip
    asked, once = seen[0], seen[1]
    assert [len(x) for x, _ in seen[:3]] == [3, 1, 1]
    assert torch.equal(once[1][0], asked[1][0]) and not torch.equal(asked[1][0], asked[1][1])
    assert torch.equal(once[0], asked[0][:1]) and not torch.equal(asked[0][0], asked[0][2])  # which has no picture


class Asking(DDPMPipeline):
    """Asks for three predictions of each sample, of unknown meaning."""

    def __call__(self, generator=None, **kwargs):
        self.scheduler.set_timesteps(2)
        x = torch.zeros(1, 3, 8, 8)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(torch.cat([x] * 3), t).sample[:1], t, x).prev_sample


class PAGPipeline(DDPMPipeline):
    """Stands for those of diffusers."""


def test_branches_of_unknown_meaning_are_refused(pixel):
    own = pixel.scheduler
    with pytest.raises(ValueError, match="asks its denoiser for 3 predictions of 1 samples"):
        guided(Asking(pixel.unet, own), 1.0)(guide_every=2)
    with pytest.raises(ValueError, match="use the pipeline without PAG"):
        guided(PAGPipeline(pixel.unet, own), 1.0)


def test_it_moves_and_is_saved_with_the_pipeline_that_draws(pixel, tmp_path):
    pipe = guided(pixel, 2.0)
    pipe.save_pretrained(tmp_path)
    again = MinorityGuidancePipeline.from_pretrained(tmp_path)
    assert again.scheduler.config.guidance_scale == 2.0
    for one in (pipe, again):
        one.base.set_progress_bar_config(disable=True)
    assert np.allclose(draw(again, batch_size=1), draw(pipe, batch_size=1), atol=1e-5)
    assert again.to(torch.float64).base.unet.dtype == torch.float64


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"perturb_ratio": 1.5}, "perturb_ratio"), ({"stop_ratio": -0.1}, "stop_ratio"),
        ({"guide_every": 0}, "guide_every"), ({"noise_samples": 0}, "noise_samples"),
    ],
    ids=str,
)  # fmt: skip
def test_impossible_settings_are_refused(pixel, settings, said):
    with pytest.raises(ValueError, match=said):
        guided(pixel, 1.0)(**settings)


def test_what_can_not_be_guided_is_refused(pixel):
    with pytest.raises(ValueError, match="takes no guide"):
        MinorityGuidancePipeline(base=pixel, scheduler=DDPMScheduler())
    with pytest.raises(ValueError, match="needs a schedule of betas"):
        MinorityGuidanceScheduler.from_config(FlowMatchEulerDiscreteScheduler().config)
    with pytest.raises(ValueError, match="neither a `unet` nor a `transformer`"):
        MinorityGuidancePipeline(base=guided(pixel, 1.0), scheduler=MinorityGuidanceScheduler())
