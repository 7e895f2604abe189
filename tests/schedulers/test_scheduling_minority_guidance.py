"""MinorityGuidanceScheduler: the authors' programs, what guidance and Boost-and-Skip promise, and what is refused.

What it keeps of the contract with diffusers is tested with all others in `test_conformance.py`.
"""

import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from sfumato.schedulers.scheduling_minority_guidance import MinorityGuidanceScheduler, class_gradient

with np.load(Path(__file__).parent.parent / "golden" / "minority.npz") as archive:
    GOLDEN = {key: torch.from_numpy(archive[key]) for key in archive.files}
LEVELS = torch.linspace(-1, 1, 10, dtype=torch.float64)


def network(x, t):
    """What the reference runs were made with."""
    return 0.3 * x * math.cos(float(t) / 5) + 0.1 * torch.sin(3 * x + float(t) / 3)


def classifier(x, t):
    """The classifier of the reference runs: ten classes by the mean."""
    mean = 20 * x.sin().mean((1, 2, 3))
    return -5 * (mean[:, None] - 3 * LEVELS.to(x)) ** 2 * (1 + torch.cos(t.to(x) / 100))[:, None]


def make(**config):
    return MinorityGuidanceScheduler(**{"timestep_spacing": "linspace", **config})


def run(scheduler, x, steps=10, noises=None, **kwargs):
    scheduler.set_timesteps(steps)
    states = []
    for index, t in enumerate(scheduler.timesteps):
        z = {} if noises is None else {"variance_noise": noises[index]}
        x = scheduler.step(network(x, t), t, x, **z, **kwargs).prev_sample
        states.append(x)
    return torch.stack(states)


def relative_error(out, reference):
    return float((out - reference).abs().max() / reference.abs().max())


# ---------------------------------------------------------------- the authors' programs


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_guided_states_are_those_of_the_authors_program(sampler):
    scheduler = make(sampler=sampler)
    scheduler.set_classifier(classifier, GOLDEN["clf/y"])
    states = run(scheduler, GOLDEN["noises"][0], noises=GOLDEN["noises"][1:])
    assert scheduler.timesteps.tolist() == GOLDEN["clf/timestep_map"].tolist()[::-1]
    assert relative_error(states, GOLDEN[f"clf/traj_{sampler}10"]) < 1e-9


# ---------------------------------------------------------------- what steers, and what does not


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_without_guidance_ancestral_steps_are_those_of_stock_ddpm(variance_type):
    """In stock, `fixed_small` is also what a learned range falls back to at its lower end."""
    settings = {"variance_type": variance_type, "clip_sample": True, "timestep_spacing": "leading"}
    ours = MinorityGuidanceScheduler(**settings, guidance_scale=0.0)
    stock = DDPMScheduler(**settings)
    x = GOLDEN["noises"][0].float()
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
    for index, t in enumerate(stock.timesteps):
        output = network(x, t)
        if variance_type == "learned_range":
            output = torch.cat([output, network(x, t + 1)], dim=1)
        expected = stock.step(output, t, x, generator=torch.Generator().manual_seed(index)).prev_sample
        found = ours.step(output, t, x, generator=torch.Generator().manual_seed(index)).prev_sample
        assert relative_error(found, expected) < 1e-5
        x = expected


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_without_guidance_ddim_is_that_of_stock(eta):
    settings = {"clip_sample": True, "timestep_spacing": "leading"}
    ours = MinorityGuidanceScheduler(**settings, guidance_scale=0.0, sampler="ddim")
    stock, x = DDIMScheduler(**settings), GOLDEN["noises"][0]
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
    for index, t in enumerate(stock.timesteps):
        given = {"eta": eta, "use_clipped_model_output": True}
        expected = stock.step(network(x, t), t, x, **given, generator=torch.Generator().manual_seed(index)).prev_sample
        found = ours.step(network(x, t), t, x, **given, generator=torch.Generator().manual_seed(index)).prev_sample
        assert relative_error(found, expected) < 1e-5
        x = expected


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_a_classifier_that_can_not_tell_changes_nothing(sampler):
    noises = GOLDEN["noises"][1:]
    plain = run(make(sampler=sampler, guidance_scale=0.0), GOLDEN["x0"], noises=noises)
    guided = make(sampler=sampler)
    guided.set_classifier(lambda x, t: 0 * x.mean((1, 2, 3))[:, None] + torch.zeros(1, 10, dtype=x.dtype))
    assert relative_error(run(guided, GOLDEN["x0"], noises=noises), plain) < 1e-12


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_guidance_raises_the_probability_of_the_class(sampler):
    labels = torch.tensor([9, 9, 0, 0])

    def probability(scale):
        scheduler = make(sampler=sampler, guidance_scale=scale)
        scheduler.set_classifier(classifier, labels)
        last = run(scheduler, GOLDEN["noises"][0], noises=GOLDEN["noises"][1:])[-1]
        return classifier(last, torch.zeros(4)).log_softmax(1).gather(1, labels[:, None]).mean()

    assert probability(3.5) > probability(0.0) + 1


