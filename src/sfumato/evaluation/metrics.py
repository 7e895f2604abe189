"""What a score is worth: proportions and distances between sets of features, with their intervals."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import torch

from sfumato.randomness import generator_for

__all__ = [
    "Estimate",
    "Proportion",
    "bootstrap",
    "frechet_distance",
    "frechet_estimate",
    "kernel_distance",
    "psnr",
    "wilson",
]

RESAMPLES = 200


@dataclass(frozen=True)
class Proportion:
    """A share of pictures, with the interval that the number of pictures supports.

    Attributes:
        value: ``successes / total``, in [0, 1].
        low: Lower end of the interval, in [0, 1].
        high: Upper end of the interval, in [0, 1].
        successes: Pictures that count.
        total: Pictures judged.
    """

    value: float
    low: float
    high: float
    successes: int
    total: int

    def __str__(self) -> str:
        """Lay it out in percent: ``97.5 % [91.3, 99.3]``."""
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def as_dict(self) -> dict[str, float | int]:
        """Give the fields as JSON can hold them."""
        return asdict(self)


@dataclass(frozen=True)
class Estimate:
    """A figure that is no share, with its interval.

    Attributes:
        value: The figure, of all samples.
        low: Lower end of the 95 % interval.
        high: Upper end of the 95 % interval.
    """

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """Lay it out with its interval, each number by `spec`: ``18.07 [17.63, 18.53]`` by ``.2f``."""
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def as_dict(self) -> dict[str, float]:
        """Give the fields as JSON can hold them."""
        return asdict(self)


def wilson(successes: int, total: int, confidence: float = 0.95) -> Proportion:
    r"""Estimate a proportion with Wilson's score interval.

    The interval holds every :math:`p` that a two-sided score test would not reject, which keeps its coverage near the
    nominal one for few samples and at proportions of 0 and 1, where the textbook interval has width zero:

    .. math::
        \frac{\hat p + z^2/2n \pm z \sqrt{\hat p (1 - \hat p)/n + z^2/4n^2}}{1 + z^2/n}

    Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22 (1927). No continuity
    correction.

    Args:
        successes: Trials that succeeded, 0 to `total`.
        total: Trials, at least 1.
        confidence: Nominal coverage, strictly between 0 and 1.

    Returns:
        The proportion. `low` is exactly 0 without a success, `high` exactly 1 without a failure.

    Raises:
        ValueError: If the counts or the confidence are out of range.
    """
    successes, total = operator.index(successes), operator.index(total)
    if total < 1:
        raise ValueError(f"`total` must be at least 1, got {total}: a share of no pictures is not a number.")
    if not 0 <= successes <= total:
        raise ValueError(f"`successes` must be between 0 and `total` ({total}), got {successes}.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must lie strictly between 0 and 1, got {confidence}; 0.95 is customary.")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    if not math.isfinite(z):
        raise ValueError(f"`confidence` {confidence} is too close to 1 to compute with; 0.95 is customary.")
    share = successes / total
    shrink = 1 + z**2 / total
    centre = (share + z**2 / (2 * total)) / shrink
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2)) / shrink
    # At the edges the formula gives 0 and 1 but for rounding; elsewhere rounding must not push an end past the share.
    low = 0.0 if successes == 0 else min(max(centre - half, 0.0), share)
    high = 1.0 if successes == total else max(min(centre + half, 1.0), share)
    return Proportion(share, low, high, successes, total)


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    r"""Measure how far apart two sets of features are, each taken for a Gaussian.

    With means :math:`\mu` and unbiased covariances :math:`\Sigma`,

    .. math::
        d^2 = \lVert \mu_a - \mu_b \rVert^2
            + \operatorname{tr}\bigl(\Sigma_a + \Sigma_b - 2 (\Sigma_a \Sigma_b)^{1/2}\bigr),

    the squared distance that is called FID when the features are Inception's (Heusel et al., "GANs Trained by a Two
    Time-Scale Update Rule Converge to a Local Nash Equilibrium", NeurIPS 2017, arXiv 1706.08500). The product of two
    covariances is not symmetric, but has the eigenvalues of
    :math:`\Sigma_a^{1/2} \Sigma_b \Sigma_a^{1/2}`, which is, so no general matrix root is needed. torchmetrics
    takes one, and is off by up to 1e-4 where there are fewer samples than features.

    The estimate is biased upwards for few samples: compare only distances between sets of the same sizes.

    Args:
        a: Features ``(N, F)``, any floating dtype and device.
        b: Features ``(M, F)``.

    Returns:
        :math:`d^2 \ge 0`, computed on the CPU in float64, in squared units of the features.

    Raises:
        ValueError: If a set has fewer than two samples, the shapes don't fit, or a value is not finite.
    """
    check_features(a, b)
    return _frechet(*(features.detach().to("cpu", torch.float64) for features in (a, b)))


def _frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """The distance of float64 features (N, F) and (M, F), in the cheaper of two ways."""
    (mean_a, centred_a), (mean_b, centred_b) = ((x.mean(0), _scaled(x)) for x in (a, b))
    if max(len(a), len(b)) < a.shape[1]:
        # The trace of the root is the sum of the singular values of one root times the other, and any factor of a
        # covariance serves as its root: those of the samples are smaller here.
        overlap = torch.linalg.svdvals(centred_a @ centred_b.T).sum()
    else:
        root = _symmetric_root(centred_a.T @ centred_a)
        cross = root @ (centred_b.T @ centred_b) @ root
        eigenvalues = torch.linalg.eigvalsh((cross + cross.T) / 2)  # (F,)
        overlap = eigenvalues.clamp(min=0).sqrt().sum()
    spread = centred_a.square().sum() + centred_b.square().sum()  # the traces of the covariances
    distance = (mean_a - mean_b).square().sum() + spread - 2 * overlap
    return max(float(distance), 0.0)  # rounding can leave equal sets a hair below zero


def _scaled(features: torch.Tensor) -> torch.Tensor:
    """Centred features (N, F) whose products are the unbiased covariance."""
    return (features - features.mean(0)) / (len(features) - 1) ** 0.5


def frechet_estimate(
    a: torch.Tensor, b: torch.Tensor, *, paired: bool = False, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Measure `frechet_distance` with its interval; see `bootstrap`.

    Args:
        a: Features ``(N, F)``.
        b: Features ``(M, F)``.
        paired: Whether sample ``k`` of both has the same prompt and noise; pairs are then drawn again together.
        seed: Seeds the resamples.
        resamples: How many.

    Returns:
        The distance, in squared units of the features.

    Raises:
        ValueError: As `frechet_distance` does, or if pairs are of sets of different sizes.
    """
    check_features(a, b)
    if paired and len(a) != len(b):
        raise ValueError(f"Pairs need sets of one size, got {len(a)} and {len(b)}.")
    a, b = (features.detach().to("cpu", torch.float64) for features in (a, b))
    if paired:
        return bootstrap(lambda i: _frechet(a[i], b[i]), [len(a)], seed=seed, resamples=resamples, least=0.0)
    return bootstrap(lambda i, j: _frechet(a[i], b[j]), (len(a), len(b)), seed=seed, resamples=resamples, least=0.0)


