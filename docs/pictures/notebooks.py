"""Crop a thumbnail for the guide out of each notebook's kept pictures: ``python docs/pictures/notebooks.py``."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import nbformat
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CROPS = {  # notebook: the cell whose picture it is, and the box to keep, in pixels
    "samplers_and_inversion": ("reconstructions", (0, 0, 353, 394)),
    "edit_a_picture": ("infedit", (0, 0, 517, 328)),
    "erase_a_concept": ("uce-after", (0, 0, 586, 262)),
    "attack_an_erased_model": ("embeddings-shown", (0, 0, 662, 130)),
    "restore_pictures": ("enlarge", (0, 0, 598, 262)),
    "release_to_the_hub": ("stock", (0, 0, 390, 96)),
}


def picture_of(name: str, cell_id: str) -> Image.Image:
    """Give the first picture among the outputs of a notebook's cell."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    (cell,) = (cell for cell in notebook.cells if cell.id == cell_id)
    found = next(output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))
    return Image.open(io.BytesIO(base64.b64decode(found)))


def main() -> None:
    """Write all thumbnails."""
    folder = ROOT / "docs" / "images" / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    for name, (cell_id, box) in CROPS.items():
        picture_of(name, cell_id).crop(box).save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
