"""Loading models: the embedded ones by name, local folders, the Hub; damaged folders are refused with the file's name.

Weights are read from safetensors alone: the older files are pickles, which can run code. diffusers and transformers
answer weights that do not fit with random ones and a warning, and a damaged file with a message that does not name it;
a folder is therefore looked through before and after they read it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from diffusers import DiffusionPipeline, ModelMixin

import sfumato
from sfumato import delta, storage

if TYPE_CHECKING:
    from sfumato.pipelines.minority_classifier import MinorityClassifier

__all__ = [
    "EMBEDDED", "PICKLES", "assets_folder", "check_part", "check_safe", "folder_of", "load", "load_result",
    "manifest_of",
]  # fmt: skip

EMBEDDED = (
    "atelier", "atelier-pixel", "atelier-sr", "atelier-inpaint", "atelier-one-more-step", "atelier-minority",
    "atelier-pixel-minority",
)  # fmt: skip
PICKLES = frozenset({".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"})
"""How the names of files end that can run code when they are read."""

_INTERRUPTED = {
    "ChunkedEncodingError", "IncompleteRead", "IncompleteSnapshotError", "ProtocolError", "ReadError", "ReadTimeout",
    "ReadTimeoutError", "RemoteProtocolError",
}  # fmt: skip

_INTERRUPTED_WORDS = re.compile("Consistency check failed|File reconstruction error|CAS Client Error")
"""What huggingface_hub says of a file that came short, and its Xet client, which raises plain RuntimeErrors."""

_NEEDED_KEYS = {"model_index.json": "_class_name", "tokenizer.json": "model"}
_CONVERT = (
    "Only safetensors are loaded, since a pickle can run code; if you trust its maker, load the model by "
    "from_pretrained(..., use_safetensors=False), save it by save_pretrained(FOLDER), and name that folder."
)
_HISTORY = "history.json"  # what a training writes beside a network: a list, which no loader reads
_OURS = ("OneMoreStepPipeline", "RDDMPipeline", "ResShiftPipeline")
"""Pipelines of ours that are trained by scripts of ours, and released with their code."""
_WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(-\d{5}-of-\d{5})?\.safetensors")


def assets_folder() -> Path:
    """Give the folder of the models and pictures that ship with the package."""
    return Path(__file__).parent / "assets"


def folder_of(name: str) -> Path:
    """Give the folder of a model that is on this machine, if it is: an embedded one's, or what the name is a path of.

    Args:
        name: An embedded model's name, or a path; it need not exist.
    """
    return assets_folder() / name if name in EMBEDDED else Path(name)


@overload
def load(
    pretrained_model_name_or_path: Literal["atelier-minority", "atelier-pixel-minority"], **kwargs: Any
) -> MinorityClassifier: ...


@overload
def load(pretrained_model_name_or_path: str | Path = "atelier", **kwargs: Any) -> DiffusionPipeline: ...


def load(pretrained_model_name_or_path: str | Path = "atelier", **kwargs: Any) -> Any:
    """Load a pipeline: an embedded model by name, a local folder, or a Hub id.

    Args:
        pretrained_model_name_or_path: ``"atelier"`` (text to picture, 32x32), ``"atelier-pixel"`` (class-conditional
            pixel DDPM, 16x16), ``"atelier-sr"`` and ``"atelier-inpaint"`` (ResShift in four steps, from 8x8 to 32x32
            and for holes in 32x32), ``"atelier-one-more-step"`` (with ``base=pipe``, a step for ``"atelier"``),
            ``"atelier-minority"`` and ``"atelier-pixel-minority"`` (classifiers for minority guidance), a folder
            written by ``save_pretrained`` of diffusers' pipelines or ours, or an id on the Hugging Face Hub.
        **kwargs: Passed on to ``DiffusionPipeline.from_pretrained``; ``dtype`` is float32 unless given, and
            ``use_safetensors`` is True always.

    Returns:
        The pipeline, on the CPU; of the classifiers a `MinorityClassifier`.

    Raises:
        FileNotFoundError: If it looks like a local folder and is none, or the Hub does not have it.
        ConnectionError: If a download was interrupted.
        ValueError: If a file in the folder is damaged, the weights of a part are those of another, or there are only
            pickles of them.
    """
    name = str(pretrained_model_name_or_path)
    if not name.strip():
        raise ValueError("The model's name is empty: give 'atelier', a local folder or a Hub id.")
    folder = folder_of(name)
    kwargs = {"dtype": torch.float32, **kwargs, "use_safetensors": True}
    if name in EMBEDDED or folder.is_dir():
        return _load_folder(folder, kwargs)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"There is no model folder {name}.")
    try:
        return DiffusionPipeline.from_pretrained(name, **kwargs)
    except Exception as error:
        if _is_interrupted(error):
            raise ConnectionError(
                f"The download of {name!r} was interrupted ({type(error).__name__}: {error}); run the same again, it "
                "goes on where it stopped."
            ) from error
        if not isinstance(error, OSError):
            raise
        if "safetensors" in str(error):
            raise ValueError(f"{name!r} has no safetensors for some part. {_CONVERT} ({error})") from error
        close = difflib.get_close_matches(name, EMBEDDED, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise FileNotFoundError(
            f"{name!r} is neither an embedded model ({', '.join(EMBEDDED)}), nor a folder here, nor could it be had "
            f"from the Hub. {hint}({error})"
        ) from error


def load_result(folder: str | Path, original: str | Path | None = None, **kwargs: Any) -> DiffusionPipeline:
    """Load what an unlearning job left, in any of the formats it saves; see `sfumato.unlearning.result`.

    Args:
        folder: The job's output folder; or, as for `load`, any model.
        original: The model that was unlearned, which a part, a delta or a LoRA is put on; None takes the one that the
            folder's manifest names.
        **kwargs: As for `load`.

    Returns:
        The unlearned model, on the CPU; of several formats the whole pipeline, else the delta, the part, the LoRA.

    Raises:
        FileNotFoundError: As `load` does.
        ValueError: As `load` does, or if the folder is no result, its manifest is damaged, or its original is not
            known or is another.
    """
    folder = Path(folder)
    if (folder / "model_index.json").exists() or not (folder / "manifest.json").is_file():
        return load(folder if folder.is_dir() else str(folder), **kwargs)
    manifest = storage.read_json(folder / "manifest.json")
    saved, parts = _saved(folder, manifest)
    origin = original or manifest.get("model")
    if origin is None:
        raise ValueError(f"{folder} holds what changed of a model, but not of which: name the original.")
    pipe = load(origin, **kwargs)
    if saved.get("delta"):
        delta.apply_delta(pipe, folder / "delta" / "delta.safetensors")
    elif "part" in saved:
        _check_original(pipe, manifest, folder)
        pipe.register_modules(**{name: _like(pipe, name, folder) for name in parts})
    elif saved.get("lora"):
        _check_original(pipe, manifest, folder)
        _load_lora(pipe, folder / "lora")
    elif not {"delta", "lora"} & set(saved):  # one of None says that nothing had changed
        raise ValueError(f"{folder} is no result of unlearning: its manifest names no format that was saved.")
    return pipe


def manifest_of(model: str | Path) -> dict[str, Any]:
    """Read what an unlearning job, or a release of its result, says of itself.

    Args:
        model: What `load_result` takes.

    Returns:
        The content of its ``manifest.json``; empty if it is no such folder.

    Raises:
        ValueError: If the manifest is damaged.
    """
    path = Path(model) / "manifest.json"
    return storage.read_json(path) if path.is_file() else {}


def check_safe(folder: str | Path) -> None:
    """Refuse a local folder whose only weights are pickles; what is no folder is left to who loads it.

    Args:
        folder: Of one network.

    Raises:
        ValueError: If there is a pickle, and no safetensors.
    """
    files = sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []
    pickles = [file for file in files if file.suffix.lower() in PICKLES]
    if pickles and not any(file.suffix == ".safetensors" for file in files):
        raise ValueError(f"{pickles[0]} is a pickle, without safetensors beside it. {_CONVERT}")


def _saved(folder: Path, manifest: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """What a manifest says was saved, and of a part its components, before anything is believed of it."""
    saved = manifest.get("saved", {})
    part = saved.get("part", {"components": []}) if isinstance(saved, Mapping) else None
    names = part.get("components") if isinstance(part, Mapping) else None
    known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not known or not isinstance(manifest.get("model"), str | None):
        raise ValueError(
            f"{folder / 'manifest.json'} is damaged: `model` must be a name, and `saved` say what was saved; run the "
            "unlearning again, or fetch it again."
        )
    return saved, list(names or ())


def _check_original(pipe: DiffusionPipeline, manifest: Mapping[str, Any], folder: Path) -> None:
    """Refuse an original that is not the one which was unlearned, as far as its weights, in that dtype, tell."""
    for name, facts in manifest.get("originals", {}).items():
        part = pipe.components.get(name)
        if isinstance(part, torch.nn.Module) and str(part.dtype) != facts["dtype"]:
            continue
        if part is None or storage.fingerprint(part.named_parameters()) != facts["fingerprint"]:
            raise ValueError(
                f"{folder} is a change of another model's {name}: it was made from {manifest.get('model')}, and this "
                "original's weights are different. Name the original that was unlearned."
            )


def _like(pipe: Any, name: str, result: Path) -> Any:
    """Load a component of the class and dtype that the original's has."""
    part, folder = pipe.components.get(name), storage.inside(result, name)
    if not isinstance(part, torch.nn.Module):
        raise ValueError(f"{result / 'manifest.json'} names {name!r}, which is no network of {type(pipe).__name__}.")
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing: the result is incomplete.")
    check_part(folder)
    kind: Any = type(part)
    loaded = kind.from_pretrained(folder, use_safetensors=True).to(part.dtype)
    _check_weights(folder, loaded, None)
    return loaded.eval()


