"""Choosing window and cutoff: the candidates that are tried, what decides, and what the pipeline keeps."""

import pytest
import torch

import sfumato
from sfumato.tuning import principal_components, tune_time_shift


@pytest.fixture(scope="module")
def pipe():
    pipe = sfumato.load("atelier-pixel")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, scheduler, seed=0, count=24):
    kept, pipe.scheduler = pipe.scheduler, scheduler
    generator = torch.Generator().manual_seed(seed)
    images = pipe(torch.arange(count) % 10, num_inference_steps=5, generator=generator, output_type="pt").images
    pipe.scheduler = kept
    return images


def test_the_candidate_that_drew_the_pictures_is_found(pipe):
    stock = pipe.scheduler
    for window, cutoff in (240, 100), (0, 100):
        made = sfumato.TimeShiftScheduler.from_config(stock.config, window=window, cutoff=cutoff)
        pictures = draw(pipe, made, count=200)
        choice = tune_time_shift(
            pipe, pictures, num_inference_steps=5, windows=[20, 240], cutoffs=[100],
            features=principal_components(pictures, 5), class_labels=torch.arange(200) % 10,
        )  # fmt: skip
        assert (choice.confidence >= 0.95) == (window > 0)
        expected = (window, cutoff if window else None)
        assert min(choice.distances, key=choice.distances.get) == expected
        assert choice.scheduler.config.window == window and pipe.scheduler is stock
        assert window == 0 or choice.scheduler.config.cutoff == cutoff
    assert set(choice.distances) == {(0, None), (20, 100), (240, 100)}
    assert choice.scheduler.config.beta_schedule == stock.config.beta_schedule


def test_other_settings_and_features_are_used(pipe):
    seen = []

    def brightness(images):
        seen.append(images.shape)
        return images.flatten(1).mean(1, keepdim=True)

    pictures = draw(pipe, pipe.scheduler)
    choice = tune_time_shift(
        pipe, pictures, num_inference_steps=5, windows=[40], cutoffs=[300], features=brightness, seed=3,
        settings={"mode": "pnm", "solver": "s_pndm"}, class_labels=[1, 2, 3, 4],
    )  # fmt: skip
    assert seen == [(24, 1, 16, 16), (4, 1, 16, 16), (4, 1, 16, 16)]
    assert choice.scheduler.config.mode == "pnm" and choice.scheduler.config.solver == "s_pndm"


def test_a_shift_that_is_better_by_chance_alone_is_not_kept(pipe):
    """Real pictures that are as far from every candidate: one of them is nearest, but not reliably."""
    noise = torch.rand(64, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    choice = tune_time_shift(
        pipe, noise, num_inference_steps=5, windows=[2, 4], cutoffs=[900], class_labels=torch.arange(24) % 10
    )
    assert choice.confidence < 0.95 and choice.scheduler.config.window == 0


def test_principal_components_are_uncorrelated_and_hold_most_of_the_variance():
    pictures = torch.randn(200, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 16).view(
        1, 4, 4
    )
    values = principal_components(pictures, 4)(pictures)
    assert values.shape == (200, 4) and values.mean(0).abs().max() < 1e-9
    covariance = values.T.cov()
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-9
    assert covariance.diag().sum() > 0.5 * pictures.flatten(1).double().var(0).sum()
    assert principal_components(pictures[:3])(pictures).shape == (200, 3)


def test_what_makes_no_sense_is_refused_and_the_scheduler_put_back(pipe):
    kept, call = pipe.scheduler, {"num_inference_steps": 2, "class_labels": [0, 1, 2, 3]}
    with pytest.raises(ValueError, match="at least two"):
        tune_time_shift(pipe, torch.zeros(1, 1, 16, 16), **call)
    with pytest.raises(ValueError, match="at least one window"):
        tune_time_shift(pipe, torch.zeros(4, 1, 16, 16), windows=[], **call)
    with pytest.raises(ValueError, match="same channels and size"):
        tune_time_shift(pipe, torch.rand(4, 1, 8, 8), **call, features=lambda images: images[:, 0, 0])
    with pytest.raises(ValueError, match="few hundred pictures must be drawn to choose by, got 2"):
        tune_time_shift(pipe, torch.rand(4, 1, 16, 16), num_inference_steps=2, class_labels=[0, 1])
    assert pipe.scheduler is kept
