r"""Closed-form edits of cross-attention: the linear algebra that UCE and RECE share.

Keys and values are linear in the text encoder's output, k = W c without a bias, so a new W can be solved for. With
embeddings c_i to be given the outputs v_i, and embeddings k_j to keep theirs,

.. math::
    \min_{W'} \sum_i s_i \|W' c_i - v_i\|^2 + s_p \sum_j \|W' k_j - W k_j\|^2 + \lambda \|W' - W\|_F^2

has, written as a change so that nothing is lost where little changes, the solution

.. math::
    W' = W + \sum_i s_i (v_i - W c_i) c_i^T M^{-1}, \qquad
    M = \lambda I + \sum_i s_i c_i c_i^T + s_p \sum_j k_j k_j^T .

M knows nothing of the layer, so one Cholesky factorisation, in float64, serves all of them. And where the outputs
wished for are those of other embeddings, v_i = W a_i, the whole edit is one linear map of the embeddings,

.. math::
    W' = W (I + E), \qquad E = \sum_i s_i (a_i - c_i) c_i^T M^{-1} ,

the same in every layer: it is found without looking at the weights and applied to all of them in one product. All of
this runs on the CPU, since not every accelerator has float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from sfumato.families import Family, Segment, TextFamily
from sfumato.settings import check_types
from sfumato.unlearning.task import Task

__all__ = [
    "EditConfig",
    "NormalEquations",
    "Pairs",
    "check_width",
    "edit_map",
    "embedding_pairs",
    "gram_of_prompts",
    "kept_prompts",
    "pairs_of",
    "prompt_pairs",
    "stack",
    "write",
]

TEMPLATES = {  # the released code's; its objects are no portraits by accident, they are in its list
    "art": ("{}", "painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"),
    "object": ("{}", "image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"),
    "bare": ("{}",),
}
_BATCH = 64  # prompts encoded at a time


@dataclass
class EditConfig:
    """What both methods can be told; the defaults are those of UCE's first released code.

    Attributes:
        positions: Which tokens of a forget prompt are given the outputs of which of its anchor. ``"last"``: the last
            token of the subject, for the last of the anchor's (UCE's later code). ``"aligned"``: from there to the
            end, padding included (the first code). ``"all"``: every position, for the same position (RECE). The
            subject ends where a prompt and its anchor begin to read alike, as before "as a mosaic" in "a sneaker as a
            mosaic" for "a bag as a mosaic". What is kept is kept at the last token for ``"last"``, else at all.
        templates: Which prompts are edited. ``"concept"``: all of the concept's. ``"bare"``: one a phrase, the
            shortest that has it. ``"art"`` and ``"object"``: that one, and in the five wordings of the released
            `expand_prompts`; the anchor likewise.
        edit_scale: s_e, the weight of the edited embeddings.
        preserve_scale: s_p, the weight of the embeddings to keep; None is ``max(0.1, 1 / number of prompts)``.
        lambda_abs: lambda, the weight of staying near the old weights, as in the paper.
        lambda_rel: A part of lambda relative to the embeddings, added to it: times the mean eigenvalue (trace over
            width) of the weighted sum of outer products. A token vector of Stable Diffusion has a squared norm near
            768, so that an absolute 0.5 weighs little.
    """

    positions: str = field(default="aligned", metadata={"choices": ["last", "aligned", "all"]})
    templates: str = field(default="concept", metadata={"choices": ["concept", *TEMPLATES]})
    edit_scale: float = 1.0
    preserve_scale: float | None = None
    lambda_abs: float = 0.5
    lambda_rel: float = 0.0

    def __post_init__(self) -> None:
        """Check the types and ranges."""
        check_types(self)
        if self.edit_scale <= 0:
            raise ValueError(f"`edit_scale` must be positive, got {self.edit_scale}.")
        for name in ("preserve_scale", "lambda_abs", "lambda_rel"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"`{name}` must not be negative, got {value}.")
        if self.lambda_abs == self.lambda_rel == 0:
            raise ValueError(
                "`lambda_abs` and `lambda_rel` are both 0: one must be positive, or there is no solution."
            )

    @property
    def part(self) -> str:
        """The part of the model that changes."""
        return "denoiser"

    @property
    def parameters(self) -> str:
        """The weights that change: what reads the text encoder's output, as cross-attention's keys and values do."""
        return "text"


@dataclass(frozen=True)
class Pairs:
    """Embeddings to edit and those whose outputs they are given.

    Attributes:
        inputs: c, ``(N, width)``, float64.
        targets: a, ``(N, width)``.
        owner: Which prompt each is of, ``(N,)``, integers.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor


