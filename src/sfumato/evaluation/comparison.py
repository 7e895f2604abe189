"""How far the retained pictures of a model are from the original's, and both from real ones.

* Sets against sets, in the features of one network: the Fréchet distance, precision, recall, density and coverage.
  Against real pictures also the kernel distance and the share of pictures that are no near-copies. Result and original
  are compared from the same noise: their distance is 0 if nothing changed, and less than that of independent sets,
  for which the kernel distance's estimate is not made.
* Pictures against pictures of the same prompt and noise: the drift, as a share of how far apart pictures of different
  retained prompts are. It needs no detector, and 0 is a model that did not change.
* Pictures against prompts, if a CLIP is named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from sfumato.concepts import Vocabulary
from sfumato.evaluation.features import Extractor, clip_scorer, extract, find_features
from sfumato.evaluation.judge import Judge
from sfumato.evaluation.manifolds import authenticity, compare_manifolds
from sfumato.evaluation.metrics import bootstrap, frechet_estimate, kernel_distance, kernel_metric
from sfumato.evaluation.pictures import read_pictures
from sfumato.evaluation.scores import Sighting
from sfumato.evaluation.unlearning import shows
from sfumato.families import family_of, latent_space_of
from sfumato.loading import assets_folder

__all__ = ["Comparison", "compare", "prepare"]

LEAST = 6  # pictures of a set, so that each has a fifth nearest neighbour


class _Settings(Protocol):
    """What of `sfumato.evaluation.evaluate.EvaluationConfig` is asked here."""

    features: str | None
    clip: str | None
    real: str | None
    resamples: int
    seed: int


@dataclass(frozen=True)
class Comparison:
    """What distances are measured with.

    Attributes:
        name: The features'.
        extractor: Makes them; None measures none.
        real: Features of real pictures ``(M, F)``; None if there are none.
        scorer: Scores how well pictures fit their prompts; None scores nothing.
    """

    name: str
    extractor: Extractor | None
    real: torch.Tensor | None
    scorer: Callable[[torch.Tensor, Sequence[str]], torch.Tensor] | None


def prepare(
    pipe: DiffusionPipeline, vocabulary: Vocabulary | None, judge: Judge | None, phrases: Sequence[str],
    sheet: Sequence[Sighting], settings: _Settings,
) -> Comparison:  # fmt: skip
    """Get the features' network and real pictures, before anything is drawn.

    Args:
        pipe: The original.
        vocabulary: Its vocabulary, if it has one.
        judge: The vocabulary's, if there is one.
        phrases: What was forgotten; real pictures of it are left out of the shipped ones.
        sheet: What will be drawn.
        settings: The evaluation's.

    Raises:
        ValueError: If there are too few pictures to compare.
        OSError: If weights or pictures can't be had.
        ImportError: If a package is not installed.
    """
    family = family_of(pipe)
    name = settings.features or ("clip" if judge is None else "judge")
    scorer = None if settings.clip is None else clip_scorer(settings.clip, family.device)
    if name == "none":
        return Comparison(name, None, None, scorer)
    retained = sum(seen.kind == "retain" for seen in sheet)
    if retained < LEAST:
        raise ValueError(
            f"{retained} retained pictures are too few to compare, at least {LEAST} are needed: raise "
            "`retain_repeats`, or set `features` to none."
        )
    extractor = find_features(name, judge, family.device)
    real = None
    if settings.real is not None:
        real = read_pictures(settings.real, family.image_size)
    elif vocabulary is not None and judge is not None:
        real = _renders(pipe, vocabulary, phrases)
    if real is not None:
        kernel_metric()  # says now if it is not installed
    if real is not None and len(real) < LEAST:
        raise ValueError(f"{settings.real} holds {len(real)} pictures; at least {LEAST} are needed.")
    return Comparison(name, extractor, None if real is None else extract(extractor, real), scorer)


def compare(
    compared: Comparison, pictures: Mapping[str, torch.Tensor], sheet: Sequence[Sighting], settings: _Settings
) -> dict[str, Any]:
    """Measure all distances.

    Args:
        compared: What `prepare` gave.
        pictures: ``"result"`` and, if there is one, ``"original"`` to pictures ``(N, 3, H, W)``.
        sheet: What they should show, ``N`` of them.
        settings: The evaluation's.

    Returns:
        Plain values for JSON: a mapping for each pair of sets, ``drift`` by kind of picture, and ``clip_score``.
    """
    found: dict[str, Any] = {"features": compared.name}
    if compared.scorer is not None:
        prompts = [seen.request.prompt for seen in sheet]
        scores = {name: compared.scorer(shown, prompts) for name, shown in pictures.items()}
        found["clip"] = settings.clip
        found["clip_score"] = {name: _by_kind(values, sheet, settings) for name, values in scores.items()}
    if compared.extractor is None:
        return found
    features = {name: extract(compared.extractor, shown) for name, shown in pictures.items()}
    kept = torch.tensor([seen.kind == "retain" for seen in sheet])
    sets = {name: values[kept] for name, values in features.items()}
    pairs = [("result", "original")] if "original" in sets else []
    if compared.real is not None:
        sets["real"] = compared.real
        pairs += [(name, "real") for name in features]
    found |= {f"{a} to {b}": _distances(sets[a], sets[b], settings, paired=b == "original") for a, b in pairs}
    if "original" in features:
        apart = torch.pdist(features["original"][kept].double()).mean()
        change = (features["result"] - features["original"]).double().norm(dim=1) / apart
        found["drift"] = _by_kind(change, sheet, settings)
    return found


def _distances(
    generated: torch.Tensor, reference: torch.Tensor, settings: _Settings, *, paired: bool
) -> dict[str, Any]:
    seed, resamples = settings.seed, settings.resamples
    found = {
        "pictures": [len(generated), len(reference)],
        "frechet": frechet_estimate(generated, reference, paired=paired, seed=seed, resamples=resamples).as_dict(),
        **compare_manifolds(generated, reference, seed=seed).as_dict(),
    }
    if not paired:
        found["kernel"] = kernel_distance(generated, reference, seed=seed, resamples=resamples).as_dict()
        found["authentic"] = authenticity(generated, reference).as_dict()
    return found


def _by_kind(values: torch.Tensor, sheet: Sequence[Sighting], settings: _Settings) -> dict[str, Any]:
    """Mean of a figure of each picture: over the concept's, the retained, and each neighbour's."""
    places: dict[str, list[int]] = {}
    for number, seen in enumerate(sheet):
        name = seen.kind if seen.kind != "neighbour" else f"neighbour: {next(iter(seen.words.values()))}"
        places.setdefault(name, []).append(number)
    return {
        name: bootstrap(
            lambda chosen, own=values[where]: float(own[chosen].mean()), [len(where)], seed=settings.seed,
            resamples=settings.resamples,
        ).as_dict()
        for name, where in places.items()
    }  # fmt: skip


def _renders(pipe: DiffusionPipeline, vocabulary: Vocabulary, phrases: Sequence[str]) -> torch.Tensor:
    """The shipped renders that do not show the concept."""
    folder, targets = assets_folder() / "renders", [vocabulary.parse(phrase) for phrase in phrases]
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    files = [row["file_name"] for row in rows if not shows(row, targets)]
    return latent_space_of(pipe).preprocess([Image.open(folder / file).convert("RGB") for file in files])
