"""What of a finished run goes into a release: checked, then copied, nothing that could run but our own."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sfumato import concepts, delta, lora, storage
from sfumato.families.stable_diffusion import TextEncoders
from sfumato.loading import PICKLES
from sfumato.unlearning.methods import METHODS
from sfumato.unlearning.result import FORMATS

__all__ = [
    "Finished",
    "check_files",
    "check_weights",
    "choose_formats",
    "copy_base",
    "copy_format",
    "copy_pipeline",
    "read_finished",
]

_DATA = frozenset({".jinja", ".json", ".model", ".safetensors", ".txt"})
_ORIGINS = ("_name_or_path", "name_or_path")
_DTYPES = ("float32", "bfloat16", "float16")
_NEEDED = {"method": str, "forget": str, "concept": dict, "settings": dict, "result_fingerprint": str, "saved": dict}


@dataclass(frozen=True)
class Finished:
    """The output folder of a finished run.

    Attributes:
        folder: Where it is.
        manifest: What was done.
        index: The ``model_index.json`` of the pipeline; empty if it was not saved.
    """

    folder: Path
    manifest: Mapping[str, Any]
    index: Mapping[str, Any]

    @property
    def changed(self) -> list[str]:
        """The components that the run changed."""
        saved = self.manifest["saved"]
        if "part" in saved:
            return list(saved["part"]["components"])
        if saved.get("delta"):
            return list(saved["delta"]["changed_weights"])
        names = ("unet", "transformer")
        if self.manifest["settings"].get("train") == "text_encoder":
            names = ("text_encoder", "text_encoder_2")
        return [name for name in names if (self.folder / name).is_dir()]

    def component(self, name: str) -> Path:
        """The folder of a component, by its name in a file."""
        if not name.isidentifier():
            raise ValueError(f"{self.folder} names a component {name!r}, which can't be one; it was tampered with.")
        return storage.inside(self.folder, name)

    def class_of(self, name: str) -> tuple[str, str]:
        """The library, diffusers or transformers, and the name of a component's class.

        Raises:
            ValueError: If its config names none that the library has.
        """
        file = self.component(name) / "config.json"
        config = storage.read_json(file)
        library = "diffusers" if "_class_name" in config else "transformers"
        named = str(config.get("_class_name") or next(iter(config.get("architectures") or [""])))
        if not named.isidentifier() or not hasattr(importlib.import_module(library), named):
            raise ValueError(f"{file} names the class {named!r}, which {library} does not have.")
        return library, named


def read_finished(folder: str | Path) -> Finished:
    """Read the output folder of a run and refuse what must not be passed on.

    Args:
        folder: The folder.

    Returns:
        What it holds.

    Raises:
        FileNotFoundError: If it is none, or the run has not finished.
        ValueError: If it holds a pickle, a link that leads out of it, or a damaged file.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(
            f"{folder} is not the finished result of `sfumato unlearn` or of a training: it has no manifest.json."
        )
    check_files(folder)
    manifest = storage.read_json(folder / "manifest.json")
    wrong = [name for name, kind in _NEEDED.items() if not isinstance(manifest.get(name), kind)]
    wrong += ["method"] if manifest.get("method") not in METHODS else []
    wrong += ["dtype"] if str(manifest.get("dtype", "float32")).removeprefix("torch.") not in _DTYPES else []
    if wrong:
        raise ValueError(f"{folder}/manifest.json is not one of an unlearning run: {wrong[0]!r} is missing or wrong.")
    index = folder / "model_index.json"
    return Finished(folder, manifest, storage.read_json(index) if "full" in manifest["saved"] else {})


def check_files(folder: Path) -> None:
    """Refuse a folder that holds what must not be passed on.

    Raises:
        ValueError: If it holds a pickle, a link that leads out of it, or a damaged file.
    """
    for path in sorted(folder.rglob("*")):
        _check_file(folder, path)


def _check_file(folder: Path, path: Path) -> None:
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{path} is a link that leads out of {folder}; put the file itself there, or remove the link."
        )
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"{path} may run code when it is loaded (a pickle); remove it: a release holds safetensors only."
        )
    if path.suffix == ".safetensors":
        storage.read_metadata(path)  # says what is wrong with it


def choose_formats(finished: Finished, asked: Sequence[str] | None) -> list[str]:
    """Say which formats are released.

    Args:
        finished: The run.
        asked: What the user wants; None takes all that the run saved.

    Returns:
        Their names.

    Raises:
        ValueError: If one is unknown, was not saved, or is empty because the run changed nothing.
        FileNotFoundError: If files of one are gone.
    """
    saved = finished.manifest["saved"]
    there = [name for name in FORMATS if name in saved and saved[name] is not None]
    chosen = there if asked is None else list(dict.fromkeys(asked))
    wrong = [name for name in chosen if name not in there]
    if wrong or not chosen:
        raise ValueError(
            f"`formats` takes what the run saved ({', '.join(there) or 'nothing'}), got "
            f"{repr(wrong[0]) if wrong else 'nothing'}."
        )
    for name in chosen:
        for path in _needed(finished, name):
            if not path.exists():
                raise FileNotFoundError(f"{path} is gone, though the manifest says that {name} was saved.")
    return chosen