def _load_lora(pipe: Any, folder: Path) -> None:
    """Put a LoRA on a pipeline's weights."""
    try:
        pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True)
    except ValueError as error:
        if "PEFT" not in str(error):
            raise
        raise ImportError("Loading a LoRA needs peft: run pip install 'sfumato[train]'.") from error
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def _is_interrupted(error: BaseException | None) -> bool:
    """Whether a download broke off, by the names and words that the libraries which may carry it have for that."""
    while error is not None:
        if type(error).__name__ in _INTERRUPTED or isinstance(error, ConnectionResetError | ConnectionAbortedError):
            return True
        if _INTERRUPTED_WORDS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _load_folder(folder: Path, kwargs: Mapping[str, Any]) -> Any:
    if not (folder / "model_index.json").exists() and (folder / "config.json").is_file():
        return _load_network(folder, kwargs)
    _check_files(folder, given=kwargs)
    pipe = _built(_pipeline_class(folder), folder, kwargs)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and name not in kwargs:
            _check_weights(folder / name, part, kwargs.get("variant"))
    return pipe


def _built(kind: Any, folder: Path, kwargs: Mapping[str, Any]) -> Any:
    """Call ``from_pretrained`` of a class; what it raises names the folder."""
    try:
        return kind.from_pretrained(folder, **kwargs)
    except (OSError, ImportError):
        raise
    except Exception as error:  # parts that do not fit together make transformers and tokenizers raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"The model in {folder} can't be loaded ({reason}); mend it or fetch it again.") from error


