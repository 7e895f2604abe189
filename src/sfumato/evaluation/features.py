"""Features of pictures, in which distances between sets are measured, and how well a picture fits its prompt.

Published figures differ by the network more than by the metric, so a result names it. A network is named on the
command line as ``judge`` (the embedded models'), ``clip:MODEL``, ``dinov2:MODEL``, ``inception`` (that of FID), or
``MODULE:FUNCTION``, which takes pictures ``(N, 3, H, W)`` in [0, 1] and gives features ``(N, F)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.utils import pt_to_pil

from sfumato.evaluation.functions import function_named
from sfumato.evaluation.judge import Judge
from sfumato.loading import check_safe

__all__ = ["Extractor", "clip_scorer", "extract", "find_features"]

Extractor = Callable[[torch.Tensor], torch.Tensor]
"""Pictures ``(N, 3, H, W)`` in [0, 1] to features ``(N, F)``."""

CLIP = "openai/clip-vit-base-patch32"
DINO = "facebook/dinov2-base"


def find_features(name: str, judge: Judge | None = None, device: torch.device | str = "cpu") -> Extractor:
    """Make an extractor from what a command line calls it.

    Args:
        name: See the module.
        judge: The model's, if it has one.
        device: Where to run it.

    Returns:
        The extractor.

    Raises:
        ValueError: If there is no such extractor, or only a pickle of it.
        ImportError: If it is not installed.
        OSError: If its weights can't be had.
    """
    kind, _, rest = name.partition(":")
    if name == "judge":
        if judge is None:
            raise ValueError("This model has no judge; name other features: clip:MODEL, dinov2:MODEL or inception.")
        judge.to(device)
        return lambda pictures: judge.features(pictures.to(device))
    if kind in ("clip", "dinov2"):
        return _loaded(kind, rest or {"clip": CLIP, "dinov2": DINO}[kind], device)
    if name == "inception":
        return _inception(device)
    if not rest:
        raise ValueError(f"There are no features {name!r}: judge, clip:MODEL, dinov2:MODEL, inception or a function.")
    function: Extractor = function_named(name, "features")
    return function


@torch.no_grad()
def extract(extractor: Extractor, pictures: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
    """Extract the features of many pictures.

    Args:
        extractor: See `find_features`.
        pictures: ``(N, 3, H, W)`` in [0, 1].
        batch_size: Pictures at a time.

    Returns:
        Features ``(N, F)``, float32, on the CPU.

    Raises:
        ValueError: If the extractor does not give one row a picture.
    """
    found = torch.cat([torch.as_tensor(extractor(batch)).float().cpu() for batch in pictures.split(batch_size)])
    if found.ndim != 2 or len(found) != len(pictures):
        raise ValueError(f"Features must be (N, F), a row a picture: got {tuple(found.shape)} for {len(pictures)}.")
    return found


def clip_scorer(
    model: str, device: torch.device | str = "cpu", batch_size: int = 32
) -> Callable[[torch.Tensor, Sequence[str]], torch.Tensor]:
    """Make what scores how well pictures fit their prompts: 100 times the cosine of CLIP's embeddings, at least 0.

    Hessel et al., "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", EMNLP 2021, arXiv 2104.08718,
    without its factor of 2.5. A prompt beyond CLIP's limit is cut.

    Args:
        model: A CLIP of transformers: a folder, or a Hub id.
        device: Where to run it.
        batch_size: Pictures at a time.

    Returns:
        A function of pictures ``(N, 3, H, W)`` in [0, 1] and ``N`` prompts that gives scores ``(N,)`` in [0, 100].

    Raises:
        OSError: If the weights can't be had.
        ValueError: If there are only pickles of them.
    """
    from transformers import CLIPModel, CLIPProcessor

    check_safe(model)
    try:
        network = CLIPModel.from_pretrained(model, use_safetensors=True)
        processor = CLIPProcessor.from_pretrained(model)
    except OSError as error:
        raise OSError(
            f"The CLIP {model} can't be loaded; name a folder of weights, or no `clip`. ({error})"
        ) from error
    clip = network.eval().to(device)

    @torch.no_grad()
    def scores(pictures: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        parts = []
        for start in range(0, len(pictures), batch_size):
            images = pt_to_pil(2 * pictures[start : start + batch_size] - 1)
            texts = [prompt or " " for prompt in prompts[start : start + batch_size]]
            told: Any = processor(text=texts, images=images, return_tensors="pt", padding=True, truncation=True)
            seen = clip(**told.to(device))
            parts.append(torch.cosine_similarity(seen.image_embeds, seen.text_embeds).clamp(min=0).cpu())
        return 100 * torch.cat(parts)

    return scores


def _loaded(kind: str, model: str, device: torch.device | str) -> Extractor:
    """CLIP's embeddings of pictures, or DINOv2's class token (Oquab et al., arXiv 2304.07193)."""
    from transformers import AutoImageProcessor, AutoModel, CLIPModel

    check_safe(model)
    try:
        loader: Any = CLIPModel if kind == "clip" else AutoModel
        network = loader.from_pretrained(model, use_safetensors=True)
        processor = AutoImageProcessor.from_pretrained(model)
    except OSError as error:
        raise OSError(
            f"The features {kind}:{model} can't be loaded; name a folder of weights, or --features none. ({error})"
        ) from error
    network = network.eval().to(device)

    def features(pictures: torch.Tensor) -> torch.Tensor:
        pixels = processor(images=pt_to_pil(2 * pictures - 1), return_tensors="pt")["pixel_values"].to(device)
        if kind == "clip":
            return network.visual_projection(network.vision_model(pixels).pooler_output)
        return network(pixels).pooler_output

    return features


def _inception(device: torch.device | str) -> Extractor:
    """The network of FID, as torch-fidelity ports it, through torchmetrics."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        network: Any = FrechetInceptionDistance(2048).inception.to(device)
    except ImportError as error:
        raise ImportError("The features of FID need: pip install torchmetrics torch-fidelity.") from error
    return lambda pictures: network((255 * pictures).round().to(torch.uint8).to(device))
