"""Files that are either whole or absent: atomic safetensors and JSON, fingerprints, and checks before long work.

Everything the library writes goes through here, so a job that is killed, or a disk that fills up, never leaves a file
that looks finished but is not. Tensors are stored as safetensors only; nothing is ever pickled.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sfumato.delta import fingerprint

__all__ = [
    "atomic_directory",
    "check_disk_space",
    "check_output_dir",
    "claimed",
    "fingerprint",
    "inside",
    "put_in_place",
    "load_tensors",
    "load_tensors_of",
    "locked",
    "read_json",
    "read_metadata",
    "save_tensors",
    "tensor_names",
    "write_bytes",
    "write_text",
]

LOCK_FILE = ".running"
JOB_FILES = frozenset({"checkpoints", "examples", "logs", "result", "saliency_mask.safetensors"})
"""What an unfinished job leaves in its output folder."""


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Fill a directory that appears under its name only when the block ends without an error.

    Args:
        path: The final directory; replaced if it exists. A symbolic link stays, and its target is replaced.

    Yields:
        A hidden sibling to write into, on the same file system.

    Raises:
        OSError: If `path` is a mount point, which can't be replaced.
    """
    path = Path(path).resolve()
    if path.is_mount():
        raise OSError(f"{path} is a mount point, which can't be replaced; choose a folder inside it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors makes private files; a model folder is to be read by others
                _sync(file)
        if path.exists():
            retired = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.retired")
            path.rename(retired)
            partial.rename(path)
            shutil.rmtree(retired)
        else:
            partial.rename(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def put_in_place(result: Path, last: str) -> None:
    """Move what a finished result's folder holds up beside it, and remove the folder.

    Args:
        result: The folder; files and folders of the same names beside it are replaced.
        last: The file that says that all is there: a kill before it was moved leaves a run that can be resumed.
    """
    for entry in sorted(result.iterdir(), key=lambda path: path.name == last):
        target = result.with_name(entry.name)
        if target.is_dir():
            shutil.rmtree(target)
        entry.replace(target)
    result.rmdir()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _atomic_file(path: str | Path) -> Iterator[Path]:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file atomically, as UTF-8, making its folder if need be.

    Args:
        path: Where to write; replaced if it exists.
        text: The content.

    Returns:
        The path.
    """
    return write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file atomically, making its folder if need be.

    Args:
        path: Where to write; replaced if it exists.
        content: What.

    Returns:
        The path.
    """
    with _atomic_file(path) as partial:
        partial.write_bytes(content)
    return Path(path)


def save_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write tensors as one safetensors file, atomically.

    Args:
        path: Where to write; replaced if it exists.
        tensors: Name to tensor, on any device.
        metadata: Values that JSON can hold; read back by `read_metadata`.

    Returns:
        The path.
    """
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with _atomic_file(path) as partial:
        save_file(flat, partial, metadata={key: json.dumps(value) for key, value in (metadata or {}).items()})
        partial.chmod(0o644)  # safetensors makes private files; a model folder is to be read by others
    return Path(path)


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file onto the CPU.

    Args:
        path: The file.

    Returns:
        Name to tensor.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is corrupt or cut short.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is not a dict)


def load_tensors_of(path: str | Path | None, key: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
    """Read what an earlier start of a run stored with the metadata ``{"key": key}``.

    Args:
        path: The file; None is none.
        key: What the tensors were made from, as JSON can hold it.

    Returns:
        Name to tensor, or None if the file is absent, damaged, or made from something else.
    """
    try:
        return load_tensors(path) if path is not None and read_metadata(path).get("key") == key else None
    except (FileNotFoundError, ValueError):
        return None


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read what `save_tensors` stored beside the tensors.

    Args:
        path: The file.

    Returns:
        The metadata; values that are not JSON come back as the strings they are.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is corrupt or cut short.
    """
    with _opened(path) as file:
        stored = file.metadata() or {}
    return {key: _from_json(value) for key, value in stored.items()}


def tensor_names(path: str | Path) -> list[str]:
    """List the tensors of a safetensors file without reading them; raises as `read_metadata` does."""
    with _opened(path) as file:
        return list(file.keys())


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: The file, in UTF-8.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not valid JSON, or holds no object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch or make it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}; fetch or make it again.")
    return content


def inside(folder: str | Path, name: str) -> Path:
    """Join a name that was read from a file to the folder that it is of.

    Only the name is looked at: a link in the folder is its owner's, and the Hub's cache consists of them.

    Args:
        folder: The folder.
        name: What the file says, for instance a component's name.

    Returns:
        The path; it need not exist.

    Raises:
        ValueError: If it would lead out of the folder: a name from a stranger must not reach other files.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{folder} names {str(name)!r}, which leads out of it; fetch it again, from who made it.")
    return Path(folder) / name


def _from_json(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt or cut short ({error}); fetch or make it again.") from error


def check_output_dir(path: str | Path, *, resume: bool = False, own: Set[str] = JOB_FILES) -> Path:
    """Refuse an output folder whose content a new run would destroy.

    Args:
        path: The folder a job wants to write into; it need not exist.
        resume: Whether the job continues what is there.
        own: What the job leaves there when it is cut short.

    Returns:
        The path.

    Raises:
        FileExistsError: If it holds a finished model, anything but a job's own files, or an unfinished run and
            `resume` is false.
        FileNotFoundError: If the path is a link that leads nowhere.
        NotADirectoryError: If the path, or one above it, is a file.
        PermissionError: If it can't be written.
    """
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"Can't write into {path}: it is a link to {path.resolve()}, which is not there.")
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"Can't write into {path}: {existing} is a file. Choose another output folder.")
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"Can't write into {path}: no permission. Choose another output folder.")
    in_place = (path / "manifest.json").exists() and not (path / "result").exists()
    if in_place or (path / "model_index.json").exists():
        raise FileExistsError(f"{path} already holds a finished model. Choose another output folder or move it away.")
    present = {entry.name for entry in path.iterdir()} - {LOCK_FILE} if path.is_dir() else set()
    foreign = {name for name in present if name not in own and not name.endswith((".partial", ".retired"))}
    if foreign and not (resume and "result" in present):  # killed while the finished result was being put in place
        raise FileExistsError(
            f"{path} holds files that are not this job's ({sorted(foreign)[0]}). Choose an empty or new output folder."
        )
    if present and not resume:
        raise FileExistsError(f"{path} holds an unfinished run. Continue it with --resume, or choose another folder.")
    return path


@contextmanager
def claimed(path: Path | None, *, resume: bool = False, own: Set[str] = JOB_FILES) -> Iterator[None]:
    """Keep other runs out of an output folder, for as long as the context lasts or this process lives.

    Args:
        path: The folder, which is made if need be, and removed again if nothing was written into it; None claims none.
        resume: As for `check_output_dir`, which is asked once more: another run may just have ended there.
        own: As for `check_output_dir`.

    Raises:
        FileExistsError: If another run is writing into it, or has finished there.
    """
    if path is None:
        yield
        return
    with locked(path) as held:
        if not held:
            raise FileExistsError(f"Another run is writing into {path}. Choose another output folder.")
        check_output_dir(path, resume=resume, own=own)
        yield


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Lock a folder against other processes, for as long as the context lasts or this process lives.

    Args:
        folder: It is made if need be, and removed again if nothing was written into it.
        wait: Whether to wait until it is free.

    Yields:
        Whether this process holds it; another one may, unless it was waited for.
    """
    file = _lock(folder / LOCK_FILE, wait)
    if file is None:
        yield False
        return
    try:
        yield True
    finally:
        (folder / LOCK_FILE).unlink(missing_ok=True)
        file.close()
        with suppress(OSError):  # unless it is empty
            folder.rmdir()


def _lock(path: Path, wait: bool) -> IO[str] | None:
    """An open file that this process alone has locked; None if another one has."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("w")
        except FileNotFoundError:  # the one before has just removed the empty folder
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # locked, but the one before has removed it


def check_disk_space(path: str | Path, needed: int) -> None:
    """Refuse to start a job whose files would not fit.

    Args:
        path: A file or folder on the disk in question; it need not exist.
        needed: Bytes the job will write.

    Raises:
        OSError: If less than that is free.
    """
    existing = next(folder for folder in (Path(path), *Path(path).absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"Not enough disk space at {existing}: {needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free. "
            "Free some, or choose an output folder on another disk."
        )
