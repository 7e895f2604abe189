"""The variance of predicted clean samples: its value, in stock pipelines and with all kinds of schedulers."""

import contextlib
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

import sfumato
from sfumato.trajectory_variance import TrajectoryVariance, threshold_for, trajectory_variance

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def network(x, t):
    return 0.3 * x + 0.1 * torch.sin(3 * x + float(t) / 100)


def start_of(scheduler):
    """What the first latents are multiplied by; schedulers of flows have none."""
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def loop(scheduler, steps=20, batch=3, **call):
    """A run by hand; gives the clean samples that are predicted, and the times."""
    scheduler.set_timesteps(steps)
    x = torch.randn(batch, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * start_of(scheduler)
    seen = []
    for t in scheduler.timesteps:
        scaled = x if start_of(scheduler) == 1 else scheduler.scale_model_input(x, t)
        output = network(scaled, t)
        before, index = x, len(seen)
        x = scheduler.step(output, t, x, return_dict=False, **call)[0]
        seen.append((before, output, index))
    return seen


def clean_of(scheduler, seen):
    """x0 by the definition of each process."""
    found = []
    for x, output, index in seen:
        if "FlowMatch" in type(scheduler).__name__ or start_of(scheduler) != 1:
            found.append(x - scheduler.sigmas[index] * output)
        else:
            alpha = scheduler.alphas_cumprod[int(scheduler.timesteps[index])]
            found.append((x - (1 - alpha).sqrt() * output) / alpha.sqrt())
    return torch.stack(found)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(**SD, clip_sample=False),
        diffusers.DPMSolverMultistepScheduler(**SD),
        diffusers.UniPCMultistepScheduler(**SD),
        diffusers.EulerDiscreteScheduler(**SD),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        sfumato.BDIAScheduler(**SD),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_score_is_the_variance_over_the_window_whatever_the_scheduler(scheduler):
    watch = TrajectoryVariance(100, 500)
    with watch.watching(SimpleNamespace(scheduler=scheduler)):
        seen = loop(scheduler)
    clean = clean_of(scheduler, seen)
    inside = (scheduler.timesteps >= 100) & (scheduler.timesteps <= 500)
    assert 3 < int(inside.sum()) < 15
    expected = clean[inside].double().numpy().var(0).reshape(3, -1).mean(1)
    assert np.allclose(watch.scores.numpy(), expected, rtol=1e-4)
    assert torch.allclose(trajectory_variance(clean, scheduler.timesteps, 100, 500), watch.scores, rtol=1e-4)
    assert "step" not in vars(scheduler)


def test_both_ends_of_the_window_count():
    samples, times = torch.randn(5, 2, 3), torch.tensor([40, 30, 20, 10, 0])
    assert torch.equal(
        trajectory_variance(samples, times, 10, 30), samples[1:4].var(0, unbiased=False).mean(1)
    )  # fmt: skip
    assert torch.equal(trajectory_variance(0 * samples + 1, times, 0, 40), torch.zeros(2))
    scaled = trajectory_variance(3 * samples + 7, times, 0, 40)
    assert torch.allclose(scaled, 9 * trajectory_variance(samples, times, 0, 40))
    swapped = trajectory_variance(samples.flip(1), times, 0, 40)
    assert torch.equal(swapped.flip(0), trajectory_variance(samples, times, 0, 40))


@pytest.fixture(scope="module")
def atelier():
    pipe = sfumato.load("atelier")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, watch, count=2, **more):
    call = {"num_inference_steps": 8, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipe(["a photo of a red bag"] * count, callback_on_step_end=watch, **call, **more).images


def test_a_callback_scores_the_samples_of_a_stock_pipeline_and_changes_none(atelier):
    plain, watch = draw(atelier, None), TrajectoryVariance(0, 700)
    assert torch.equal(draw(atelier, watch), plain)
    assert watch.scores.shape == (2,) and (watch.scores > 0).all()
    first = watch.scores
    draw(atelier, watch)
    assert torch.equal(watch.scores, first)  # a new run is a new score
    with watch.watching(atelier):
        draw(atelier, None)
    assert torch.allclose(watch.scores, first)  # the first step is none of these times
    assert "step" not in vars(atelier.scheduler)


def test_it_goes_together_with_other_callbacks(atelier):
    class Counter(PipelineCallback):
        tensor_inputs = ["latents"]  # noqa: RUF012
        steps = 0

        def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
            self.steps += 1
            return callback_kwargs

    counter, watch, alone = Counter(), TrajectoryVariance(0, 700), TrajectoryVariance(0, 700)
    draw(atelier, MultiPipelineCallbacks([counter, watch]))
    draw(atelier, alone)
    assert counter.steps == 8 and torch.equal(watch.scores, alone.scores)


class Stopping(PipelineCallback):
    """Ends a run after its fourth step."""

    tensor_inputs: list[str] = []  # noqa: RUF012

    def __init__(self, how):
        super().__init__()
        self.how = how

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        if step_index == 3:
            self.how(pipeline)
        return callback_kwargs


def press_keys(pipeline):
    raise KeyboardInterrupt


def ask_it_to_stop(pipeline):
    pipeline._interrupt = True


@pytest.mark.parametrize("how", [press_keys, ask_it_to_stop])
def test_a_run_that_was_broken_off_leaves_nothing_behind(atelier, how):
    watch, expected = TrajectoryVariance(0, 999), TrajectoryVariance(0, 999)
    draw(atelier, expected)
    plain = draw(atelier, None, count=3)
    with contextlib.suppress(KeyboardInterrupt):
        draw(atelier, MultiPipelineCallbacks([watch, Stopping(how)]))
    so_far = watch.scores
    assert torch.equal(draw(atelier, None, count=3), plain)  # of another size, and not watched
    assert torch.equal(watch.scores, so_far) and not torch.equal(so_far, expected.scores)
    assert not {"step", "set_timesteps"} & set(vars(atelier.scheduler))
    draw(atelier, watch)
    assert torch.equal(watch.scores, expected.scores)


def test_a_run_that_is_asked_to_stop_first_is_not_watched_any_more(atelier):
    watch = TrajectoryVariance(0, 999)
    draw(atelier, MultiPipelineCallbacks([Stopping(ask_it_to_stop), watch]))
    assert "step" not in vars(atelier.scheduler) and watch._count == 3


def test_two_can_watch_a_run_and_one_several(atelier):
    early, late, apart = TrajectoryVariance(400, 999), TrajectoryVariance(0, 500), TrajectoryVariance(0, 500)
    draw(atelier, MultiPipelineCallbacks([early, late]))
    draw(atelier, apart)
    assert torch.equal(late.scores, apart.scores) and not torch.equal(early.scores, apart.scores)
    with apart.watching(atelier), early.watching(atelier):
        draw(atelier, None, count=3)
        draw(atelier, None)
    assert torch.allclose(apart.scores, late.scores) and len(early.scores) == 2
    assert not {"step", "set_timesteps"} & set(vars(atelier.scheduler))


@pytest.mark.parametrize(
    "scheduler", [diffusers.EDMEulerScheduler(), diffusers.EulerDiscreteScheduler(timestep_type="continuous")]
)
def test_times_in_other_units_are_refused(atelier, scheduler, monkeypatch):
    monkeypatch.setattr(atelier, "scheduler", scheduler)
    with pytest.raises(ValueError, match="counts times as logarithms"):
        draw(atelier, TrajectoryVariance())
    assert not {"step", "set_timesteps"} & set(vars(scheduler))


def test_a_scheduler_that_does_not_tell_is_refused_at_its_first_step(atelier, monkeypatch):
    calls = []
    monkeypatch.setattr(atelier, "scheduler", diffusers.IPNDMScheduler())
    handle = atelier.unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(ValueError, match="IPNDMScheduler does not tell"):
            draw(atelier, TrajectoryVariance(0, 1))
    finally:
        handle.remove()
    assert len(calls) == 2  # of 8


def test_calibration_keeps_the_share_that_is_asked_for():
    scores = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).float()
    watch = TrajectoryVariance()
    for kept in (0.96, 0.5, 1.0):
        threshold = watch.calibrate(scores, kept)
        assert float((scores <= threshold).float().mean()) == pytest.approx(kept, abs=1e-3)


