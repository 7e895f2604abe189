"""What was trained beside a model, One More Step or a minority classifier, as a folder for the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import ModelCard

from sfumato import storage
from sfumato.guidance.card import CLASSIFIER, ONE_MORE_STEP, make_card
from sfumato.pipelines.minority_classifier import MinorityClassifier
from sfumato.releasing.base import check_licence
from sfumato.releasing.contents import check_files, copy_pipeline, is_same_release
from sfumato.releasing.custom_code import ship_code, ship_model_code
from sfumato.releasing.places import recipe_of_settings, without_places

__all__ = ["release_guidance"]

_CLASSIFIER_FILES = ("config.json", "diffusion_pytorch_model.safetensors")


def release_guidance(result: str | Path, output: str | Path, *, license: str, code: bool = True) -> Path:
    """Make of a finished run a folder for the Hub, with a card.

    Args:
        result: The output folder of ``training/one_more_step.py`` or ``training/minority_classifier.py``.
        output: The release, a new or empty folder.
        license: Of the weights.
        code: Whether the code of the pipeline or the classifier goes with it, so that it loads where sfumato is not
            installed.

    Returns:
        The release.

    Raises:
        FileNotFoundError: If the run has not finished.
        FileExistsError: If there is something in the output folder.
        ValueError: If the folder is of another job, damaged, holds a pickle or weights that are not the run's, or the
            licence is no identifier.
    """
    folder, output = Path(result), Path(output)
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"{folder} is not the result of a training: it has no manifest.json.")
    check_licence(license)
    check_files(folder)
    manifest = storage.read_json(folder / "manifest.json")
    if manifest.get("method") not in (ONE_MORE_STEP, CLASSIFIER) or "fingerprint" not in manifest:
        raise ValueError(f"{folder}/manifest.json is not one of {ONE_MORE_STEP} or {CLASSIFIER}.")
    if _fingerprint(folder, manifest) != manifest["fingerprint"]:
        raise ValueError(f"The weights in {folder} were changed after the run that its manifest tells of.")
    is_same_release(output, None)
    recipe, _ = recipe_of_settings(manifest["settings"])
    card = make_card(manifest, name=output.resolve().name, licence=license)
    stated = {
        **manifest, "settings": without_places(manifest["settings"]), "result_fingerprint": manifest["fingerprint"],
    }  # fmt: skip
    with storage.atomic_directory(output) as release:
        if manifest["method"] == CLASSIFIER:
            for name in _CLASSIFIER_FILES:
                shutil.copyfile(folder / name, release / name)
        else:
            copy_pipeline(folder, storage.read_json(folder / "model_index.json"), release)
        if code and manifest["method"] == CLASSIFIER:
            ship_model_code(MinorityClassifier, release)
        elif code:
            ship_code(release)
        storage.write_text(release / "recipe.yaml", recipe)
        storage.write_text(release / "manifest.json", json.dumps(stated, indent=1))
        storage.write_text(release / "README.md", card)
        ModelCard.load(release / "README.md")  # says what is wrong with it while nothing is in place
    return output


def _fingerprint(folder: Path, manifest: dict[str, Any]) -> str:
    """Of the weights that were trained, as the job takes it."""
    place, kind = (folder, MinorityClassifier) if manifest["method"] == CLASSIFIER else (
        folder / "unet", UNet2DConditionModel,
    )  # fmt: skip
    dtype = getattr(torch, manifest["settings"]["job"]["save_dtype"])
    network: Any = kind.from_pretrained(place, torch_dtype=dtype, use_safetensors=True)
    return storage.fingerprint(network.named_parameters())
