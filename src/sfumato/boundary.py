"""The noise that a restoration starts from, chosen once for all pictures: the optimal boundary condition.

Ma, Yang, Yang, Fu, Liu, "Solving Diffusion ODEs with Optimal Boundary Conditions for Better Image Super-Resolution",
ICLR 2024, arXiv 2305.15357. A deterministic sampler h makes of noise z and a degraded picture y one result. The best
noise is nearly the same for all pictures, they find, so it is searched on a few whose clean originals x are known,

    z* = argmin_k sum_i M(h(z_k, y_i), x_i),    z_k ~ N(0, I), k = 1 ... K,

and kept. The best of many looks better than it is: here, it is chosen on one half of the pairs and judged on the
other, and the two halves' rankings of the candidates are compared. Where these do not agree (a rank correlation of 0
or below), the claim does not hold for the model, and any noise is as good.

No program of the authors is known; what is not in the equation (halves, halving, noise in common) is ours. Samplers
that draw noise as they go get the same for every candidate, so that candidates differ in their start alone.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import storage
from sfumato.pipelines.restoration_pictures import read_pictures
from sfumato.progress import Track
from sfumato.randomness import generator_for
from sfumato.settings import check_seed

__all__ = ["Boundary", "find_boundary", "mean_squared_error", "rank_correlation"]

Metric = Callable[[Tensor, Tensor], Tensor]
_OURS = ("image", "mask_image", "generator", "latents", "output_type", "return_dict", "num_inference_steps")
REFERENCES = 8
"""Candidates that halving judges beside the best, on pairs that chose nothing."""


@dataclass(frozen=True)
class Boundary:
    """The best initial noise, and what was measured.

    Attributes:
        noise: ``(1, C, h, w)``, float32: pass it as ``latents``; `noise_for` also sees that it is for the call.
        seed: The seed that draws it: with it, ``generator=torch.Generator().manual_seed(seed)`` starts alike.
        scores: Mean of the metric for each candidate ``(K,)``, float64, on those pairs of the half that chooses which
            it was tried on; candidate k has the seed of the search plus k.
        held_out: Likewise on the other half; not a number for candidates that halving did not try there.
        rank_correlation: Spearman's, between the candidates' scores on the two halves of the pairs (with halving, on
            two halves of the pairs of its first round). None for fewer than three candidates, or too few pairs.
        settings: Of the search; also the steps of its runs, ``num_inference_steps``, the networks, as the
            fingerprints of their weights, ``unet`` and ``noise_unet`` (None without one), and the config of the
            ``scheduler``. (Files of earlier releases may lack some of these, which are not held against a call.)
    """

    noise: Tensor
    seed: int
    scores: Tensor
    held_out: Tensor
    rank_correlation: float | None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def candidate(self) -> int:
        """Number of the best candidate."""
        return self.seed - self.settings["seed"]

    @property
    def held_out_score(self) -> float:
        """Of the best, on pairs that did not choose it."""
        return float(self.held_out[self.candidate])

    @property
    def random_score(self) -> float | None:
        """Mean of the others there: what a start without a search scores. None if there are no others."""
        others = self.held_out.clone()
        others[self.candidate] = torch.nan
        return None if bool(others.isnan().all()) else float(others.nanmean())

    @property
    def beats_random(self) -> bool:
        """Whether the best is better than that on pairs that did not choose it."""
        return self.random_score is not None and self.held_out_score < self.random_score

    def noise_for(self, pipe: Any, num_inference_steps: int | None = None) -> Tensor:
        """Give the noise for a call of a pipeline, if it was searched for such calls.

        Args:
            pipe: The pipeline.
            num_inference_steps: Steps that the call will take; None for the pipeline's default.

        Returns:
            ``(1, C, h, w)``, to be passed as ``latents``.

        Raises:
            ValueError: If it was searched with another network or scheduler, or in another number of steps.
        """
        steps, searched = pipe.check_settings(num_inference_steps), self.settings.get("num_inference_steps")
        for name, own in _networks_of(pipe).items():
            known = self.settings.get(name, own)
            if known != own:
                raise ValueError(
                    f"The boundary was searched with another network `{name}` (fingerprint {known}) than this"
                    f" (fingerprint {own}): search one for this with sfumato.find_boundary."
                )
        own_config = _config_of(pipe.scheduler)
        for name, known in self.settings.get("scheduler", {}).items():
            if known != own_config.get(name):
                raise ValueError(
                    f"The boundary was searched with a scheduler of `{name}` {known!r}, this one has"
                    f" {own_config.get(name)!r}: take that one, or search another with sfumato.find_boundary."
                )
        if searched not in (None, steps):
            raise ValueError(
                f"The boundary was searched in {searched} steps, not in {steps}: take as many, or search another."
            )
        return self.noise

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file; `load` and ``sfumato restore --boundary`` read it.

        Args:
            path: The file; replaced if it exists.
        """
        tensors = {"noise": self.noise, "scores": self.scores, "held_out": self.held_out}
        facts = {"seed": self.seed, "rank_correlation": self.rank_correlation, "settings": self.settings}
        return storage.save_tensors(path, tensors, {"boundary": facts})

    @classmethod
    def load(cls, path: str | Path) -> Boundary:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, or holds something else.
        """
        tensors, facts = storage.load_tensors(path), storage.read_metadata(path).get("boundary")
        facts = facts if isinstance(facts, dict) else {}
        whole = {"seed", "rank_correlation", "settings"} <= set(facts) and {"scores", "held_out"} <= set(tensors)
        settings = facts.get("settings")
        told = isinstance(settings, dict) and isinstance(settings.get("scheduler", {}), dict)
        if not (whole and told and _is_noise(tensors.get("noise"))):
            raise ValueError(f"{path} holds no boundary; give a file written by Boundary.save.")
        return cls(tensors["noise"], facts["seed"], tensors["scores"], tensors["held_out"],
                   facts["rank_correlation"], facts["settings"])  # fmt: skip


def _networks_of(pipe: Any) -> dict[str, str | None]:
    """Fingerprints of what predicts."""
    networks = {name: getattr(pipe, name, None) for name in ("unet", "noise_unet")}
    return {
        name: None if network is None else storage.fingerprint(network.named_parameters())
        for name, network in networks.items()
    }


def _config_of(scheduler: Any) -> dict[str, Any]:
    """A scheduler's config as JSON holds it, without what diffusers notes in it."""
    config: dict[str, Any] = json.loads(scheduler.to_json_string())
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _is_noise(tensor: Tensor | None) -> bool:
    """Whether it is noise of one picture `(1, C, h, w)`."""
    if tensor is None or tensor.ndim != 4 or len(tensor) != 1:
        return False
    return tensor.is_floating_point() and bool(tensor.isfinite().all())


