"""What every release has in common: it is made whole or not at all, and its upload goes on where it broke off."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from sfumato import storage
from sfumato.releasing import hub
from sfumato.releasing.contents import check_files
from sfumato.releasing.places import recipe_of_settings, without_places

__all__ = ["publish", "read_manifest", "write_settings"]


def read_manifest(folder: Path, job: str, needed: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """Read what a training job says of its result, and refuse what must not be passed on.

    Args:
        folder: The job's output folder.
        job: What the job is called, for messages.
        needed: The entries that are read later, and their types.

    Raises:
        FileNotFoundError: If there is no result.
        ValueError: If the folder holds a pickle, a link that leads out of it or a damaged file, or the manifest lacks
            something.
    """
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"{folder} is not the result of a training: it has no manifest.json.")
    check_files(folder)
    manifest = storage.read_json(folder / "manifest.json")
    wrong = [name for name, kinds in needed.items() if not isinstance(manifest.get(name), kinds)]
    if wrong:
        raise ValueError(f"{folder}/manifest.json is not one of {job}: {wrong[0]!r} is missing or wrong.")
    return manifest


def write_settings(folder: Path, manifest: Mapping[str, Any], told: Mapping[str, str]) -> None:
    """Write ``recipe.yaml`` and ``manifest.json`` of a training job, without the places of whoever trained it.

    Args:
        folder: Of the release.
        manifest: The job's own.
        told: What the release's says beside.
    """
    recipe, _ = recipe_of_settings(manifest["settings"])
    storage.write_text(folder / "recipe.yaml", recipe)
    stated = {**manifest, "settings": without_places(manifest["settings"]), **told}
    storage.write_text(folder / "manifest.json", json.dumps(stated, indent=1))


def publish(
    result: str | Path, output: Path, fill: Callable[[Path, Mapping[str, str]], None], *, fingerprint: str, asked: Any,
    push: str | None, public: bool, api: Any,
) -> Path:  # fmt: skip
    """Make a release of a finished run, unless it is made already and only its upload is to go on; and upload it.

    Args:
        result: The run's output folder.
        output: The release, a new or empty folder; with `push` also one that the same call has made before.
        fill: Writes the files of the release into a folder. It is also given what ``manifest.json`` there has to say
            beside: which run, and which release of it.
        fingerprint: Of the weights, as the run's manifest states it.
        asked: What tells this release from others of the same run, as JSON can hold it.
        push: The Hub id to upload to; None uploads nothing.
        public: Whether all may see the upload.
        api: The `huggingface_hub.HfApi` to upload with; None makes one.

    Returns:
        The release.

    Raises:
        FileExistsError: If `output` holds something else, or the repository does.
        ValueError: If `push` is no Hub id.
        ConnectionError: If the Hub can't be reached.
        PermissionError: If the user is not logged in, or may not write there.
    """
    run = hashlib.sha256((Path(result) / "manifest.json").read_bytes()).hexdigest()  # also how long it took, and where
    request = hashlib.sha256(json.dumps([run, asked], sort_keys=True).encode()).hexdigest()
    told = {"result_fingerprint": fingerprint, "run": run[:16]}
    done = _is_same(output, request if push is not None else None)
    standing = None if push is None else hub.check_push(push, told, public=public, api=api)
    if not done:
        with storage.atomic_directory(output) as folder:
            fill(folder, {**told, "release": request})
            ModelCard.load(folder / "README.md")  # says what is wrong with it while nothing is in place
    if push is not None and standing is not None:
        hub.push(output, push, standing=standing, public=public, api=api)
    return output


def _is_same(output: Path, request: str | None) -> bool:
    """Say whether a folder holds a release that was made by the same request already; None takes none for the same."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise FileExistsError(f"{output} is a file or a link. Choose a new or empty output folder.")
    if not output.exists() or not any(output.iterdir()):
        return False
    stated = output / "manifest.json"
    if request is not None and stated.is_file() and storage.read_json(stated).get("release") == request:
        return True
    raise FileExistsError(f"{output} already holds something. Choose a new or empty output folder.")
