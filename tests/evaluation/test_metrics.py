import math
from itertools import pairwise

import pytest
import torch

from sfumato.evaluation.metrics import (
    Estimate,
    Proportion,
    bootstrap,
    frechet_distance,
    frechet_estimate,
    kernel_distance,
    psnr,
    wilson,
)

Z2 = 3.841458820694124  # the square of the normal quantile at 0.975


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        (0, 10, 0.0, Z2 / (10 + Z2)),  # the equation at p = 0
        (10, 10, 10 / (10 + Z2), 1.0),
        (5, 10, 0.5 - 0.263405, 0.5 + 0.263405),  # half width: 1.959964 * sqrt(0.025 + Z2 / 400) / 1.384146
        (95, 100, 0.888250, 0.978456),
    ],
)
def test_wilson_agrees_with_hand_calculation(successes: int, total: int, low: float, high: float) -> None:
    interval = wilson(successes, total)
    assert interval.low == pytest.approx(low, abs=2e-6)
    assert interval.high == pytest.approx(high, abs=2e-6)


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_agrees_with_published_intervals(successes: int, total: int, low: float, high: float) -> None:
    """Newcombe, "Two-sided confidence intervals for the single proportion", Stat. Med. 17 (1998), method 3."""
    interval = wilson(successes, total)
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


@pytest.mark.parametrize("total", [1, 7, 200])
def test_interval_contains_the_share_and_moves_up_with_it(total: int) -> None:
    intervals = [wilson(successes, total) for successes in range(total + 1)]
    assert all(0 <= i.low <= i.value <= i.high <= 1 for i in intervals)
    assert all(a.low < b.low and a.high < b.high for a, b in pairwise(intervals))


def test_edges_are_exact() -> None:
    for total in range(1, 400):
        assert wilson(0, total).low == 0.0
        assert wilson(total, total).high == 1.0


def test_interval_is_symmetric_in_success_and_failure() -> None:
    a, b = wilson(3, 40), wilson(37, 40)
    assert (a.low, a.high) == pytest.approx((1 - b.high, 1 - b.low))


def test_interval_narrows_with_pictures_and_widens_with_confidence() -> None:
    widths = [wilson(n // 2, n).high - wilson(n // 2, n).low for n in (10, 100, 1000)]
    assert widths == sorted(widths, reverse=True)
    assert wilson(5, 10, 0.99).high > wilson(5, 10, 0.95).high > wilson(5, 10, 0.5).high


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((0, 0), "total"), ((1, -1), "total"), ((-1, 5), "successes"), ((6, 5), "successes")]
    + [((1, 5, c), "confidence") for c in (0.0, 1.0, 95.0, math.nan)],
)
def test_wilson_names_what_is_wrong(arguments: tuple, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        wilson(*arguments)


def test_wilson_refuses_a_share_in_place_of_a_count() -> None:
    with pytest.raises(TypeError):
        wilson(0.5, 10)  # type: ignore[arg-type]


def test_proportion_as_dict_rebuilds_it() -> None:
    proportion = wilson(torch.tensor(3), 4)  # counts often come as zero-dimensional tensors
    assert list(proportion.as_dict()) == ["value", "low", "high", "successes", "total"]
    assert Proportion(**proportion.as_dict()) == proportion == wilson(3, 4)  # type: ignore[arg-type]


def standard(samples: int, features: int, seed: int) -> torch.Tensor:
    """Draw samples whose mean is exactly 0 and whose covariance is exactly the identity, (samples, features)."""
    x = torch.randn(samples, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    factor = torch.linalg.cholesky(x.T @ x / (samples - 1))
    return torch.linalg.solve_triangular(factor, x.T, upper=False).T


def test_frechet_of_diagonal_gaussians_is_the_closed_form() -> None:
    spread_a, spread_b = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 2.0, 0.1])
    shift = torch.tensor([0.3, -1.0, 2.0])
    a, b = standard(40, 3, 0) * spread_a, standard(55, 3, 1) * spread_b + shift
    expected = shift.square().sum() + (spread_a - spread_b).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected))


def test_frechet_of_covariances_that_do_not_commute_is_the_closed_form() -> None:
    mix_a = torch.tensor([[2.0, 0.3], [0.0, 0.5]], dtype=torch.float64)
    mix_b = torch.tensor([[0.7, -1.0], [0.4, 1.5]], dtype=torch.float64)
    a, b = standard(30, 2, 2) @ mix_a, standard(30, 2, 3) @ mix_b
    product = mix_a.T @ mix_a @ mix_b.T @ mix_b
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()  # the trace of the root of a 2 x 2 matrix
    expected = mix_a.square().sum() + mix_b.square().sum() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(float(expected))


def test_frechet_is_zero_for_the_same_set_and_symmetric() -> None:
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(100, 16, generator=generator), 1 + 2 * torch.rand(80, 16, generator=generator)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) > 1