def mean_squared_error(restored: Tensor, clean: Tensor) -> Tensor:
    """Mean squared error of each picture.

    Args:
        restored: ``(B, 3, H, W)`` in [0, 1].
        clean: The same.

    Returns:
        ``(B,)``.
    """
    return (restored - clean).square().flatten(1).mean(dim=1)


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation of two lists of numbers ``(K,)``; 0 if one of them is constant."""
    ranks = [_ranks(values) for values in (first, second)]
    centred = [values - values.mean() for values in ranks]
    scale = centred[0].norm() * centred[1].norm()
    return float(centred[0] @ centred[1] / scale) if scale > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0 on; equal values share the mean of theirs."""
    below = (values[:, None] > values).sum(dim=1)
    return below + ((values[:, None] == values).sum(dim=1) - 1) / 2.0


@torch.no_grad()
def find_boundary(
    pipe: Any,
    pairs: Iterable[Sequence[Any]],
    *,
    candidates: int = 64,
    metric: Metric = mean_squared_error,
    num_inference_steps: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    halving: bool = False,
    progress: bool = True,
    **call: Any,
) -> Boundary:
    """Search the initial noise from which a pipeline restores best.

    Pairs in even places choose, those in odd places judge the choice. Without `halving` every candidate is tried on
    all pairs, ``candidates * len(pairs)`` runs of the sampler; with it, on a share of those that choose, after which
    the better half goes on to the next share, and so on.

    Args:
        pipe: A `ResShiftPipeline` or `RDDMPipeline`.
        pairs: At least two of ``(degraded, clean)``, for a model that fills holes ``(degraded, clean, mask)``:
            pictures of any kind that the pipeline takes, all of one size. A list, or a zip and the like.
        candidates: Initial noises K to try; the k-th is drawn by the seed ``seed + k``.
        metric: Takes restored and clean pictures ``(B, 3, H, W)`` in [0, 1], gives ``(B,)``, lower is better. The
            paper takes LPIPS; the default is the mean squared error.
        num_inference_steps: Steps, as they will be taken later; None for the pipeline's default.
        seed: Of the first candidate, and of what a stochastic sampler draws later.
        batch_size: Pictures that are restored at once.
        halving: Drop the worse half of the candidates again and again.
        progress: Show a progress bar.
        **call: Other arguments of the pipeline, as they will be later, such as ``eta``.

    Returns:
        The best noise and all scores.

    Raises:
        ValueError: If a setting is out of range, pictures do not fit together, or the metric gives something else.
    """
    pairs = list(pairs) if isinstance(pairs, Iterable) else []
    _check_search(pipe, pairs, metric, candidates, batch_size, seed, call)
    steps = {"num_inference_steps": pipe.check_settings(num_inference_steps)}
    trial = _Trial(pipe, pairs, metric, seed, batch_size, {**steps, **call})
    scores = torch.full((candidates, len(pairs)), torch.nan, dtype=torch.float64)
    choosing, judging = list(range(0, len(pairs), 2)), list(range(1, len(pairs), 2))
    quiet = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**quiet, "disable": True})
    try:
        if halving:
            best, halves = _halve(trial, scores, choosing, judging, progress)
        else:
            trial.fill(scores, list(range(candidates)), [*choosing, *judging], progress)
            best, halves = int(scores[:, choosing].mean(dim=1).argmin()), (choosing, judging)
    finally:
        pipe.set_progress_bar_config(**quiet)
    correlation = None
    if candidates > 2 and all(halves):
        correlation = rank_correlation(*(scores[:, half].mean(dim=1) for half in halves))
    settings = {
        **{name: value for name, value in call.items() if isinstance(value, bool | int | float | str)}, **steps,
        "candidates": candidates, "pairs": len(pairs), "seed": seed, "halving": halving,
        "metric": getattr(metric, "__name__", type(metric).__name__),
        **_networks_of(pipe), "scheduler": _config_of(pipe.scheduler),
    }  # fmt: skip
    return Boundary(
        trial.noise(best), seed + best, scores[:, choosing].nanmean(dim=1), scores[:, judging].nanmean(dim=1),
        correlation, settings,
    )  # fmt: skip


