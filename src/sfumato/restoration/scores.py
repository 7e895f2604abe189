"""How near restored pictures come to the clean ones: PSNR, SSIM and a distance of features, a value a picture.

PSNR rewards the mean of all pictures that may have been, which is blurred; the distance of features sees that it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sfumato.evaluation.features import Extractor, extract, find_features
from sfumato.evaluation.judge import Judge
from sfumato.evaluation.metrics import Estimate, bootstrap, frechet_distance
from sfumato.loading import assets_folder

__all__ = ["Distance", "between_sets", "feature_distance", "find_distance", "psnr", "score", "ssim", "summarise"]

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Restored and clean pictures ``(N, 3, H, W)`` in [0, 1] to distances ``(N,)``."""

SMALLEST_ERROR = 1e-10  # equal pictures have a PSNR of 100 dB, not an infinite one
SMALLEST_SIDE = 11  # of SSIM's window


def psnr(restored: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each picture.

    Args:
        restored: ``(N, 3, H, W)`` in [0, 1].
        clean: Likewise.

    Returns:
        ``(N,)``, in dB, float64; at most 100, for equal pictures.
    """
    error = (restored.double() - clean.to(restored.device).double()).square().flatten(1).mean(1)
    return -10 * error.clamp(min=SMALLEST_ERROR).log10()


def ssim(restored: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each picture, averaged over colours.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", IEEE TIP 2004, with its
    Gaussian window of 11x11, as torchmetrics computes it: windows over the edge see the picture reflected.

    Args:
        restored: ``(N, 3, H, W)`` in [0, 1], at least 11x11.
        clean: Likewise.

    Returns:
        ``(N,)``, at most 1, float64.

    Raises:
        ImportError: If torchmetrics is not installed.
        ValueError: If the pictures are too small.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise ImportError("SSIM needs torchmetrics: run pip install 'sfumato[train]'.") from error
    if min(clean.shape[-2:]) < SMALLEST_SIDE:
        height, width = clean.shape[-2:]
        raise ValueError(f"SSIM needs pictures of at least {SMALLEST_SIDE}x{SMALLEST_SIDE}, got {width}x{height}.")
    pairs = restored.double(), clean.to(restored.device).double()
    found = structural_similarity_index_measure(*pairs, data_range=1.0, reduction="none")
    assert isinstance(found, torch.Tensor)
    return found.reshape(-1)


def feature_distance(restored: torch.Tensor, clean: torch.Tensor, extractor: Extractor) -> torch.Tensor:
    """Squared distance between the features of each restored picture and its original.

    It is given in units of the clean pictures' variance: 0 for equal features, 1 for those of the mean of all, about 2
    for those of another picture.

    Args:
        restored: ``(N, 3, H, W)`` in [0, 1].
        clean: Likewise; at least two.
        extractor: See `sfumato.evaluation.features`.

    Returns:
        ``(N,)``, float64.

    Raises:
        ValueError: If there is one picture only, or the extractor does not give one row a picture.
    """
    if len(clean) < 2:
        raise ValueError(f"Distances are measured against the variance of several pictures, got {len(clean)}.")
    found, wanted = (extract(extractor, pictures).double() for pictures in (restored, clean))
    spread = (wanted - wanted.mean(0)).square().sum(1).mean()
    return (found - wanted).square().sum(1) / spread.clamp(min=1e-12)


def find_distance(name: str, device: torch.device | str = "cpu") -> Distance:
    """Make a distance from what a command line calls it.

    Args:
        name: ``lpips:NETWORK`` (``alex``, ``vgg`` or ``squeeze``: Zhang et al., arXiv 1801.03924, by torchmetrics and
            torchvision), ``judge`` (that of the embedded models), or other features as
            `sfumato.evaluation.features` names them, whose `feature_distance` is taken.
        device: Where to run it.

    Returns:
        The distance.

    Raises:
        ValueError: If there is none of that name.
        ImportError: If it is not installed.
        OSError: If its weights can't be had.
    """
    kind, _, network = name.partition(":")
    if kind == "lpips":
        return _lpips(network or "alex", device)
    extractor = _extractor(name, device)
    return lambda restored, clean: feature_distance(restored, clean, extractor)


def between_sets(name: str, device: torch.device | str = "cpu") -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Make what measures how far generated pictures are from real ones: `frechet_distance` of features.

    Args:
        name: Features as `sfumato.evaluation.features` names them.
        device: Where to run them.

    Returns:
        A function of two sets of pictures ``(N, 3, H, W)`` in [0, 1]; compare only sets of the same sizes.

    Raises:
        Exception: As `find_distance`.
    """
    extractor = _extractor(name, device)
    return lambda drawn, real: frechet_distance(extract(extractor, drawn), extract(extractor, real))


def _extractor(name: str, device: torch.device | str) -> Extractor:
    judge = Judge.load(assets_folder() / "judge") if name == "judge" else None
    return find_features(name, judge, device)


def _lpips(network: str, device: torch.device | str) -> Distance:
    if network not in ("alex", "vgg", "squeeze"):
        raise ValueError(f"LPIPS has the networks alex, vgg and squeeze, got {network!r}.")
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        how: Any = {"net_type": network, "reduction": "none", "normalize": True}
        metric = LearnedPerceptualImagePatchSimilarity(**how).to(device)
    except (ImportError, ValueError) as error:
        raise ImportError("LPIPS needs: pip install torchmetrics torchvision.") from error

    @torch.no_grad()
    def distance(restored: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        batches = zip(restored.split(64), clean.split(64), strict=True)
        found = [metric(*(part.to(device).clamp(0, 1) for part in batch)).reshape(-1).cpu() for batch in batches]
        return torch.cat(found).double()

    return distance


def score(restored: torch.Tensor, clean: torch.Tensor, distance: Distance | None = None) -> dict[str, torch.Tensor]:
    """Compare restored pictures with the clean ones.

    Args:
        restored: ``(N, 3, H, W)`` in [0, 1].
        clean: Likewise.
        distance: See `find_distance`; None measures none.

    Returns:
        ``psnr``, ``ssim`` and, if asked for, ``distance``, ``(N,)`` each.

    Raises:
        ValueError: If the shapes differ, or a picture is not finite.
        ImportError: If torchmetrics is not installed.
    """
    if restored.shape != clean.shape:
        raise ValueError(f"Restored pictures are {tuple(restored.shape)}, the clean ones {tuple(clean.shape)}.")
    if not bool(torch.isfinite(restored).all()):
        raise ValueError("Restored pictures have values that are not finite; check the weights.")
    found = {"psnr": psnr(restored, clean), "ssim": ssim(restored, clean)}
    return found if distance is None else {**found, "distance": distance(restored, clean).double().cpu()}


def summarise(scores: Mapping[str, torch.Tensor], seed: int = 0) -> dict[str, Estimate]:
    """Give the mean of each score with its 95 % interval, by drawing the pictures again.

    Args:
        scores: Name to values ``(N,)``, as `score` gives them.
        seed: Seeds the resamples.
    """
    return {
        name: bootstrap(lambda chosen, values=values: float(values[chosen].mean()), [len(values)], seed=seed)
        for name, values in scores.items()
    }