class NormalEquations:
    r"""The matrix M of the module's docstring, factored once.

    Args:
        inputs: Embeddings to edit, ``(N, width)``, float64.
        scales: Their weights s_i, ``(N,)``.
        kept: ``s_p * sum k k^T``, ``(width, width)``.
        config: lambda.
    """

    def __init__(self, inputs: torch.Tensor, scales: torch.Tensor, kept: torch.Tensor, config: EditConfig) -> None:
        gram = inputs.T @ (scales[:, None] * inputs) + kept
        width = len(gram)
        self.ridge = config.lambda_abs + config.lambda_rel * float(gram.trace()) / width
        self.matrix = gram + self.ridge * torch.eye(width, dtype=gram.dtype)
        self.factor, failed = torch.linalg.cholesky_ex(self.matrix)
        if failed or not torch.isfinite(self.factor).all():
            raise ValueError(
                f"The equations have no stable solution at lambda = {self.ridge:.3g}; raise `lambda_abs` or"
                " `lambda_rel`."
            )
        self.residual = 0.0

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """Find X with ``X M = right``, ``(rows, width)``; `residual` keeps the worst relative error so far."""
        solution = torch.cholesky_solve(right.T, self.factor).T
        error = (solution @ self.matrix - right).norm() / right.norm().clamp_min(torch.finfo(right.dtype).tiny)
        self.residual = max(self.residual, float(error))
        return solution


def edit_map(equations: NormalEquations, pairs: Pairs, scales: torch.Tensor) -> torch.Tensor:
    """Give E of ``W' = W (I + E)``, ``(width, width)``, for scales ``(N,)`` of the pairs."""
    return equations.solve((pairs.targets - pairs.inputs).T @ (scales[:, None] * pairs.inputs))