def _check_search(
    pipe: Any, pairs: Sequence[Sequence[Any]], metric: Metric, candidates: int, batch_size: int, seed: int,
    call: dict[str, Any],
) -> None:  # fmt: skip
    if not hasattr(pipe, "check_settings"):
        raise ValueError(
            f"`pipe` must restore pictures, as ResShiftPipeline and RDDMPipeline do, got a {type(pipe).__name__}."
        )
    for name, value, least in (("candidates", candidates, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` must be a whole number from {least} on, got {value!r}.")
    check_seed(seed)
    if not callable(metric):
        raise ValueError(f"`metric` must be a function of restored and clean pictures, got {metric!r}.")
    ours = sorted(set(_OURS) & set(call))
    if ours:
        raise ValueError(f"`{ours[0]}` is set by the search: leave it out.")
    known = sorted(set(inspect.signature(pipe.__call__).parameters) - {"image", *_OURS})
    unknown = sorted(set(call) - set(known))
    if unknown:
        raise ValueError(
            f"A call of {type(pipe).__name__} takes no `{unknown[0]}`: beside pictures and noise it takes"
            f" {', '.join(known)}."
        )
    members = 2 + bool(pipe.config.masked)
    if len(pairs) < 2:
        raise ValueError(f"`pairs` must be at least two, one to choose by and one to judge by, got {len(pairs)}.")
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list | tuple) or len(pair) != members:
            form = "(degraded, clean, mask)" if members == 3 else "(degraded, clean)"
            raise ValueError(f"Pair {index} of `pairs` must be {form} for this model.")


class _Trial:
    """Restores pairs from candidates' noise and scores what comes out."""

    def __init__(
        self, pipe: Any, pairs: Sequence[Sequence[Any]], metric: Metric, seed: int, batch_size: int,
        call: dict[str, Any],
    ) -> None:  # fmt: skip
        self._pipe, self._metric, self._seed, self._batch_size, self._call = pipe, metric, seed, batch_size, call
        columns = [read_pictures(list(column)) for column in zip(*pairs, strict=True)]
        if any(len(column) != len(pairs) for column in columns):
            raise ValueError("Each member of a pair must be one picture, not a batch of them.")
        for column in columns:
            sizes = sorted({picture.size for picture in column})
            if len(sizes) > 1:
                raise ValueError(f"Pictures must be of one size, for which noise is searched, got {sizes}.")
        size, scale = columns[0][0].size, pipe.config.scale
        if columns[1][0].size != (size[0] * scale, size[1] * scale):
            raise ValueError(
                f"Clean pictures must be {scale} times the size of degraded ones, {size}, got {columns[1][0].size}."
            )
        self._columns = [[picture.pixels for picture in column] for column in columns]
        self._shape = pipe.latents_shape(*size)

    def noise(self, candidate: int) -> Tensor:
        """The initial noise of a candidate ``(1, C, h, w)``: what the pipeline draws for its seed."""
        generator = torch.Generator().manual_seed(self._seed + candidate)
        return torch.randn(1, *self._shape, generator=generator)

    def fill(self, scores: Tensor, candidates: Sequence[int], pairs: Sequence[int], progress: bool) -> None:
        """Score candidates on pairs into the table ``(K, pairs)``."""
        places = [(candidate, pair) for candidate in candidates for pair in pairs]
        batches = [places[first : first + self._batch_size] for first in range(0, len(places), self._batch_size)]
        for batch in Track(batches, "boundary", shown=progress):
            rows, columns = zip(*batch, strict=True)
            scores[list(rows), list(columns)] = self._scores(batch)

    def _scores(self, batch: Sequence[tuple[int, int]]) -> Tensor:
        degraded, clean, *masks = ([column[pair] for _, pair in batch] for column in self._columns)
        restored = self._pipe(
            degraded, **({"mask_image": masks[0]} if masks else {}), **self._call, output_type="pt",
            latents=torch.cat([self.noise(candidate) for candidate, _ in batch]),
            generator=[generator_for(self._seed, pair) for _, pair in batch],
        ).images  # fmt: skip
        found = torch.as_tensor(self._metric(restored, torch.stack(clean))).detach().cpu().double()
        if found.shape != (len(batch),) or not bool(found.isfinite().all()):
            raise ValueError(
                f"`metric` must give {len(batch)} finite numbers for as many pictures, got the shape"
                f" {tuple(found.shape)}" + (": not all finite." if found.shape == (len(batch),) else ".")
            )
        return found


def _halve(
    trial: _Trial, scores: Tensor, choosing: Sequence[int], judging: Sequence[int], progress: bool
) -> tuple[int, tuple[Sequence[int], Sequence[int]]]:
    """Successive halving; gives the best candidate, and two halves of the pairs that all were tried on."""
    alive, tried = list(range(len(scores))), 0
    rounds = min(max(1, math.ceil(math.log2(len(scores)))), max(1, len(choosing) // 2))
    first: Sequence[int] = ()
    for number in range(rounds):
        until = len(choosing) * (number + 1) // rounds
        share = choosing[tried:until]
        first, tried = first or share, until
        trial.fill(scores, alive, share, progress)
        order = scores[alive][:, choosing[:tried]].mean(dim=1).argsort(stable=True).tolist()
        kept = 1 if until == len(choosing) else math.ceil(len(alive) / 2)
        alive = [alive[place] for place in order[:kept]]
    judged = sorted({alive[0], *range(min(len(scores), REFERENCES))})
    trial.fill(scores, judged, judging, progress)
    return alive[0], (first[::2], first[1::2])
