r"""Tokens as points of a simplex: the relaxation in which UnlearnDiffAtk descends.

A slot holds weights u over the vocabulary, :math:`u \ge 0, \sum u = 1`. Forward, a token is drawn from them and taken
as one-hot; backward, the gradient with respect to the one-hot passes to u, clamped to [-1, 1] entry by entry. After
every step each u is projected back.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["drawn_tokens", "project_to_simplex"]


class _Drawn(torch.autograd.Function):
    """One-hot rows of tokens that were drawn; straight-through, with a clamped gradient."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(tokens, weights.shape[-1]).to(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor, None]:
        return gradients[0].clamp(-1, 1), None


def drawn_tokens(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw a token for each slot.

    Args:
        weights: ``(..., V)``, on the simplex.
        uniform: Numbers in [0, 1), ``(...)``: what each is drawn with.

    Returns:
        One-hot rows ``(..., V)``, whose gradient passes to `weights`, clamped to [-1, 1].
    """
    below = weights.detach().cumsum(-1)
    drawn = torch.searchsorted(below, (uniform.to(below) * below[..., -1])[..., None], right=True)[..., 0]
    return _Drawn.apply(weights, drawn.clamp(max=weights.shape[-1] - 1))


def project_to_simplex(points: torch.Tensor) -> torch.Tensor:
    r"""Project points ``(..., V)`` onto the simplex, exactly.

    The nearest point is :math:`\max(x - \mu, 0)` for the shift :math:`\mu` that makes it sum to 1, found by sorting
    (Held, Wolfe and Crowder, Mathematical Programming 6, 1974), where the released program bisects to 1e-5.
    """
    ordered = points.sort(-1, descending=True).values
    ranks = torch.arange(1, points.shape[-1] + 1, device=points.device, dtype=points.dtype)
    shifts = (ordered.cumsum(-1) - 1) / ranks
    support = (ordered > shifts).sum(-1, keepdim=True)  # as many entries stay above 0
    return (points - shifts.gather(-1, support - 1)).clamp(min=0)