def test_frechet_works_with_fewer_samples_than_features() -> None:
    a = torch.randn(5, 64, generator=torch.Generator().manual_seed(5))
    assert frechet_distance(a, a + 1) == pytest.approx(64, abs=1e-4)  # only the mean moved


def test_frechet_is_computed_in_float64() -> None:
    a, b = ((standard(30, 4, seed) * 0.01 + 1000).float() for seed in (6, 7))  # float32 would lose the covariance
    assert frechet_distance(a, b) == frechet_distance(a.double(), b.double())


@pytest.mark.parametrize(
    ("a", "b", "named"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), "at least 2"),
        (torch.zeros(5, 3), torch.zeros(0, 3), "at least 2"),
        (torch.zeros(5, 3), torch.zeros(5, 4), "3 and 4"),
        (torch.zeros(5), torch.zeros(5, 1), "shape"),
        (torch.full((5, 3), math.nan), torch.zeros(5, 3), "finite"),
    ],
)
def test_frechet_names_what_is_wrong(a: torch.Tensor, b: torch.Tensor, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        frechet_distance(a, b)


def test_psnr_is_the_mean_over_pictures_of_the_ratio_to_a_peak_of_one():
    references = torch.full((2, 3, 4, 4), 0.5)
    images = references + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert psnr(images, references) == pytest.approx((20 + 40) / 2, abs=1e-4)
    assert psnr(references, references) == pytest.approx(200)


def pair(count=60, features=6, shift=0.5):
    a, b = (torch.randn(count, features, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    return a, b + shift


def test_frechet_agrees_with_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    network = torch.nn.Identity()
    network.num_features = 6
    metric = fid.FrechetInceptionDistance(network).set_dtype(torch.float64)
    a, b = (features.double() for features in pair())
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert frechet_distance(a, b) == pytest.approx(float(metric.compute()), rel=1e-9)


def test_both_ways_to_the_frechet_distance_agree():
    a, b = pair(count=30, features=29)
    wide = [torch.nn.functional.pad(features, (0, 5)) for features in (a, b)]  # columns of zeros change nothing
    assert frechet_distance(*wide) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_kernel_distance_is_the_mean_of_the_definition():
    a, b = pair(count=20)

    def kernel(x, y):
        return (sum(p * q for p, q in zip(x.tolist(), y.tolist(), strict=True)) / 6 + 1) ** 3

    def mean(pairs):
        values = [kernel(x, y) for x, y in pairs]
        return sum(values) / len(values)

    inside = [mean((x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j) for s in (a, b)]
    expected = sum(inside) - 2 * mean((x, y) for x in a for y in b)
    assert kernel_distance(a, b, resamples=2).value == pytest.approx(expected, rel=1e-6)  # subsets hold all samples


def test_kernel_distance_is_seeded_and_leaves_torch_alone():
    a, b = pair()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = kernel_distance(a, b, subset_size=20, resamples=10)
    assert torch.equal(torch.rand(1), expected)
    assert first == kernel_distance(a, b, subset_size=20, resamples=10)
    assert first != kernel_distance(a, b, subset_size=20, resamples=10, seed=1)


@pytest.mark.parametrize("distance", [frechet_estimate, kernel_distance])
def test_intervals_hold_the_distance_and_narrow_with_samples(distance):
    few, many = distance(*pair(count=40)), distance(*pair(count=640))
    for found in (few, many):
        assert found.low < found.value < found.high
    assert many.high - many.low < (few.high - few.low) / 2
    assert many.low > 0


def test_frechet_estimate_has_the_value_of_the_distance():
    a, b = pair()
    assert frechet_estimate(a, b, resamples=5).value == frechet_distance(a, b)
    assert frechet_estimate(a, a, resamples=5).low == 0


def test_bootstrap_covers_a_mean_as_often_as_it_says():
    truth = 0
    for trial in range(100):
        x = torch.randn(50, generator=torch.Generator().manual_seed(trial))
        found = bootstrap(lambda chosen, x=x: float(x[chosen].mean()), [50], seed=trial, resamples=100)
        truth += found.low <= 0 <= found.high
    assert 86 <= truth <= 99


def test_bootstrap_refuses_too_few_resamples():
    with pytest.raises(ValueError, match="at least 2 resamples, got 1"):
        bootstrap(lambda chosen: 0.0, [3], resamples=1)


def test_pairs_are_resampled_together():
    a, _ = pair()
    same = frechet_estimate(a, a, paired=True, resamples=20)
    assert same.high == pytest.approx(0, abs=1e-9)
    assert frechet_estimate(a, a, resamples=20).high > 0.01
    with pytest.raises(ValueError, match="60 and 59"):
        frechet_estimate(a, a[1:], paired=True)


def test_figures_are_laid_out_with_their_intervals():
    assert str(wilson(39, 40)) == f"{wilson(39, 40)}" == "97.5 % [87.1, 99.6]"
    assert f"{Estimate(18.071, 17.634, 18.526):.2f}" == "18.07 [17.63, 18.53]"
