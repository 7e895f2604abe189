"""The claim of Aithal et al. (arXiv 2406.09358), where all is known: Gaussians on a line or a grid, exactly denoised.

A network can't be as steep as that denoiser is between two modes; blurred over a distance, as a smooth network is, it
draws samples between them, where the data has none. As long as it is steep there, the clean sample that is predicted
swings in the last steps, and tells them.
"""

import numpy as np
import pytest
import torch

from sfumato import MinorityGuidanceScheduler, TrajectoryVariance

LINE = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64)
SIDE = torch.arange(-2.0, 3.0, dtype=torch.float64)  # of a grid, which is a mixture in each coordinate by itself
SPREAD = 0.05
FAR = 5 * SPREAD


def near(x, alpha, modes):
    """How near the modes are in each coordinate, as weights of the mixture's posterior, (..., M)."""
    return torch.softmax(-(x[..., None] - alpha.sqrt() * modes).square() / (2 * (alpha * SPREAD**2 + 1 - alpha)), -1)


def blurred(x, alpha, modes, width):
    """The mean of these over a Gaussian about x."""
    if width == 0:
        return near(x, alpha, modes)
    places, weights = np.polynomial.hermite_e.hermegauss(9)
    several = near(x[..., None] + width * torch.from_numpy(places), alpha, modes)
    return (several * torch.from_numpy(weights / weights.sum())[:, None]).sum(-2)


def denoised(x, alpha, modes, width):
    """E[x0 | x_t] of the mixture, of the shape of x; with a width, between its modes less steep than it is."""
    of_each = modes + alpha.sqrt() * SPREAD**2 / (alpha * SPREAD**2 + 1 - alpha) * (
        x[..., None] - alpha.sqrt() * modes
    )
    return (blurred(x, alpha, modes, width) * of_each).sum(-1)


def drawn(width, count=1000, modes=LINE, dimensions=1):
    """Samples, how far they lie from the nearest mode, and their scores: the last ten steps of a thousand."""
    scheduler = MinorityGuidanceScheduler(
        beta_start=0.001, beta_end=0.2, clip_sample=False, variance_type="fixed_large", guidance_scale=0.0
    )
    random = torch.Generator().manual_seed(0)
    x = torch.randn(count, dimensions, generator=random, dtype=torch.float64)
    scheduler.set_timesteps(1000)
    watch = TrajectoryVariance(0, 9)
    with watch.watching(type("Loop", (), {"scheduler": scheduler})):
        for t in scheduler.timesteps:
            alpha = scheduler.alphas_cumprod[int(t)].double()
            noise = (x - alpha.sqrt() * denoised(x, alpha, modes, width)) / (1 - alpha).sqrt()
            x = scheduler.step(noise, t, x, generator=random).prev_sample
    return x, (x[..., None] - modes).abs().amin(-1).norm(dim=1), watch.scores


def found(apart, scores, kept=0.96):
    """The share of made-up samples that go where such a share of the others is kept."""
    made_up, watch = apart > FAR, TrajectoryVariance(0, 9)
    threshold = watch.calibrate(scores[~made_up], kept)
    assert float((scores[~made_up] <= threshold).double().mean()) == pytest.approx(kept, abs=0.002)
    return float((scores[made_up] > threshold).double().mean())


@pytest.mark.parametrize(("modes", "dimensions"), [(LINE, 1), (SIDE, 2)], ids=["line", "grid"])
def test_the_exact_denoiser_makes_nothing_up(modes, dimensions):
    assert float(drawn(0.0, 1000, modes, dimensions)[1].max()) < FAR


@pytest.fixture(scope="module")
def smooth():
    return drawn(0.11, 4000)


def test_a_smooth_one_draws_samples_between_neighbouring_modes(smooth):
    x, apart, _ = smooth
    made_up = x[apart > FAR, 0]
    assert 0.001 < len(made_up) / len(x) < 0.05
    assert bool((((made_up > 1) & (made_up < 2)) | ((made_up > 4) & (made_up < 5))).all())  # none from 2 to 4


def test_the_trajectory_variance_finds_them(smooth):
    assert found(*smooth[1:]) > 0.8


def test_on_a_grid_too_it_finds_those_between_two_modes():
    """About half of them where 96 % are kept: more of the others were between two modes for a while."""
    x, apart, scores = drawn(0.11, 3000, SIDE, 2)
    made_up = x[apart > FAR]
    assert 0.001 < len(made_up) / len(x) < 0.05
    off = (made_up[..., None] - SIDE).abs().amin(-1) > FAR / 2
    assert int((off.sum(1) == 1).sum()) > 0.9 * len(made_up)  # in the row, or the column, of neighbouring modes
    assert found(apart, scores, 0.9) > 0.8 and found(apart, scores) > 0.4


def test_it_does_not_find_those_of_a_denoiser_that_is_not_steep_at_all():
    _, apart, scores = drawn(0.3)
    assert float((apart > FAR).double().mean()) > 0.1 and found(apart, scores) < 0.5
