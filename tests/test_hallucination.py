"""The claim of Aithal et al. (arXiv 2406.09358), where all is known: Gaussians on a line, and their exact denoiser.

A network can't be as steep as that denoiser is between two modes; blurred over a distance, as a smooth network is, it
draws samples between them, where the data has none. As long as it is steep there, the clean sample that is predicted
swings in the last steps, and tells them.
"""

import numpy as np
import pytest
import torch

from sfumato import MinorityGuidanceScheduler, TrajectoryVariance

MODES, SPREAD = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64), 0.05
FAR = 5 * SPREAD


def near(x, alpha):
    """How near the modes are, as weights of the mixture's posterior, (..., 4)."""
    return torch.softmax(-(x[..., None] - alpha.sqrt() * MODES).square() / (2 * (alpha * SPREAD**2 + 1 - alpha)), -1)


def blurred(x, alpha, width):
    """The mean of these over a Gaussian about x."""
    if width == 0:
        return near(x, alpha)
    places, weights = np.polynomial.hermite_e.hermegauss(9)
    several = near(x[..., None] + width * torch.from_numpy(places), alpha)
    return (several * torch.from_numpy(weights / weights.sum())[:, None]).sum(-2)


def denoised(x, alpha, width):
    """E[x0 | x_t] of the mixture, of the shape of x; with a width, between its modes less steep than it is."""
    of_each = MODES + alpha.sqrt() * SPREAD**2 / (alpha * SPREAD**2 + 1 - alpha) * (
        x[..., None] - alpha.sqrt() * MODES
    )
    return (blurred(x, alpha, width) * of_each).sum(-1)


def drawn(width, count=1000):
    """Samples, how far they lie from the nearest mode, and their scores: the last ten steps of a thousand."""
    scheduler = MinorityGuidanceScheduler(
        beta_start=0.001, beta_end=0.2, clip_sample=False, variance_type="fixed_large", guidance_scale=0.0
    )
    random = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, generator=random, dtype=torch.float64)
    scheduler.set_timesteps(1000)
    watch = TrajectoryVariance(0, 9)
    with watch.watching(type("Loop", (), {"scheduler": scheduler})):
        for t in scheduler.timesteps:
            alpha = scheduler.alphas_cumprod[int(t)].double()
            noise = (x - alpha.sqrt() * denoised(x, alpha, width)) / (1 - alpha).sqrt()
            x = scheduler.step(noise, t, x, generator=random).prev_sample
    return x[:, 0], (x - MODES).abs().amin(1), watch.scores


def found(apart, scores):
    """The share of made-up samples that go where 96 % of the others are kept."""
    made_up, watch = apart > FAR, TrajectoryVariance(0, 9)
    threshold = watch.calibrate(scores[~made_up], 0.96)
    assert float((scores[~made_up] <= threshold).double().mean()) == pytest.approx(0.96, abs=0.002)
    return float((scores[made_up] > threshold).double().mean())


def test_the_exact_denoiser_makes_nothing_up():
    assert float(drawn(0.0)[1].max()) < FAR


@pytest.fixture(scope="module")
def smooth():
    return drawn(0.11, 4000)


def test_a_smooth_one_draws_samples_between_neighbouring_modes(smooth):
    x, apart, _ = smooth
    made_up = x[apart > FAR]
    assert 0.001 < len(made_up) / len(x) < 0.05
    assert bool((((made_up > 1) & (made_up < 2)) | ((made_up > 4) & (made_up < 5))).all())  # none from 2 to 4


def test_the_trajectory_variance_finds_them(smooth):
    assert found(*smooth[1:]) > 0.8


def test_it_does_not_find_those_of_a_denoiser_that_is_not_steep_at_all():
    _, apart, scores = drawn(0.3)
    assert float((apart > FAR).double().mean()) > 0.1 and found(apart, scores) < 0.5
