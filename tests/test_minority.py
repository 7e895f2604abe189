"""The minority score: the authors' program, what it says of pictures, and its classes."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

import sfumato
from sfumato.families.process import Diffusion
from sfumato.minority import denoised_once, minority_labels, minority_scores

with np.load(Path(__file__).parent / "golden" / "minority.npz") as archive:
    GOLDEN = {key: torch.from_numpy(archive[key]) for key in archive.files}


class Toy:
    """The network that the reference score was made with, in the place of a family."""

    denoiser = None

    def __init__(self):
        self.process = Diffusion(DDPMScheduler())
        table = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        self.process.alphas_cumprod = (1 - table).cumprod(0)
        self.split = self.process.split

    def add_noise(self, clean, noise, times):
        signal, sigma = self.process.scales(times)
        return signal.view(-1, 1, 1, 1) * clean + sigma.view(-1, 1, 1, 1) * noise

    def ask(self, denoiser, x, times, conditioning):
        t = float(times[0])
        return 0.3 * x * math.cos(t / 5) + 0.1 * torch.sin(3 * x + t / 3)


def test_the_reconstruction_and_its_distance_are_those_of_the_authors_program():
    clean, noise, time = GOLDEN["x0"], GOLDEN["noises"][0], int(GOLDEN["score/t_orig"][0])
    found = denoised_once(Toy(), clean, noise, time, {}).clamp(-1, 1)
    assert (found - GOLDEN["score/recon"]).abs().max() < 1e-9
    assert torch.allclose((clean - found).flatten(1).norm(dim=1), GOLDEN["score/l2"], rtol=1e-9)
    assert time == int(sfumato.minority.TIME_SHARE * 1000)


@pytest.fixture(scope="module")
def pixel():
    pipe = sfumato.load("atelier-pixel")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def drawn(pixel):
    found = pixel(class_labels=[7] * 6, num_inference_steps=10, output_type="pt", guidance_scale=2.0,
                  generator=torch.Generator().manual_seed(0))  # fmt: skip
    return found.images


def test_what_the_model_draws_is_commoner_than_noise(pixel, drawn):
    noise = torch.rand(drawn.shape, generator=torch.Generator().manual_seed(1))
    common, rare = (minority_scores(pixel, some, repeats=2, progress=False) for some in (drawn, noise))
    assert common.shape == (6,) and float(common.max()) < float(rare.min())


def test_a_score_does_not_depend_on_the_batch(pixel, drawn):
    whole = minority_scores(pixel, drawn, repeats=2, progress=False)
    parts = minority_scores(pixel, drawn, repeats=2, batch_size=2, progress=False)
    assert torch.allclose(whole, parts, rtol=1e-4)
    assert not torch.allclose(whole, minority_scores(pixel, drawn, repeats=2, seed=1, progress=False), rtol=1e-4)


def test_latent_models_and_other_distances(pixel, drawn):
    atelier = sfumato.load("atelier")
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = ["a photo of a red bag", "a sketch of a blue coat"]
    call = {"repeats": 1, "progress": False}
    scores = {
        "l2": minority_scores(atelier, pictures, prompts, **call),
        "judge": minority_scores(atelier, pictures, prompts, distance="judge", **call),
        "own": minority_scores(atelier, pictures, distance=lambda a, b: (a - b).abs().amax((1, 2, 3)), **call),
    }
    assert all(found.shape == (2,) and bool((found > 0).all()) for found in scores.values())
    assert float(scores["own"].max()) <= 1


def test_classes_hold_as_many_and_the_last_is_the_rarest():
    scores = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).float()
    labels = minority_labels(scores, 10)
    assert labels.bincount().tolist() == [100] * 10
    assert scores[labels == 9].min() > scores[labels < 9].max()
    assert minority_labels(torch.tensor([1.0, 2.0, 3.0, 4.0]), 2).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pictures": torch.zeros(2, 1, 8, 8)}, "of 16 x 16 pixels"),
        ({"pictures": torch.full((2, 1, 16, 16), 1.5)}, "must lie in"),
        ({"prompts": ["class 1"]}, "a list of 2"),
        ({"repeats": 0}, "repeats"),
        ({"batch_size": 0}, "batch_size"),
        ({"timestep": 1000}, "timestep"),
        ({"distance": "vgg"}, "vgg"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_does_not_fit_is_refused(pixel, change, said):
    call = {"pictures": torch.zeros(2, 1, 16, 16), **change}
    with pytest.raises(ValueError, match=said):
        minority_scores(pixel, call.pop("pictures"), call.pop("prompts", None), progress=False, **call)


def test_too_few_scores_make_no_classes():
    with pytest.raises(ValueError, match="100 classes need"):
        minority_labels(torch.zeros(5))
    with pytest.raises(ValueError, match="all finite"):
        minority_labels(torch.full((200,), math.nan))
