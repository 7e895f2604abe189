"""How far a run has come: held-out pictures, restored at each checkpoint by the pipeline that the run will leave.

``validation.json`` gets a row a checkpoint, ``validation/`` a picture of degraded, restored and clean side by side,
and ``curves.png`` shows the rows at the end.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from sfumato import storage
from sfumato.pipelines.restoration import degraded_start
from sfumato.randomness import generator_for
from sfumato.restoration.examples import HeldOut
from sfumato.restoration.scores import Distance, score, summarise

__all__ = [
    "CURVES_FILE",
    "FILES",
    "ROWS_FILE",
    "Restorer",
    "Validation",
    "check_same_curves",
    "generate",
    "grid_picture",
    "picture_of",
    "restore",
]

logger = logging.getLogger(__name__)

ROWS_FILE, PICTURES_FOLDER, CURVES_FILE = FILES = ("validation.json", "validation", "curves.png")
SHOWN = 8  # rows of the picture, at the most
LABELS = {"psnr": "PSNR (dB)", "ssim": "SSIM", "distance": "distance of features"}


class Restorer(Protocol):
    """A pipeline of the kind of `sfumato.pipelines.restoration.RestorationPipeline`."""

    def __call__(self, image: Any = None, mask_image: Any = None, **settings: Any) -> Any:
        """Give pictures, in ``images``."""
        ...

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write it into a folder."""
        ...


@torch.no_grad()
def restore(pipe: Restorer, held_out: HeldOut, batch_size: int = 64, **settings: Any) -> torch.Tensor:
    """Restore pictures, each with the noise of its own key, so that the batches do not matter.

    Args:
        pipe: The pipeline.
        held_out: The pictures.
        batch_size: Pictures at a time.
        **settings: Of the call.

    Returns:
        ``(N, 3, S, S)`` in [0, 1], on the CPU.
    """
    assert held_out.degraded is not None
    pictures, masks = held_out.degraded
    parts = []
    for start in range(0, len(held_out), batch_size):
        chosen = slice(start, start + batch_size)
        given = pictures[chosen] / 2 + 0.5
        generators = [generator_for(*held_out.key(start + k)) for k in range(len(given))]
        mask = {} if masks is None else {"mask_image": masks[chosen]}
        parts.append(pipe(image=given, **mask, generator=generators, output_type="pt", **settings).images)
    return torch.cat(parts).float().cpu()


@torch.no_grad()
def generate(pipe: Restorer, held_out: HeldOut, batch_size: int = 64, **settings: Any) -> torch.Tensor:
    """Draw as many pictures as are held out, of their size; see `restore`."""
    parts = []
    height, width = held_out.clean.shape[-2:]
    for start in range(0, len(held_out), batch_size):
        count = min(batch_size, len(held_out) - start)
        generators = [generator_for(*held_out.key(start + k)) for k in range(count)]
        size = {"batch_size": count, "height": height, "width": width}
        parts.append(pipe(**size, generator=generators, output_type="pt", **settings).images)
    return torch.cat(parts).float().cpu()