def stack(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Stack the matrices ``(outputs, width)`` of all layers into one, ``(sum of outputs, width)``, float64."""
    return torch.cat([weight.detach().cpu().double() for weight in weights.values()])


@torch.no_grad()
def write(weights: Mapping[str, torch.Tensor], stacked: torch.Tensor) -> None:
    """Write a stack back into the matrices it came from; ValueError, changing none, if it isn't finite."""
    if not torch.isfinite(stacked).all():
        raise ValueError("The edit gives weights that are NaN or infinite; raise `lambda_abs` or `lambda_rel`.")
    sizes = [len(weight) for weight in weights.values()]
    for weight, rows in zip(weights.values(), stacked.split(sizes), strict=True):
        weight.copy_(rows)


def check_width(task: Task) -> None:
    """Refuse, with a ValueError, a model whose cross-attention does not read the text encoder's output as it is."""
    width = _states(text_family(task.family), [""]).shape[-1]
    for name, weight in matrices(task).items():
        if weight.shape[1] != width:
            raise ValueError(
                f"{name} takes {weight.shape[1]} numbers a token and the text encoder gives {width}: this model "
                "transforms its embeddings first, and closed-form methods can't edit it."
            )


def text_family(family: Family) -> TextFamily:
    """Give a family that reads texts; ValueError if it reads none."""
    if not isinstance(family, TextFamily):
        raise ValueError(f"Closed-form methods edit the layers that read a text; {family.label} has none.")
    return family


def matrices(task: Task) -> dict[str, torch.Tensor]:
    """Name the projections that a task may change; biases, where there are any, drop out of the equations."""
    return {name: parameter for name, parameter in task.trained().items() if parameter.ndim == 2}


class Forgettable(Protocol):
    """What is asked for: a `Concept`, or as much of one as `prompt_pairs` needs."""

    @property
    def prompts(self) -> Sequence[str]:
        """Prompts that ask for it."""

    @property
    def anchors(self) -> Sequence[str]:
        """What each should mean afterwards."""

    @property
    def phrases(self) -> Sequence[str]:
        """The phrases that were given."""


def prompt_pairs(concept: Forgettable, templates: str) -> list[tuple[str, str]]:
    """List forget prompts, each with its anchor prompt; see `EditConfig.templates`.

    Raises:
        ValueError: If no forget prompt has the phrase that the user gave, as when it is a synonym.
    """
    anchors = dict(zip(concept.prompts, concept.anchors, strict=True))
    if templates == "concept":
        return list(anchors.items())
    bare = []
    for phrase in concept.phrases:
        having = [prompt for prompt in concept.prompts if phrase.lower() in prompt.lower()]
        if not having:
            raise ValueError(f"No prompt of the concept has the words {phrase!r}; use templates='concept'.")
        bare.append(min(having, key=len))
    wordings = TEMPLATES[templates]
    return [(form.format(p), form.format(anchors[p]).strip()) for p in dict.fromkeys(bare) for form in wordings]


def embedding_pairs(family: TextFamily, prompts: Sequence[tuple[str, str]], positions: str) -> Pairs:
    """Pair the token embeddings of prompts with those of their anchors.

    Args:
        family: Encodes them.
        prompts: Forget prompts, each with its anchor prompt.
        positions: See `EditConfig.positions`.

    Raises:
        ValueError: If the text encoder cannot tell any of the prompts from its anchor.
    """
    inputs, targets, owner = [], [], []
    for start in range(0, len(prompts), _BATCH):
        batch = prompts[start : start + _BATCH]
        sides = [[pair[side] for pair in batch] for side in range(2)]
        states = [_states(family, texts) for texts in sides]
        segments, others = (family.segments(texts) for texts in sides)
        for k in range(len(batch)):
            of, like = _aligned(segments, others, k, states[0].shape[1], positions)
            inputs.append(states[0][k, of])
            targets.append(states[1][k, like])
            owner.append(torch.full((len(of),), start + k))
    pairs = Pairs(torch.cat(inputs), torch.cat(targets), torch.cat(owner))
    if (pairs.inputs - pairs.targets).norm() <= 1e-6 * pairs.inputs.norm():
        raise ValueError(
            f"The text encoder gives {prompts[0][0]!r} and its anchor {prompts[0][1]!r} the same embeddings: the "
            "model does not know the concept. Name it in other words, or choose another anchor."
        )
    return pairs


def _aligned(
    segments: Sequence[Segment], others: Sequence[Segment], k: int, length: int, positions: str
) -> tuple[list[int], list[int]]:
    """Positions of prompt k and those of its anchor."""
    if positions == "all":
        return list(range(length)), list(range(length))
    of, like = list[int](), list[int]()
    for segment, other in zip(segments, others, strict=True):
        own, anchor = segment.tokens[k], other.tokens[k]
        alike = 0  # tokens at the end that both have; the subject keeps at least one, as an anchor that has any
        while alike < min(len(own) - 1, max(len(anchor) - 1, 0)) and own[-1 - alike] == anchor[-1 - alike]:
            alike += 1
        last, last_other = segment.last(k, alike), other.last(k, alike)
        count = 1 if positions == "last" else segment.end - max(last, last_other)
        of += range(last, last + count)
        like += range(last_other, last_other + count)
    return of, like


def gram_of_prompts(family: TextFamily, prompts: Sequence[str], positions: str) -> torch.Tensor:
    """Sum the outer products of the embeddings of prompts to keep, ``(width, width)``; a batch of them at a time."""
    total = torch.zeros(())
    for start in range(0, len(prompts), _BATCH):
        batch = prompts[start : start + _BATCH]
        states = _states(family, batch)
        if positions == "last":
            segments = family.segments(batch)
            places = [[segment.last(k) for segment in segments] for k in range(len(batch))]
            states = states[torch.arange(len(batch))[:, None], torch.tensor(places)]
        vectors = states.reshape(-1, states.shape[-1])
        total = total + vectors.T @ vectors
    return total


def _states(family: TextFamily, prompts: Sequence[str]) -> torch.Tensor:
    """Token embeddings ``(B, tokens, width)``."""
    return family.encode_prompts(prompts)["encoder_hidden_states"].cpu().double()


def kept_prompts(task: Task) -> list[str]:
    """List the prompts to keep: the retain set, and the empty prompt, which guidance needs."""
    return list(dict.fromkeys([*task.concept.retain, ""]))


def preserve_scale(config: EditConfig, count: int) -> float:
    """Give s_p for a number of prompts to keep."""
    return max(0.1, 1 / count) if config.preserve_scale is None else config.preserve_scale


def pairs_of(task: Task, config: EditConfig) -> tuple[Pairs, torch.Tensor, dict[str, Any]]:
    """Encode what a task asks for: pairs, ``s_p * sum k k^T``, and facts for the manifest."""
    pairs = embedding_pairs(text_family(task.family), prompt_pairs(task.concept, config.templates), config.positions)
    prompts = kept_prompts(task)
    scale = preserve_scale(config, len(prompts))
    kept = scale * gram_of_prompts(text_family(task.family), prompts, config.positions)
    return pairs, kept, {"edited_embeddings": len(pairs.inputs), "preserve_scale": scale}
