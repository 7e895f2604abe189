"""Where clean pictures come from: renders of Fashion-MNIST, a folder, or a data set of the Hub.

A picture is asked for by its position in the source and the key of the sample: position and key give the same picture
in any batch and on any process. Those of a folder or data set are cropped where the key says, and perhaps mirrored;
without keys they are cropped in the middle, as pictures that are held out for validation are.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

from sfumato import atelier
from sfumato.pipelines.restoration_pictures import read_pictures
from sfumato.progress import Track
from sfumato.randomness import Key, permuted_indices, randint_for, rng_for

__all__ = ["Crops", "Pictures", "Renders", "Some", "folder_pictures", "holds_rows", "hub_pictures", "split"]

logger = logging.getLogger(__name__)

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
ROWS = {".parquet", ".arrow"}
"""Endings of a data set's files."""
CROP, MIRROR = range(1, 3)  # streams of a sample's key
END = 2**16  # bytes at either end of a file that tell it from another
READERS = 8  # threads; PIL decodes outside of Python's lock


class Pictures(Protocol):
    """A source of clean pictures."""

    size: int

    def __len__(self) -> int:
        """Give the number of positions."""
        ...

    def take(self, positions: Sequence[int], keys: Sequence[Key] | None = None) -> torch.Tensor:
        """Give a picture for each position.

        Args:
            positions: ``B`` of them, each in ``[0, len)``.
            keys: One a sample, which what is random in it depends on; None takes the pictures in their plainest form.

        Returns:
            ``(B, 3, size, size)`` in [-1, 1], float32, on the CPU.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """Say what tells the source from another, as JSON can hold it."""
        ...


class Renders:
    """Renders of the garments of Fashion-MNIST, 32x32, each in a style and a colour by its key; see `sfumato.atelier`.

    Args:
        data_dir: As for `sfumato.atelier.find_fashion_mnist`.
        split: ``"train"`` or ``"test"``.

    Raises:
        FileNotFoundError: If the data is not found.
    """

    size = atelier.IMAGE_SIZE

    def __init__(self, data_dir: str | Path | None = None, split: str = "train") -> None:
        self.split = split
        self.garments = torch.from_numpy(atelier.find_fashion_mnist(data_dir, split)[0])

    def __len__(self) -> int:
        """See `Pictures`."""
        return len(self.garments)

    def take(self, positions: Sequence[int], keys: Sequence[Key] | None = None) -> torch.Tensor:
        """See `Pictures`; without keys, style and colour go by the position."""
        looks = len(atelier.STYLES) * len(atelier.COLOURS)
        chosen = torch.as_tensor(np.asarray(positions), dtype=torch.long)
        look = chosen % looks if keys is None else randint_for(keys, looks)
        styles, colours = look % len(atelier.STYLES), look // len(atelier.STYLES)
        return 2 * atelier.render(self.garments[chosen], styles, colours) - 1

    def facts(self) -> dict[str, Any]:
        """See `Pictures`."""
        digest = hashlib.sha256(self.garments.numpy().tobytes()).hexdigest()
        return {"source": "atelier", "split": self.split, "pictures": len(self), "digest": digest}


class Crops:
    """Pictures of any size, at least that of the crops, opened when they are asked for.

    Args:
        name: Of the folder or data set.
        names: Of the pictures.
        opened: Gives the picture of an index, as PIL has it.
        size: Height and width of the crops.
        unfit: ``"refuse"`` pictures that can't be read or are too small, or ``"skip"`` them.
        digest: Tells these pictures from others.
        shown: Whether there is a progress bar while all are looked at.

    Raises:
        ValueError: If some can't be read or are smaller than the crops, or, skipping these, none is left.
    """

    def __init__(
        self, name: str, names: Sequence[str], opened: Callable[[int], Image.Image], size: int, *,
        unfit: str = "refuse", digest: str = "", shown: bool = True,
    ) -> None:  # fmt: skip
        self.name, self.size, self._opened, self._digest = name, size, opened, digest
        self._pool = ThreadPoolExecutor(READERS)
        faults = self._look_through(len(names), shown)
        named = [f"{names[index]}: {fault}" for index, fault in faults.items()]
        if named:
            said = f"{len(named)} of {len(names)} pictures of {name} can't be used ({'; '.join(named[:3])}"
            said += "; ...)" if len(named) > 3 else ")"
            if unfit == "refuse":
                raise ValueError(f"{said}: mend or remove them, or leave them out with --unfit skip.")
            logger.warning(f"{said}, and are left out.")
        self._fit = [index for index in range(len(names)) if index not in faults]
        if not self._fit:
            raise ValueError(f"There is no picture in {name} that can be used.")

    def __len__(self) -> int:
        """See `Pictures`."""
        return len(self._fit)

    def take(self, positions: Sequence[int], keys: Sequence[Key] | None = None) -> torch.Tensor:
        """See `Pictures`."""
        several = [None] * len(positions) if keys is None else keys
        return 2 * torch.stack(list(self._pool.map(self._crop, positions, several))) - 1

    def facts(self) -> dict[str, Any]:
        """See `Pictures`; the folder may lie elsewhere when a run is resumed."""
        return {"source": "pictures", "pictures": len(self), "digest": self._digest, "size": self.size}

    def _crop(self, position: int, key: Key | None) -> torch.Tensor:
        """A crop (3, size, size) in [0, 1]."""
        image = self._turned(self._fit[position])
        spare = [length - self.size for length in image.size]
        left, top = (length // 2 for length in spare)
        if key is not None:
            rng = rng_for(*key, CROP)
            left, top = (int(rng.integers(length + 1)) for length in spare)
        (crop,) = read_pictures(image.crop((left, top, left + self.size, top + self.size)))
        mirrored = key is not None and rng_for(*key, MIRROR).random() < 0.5
        return crop.pixels.flip(2) if mirrored else crop.pixels

    def _turned(self, index: int) -> Image.Image:
        """A picture as a viewer shows it."""
        with self._opened(index) as image:
            image.load()  # a file that is cut short has a sound header
            return ImageOps.exif_transpose(image)

    def _look_through(self, count: int, shown: bool) -> dict[int, str]:
        """What is wrong with pictures that can't be used, by their index."""
        found = self._pool.map(self._fault, range(count))
        faults = zip(Track(range(count), "look at pictures", shown=shown), found, strict=True)
        return {index: fault for index, fault in faults if fault is not None}

    def _fault(self, index: int) -> str | None:
        """What reading a picture as a crop is read comes to, before the training does."""
        try:
            image = self._turned(index)
            width, height = image.size
            if min(image.size) < self.size:
                return f"{width}x{height}, smaller than the crops of {self.size}x{self.size}"
            wide = image.mode.startswith(("F", "I"))  # these may hold a value that is out of range anywhere
            read_pictures(image if wide else image.crop((0, 0, self.size, self.size)))
        except Exception as error:  # decoders of PIL raise almost anything on a broken file
            return f"can't be read ({error or type(error).__name__})"
        return None