def kernel_distance(
    a: torch.Tensor, b: torch.Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:  # fmt: skip
    r"""Measure how far apart two sets of features are by a cubic kernel: KID, when the features are Inception's.

    The unbiased squared maximum mean discrepancy with :math:`k(x, y) = (x^\top y / F + 1)^3`, averaged over random
    subsets of equal size, as torchmetrics computes it. Other than the Fréchet distance it is not biased by the number
    of samples, and may come out a little below zero. Binkowski et al., "Demystifying MMD GANs", ICLR 2018, arXiv
    1801.01401. The interval is of the same discrepancy between all samples; see `bootstrap`.

    Args:
        a: Features ``(N, F)``.
        b: Features ``(M, F)``.
        subsets: How many subsets to average over.
        subset_size: Samples of each; where a set has fewer, as many as the smaller one has.
        seed: Seeds subsets and resamples; torch's own state is as it was afterwards.
        resamples: How many.

    Returns:
        The distance.

    Raises:
        ImportError: If torchmetrics is not installed.
        ValueError: If a set has fewer than two samples, the shapes don't fit, or a value is not finite.
    """
    check_features(a, b)
    a, b = (features.detach().to("cpu", torch.float64) for features in (a, b))
    size = min(subset_size, len(a), len(b))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps the features, which we do too
        metric = kernel_metric()(torch.nn.Identity(), subsets, size)
    metric.update(a, real=True)
    metric.update(b, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed_of(seed))
        value = float(metric.compute()[0])
    around = bootstrap(_Discrepancy(a, b), (len(a), len(b)), seed=seed, resamples=resamples)
    return Estimate(value, value + around.low - around.value, value + around.high - around.value)


def kernel_metric() -> Any:
    """Give torchmetrics' class for KID; ImportError if it is not installed."""
    try:
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError as error:
        raise ImportError("The kernel distance needs torchmetrics: run pip install 'sfumato[eval]'.") from error
    return KernelInceptionDistance


class _Discrepancy:
    """The unbiased squared discrepancy of resampled features, from kernels that are computed once."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.aa, self.ab, self.bb = ((x @ y.T / a.shape[1] + 1) ** 3 for x, y in ((a, a), (a, b), (b, b)))

    def __call__(self, i: torch.Tensor, j: torch.Tensor) -> float:
        wa, wb = i.bincount(minlength=len(self.aa)).double(), j.bincount(minlength=len(self.bb)).double()
        within = [
            (w @ k @ w - w @ k.diagonal()) / (w.sum() * (w.sum() - 1)) for w, k in ((wa, self.aa), (wb, self.bb))
        ]
        return float(sum(within) - 2 * (wa @ self.ab @ wb) / (wa.sum() * wb.sum()))


def bootstrap(
    statistic: Callable[..., float], sizes: Sequence[int], *, seed: int = 0, resamples: int = RESAMPLES,
    confidence: float = 0.95, least: float = -math.inf,
) -> Estimate:  # fmt: skip
    """Find the interval of a figure by drawing its samples again, with replacement.

    Samples that are drawn twice make sets look narrower than they are, which pushes distances up. So the quantiles are
    taken of the resamples' deviations from their own mean, and laid around the figure: its bias, whatever it is, stays
    in the figure and is not counted twice. Efron and Tibshirani, "An Introduction to the Bootstrap", 1993.

    Args:
        statistic: Takes indices of samples, ``(N,)`` for each of `sizes`; gives the figure.
        sizes: How many samples each set has.
        seed: Seeds the resamples, which do not touch torch's own state.
        resamples: How many.
        confidence: Nominal coverage.
        least: What the figure can't be below.

    Returns:
        The figure of all samples, with its interval.

    Raises:
        ValueError: If there are fewer than 2 resamples.
    """
    if resamples < 2:
        raise ValueError(f"An interval needs at least 2 resamples, got {resamples}.")
    value = statistic(*(torch.arange(size) for size in sizes))
    found = torch.tensor(
        [statistic(*(_redrawn(size, seed, k, number) for number, size in enumerate(sizes))) for k in range(resamples)],
        dtype=torch.float64,
    )
    away = found - found.mean()
    ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = (value + float(end) for end in away.quantile(ends))
    return Estimate(value, max(min(low, value), least), max(high, value))


def _redrawn(size: int, seed: int, resample: int, number: int) -> torch.Tensor:
    return torch.randint(size, (size,), generator=generator_for(seed, resample, number))


def _seed_of(seed: int) -> int:
    return generator_for(seed).initial_seed()


def psnr(images: torch.Tensor, references: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of pictures ``(B, 3, H, W)`` in [0, 1], in dB, averaged over pictures."""
    error = (images.double() - references.to(images.device).double()).square().flatten(1).mean(1)
    return (-10 * error.clamp(min=1e-20).log10()).mean().item()


def check_features(a: torch.Tensor, b: torch.Tensor, *, least: int = 2) -> None:
    """Refuse, with a ValueError, what are not two sets of at least so many features (N, F) and (M, F)."""
    for name, features in (("a", a), ("b", b)):
        if features.ndim != 2:
            raise ValueError(f"`{name}` must be features (samples, F), got shape {tuple(features.shape)}.")
        if len(features) < least:
            raise ValueError(f"`{name}` has {len(features)} samples; at least {least} are needed.")
        if not torch.isfinite(features).all():
            raise ValueError(f"`{name}` holds values that are not finite; check the pictures it was computed from.")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"`a` and `b` must have equally many features, got {a.shape[1]} and {b.shape[1]}.")


def _symmetric_root(matrix: torch.Tensor) -> torch.Tensor:
    """Root of a symmetric positive semi-definite matrix, (F, F)."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
