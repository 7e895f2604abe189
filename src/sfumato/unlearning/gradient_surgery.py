r"""Gradient surgery: take out of one gradient what works against another.

Wu et al., "Unlearning Concepts in Diffusion Model via Concept Domain Correction and Concept Preserving Gradient", AAAI
2025, arXiv 2405.15304. With g the gradient to step with and r that of what is to be preserved, and lambda ``weight``:

* `projection`, the paper's: if :math:`\langle g, r\rangle < 0`, over all weights at once,
  :math:`g \leftarrow g - \lambda\, \frac{\langle g, r\rangle}{\|r\|^2}\, r` , so that at lambda = 1 nothing of g works
  against r any more: :math:`\langle g, r\rangle = 0`.
* `official`, the released code's: for each tensor alone, with :math:`s = \langle g, r\rangle / (\|g\|\,\|r\|) < 0`,
  :math:`g \leftarrow g - \lambda\, s\, r / \|r\|` . The factor :math:`\|g\|` of a projection is missing, and g was
  clipped to a norm of 1 over *all* tensors, so the correction is too large and the conflict changes sign:
  :math:`\langle g, r\rangle / \|r\| = s\,(\|g\| - \lambda) > 0` for :math:`\|g\| < \lambda` . Such tensors descend the
  loss that was only to be spared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

__all__ = ["SURGERIES", "clipped", "official", "projection"]

Gradient = Sequence[torch.Tensor]


def projection(gradient: Gradient, preserved: Gradient, weight: float = 1.0) -> list[torch.Tensor]:
    """Project the conflict out of a gradient, over all tensors at once.

    Args:
        gradient: g, a tensor for each parameter.
        preserved: r, likewise.
        weight: lambda; 1 takes the whole conflict out, 0 nothing.

    Returns:
        The gradient without the conflict; `gradient` itself where there is none.
    """
    along = sum(
        torch.vdot(g.flatten().double(), r.flatten().double()) for g, r in zip(gradient, preserved, strict=True)
    )
    if along >= 0:
        return list(gradient)
    squared = sum(r.double().square().sum() for r in preserved)
    share = float(weight * along / squared)
    return [g - share * r for g, r in zip(gradient, preserved, strict=True)]


def official(gradient: Gradient, preserved: Gradient, weight: float = 1.0) -> list[torch.Tensor]:
    """Correct each tensor of a gradient as DoCo's released code does; see the module's docstring.

    Args:
        gradient: g, a tensor for each parameter; see `clipped`.
        preserved: r, likewise.
        weight: lambda.

    Returns:
        The corrected gradient.
    """
    return [_corrected(g, r, weight) for g, r in zip(gradient, preserved, strict=True)]


def clipped(gradient: Gradient, norm: float = 1.0) -> list[torch.Tensor]:
    """Shorten a gradient to a norm over all tensors, if it is longer; the released code does so before `official`."""
    length = torch.nn.utils.get_total_norm(list(gradient))
    return [g * (norm / length).clamp(max=1) for g in gradient]


def _corrected(gradient: torch.Tensor, preserved: torch.Tensor, weight: float) -> torch.Tensor:
    direction = preserved / preserved.norm().clamp(min=1e-30)  # a tensor without gradient has no direction
    cosine = (gradient * direction).sum() / gradient.norm().clamp(min=1e-30)
    return gradient - weight * cosine.clamp(max=0) * direction


SURGERIES: Mapping[str, Callable[[Gradient, Gradient, float], list[torch.Tensor]]] = {
    "projection": projection,
    "official": official,
}
