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

Intervals are over the samples that a share is a share of; the balls are taken as they are.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from sfumato.evaluation.metrics import Estimate, Proportion, bootstrap, check_features, wilson

__all__ = ["Manifolds", "authenticity", "compare_manifolds"]


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


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Between all of two sets (N, F) and (M, F), without the shortcut by products, which blurs small ones."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(features: torch.Tensor, k: int) -> torch.Tensor:
    """Of the balls, (N,): the distance to the k-th nearest other sample."""
    apart = _distances(features, features).fill_diagonal_(torch.inf)
    return apart.kthvalue(k, dim=1).values


def _share(hits: torch.Tensor) -> Proportion:
    return wilson(int(hits.sum()), hits.numel())
