"""A trained restoration model as a folder for the Hub: pipeline, its code, recipe, pictures and a card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from sfumato import storage
from sfumato.releasing.base import own_licence
from sfumato.releasing.contents import copy_pipeline
from sfumato.releasing.custom_code import ship_code
from sfumato.releasing.places import recipe_of_settings
from sfumato.releasing.publishing import publish, read_manifest, write_settings
from sfumato.restoration.card import SAMPLES_FILE, Published, make_card
from sfumato.restoration.validation import CURVES_FILE, ROWS_FILE, picture_of

__all__ = ["is_restorer", "release_restorer"]

METHODS = ("resshift", "rddm")
_NEEDED = {"settings": dict, "fingerprint": str, "title": str, "pipeline": str, "scale": int, "parameters": int}


def is_restorer(folder: str | Path) -> bool:
    """Whether a folder is what a restoration job left, or is to be refused as such."""
    manifest = Path(folder) / "manifest.json"
    return manifest.is_file() and storage.read_json(manifest).get("method") in METHODS


def release_restorer(
    result: str | Path, output: str | Path, *, license: str | None, code: bool = True, push: str | None = None,
    public: bool = False, api: Any = None,
) -> Path:  # fmt: skip
    """Make of a trained restoration model a folder for the Hub, with a card that shows what it does.

    Args:
        result: The output folder of ``training/resshift.py`` or ``training/rddm.py``.
        output: The release, a new or empty folder; with `push` also one that this call has made before.
        license: Of the weights.
        code: Whether the pipeline's code goes with it, so that it loads where sfumato is not installed.
        push: The Hub id to upload to.
        public: Whether all may see the upload.
        api: The `huggingface_hub.HfApi` to upload with; None makes one.

    Returns:
        The release.

    Raises:
        As `sfumato.release`.
    """
    folder, output = Path(result), Path(output)
    manifest, index, seen = _read(folder)
    licence, (_, brought) = own_licence(license), recipe_of_settings(manifest["settings"])
    name = push or output.resolve().name
    published = Published(name, licence, code, (folder / CURVES_FILE).is_file(), brought)

    def fill(release: Path, told: Mapping[str, str]) -> None:
        copy_pipeline(folder, index, release)
        if code:
            ship_code(release)
        write_settings(release, manifest, told)
        if published.curves:
            shutil.copyfile(folder / CURVES_FILE, release / CURVES_FILE)
        shutil.copyfile(storage.inside(folder, picture_of(seen["rows"][-1])), release / SAMPLES_FILE)
        storage.write_text(release / "README.md", make_card(manifest, seen, published))

    return publish(
        folder, output, fill, fingerprint=manifest["fingerprint"], asked=list(published), push=push, public=public,
        api=api,
    )  # fmt: skip


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Manifest, index and validation of a finished run, whose weights are its own."""
    manifest = read_manifest(folder, "a restoration job", _NEEDED)
    index, seen = storage.read_json(folder / "model_index.json"), storage.read_json(folder / ROWS_FILE)
    if not seen.get("rows") or "of" not in seen:
        raise ValueError(f"{folder / ROWS_FILE} has no row: the card has nothing to show. Train the model again.")
    if _fingerprint(folder, manifest) != manifest["fingerprint"]:
        raise ValueError(f"The weights in {folder} were changed after the run that its manifest tells of.")
    return manifest, index, seen


def _fingerprint(folder: Path, manifest: Mapping[str, Any]) -> str:
    """Of the weights that were trained, as the job takes it."""
    names = [name for name in ("unet", "noise_unet") if (folder / name).is_dir()]
    dtype = getattr(torch, manifest["settings"]["job"]["save_dtype"])
    found: dict[str, torch.Tensor] = {}
    for name in names:
        network = UNet2DModel.from_pretrained(folder / name, torch_dtype=dtype, use_safetensors=True)
        prefix = f"{name}." if len(names) > 1 else ""
        found |= {f"{prefix}{key}": value for key, value in network.named_parameters()}
    return storage.fingerprint(found.items())