def _needed(finished: Finished, name: str) -> list[Path]:
    folder = finished.folder
    if name == "full":
        return [folder / "model_index.json", *(finished.component(part) for part in _components(finished.index))]
    if name == "part":
        return [finished.component(part) for part in finished.changed]
    return [folder / "delta" / "delta.safetensors" if name == "delta" else folder / "lora" / lora.DIFFUSERS_FILE]


def _components(index: Mapping[str, Any]) -> list[str]:
    """The components of a whole pipeline that have a folder."""
    entries = {name: entry for name, entry in index.items() if not name.startswith("_")}
    return [
        name for name, entry in entries.items() if isinstance(entry, list) and len(entry) == 2 and None not in entry
    ]


def check_weights(finished: Finished, formats: Sequence[str]) -> None:
    """Refuse weights other than those that the manifest, and so the card, speaks of.

    A LoRA alone can't be checked: it is an approximation.

    Args:
        finished: The run.
        formats: What is to be released.

    Raises:
        ValueError: If the weights are another's.
    """
    wanted = finished.manifest["result_fingerprint"]
    if {"full", "part"} & set(formats):
        modules = [_load(finished, name) for name in finished.changed]
        whole = TextEncoders(*modules) if len(modules) == 2 else (modules or [torch.nn.Module()])[0]
        if modules and storage.fingerprint(whole.named_parameters()) != wanted:
            raise ValueError(
                f"The weights in {finished.folder} are not those of its manifest (fingerprint {wanted}): they were "
                "changed after the run. Run it again."
            )
    if "delta" in formats:
        stated = delta.read_metadata(finished.folder / "delta" / "delta.safetensors")["components"]
        if len(stated) == 1 and next(iter(stated.values()))["result"] != wanted:
            raise ValueError(f"The delta in {finished.folder} is of another run than its manifest. Run it again.")


def _load(finished: Finished, name: str) -> torch.nn.Module:
    library, named = finished.class_of(name)
    dtype = getattr(torch, str(finished.manifest.get("dtype", "float32")).removeprefix("torch."))
    loader = getattr(importlib.import_module(library), named)
    module: torch.nn.Module = loader.from_pretrained(finished.component(name), torch_dtype=dtype, use_safetensors=True)
    return module


def copy_format(finished: Finished, name: str, target: Path) -> None:
    """Copy one format.

    Args:
        finished: The run.
        name: The format.
        target: The release.
    """
    if name == "full":
        copy_pipeline(finished.folder, finished.index, target)
    elif name == "part":
        for part in finished.changed:
            _copy_data(finished.component(part), target / part)
    else:
        _copy_data(finished.folder / name, target / name)
        if name == "delta":  # ours, whatever lies in the folder: it is code
            shutil.copyfile(delta.__file__, target / name / "delta.py")


def copy_base(source: Path, target: Path) -> None:
    """Copy an embedded model, with the card that states its licence.

    Args:
        source: Its folder in this package.
        target: Its folder in the release, which is made.
    """
    target.mkdir()
    copy_pipeline(source, storage.read_json(source / "model_index.json"), target)
    shutil.copyfile(source / "README.md", target / "README.md")


def copy_pipeline(source: Path, index: Mapping[str, Any], target: Path) -> None:
    """Copy the parts of a saved pipeline, without code and without paths on this machine.

    Args:
        source: Its folder.
        index: Its ``model_index.json``.
        target: An empty folder.
    """
    for part in _components(index):
        _copy_data(storage.inside(source, part), target / part)
    told = {key: value for key, value in index.items() if key not in _ORIGINS}
    storage.write_text(target / "model_index.json", json.dumps(told, indent=2))
    words = source / concepts.VOCABULARY_FILE
    if words.is_file():
        shutil.copyfile(words, target / words.name)


def _copy_data(source: Path, target: Path) -> None:
    """Copy a component's weights and settings, without the paths on this machine that the settings remember."""
    target.mkdir(exist_ok=True)
    for file in sorted(source.iterdir()):
        if not file.is_file() or file.suffix not in _DATA:
            continue
        shutil.copyfile(file, target / file.name)
        content = json.loads(file.read_text(encoding="utf-8")) if file.suffix == ".json" else None
        if isinstance(content, dict) and set(_ORIGINS) & set(content):
            kept = {key: value for key, value in content.items() if key not in _ORIGINS}
            storage.write_text(target / file.name, json.dumps(kept, indent=2))