def _load_network(folder: Path, kwargs: Mapping[str, Any]) -> Any:
    """A network of ours that is no part of a pipeline."""
    named = storage.read_json(folder / "config.json").get("_class_name")
    if named != "MinorityClassifier":
        raise FileNotFoundError(f"{folder} is not a diffusers pipeline: it has no model_index.json.")
    if set(kwargs) > {"dtype", "use_safetensors"}:
        unknown = sorted(set(kwargs) - {"dtype", "use_safetensors"})
        raise ValueError(f"A classifier is loaded with `dtype` alone, not with `{unknown[0]}`.")
    check_part(folder)
    network = _built(
        sfumato.MinorityClassifier, folder, {"torch_dtype": kwargs["dtype"], "use_safetensors": True}
    )  # fmt: skip
    _check_weights(folder, network, None)
    return network.eval()


def _pipeline_class(folder: Path) -> Any:
    """One of our pipelines if the folder is of one: diffusers finds its own alone."""
    named = storage.read_json(folder / "model_index.json")["_class_name"]
    if isinstance(named, list):  # ships its code: these are read without running that
        named = named[-1] if named and named[-1] in _OURS else None
    ours = isinstance(named, str) and named.endswith("Pipeline") and named in sfumato.__all__
    return getattr(sfumato, str(named)) if ours else DiffusionPipeline


