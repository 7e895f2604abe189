r"""RECE: reliable and efficient concept erasure, UCE repeated against the embeddings that undo it, in closed form.

After an edit of the projections W_i of cross-attention (all keys and values), some other embedding c' may still bring
back the original's outputs. It is found in closed form, for each token embedding c of the concept,

.. math::
    c' = \arg\min_x \sum_i \|W_i x - W_i^{old} c\|^2 + \lambda_r \|x\|^2
       = \Big(\lambda_r I + \sum_i W_i^T W_i\Big)^{-1} \sum_i W_i^T W_i^{old}\, c ,

and the next edit, UCE's with the current weights, gives it the anchor's outputs:

.. math::
    \min_{W'} \sum s_e \|W' c' - W a\|^2 + s_p \sum \|W' k - W k\|^2 + \lambda \|W' - W\|_F^2 .

This is done ``epochs`` times after one edit by UCE. A smaller lambda_r finds a stronger c' and does more harm. Each
edit is a map of embeddings, W' = W (I + E) (see `sfumato.unlearning.closed_form`), so with W = W^old T all of the
above needs only one matrix of the weights, :math:`\sum_i W_i^{old\,T} W_i^{old}`, and they are written once, at the
end.

Gong, Chen, Wei, Chen, Jiang, "Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models", ECCV 2024,
arXiv 2407.12383. Where this differs from the released code: the concept is given its own anchor, not always a single
space; what is kept is the retain set (``keep="anchor"`` is the released choice); all is in float64, by Cholesky; and
the last epoch is the result, where the released code keeps the one that scores best by the very detector it reports.
With ``held_out_prompts`` the epoch is chosen by the denoising loss on other prompts' pictures instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from sfumato.unlearning import closed_form
from sfumato.unlearning.closed_form import EditConfig, NormalEquations, Pairs, edit_map, stack, write
from sfumato.unlearning.residual import DenoisingResidual
from sfumato.unlearning.task import History, Task

__all__ = ["RECEConfig", "adversary", "check", "recoverable", "run", "solve"]

REGULARISERS = ("regzero", "standardreg", "surrogate_1st", "surrogate_2nd", "surrogate_both")


@dataclass
class RECEConfig(EditConfig):
    """RECE's settings; those inherited are of the first edit, by UCE.

    Attributes:
        epochs: How often to find c' and edit it; 0 is UCE.
        lambda_r: How near c' is held to what `regulariser` says.
        regulariser: Near 0 (``"regzero"``, the paper's), near the anchor's embedding (``"standardreg"``), in its
            outputs near those of c now (``"surrogate_1st"``), near c (``"surrogate_2nd"``), or near both
            (``"surrogate_both"``).
        erase_scale: s_e of the later edits.
        erase_preserve_scale: s_p of the later edits.
        erase_lambda: lambda of the later edits, on staying near the current weights.
        concept_scale: Weight, in the later edits, of the concept's own embeddings, which are given the anchor's
            outputs once more; 0 is the paper's. Without them a later edit, which knows of c' alone, moves the concept
            part of the way back.
        keep: Embeddings whose outputs the later edits keep: ``"retain"``, of the retain set and the empty prompt, or
            ``"anchor"``, of the anchor prompts alone, as in the released code.
        held_out_prompts: Prompts for the concept, in other words than those it is edited or reported with. If given,
            the epoch with the greatest denoising loss on their pictures is the result, else the last.
        held_out_pictures: Pictures of each, drawn by the original.
        seed: Seeds these pictures.
    """

    epochs: int = 3
    lambda_r: float = 0.1
    regulariser: str = field(default="regzero", metadata={"choices": list(REGULARISERS)})
    erase_scale: float = 1.0
    erase_preserve_scale: float = 0.1
    erase_lambda: float = 0.1
    concept_scale: float = 0.0
    keep: str = field(default="retain", metadata={"choices": ["retain", "anchor"]})
    held_out_prompts: list[str] | None = field(default=None, metadata={"nargs": "+"})
    held_out_pictures: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the types and ranges."""
        super().__post_init__()
        if self.epochs < 0:
            raise ValueError(f"`epochs` must not be negative, got {self.epochs}.")
        for name in ("lambda_r", "erase_scale", "erase_lambda"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        for name in ("erase_preserve_scale", "concept_scale"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.held_out_prompts is not None and not (
            self.held_out_prompts and all(prompt.strip() for prompt in self.held_out_prompts)
        ):
            raise ValueError(
                "`held_out_prompts` is empty or has an empty prompt; leave it out to take the last epoch."
            )
        if self.held_out_pictures < 1:
            raise ValueError(f"`held_out_pictures` must be at least 1, got {self.held_out_pictures}.")

    def later(self) -> EditConfig:
        """Give the settings of the edits after the first."""
        return EditConfig(
            edit_scale=self.erase_scale, preserve_scale=self.erase_preserve_scale, lambda_abs=self.erase_lambda
        )


def adversary(gram: torch.Tensor, current: torch.Tensor, pairs: Pairs, config: RECEConfig) -> torch.Tensor:
    r"""Find the embeddings that bring the original's outputs back.

    Args:
        gram: :math:`G = \sum_i W_i^{old\,T} W_i^{old}`, ``(width, width)``, float64.
        current: T of the current weights, :math:`W_i = W_i^{old} T`, ``(width, width)``.
        pairs: The concept's embeddings c and the anchor's.
        config: lambda_r and the regulariser.

    Returns:
        c' for each c, ``(N, width)``.
    """
    weight, kind = config.lambda_r, config.regulariser
    cross = current.T @ gram  # sum W^T W_old
    own = cross @ current  # sum W^T W
    left, right = own, cross @ pairs.inputs.T
    if kind in ("surrogate_1st", "surrogate_both"):
        left, right = left + weight * own, right + weight * own @ pairs.inputs.T
    if kind != "surrogate_1st":
        left = left + weight * torch.eye(len(gram), dtype=gram.dtype)
        if kind != "regzero":
            right = right + weight * (pairs.targets if kind == "standardreg" else pairs.inputs).T
    factor, failed = torch.linalg.cholesky_ex(left)
    if failed:
        raise ValueError(f"There is no stable adversarial embedding at lambda_r = {weight:.3g}; raise `lambda_r`.")
    return torch.cholesky_solve(right, factor).T


def recoverable(gram: torch.Tensor, current: torch.Tensor, pairs: Pairs, inputs: torch.Tensor) -> float:
    """Give the share of the original's outputs that inputs bring back: 1 all, 0 no more than the anchor does."""

    def size(vectors: torch.Tensor) -> float:
        return float(((vectors @ gram) * vectors).sum())

    return 1 - size(inputs @ current.T - pairs.inputs) / size(pairs.targets - pairs.inputs)


def solve(
    gram: torch.Tensor, first: torch.Tensor, pairs: Pairs, kept: torch.Tensor, config: RECEConfig
) -> tuple[list[torch.Tensor], History, float]:
    """Repeat attack and edit.

    Args:
        gram: As for `adversary`.
        first: T after UCE's edit, ``(width, width)``.
        pairs: The concept's and the anchor's embeddings.
        kept: ``s_p * sum k k^T`` of the later edits, ``(width, width)``.
        config: Settings.

    Returns:
        T after each number of epochs from 0, a row of history for each epoch, and the worst relative residual of the
        normal equations.
    """
    maps, history, residual = [first], list[dict[str, float]](), 0.0
    later, ones = config.later(), torch.ones_like(pairs.inputs[:, 0])
    scales = torch.cat([config.erase_scale * ones, config.concept_scale * ones])
    for epoch in range(config.epochs):
        found = adversary(gram, maps[-1], pairs, config)
        both = Pairs(torch.cat([found, pairs.inputs]), pairs.targets.repeat(2, 1), pairs.owner.repeat(2))
        equations = NormalEquations(both.inputs, scales, kept, later)
        edited = maps[-1] + maps[-1] @ edit_map(equations, both, scales)
        history.append(
            {
                "epoch": epoch,
                "recoverable": recoverable(gram, maps[-1], pairs, found),
                "recoverable_after": recoverable(gram, edited, pairs, found),
            }
        )
        maps.append(edited)
        residual = max(residual, equations.residual)
    return maps, history, residual


def check(task: Task, config: RECEConfig) -> None:
    """Check, before the work, that the model can be edited and that the wordings asked for exist."""
    closed_form.check_width(task)
    edited = {prompt for prompt, _ in closed_form.prompt_pairs(task.concept, config.templates)}
    both = sorted(edited & set(config.held_out_prompts or ()))
    if both:
        raise ValueError(f"{both[0]!r} is edited and held out; choose by prompts that are not edited.")


def run(task: Task, config: RECEConfig) -> tuple[History, dict[str, Any]]:
    """Edit by UCE, then attack and edit in turn; see `sfumato.unlearning.task`."""
    weights = closed_form.matrices(task)
    original = stack(weights)
    pairs, kept, facts = closed_form.pairs_of(task, config)
    scales = torch.full_like(pairs.inputs[:, 0], config.edit_scale)
    equations = NormalEquations(pairs.inputs, scales, kept, config)
    identity = torch.eye(original.shape[1], dtype=original.dtype)
    prompts = closed_form.prompt_pairs(task.concept, config.templates)
    attacked = closed_form.embedding_pairs(closed_form.text_family(task.family), prompts, "all")
    shown = closed_form.kept_prompts(task) if config.keep == "retain" else [anchor for _, anchor in prompts]
    later = config.erase_preserve_scale * closed_form.gram_of_prompts(
        closed_form.text_family(task.family), list(dict.fromkeys(shown)), "all"
    )
    first = identity + edit_map(equations, pairs, scales)
    maps, history, residual = solve(original.T @ original, first, attacked, later, config)
    changes = [original @ (one - identity) for one in (maps if config.held_out_prompts else maps[-1:])]
    chosen = 0
    if config.held_out_prompts:
        residuals = _held_out(task, config, weights, [original + change for change in changes])
        chosen = max(range(len(residuals)), key=residuals.__getitem__)
        facts = {**facts, "held_out_residuals": residuals, "chosen_epochs": chosen}
    write(weights, original + changes[chosen])
    facts["normal_equations_residual"] = max(equations.residual, residual)
    return history, {**facts, "lambda": equations.ridge}


def _held_out(
    task: Task, config: RECEConfig, weights: dict[str, torch.Tensor], stacks: list[torch.Tensor]
) -> list[float]:
    """Denoising loss on the held-out prompts' pictures of the model with each stack of weights."""
    measure = DenoisingResidual(
        task.family.with_parts({}), config.held_out_prompts or (), pictures=config.held_out_pictures, seed=config.seed
    )
    pipe, found = task.family.with_parts({"denoiser": task.model}), []
    for stacked in stacks:
        write(weights, stacked)
        found.append(float(measure(pipe).mean()))
    return found
