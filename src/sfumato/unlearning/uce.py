r"""UCE: unified concept editing, in closed form.

Every key and value projection W of cross-attention is replaced by the minimiser of

.. math::
    \sum_{i} s_e \|W' c_i - v_i\|^2 + \sum_{j} s_p \|W' k_j - W k_j\|^2 + \lambda \|W' - W\|_F^2 ,

where c_i are token embeddings of the concept, k_j those of prompts to keep, and v_i the outputs wished for: those of
the anchor's embeddings a_i (`technique` ``"replace"``), or these without what they share with the concept's own
(``"tensor"``; the inner products run over all positions of a prompt):

.. math::
    v_i = W a_i \qquad\text{or}\qquad v_i = W a_i - \frac{\langle W A, W C\rangle}{\|W C\|^2}\, W c_i .

How it is solved is in `sfumato.unlearning.closed_form`; which tokens c_i and a_i are, in `EditConfig.positions`. An
empty anchor prompt is the text encoder's output for it: the subject's last token is given the outputs of the start
token, what follows those of the empty prompt's padding.

Gandikota, Orgad, Belinkov, Materzynska, Bau, "Unified Concept Editing in Diffusion Models", WACV 2024, arXiv
2308.14761. Where this differs from the released code: prompts are encoded and the matrix is factored once, not once a
layer; by Cholesky in float64, not an explicit inverse in float32; ``""`` is always among the prompts to keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sfumato.unlearning import closed_form
from sfumato.unlearning.closed_form import EditConfig, NormalEquations, Pairs, edit_map, stack, write
from sfumato.unlearning.task import History, Task

__all__ = ["UCEConfig", "check", "run", "solve"]


@dataclass
class UCEConfig(EditConfig):
    """UCE's settings.

    Attributes:
        technique: ``"replace"`` gives the concept the anchor's outputs, ``"tensor"`` removes from them what points
            along the concept's own.
    """

    technique: str = field(default="replace", metadata={"choices": ["replace", "tensor"]})


def solve(
    weights: Mapping[str, torch.Tensor],
    pairs: Pairs,
    kept: torch.Tensor,
    config: UCEConfig,
    scales: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Edit projections in place.

    Args:
        weights: Name to a matrix ``(outputs, width)``.
        pairs: Embeddings to edit and those whose outputs they are given.
        kept: ``s_p * sum k k^T``, ``(width, width)``, float64.
        config: Technique, scale and lambda.
        scales: A weight s_i for each pair, ``(N,)``; default ``config.edit_scale``.

    Returns:
        lambda, and the relative residual of the normal equations.
    """
    scales = torch.full_like(pairs.inputs[:, 0], config.edit_scale) if scales is None else scales
    equations = NormalEquations(pairs.inputs, scales, kept, config)
    stacked = stack(weights)
    if config.technique == "replace":
        change = stacked @ edit_map(equations, pairs, scales)
    else:
        sizes = [len(weight) for weight in weights.values()]
        wished = _without_concept(stacked, pairs, sizes) - stacked @ pairs.inputs.T  # (sum of outputs, N)
        change = wished @ equations.solve(scales[:, None] * pairs.inputs)
    write(weights, stacked + change)
    return {"lambda": equations.ridge, "normal_equations_residual": equations.residual}


def _without_concept(stacked: torch.Tensor, pairs: Pairs, sizes: list[int]) -> torch.Tensor:
    """Outputs ``(sum of outputs, N)`` of the targets less their projection on the concept's, by layer and prompt."""
    own, wished = stacked @ pairs.inputs.T, stacked @ pairs.targets.T
    for rows_own, rows_wished in zip(own.split(sizes), wished.split(sizes), strict=True):
        shared = _by_prompt((rows_own * rows_wished).sum(0), pairs.owner) / _by_prompt(
            rows_own.square().sum(0), pairs.owner
        )
        rows_wished -= shared[pairs.owner] * rows_own
    return wished


def _by_prompt(values: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    return torch.zeros(int(owner.max()) + 1, dtype=values.dtype).index_add_(0, owner, values)


def check(task: Task, config: UCEConfig) -> None:
    """Check, before the work, that the model can be edited and that the wordings asked for exist."""
    closed_form.check_width(task)
    closed_form.prompt_pairs(task.concept, config.templates)


def run(task: Task, config: UCEConfig) -> tuple[History, dict[str, Any]]:
    """Solve for the new projections; see `sfumato.unlearning.task`."""
    pairs, kept, facts = closed_form.pairs_of(task, config)
    return [], {**facts, **solve(closed_form.matrices(task), pairs, kept, config)}