def test_what_is_kept_follows_from_the_threshold(atelier):
    watch = TrajectoryVariance(0, 700)
    draw(atelier, watch, count=3)
    watch.threshold = float(watch.scores.median())
    assert watch.kept.tolist() == (watch.scores <= watch.scores.median()).tolist() and watch.kept.sum() == 2


def test_what_makes_no_sense_is_refused(atelier):
    with pytest.raises(ValueError, match="`t_max` must be at least `t_min`"):
        TrajectoryVariance(5, 1)
    watch = TrajectoryVariance(0, 1)
    with pytest.raises(ValueError, match="a variance needs two"):
        watch.scores  # noqa: B018
    draw(atelier, watch)
    with pytest.raises(ValueError, match="0 steps lay between the times 0 and 1"):
        watch.scores  # noqa: B018
    with pytest.raises(ValueError, match="There is no threshold"):
        watch.kept  # noqa: B018
    for scores, kept in ((torch.zeros(0), 0.9), (torch.tensor([float("nan")]), 0.9), (torch.ones(3), 0.0)):
        with pytest.raises(ValueError, match="must"):
            threshold_for(scores, kept)
    with pytest.raises(ValueError, match="a variance needs two"):
        trajectory_variance(torch.zeros(3, 2, 4), torch.tensor([3, 2, 1]), 0, 1)
    pndm = diffusers.IPNDMScheduler()
    with (
        pytest.raises(ValueError, match="IPNDMScheduler does not tell"),
        watch.watching(SimpleNamespace(scheduler=pndm)),
    ):
        loop(pndm, 4)