def _check_files(folder: Path, given: Container[str]) -> None:
    """Name a damaged file before anything is built: the libraries below report it without its name, or late.

    Of the parts that the caller has given the weights are not read.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{folder} is not a diffusers pipeline: it has no model_index.json.")
    named = storage.read_json(index)
    needed = _NEEDED_KEYS[index.name]
    if needed not in named:
        raise ValueError(f"{index} is damaged: it has no {needed!r}; fetch the model again.")
    for part in [part for name in named if (part := storage.inside(folder, name)).is_dir()]:
        check_part(part, weights=part.name not in given and named[part.name] != [None, None])


def check_part(folder: Path, *, weights: bool = True) -> None:
    """Name a damaged file of a component, or a pickle in the place of its weights.

    Args:
        folder: Of the component.
        weights: Whether its weights will be read.

    Raises:
        ValueError: If there is one.
    """
    if weights:
        check_safe(folder)
    for file in sorted(set(folder.glob("*.json")) - {folder / _HISTORY}):
        content, needed = storage.read_json(file), _NEEDED_KEYS.get(file.name)
        if needed not in (None, *content):
            raise ValueError(f"{file} is damaged: it has no {needed!r}; fetch the model again.")
        if file.name.endswith(".safetensors.index.json"):  # the loaders join the names of its shards
            shards = content.get("weight_map")
            for shard in set(shards.values()) if isinstance(shards, Mapping) else ():
                storage.inside(folder, str(shard))
    for file in sorted(folder.glob("*.safetensors")):
        storage.read_metadata(file)


def _check_weights(folder: Path, module: torch.nn.Module, variant: str | None) -> None:
    """Refuse the weights of another module, which the loaders answer with random ones and a mere warning."""
    files = _weight_files(folder, variant)
    stored = {name for file in files for name in storage.tensor_names(file)}
    own = [name for name, _ in module.named_parameters()]
    if isinstance(module, ModelMixin):
        missing = [name for name in own if name not in stored and _old_name(name) not in stored]
    else:  # transformers ties and renames weights on loading, so only names that have nothing in common tell
        common = any(f".{a}".endswith(f".{b}") or f".{b}".endswith(f".{a}") for a in own for b in stored)
        missing = [] if common else own
    if files and missing:
        raise ValueError(
            f"{files[0]} lacks {len(missing)} of the {len(own)} weights of {type(module).__name__} ({missing[0]}, "
            "...): it is incomplete or belongs to another part; fetch the model again."
        )


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Find the file, or the shards, that a part is read from; those of the variant if it has any."""
    names = {file: file.name for file in sorted(folder.glob("*.safetensors"))}
    special = {file: name.replace(f".{variant}", "", 1) for file, name in names.items() if f".{variant}" in name}
    found = ([file for file in choice if _WEIGHTS.fullmatch(choice[file])] for choice in (special, names))
    return next(filter(None, found), [])


def _old_name(name: str) -> str:
    """Give the name that a weight of an attention block had before diffusers 0.12; its loader still reads it."""
    for new, old in ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")):
        name = name.replace(new, old)
    return name
