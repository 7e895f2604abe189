r"""Whether one set of pictures fills the place of another, by balls around features; and whether it merely copies it.

Each sample of a set has a ball, as far as its k-th nearest neighbour in the set; together they stand for the manifold.

* Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", NeurIPS 2019, arXiv
  1904.06991: precision is the share of generated samples in a real ball, recall that of real ones in a generated ball.
* Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", ICML 2020, arXiv 2002.09797: density
  counts the real balls that hold a generated sample, over k, and coverage is the share of real balls that hold any;
  both suffer less from outliers.
* Alaa et al., "How Faithful is your Synthetic Data?", ICML 2022, arXiv 2102.08921: a generated sample is authentic if
  it is farther from the nearest training sample than this is from its own nearest neighbour. Stein et al., "Exposing
  flaws of generative model evaluation metrics and their unfair treatment of diffusion models", NeurIPS 2023, arXiv
  2306.04675, call the share AuthPct and find that it tells memorisation best where samples are near-copies.

How far a single sample lies from the others, as a figure for each, is the mean distance to its nearest neighbours, or
the local outlier factor (Breunig et al., "LOF: Identifying Density-Based Local Outliers", SIGMOD 2000), which compares
the density about a sample with that about its neighbours, and so tells a rare sample from one of a spread-out kind.

Intervals are over the samples that a share is a share of; the balls are taken as they are.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from sfumato.evaluation.metrics import Estimate, Proportion, bootstrap, check_features, wilson

__all__ = ["Manifolds", "authenticity", "compare_manifolds", "local_outlier_factors", "neighbour_distances"]


NEXT_TO_NOTHING = 1e-30  # copies lie at no distance


@dataclass(frozen=True)
class Manifolds:
    """How a generated set lies in a real one.

    Attributes:
        precision: Share of generated samples that lie in a real ball.
        recall: Share of real samples that lie in a generated ball.
        density: Real balls that hold a generated sample, over k, on average; 1 is expected of equal distributions.
        coverage: Share of real balls that hold a generated sample.
    """

    precision: Proportion
    recall: Proportion
    density: Estimate
    coverage: Proportion

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Give plain values for JSON."""
        return asdict(self)


def compare_manifolds(generated: torch.Tensor, real: torch.Tensor, *, k: int = 5, seed: int = 0) -> Manifolds:
    """Measure precision, recall, density and coverage.

    Args:
        generated: Features ``(N, F)``.
        real: Features ``(M, F)``.
        k: Which nearest neighbour, itself not counted, a sample's ball reaches to.
        seed: Seeds the interval of the density.

    Returns:
        The four, each with its interval.

    Raises:
        ValueError: If a set has no more than `k` samples, the shapes don't fit, or a value is not finite.
    """
    check_features(generated, real)
    if k < 1 or min(len(generated), len(real)) <= k:
        raise ValueError(
            f"Balls to the nearest neighbour number {k} need more than {k} samples in each set, got {len(generated)} "
            f"and {len(real)}."
        )
    generated, real = (features.detach().to("cpu", torch.float64) for features in (generated, real))
    apart = _distances(generated, real)  # (N, M)
    in_real = apart <= _radii(real, k)
    in_generated = apart <= _radii(generated, k)[:, None]
    counts = in_real.sum(1).double() / k  # (N,)
    return Manifolds(
        precision=_share(in_real.any(1)),
        recall=_share(in_generated.any(0)),
        density=bootstrap(lambda chosen: float(counts[chosen].mean()), [len(counts)], seed=seed, least=0.0),
        coverage=_share(in_real.any(0)),
    )


def authenticity(generated: torch.Tensor, training: torch.Tensor) -> Proportion:
    """Measure AuthPct: the share of generated samples that are no near-copies of training samples.

    Args:
        generated: Features ``(N, F)``.
        training: Features ``(M, F)``, of the pictures that might have been memorised.

    Returns:
        The share, with its Wilson interval; of an honest model about a half or more, of copies none.

    Raises:
        ValueError: If a set has fewer than two samples, the shapes don't fit, or a value is not finite.
    """
    check_features(generated, training)
    generated, training = (features.detach().to("cpu", torch.float64) for features in (generated, training))
    nearest, which = _distances(generated, training).min(1)
    return _share(nearest > _radii(training, 1)[which])


def neighbour_distances(generated: torch.Tensor, real: torch.Tensor, *, k: int = 5) -> torch.Tensor:
    """Measure how far samples lie from the real ones.

    Args:
        generated: Features ``(N, F)``.
        real: Features ``(M, F)``.
        k: Nearest real samples.

    Returns:
        Mean distance to these, ``(N,)``, float64.

    Raises:
        ValueError: If there are fewer than `k` real samples, the shapes don't fit, or a value is not finite.
    """
    return _nearest(generated, real, k)[0].mean(1)


def local_outlier_factors(generated: torch.Tensor, real: torch.Tensor, *, k: int = 20) -> torch.Tensor:
    """Measure how much sparser the real samples are about a sample than about its neighbours among them.

    Args:
        generated: Features ``(N, F)``.
        real: Features ``(M, F)``, which the densities are those of.
        k: Nearest real samples; of a real sample, itself not counted.

    Returns:
        LOF, ``(N,)``, float64; about 1 where the real samples are as dense as about these, above 1 for outliers.

    Raises:
        ValueError: If there are no more than `k` real samples, the shapes don't fit, or a value is not finite.
    """
    apart, which = _nearest(generated, real, k)
    own = _distances(*[real.detach().to("cpu", torch.float64)] * 2).fill_diagonal_(torch.inf)
    if len(real) <= k:
        raise ValueError(f"{k} neighbours of each real sample need more than {k} of them, got {len(real)}.")
    among, near = own.topk(k, dim=1, largest=False)
    radii = among[:, -1]
    reaches = torch.maximum(among, radii[near]).mean(1)  # (M,)
    here = torch.maximum(apart, radii[which]).mean(1)  # (N,)
    return ((here[:, None] + NEXT_TO_NOTHING) / (reaches[which] + NEXT_TO_NOTHING)).mean(1)


def _nearest(generated: torch.Tensor, real: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances to the nearest real samples and which they are, ``(N, k)`` each."""
    check_features(generated, real, least=1)
    if k < 1 or len(real) < k:
        raise ValueError(f"`k` must be at least 1 and at most the number of real samples, {len(real)}, got {k}.")
    generated, real = (features.detach().to("cpu", torch.float64) for features in (generated, real))
    found = _distances(generated, real).topk(k, dim=1, largest=False)
    return found.values, found.indices


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Between all of two sets (N, F) and (M, F), without the shortcut by products, which blurs small ones."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(features: torch.Tensor, k: int) -> torch.Tensor:
    """Of the balls, (N,): the distance to the k-th nearest other sample."""
    apart = _distances(features, features).fill_diagonal_(torch.inf)
    return apart.kthvalue(k, dim=1).values


def _share(hits: torch.Tensor) -> Proportion:
    return wilson(int(hits.sum()), hits.numel())