def test_a_guide_takes_the_place_of_the_classifier_and_may_leave_steps_out():
    def given(x, time):
        return class_gradient(classifier, x, time, 9) if time > 500 else None

    outs = {}
    for name, guide in {"none": lambda x, time: None, "some": given}.items():
        scheduler = make()
        scheduler.set_classifier(classifier, 3)
        scheduler.set_guide(guide)
        outs[name] = run(scheduler, GOLDEN["noises"][0], noises=GOLDEN["noises"][1:])
    assert torch.equal(outs["none"], run(make(guidance_scale=0.0), GOLDEN["noises"][0], noises=GOLDEN["noises"][1:]))
    by_class = GOLDEN["noises"][0], GOLDEN["noises"][1:]
    scheduler.set_classifier(classifier, 9)
    assert torch.equal(outs["some"][:5], run(scheduler, by_class[0], noises=by_class[1])[:5])
    assert not torch.equal(outs["some"][5:], outs["none"][5:])


def test_the_gradient_is_multiplied_by_the_variance_or_by_one():
    x, g = GOLDEN["noises"][0], GOLDEN["noises"][1]
    added = {}
    for scaled in (True, False):
        for scale in (0.0, 0.5):
            scheduler = make(scale_by_variance=scaled, guidance_scale=scale)
            scheduler.set_guide(lambda sample, time: g)
            scheduler.set_timesteps(10)
            t = scheduler.timesteps[3]
            added[scaled, scale] = scheduler.step(network(x, t), t, x, variance_noise=x).prev_sample
    alphas = scheduler.alphas_cumprod[scheduler.timesteps[3:5]].tolist()
    variance = (1 - alphas[0] / alphas[1]) * (1 - alphas[1]) / (1 - alphas[0])
    assert torch.allclose(added[False, 0.5] - added[False, 0.0], 0.5 * g, atol=1e-12)
    assert torch.allclose(added[True, 0.5] - added[True, 0.0], 0.5 * variance * g, atol=1e-12)


def test_the_last_class_is_guided_to_unless_another_is_asked_for():
    x = GOLDEN["x0"]
    assert torch.equal(class_gradient(classifier, x, 5, None), class_gradient(classifier, x, 5, 9))
    each = torch.cat([class_gradient(classifier, x[k : k + 1], 5, k) for k in range(4)])
    assert torch.allclose(class_gradient(classifier, x, 5, [0, 1, 2, 3]), each, atol=1e-12)


def test_guidance_works_under_inference_mode():
    scheduler = make()
    scheduler.set_classifier(classifier)
    expected = run(scheduler, GOLDEN["noises"][0], noises=GOLDEN["noises"][1:])
    with torch.inference_mode():
        assert torch.equal(run(scheduler, GOLDEN["noises"][0], noises=GOLDEN["noises"][1:]), expected)