def grid_picture(*columns: torch.Tensor, smallest: int = 64) -> Image.Image:
    """Lay pictures side by side.

    Args:
        *columns: ``(N, 3, H, W)`` in [0, 1] each; smaller ones are brought to the size of the last by repeating
            pixels.
        smallest: What pictures are enlarged to, by a whole factor.

    Returns:
        A row for each of the ``N``.
    """
    height, width = columns[-1].shape[-2:]
    factor = max(1, -(-smallest // height))
    size = factor * height, factor * width
    shown = [F.pad(F.interpolate(column.float(), size, mode="nearest-exact"), (2,) * 4, value=1) for column in columns]
    rows = torch.cat(shown, dim=3)  # (N, 3, h, columns * w)
    sheet = torch.cat(list(rows), dim=1).clamp(0, 1)
    return Image.fromarray(np.asarray((255 * sheet).round().to(torch.uint8).permute(1, 2, 0)))


def picture_of(row: Mapping[str, Any]) -> str:
    """Give the path, in the folder of the run, of the picture that goes with a row."""
    return f"{PICTURES_FOLDER}/step-{row['step']:08d}.png"


def check_same_curves(folder: Path, held_out: HeldOut, measure: str) -> None:
    """Refuse to go on with curves of other pictures, or of another distance.

    Args:
        folder: Of the run.
        held_out: The pictures.
        measure: What the distance is called.

    Raises:
        ValueError: If the folder's curves are of others, or damaged.
    """
    path = folder / ROWS_FILE
    stored = storage.read_json(path).get("of") if path.exists() else _facts(held_out, measure)
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is damaged; delete it to begin the curves anew.")
    if stored == _facts(held_out, measure):
        return
    other = "were drawn from other held-out pictures"
    if stored.get("distance") != measure:
        other = f"have the distance {stored.get('distance')!r}, not {measure!r}"
    raise ValueError(f"The curves in {path} {other}: resume with the same, or delete that file to begin them anew.")


def _facts(held_out: HeldOut, measure: str) -> dict[str, Any]:
    return {"distance": measure, "held_out": len(held_out), "digest": held_out.digest()}


class Validation:
    """Held-out pictures, and what became of them so far.

    Args:
        held_out: The pictures.
        scale: Size of the clean by that of the degraded ones.
        distance: Beside PSNR and SSIM; None measures none.
        folder: Where rows and pictures go.
        between_sets: For generation, how far the pictures are from those held out; None does not measure that.
        measure: What the distance is called.
    """

    def __init__(
        self, held_out: HeldOut, scale: int, distance: Distance | None, folder: Path,
        between_sets: Callable[[torch.Tensor, torch.Tensor], float] | None = None, measure: str = "none",
    ) -> None:  # fmt: skip
        self.held_out, self.distance, self.between_sets, self.folder = held_out, distance, between_sets, folder
        self._facts = _facts(held_out, measure)
        self.path, self.rows = folder / ROWS_FILE, list[dict[str, Any]]()
        self.baseline: dict[str, Any] = {}
        if held_out.degraded is not None:
            start = degraded_start(held_out.degraded.picture, scale) / 2 + 0.5
            self.baseline = self._summary(start.clamp(0, 1))

    def go_on(self, step: int) -> None:
        """Read the rows of an earlier start, up to a step.

        Raises:
            ValueError: If they are damaged.
        """
        if self.path.exists():
            try:
                rows = storage.read_json(self.path)["rows"]
                self.rows = [row for row in rows if row["step"] <= step]
            except (KeyError, TypeError) as error:
                raise ValueError(f"{self.path} is damaged; delete it to begin the curves anew.") from error

    @property
    def seconds(self) -> float:
        """How long the run had taken at the last row."""
        return float(self.rows[-1]["seconds"]) if self.rows else 0.0

    def look(self, pipe: Restorer, step: int, seconds: float) -> dict[str, Any]:
        """Restore the pictures, note the scores, and write a picture of some.

        Args:
            pipe: With the weights of now.
            step: How many steps were taken.
            seconds: How long they took, all starts together.

        Returns:
            The row.
        """
        if self.held_out.degraded is None:
            restored = generate(pipe, self.held_out)
            shown = [restored[:SHOWN], self.held_out.clean[:SHOWN]]
        else:
            restored = restore(pipe, self.held_out)
            shown = [self.held_out.degraded.picture[:SHOWN] / 2 + 0.5, restored[:SHOWN], self.held_out.clean[:SHOWN]]
        row = {"step": step, "seconds": round(seconds, 1), **self._summary(restored)}
        self.rows = [*(other for other in self.rows if other["step"] < step), row]
        file = self.folder / picture_of(row)
        file.parent.mkdir(parents=True, exist_ok=True)
        grid_picture(*shown).save(file)
        storage.write_text(self.path, json.dumps(self.content, indent=1))
        return row

    @property
    def content(self) -> dict[str, Any]:
        """What ``validation.json`` holds."""
        return {"of": self._facts, "baseline": self.baseline, "rows": self.rows}

    def _summary(self, pictures: torch.Tensor) -> dict[str, Any]:
        """Means with their intervals, as JSON can hold them."""
        clean = self.held_out.clean
        if self.held_out.degraded is None:
            return {} if self.between_sets is None else {"distance": {"value": self.between_sets(pictures, clean)}}
        scores = score(pictures, clean, self.distance)
        return {name: estimate.as_dict() for name, estimate in summarise(scores).items()}

    def draw_curves(self, file: Path) -> None:
        """Draw the scores over the steps, with their intervals, if matplotlib is installed and there are some."""
        measured = [name for name in LABELS if any(name in row for row in self.rows)]
        if not measured:
            return
        if find_spec("matplotlib") is None:
            logger.warning("%s is left out: it is drawn by matplotlib (pip install 'sfumato[train]').", file.name)
            return
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4 * len(measured), 3), layout="constrained")
        for place, name in enumerate(measured, start=1):
            axes = figure.add_subplot(1, len(measured), place, xlabel="step", title=LABELS[name])
            steps, values = zip(*((row["step"], row[name]) for row in self.rows if name in row), strict=True)
            axes.plot(steps, [value["value"] for value in values], marker=".", label="restored")
            if "low" in values[0]:
                low, high = ([value[end] for value in values] for end in ("low", "high"))
                axes.fill_between(steps, low, high, alpha=0.2)
            if name in self.baseline:
                axes.axhline(self.baseline[name]["value"], color="grey", linestyle="--", label="degraded")
            axes.legend()
        figure.savefig(file, dpi=120)