class Some:
    """Some pictures of a source.

    Args:
        whole: The source.
        chosen: Their positions in it.
    """

    def __init__(self, whole: Pictures, chosen: Sequence[int]) -> None:
        self.whole, self.chosen, self.size = whole, [int(position) for position in chosen], whole.size

    def __len__(self) -> int:
        """See `Pictures`."""
        return len(self.chosen)

    def take(self, positions: Sequence[int], keys: Sequence[Key] | None = None) -> torch.Tensor:
        """See `Pictures`."""
        return self.whole.take([self.chosen[position] for position in positions], keys)

    def facts(self) -> dict[str, Any]:
        """See `Pictures`."""
        chosen = hashlib.sha256(repr(self.chosen).encode()).hexdigest()
        return {**self.whole.facts(), "chosen": chosen, "of_these": len(self)}


def split(whole: Pictures, held_out: int, seed: int) -> tuple[Some, Some]:
    """Hold pictures out of a source, which ones by the seed.

    Args:
        whole: The source.
        held_out: How many, but no more than a tenth of all, and at least two.
        seed: Chooses them.

    Returns:
        What is left, and what is held out.

    Raises:
        ValueError: If there are fewer than three pictures.
    """
    if len(whole) < 3:
        raise ValueError(
            f"There are {len(whole)} pictures only: add others, so that two can be held out for validation, or name a "
            "folder of these."
        )
    order = permuted_indices(seed, len(whole), 0, len(whole))
    count = max(2, min(held_out, len(whole) // 10))
    return Some(whole, sorted(order[count:])), Some(whole, sorted(order[:count]))


def folder_pictures(
    folder: str | Path, size: int, *, unfit: str = "refuse", without: str | Path | None = None, shown: bool = True
) -> Crops:
    """Open a folder of pictures.

    Args:
        folder: Searched for picture files, folders in it too; hidden ones are left out.
        size: Of the crops.
        unfit: See `Crops`.
        without: A folder whose pictures are left out: those that are validated with.
        shown: See `Crops`.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If all are left out; see also `Crops`.
    """
    folder, files = Path(folder), _picture_files(folder)
    if without is not None:
        others = {file.resolve() for file in _picture_files(without)}
        kept = [file for file in files if file.resolve() not in others]
        if not kept:
            raise ValueError(f"All pictures of {folder} are in {without} too: hold out a folder of other pictures.")
        if len(kept) < len(files) and shown:
            logger.warning(f"{len(files) - len(kept)} pictures of {folder} are held out, and not trained on.")
        files = kept
    names = [str(file.relative_to(folder)) for file in files]
    listed = "\n".join(f"{name} {_content(file)}" for name, file in zip(names, files, strict=True))
    digest = hashlib.sha256(listed.encode()).hexdigest()
    return Crops(
        str(folder), names, lambda index: Image.open(files[index]), size, unfit=unfit, digest=digest, shown=shown
    )


def _picture_files(folder: str | Path) -> list[Path]:
    """Files of a folder that are pictures by their names, and neither hidden nor in a hidden folder, in order."""
    files = _files_of(folder, SUFFIXES)
    if not files:
        raise FileNotFoundError(f"There are no pictures ({', '.join(sorted(SUFFIXES))}) in {folder}.")
    return files


def _files_of(folder: str | Path, suffixes: Set[str]) -> list[Path]:
    return sorted(
        file for file in Path(folder).rglob("*")
        if file.suffix.lower() in suffixes and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )  # fmt: skip


def _content(file: Path) -> str:
    """What tells a file from another of its name: its size and both ends, without reading all of a large one."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        ends = stream.read(END)
        stream.seek(max(END, size - END))
        return f"{size} {hashlib.sha256(ends + stream.read(END)).hexdigest()}"


def holds_rows(folder: str | Path) -> bool:
    """Whether a folder holds no picture files but those of a data set's rows, which `hub_pictures` reads."""
    return not _files_of(folder, SUFFIXES) and bool(_files_of(folder, ROWS))


def hub_pictures(name: str, size: int, *, split: str = "train", unfit: str = "refuse", shown: bool = True) -> Crops:
    """Open the pictures of a data set of the Hub, or of a folder that `datasets` can read.

    Args:
        name: As ``datasets.load_dataset`` takes it; or a folder that ``save_to_disk`` of a data set wrote.
        size: Of the crops.
        split: Of the data set.
        unfit: See `Crops`.
        shown: See `Crops`.

    Raises:
        ImportError: If `datasets` is not installed.
        ValueError: If there is no such data set, or no column of pictures in it; see also `Crops`.
    """
    try:
        import datasets
    except ImportError as error:
        found = f"{name} holds no pictures but" if Path(name).is_dir() else f"There is no folder {name};"
        raise ImportError(f"{found} a data set, which needs datasets: pip install 'sfumato[train]'.") from error
    try:
        rows = _rows_of(datasets, name, split)
    except Exception as error:  # not there, not online, no such split, or not readable: all end here
        named = f"{name!r} is neither 'atelier', nor a folder, nor a"
        named = f"The folder {name} is no" if Path(name).is_dir() else named
        raise ValueError(
            f"{named} data set that can be had with a split {split!r} ({type(error).__name__}: {error})."
        ) from error
    column = next((key for key, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise ValueError(f"The data set {name} has no column of pictures, only {', '.join(rows.features)}.")
    read = partial(_of_row, rows.select_columns([column]), column)
    names = [f"{split} {index}" for index in range(len(rows))]
    return Crops(name, names, read, size, unfit=unfit, digest=rows._fingerprint, shown=shown)


def _rows_of(datasets: Any, name: str, split: str) -> Any:
    """The rows of a data set; those that ``save_to_disk`` wrote are read by another call."""
    if (Path(name) / "dataset_dict.json").is_file():
        return datasets.load_from_disk(name)[split]
    if (Path(name) / "state.json").is_file():
        return datasets.load_from_disk(name)
    return datasets.load_dataset(name, split=split)


def _of_row(rows: Any, column: str, index: int) -> Image.Image:
    picture: Image.Image | None = rows[index][column]
    if picture is None:
        raise ValueError("the row has no picture")
    return picture
