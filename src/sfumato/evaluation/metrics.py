"""What a score is worth: proportions with their intervals, and the distance between two sets of features."""

from __future__ import annotations

import math
import operator
from dataclasses import asdict, dataclass
from statistics import NormalDist

import torch

__all__ = ["Proportion", "frechet_distance", "psnr", "wilson"]


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

    def as_dict(self) -> dict[str, float | int]:
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
    :math:`\Sigma_a^{1/2} \Sigma_b \Sigma_a^{1/2}`, which is, so no general matrix root is needed.

    The estimate is biased upwards for few samples: compare only distances between sets of the same sizes.

    Args:
        a: Features ``(N, F)``, any floating dtype and device.
        b: Features ``(M, F)``.

    Returns:
        :math:`d^2 \ge 0`, computed on the CPU in float64, in squared units of the features.

    Raises:
        ValueError: If a set has fewer than two samples, the shapes don't fit, or a value is not finite.
    """
    _check_features(a, b)
    mean_a, covariance_a = _moments(a)
    mean_b, covariance_b = _moments(b)
    root = _symmetric_root(covariance_a)
    cross = root @ covariance_b @ root
    eigenvalues = torch.linalg.eigvalsh((cross + cross.T) / 2)  # (F,)
    overlap = eigenvalues.clamp(min=0).sqrt().sum()  # the trace of the root of the product
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * overlap
    return max(float(distance), 0.0)  # rounding can leave equal sets a hair below zero


def psnr(images: torch.Tensor, references: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of pictures ``(B, 3, H, W)`` in [0, 1], in dB, averaged over pictures."""
    error = (images.double() - references.to(images.device).double()).square().flatten(1).mean(1)
    return (-10 * error.clamp(min=1e-20).log10()).mean().item()


def _check_features(a: torch.Tensor, b: torch.Tensor) -> None:
    for name, features in (("a", a), ("b", b)):
        if features.ndim != 2:
            raise ValueError(f"`{name}` must be features (samples, F), got shape {tuple(features.shape)}.")
        if len(features) < 2:
            raise ValueError(f"`{name}` has {len(features)} samples; a covariance needs at least 2.")
        if not torch.isfinite(features).all():
            raise ValueError(f"`{name}` holds values that are not finite; check the pictures it was computed from.")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"`a` and `b` must have equally many features, got {a.shape[1]} and {b.shape[1]}.")


def _moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (F,) and unbiased covariance (F, F), in float64 on the CPU, as not every accelerator has float64."""
    features = features.detach().to("cpu", torch.float64)
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def _symmetric_root(matrix: torch.Tensor) -> torch.Tensor:
    """Root of a symmetric positive semi-definite matrix, (F, F)."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
