"""What was trained beside a model, One More Step or a minority classifier, as a folder for the Hub."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from sfumato import storage
from sfumato.guidance.card import CLASSIFIER, ONE_MORE_STEP, Published, make_card
from sfumato.pipelines.minority_classifier import MinorityClassifier
from sfumato.releasing.base import own_licence
from sfumato.releasing.contents import copy_pipeline
from sfumato.releasing.custom_code import ship_code, ship_model_code
from sfumato.releasing.places import recipe_of_settings
from sfumato.releasing.publishing import publish, read_manifest, write_settings

__all__ = ["is_guidance", "release_guidance"]

METHODS = (ONE_MORE_STEP, CLASSIFIER)
_NEEDED: dict[str, type | tuple[type, ...]] = {
    "settings": dict, "fingerprint": str, "parameters": int, "pictures": dict, "measured": dict,
    "beside": (str, type(None)),
}  # fmt: skip
_CLASSIFIER_FILES = ("config.json", "diffusion_pytorch_model.safetensors")


def is_guidance(folder: str | Path) -> bool:
    """Whether a folder is what one of these trainings left, or is to be refused as such."""
    manifest = Path(folder) / "manifest.json"
    return manifest.is_file() and storage.read_json(manifest).get("method") in METHODS


def release_guidance(
    result: str | Path, output: str | Path, *, license: str | None, code: bool = True, push: str | None = None,
    public: bool = False, api: Any = None,
) -> Path:  # fmt: skip
    """Make of a finished run a folder for the Hub, with a card.

    Args:
        result: The output folder of ``training/one_more_step.py`` or ``training/minority_classifier.py``.
        output: The release, a new or empty folder; with `push` also one that this call has made before.
        license: Of the weights.
        code: Whether the code of the pipeline or the classifier goes with it, so that it loads where sfumato is not
            installed.
        push: The Hub id to upload to.
        public: Whether all may see the upload.
        api: The `huggingface_hub.HfApi` to upload with; None makes one.

    Returns:
        The release.

    Raises:
        As `sfumato.release`.
    """
    folder, output = Path(result), Path(output)
    licence, manifest = own_licence(license), _read(folder)
    _, brought = recipe_of_settings(manifest["settings"])
    published = Published(push or output.resolve().name, licence, code, brought)

    def fill(release: Path, told: Mapping[str, str]) -> None:
        _copy(folder, manifest["method"], release, code=code)
        write_settings(release, manifest, told)
        storage.write_text(release / "README.md", make_card(manifest, published))

    return publish(
        folder, output, fill, fingerprint=manifest["fingerprint"], asked=list(published), push=push, public=public,
        api=api,
    )  # fmt: skip


def _read(folder: Path) -> dict[str, Any]:
    """The manifest of a finished run, whose weights are its own."""
    manifest = read_manifest(folder, f"{ONE_MORE_STEP} or {CLASSIFIER}", _NEEDED)
    if manifest.get("method") not in METHODS:
        raise ValueError(f"{folder}/manifest.json is not one of {ONE_MORE_STEP} or {CLASSIFIER}.")
    if _fingerprint(folder, manifest) != manifest["fingerprint"]:
        raise ValueError(f"The weights in {folder} were changed after the run that its manifest tells of.")
    return manifest


def _copy(folder: Path, method: str, release: Path, *, code: bool) -> None:
    """Copy the network, and the code that it needs."""
    if method == ONE_MORE_STEP:
        copy_pipeline(folder, storage.read_json(folder / "model_index.json"), release)
        if code:
            ship_code(release)
        return
    for name in _CLASSIFIER_FILES:
        shutil.copyfile(folder / name, release / name)
    if code:
        ship_model_code(MinorityClassifier, release)


def _fingerprint(folder: Path, manifest: Mapping[str, Any]) -> str:
    """Of the weights that were trained, as the job takes it."""
    place, kind = (folder, MinorityClassifier) if manifest["method"] == CLASSIFIER else (
        folder / "unet", UNet2DConditionModel,
    )  # fmt: skip
    dtype = getattr(torch, manifest["settings"]["job"]["save_dtype"])
    network: Any = kind.from_pretrained(place, torch_dtype=dtype, use_safetensors=True)
    return storage.fingerprint(network.named_parameters())