def test_where_no_signal_is_left_ddim_is_not_steered_yet():
    settings = {"sampler": "ddim", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler = make(**settings)
    scheduler.set_classifier(classifier)
    assert torch.isfinite(run(scheduler, GOLDEN["noises"][0])).all()


# ---------------------------------------------------------------- Boost-and-Skip, and stock pipelines


def test_boost_and_skip_of_one_and_none_is_plain_sampling():
    plain, same = make(guidance_scale=0.0), make(guidance_scale=0.0, boost=1.0, skip_steps=0)
    noises = GOLDEN["noises"][1:]
    assert torch.equal(*(run(one, GOLDEN["x0"], noises=noises) for one in (plain, same)))


def test_boost_and_skip_starts_with_more_noise_and_later():
    scheduler = make(guidance_scale=0.0, boost=2.5, skip_steps=3)
    plain = make(guidance_scale=0.0)
    for one in (scheduler, plain):
        one.set_timesteps(10)
    assert scheduler.init_noise_sigma == 2.5
    assert scheduler.timesteps.tolist() == plain.timesteps.tolist()[3:]
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == 7


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip


@pytest.mark.parametrize("pipeline", [DDPMPipeline, DDIMPipeline])
def test_stock_pipelines_are_guided_by_one_line(pipeline, unet):
    pipe = pipeline(unet, DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    sampler = "ddim" if pipeline is DDIMPipeline else "ancestral"
    pictures = []
    for scale in (0.0, 50.0):
        pipe.scheduler = MinorityGuidanceScheduler.from_config(
            pipe.scheduler.config, guidance_scale=scale, sampler=sampler
        )
        pipe.scheduler.set_classifier(lambda x, t: torch.stack([-x.mean((1, 2, 3)), x.mean((1, 2, 3))], dim=1))
        call = {"batch_size": 2, "num_inference_steps": 5, "output_type": "np"}
        pictures.append(pipe(**call, generator=torch.Generator().manual_seed(0)).images)
    assert pictures[1].mean() > pictures[0].mean() and np.isfinite(pictures[1]).all()


def test_a_model_without_a_learned_variance_is_refused_where_one_is_expected():
    scheduler = make(variance_type="learned_range", guidance_scale=0.0)
    scheduler.set_timesteps(4)
    x, t = GOLDEN["x0"], scheduler.timesteps[0]
    with pytest.raises(ValueError, match="twice the channels"):
        scheduler.step(x, t, x)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": math.nan}, "guidance_scale"),
        ({"boost": 0.0}, "boost"),
        ({"boost": math.inf}, "boost"),
        ({"skip_steps": -1}, "skip_steps"),
        ({"sampler": "euler"}, "sampler"),
        ({"variance_type": "learned"}, "variance_type"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        make(**settings)


def test_more_steps_than_there_are_can_not_be_skipped():
    with pytest.raises(ValueError, match="must leave one of the 3 steps"):
        make(skip_steps=3).set_timesteps(3)


def test_a_missing_classifier_is_said_before_anything_is_drawn():
    scheduler, x = make(), GOLDEN["x0"]
    scheduler.set_timesteps(3)
    for begin in (scheduler.scale_model_input, lambda x, t: scheduler.step(x, t, x)):
        with pytest.raises(ValueError, match="there is no classifier: call `set_classifier`"):
            begin(x, scheduler.timesteps[0])
    assert make(guidance_scale=0.0).scale_model_input(x) is x


@pytest.mark.parametrize("labels", [2.5, "a", -1, [1, -2], [], torch.tensor([0.5]), [[1], [2, 3]]], ids=str)
def test_labels_that_are_none_are_refused_at_once(labels):
    with pytest.raises(ValueError, match="`labels` must be whole numbers from 0"):
        make().set_classifier(classifier, labels)


def test_what_guides_can_be_read_and_put_back():
    scheduler = make()
    scheduler.set_classifier(classifier)
    own = scheduler.guide
    scheduler.set_guide(None)
    assert scheduler.guide is None
    scheduler.set_guide(own)
    assert torch.equal(scheduler.guide(GOLDEN["x0"], 5), class_gradient(classifier, GOLDEN["x0"], 5, None))


def test_from_schedulers_that_never_clip_it_does_not_either():
    """Latents of Stable Diffusion would be ruined."""
    for stock in (
        diffusers.PNDMScheduler(),
        diffusers.EulerDiscreteScheduler(),
        diffusers.DPMSolverMultistepScheduler(),
    ):
        assert not MinorityGuidanceScheduler.from_config(stock.config).config.clip_sample
        assert MinorityGuidanceScheduler.from_config(stock.config, clip_sample=True).config.clip_sample
    assert MinorityGuidanceScheduler.from_config(DDPMScheduler().config).config.clip_sample
    assert not MinorityGuidanceScheduler.from_config(DDIMScheduler(clip_sample=False).config).config.clip_sample


@pytest.mark.parametrize(
    ("labels", "said"),
    [(10, r"must lie in \[0, 9\], got \[10\]"), ([1, 2], "one for each of 4 samples, got 2")],
    ids=str,
)
def test_labels_that_do_not_fit_are_refused(labels, said):
    scheduler, x = make(), GOLDEN["x0"]
    scheduler.set_classifier(classifier, labels)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match=said):
        scheduler.step(x, scheduler.timesteps[0], x)


def test_logits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"must give logits \(4, classes\), got \(4, 3, 8, 8\)"):
        class_gradient(lambda x, t: x, GOLDEN["x0"], 5, None)


def test_a_flow_has_no_minority_guidance():
    with pytest.raises(ValueError, match="needs a schedule of betas"):
        MinorityGuidanceScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler().config)
