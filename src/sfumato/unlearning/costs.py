"""What a run has cost, over all its starts: kept beside its examples, so that a resumed run knows what came before."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from sfumato import storage

__all__ = ["Costs"]


class Costs:
    """Seconds and denoiser evaluations.

    A run that is cut short and resumed has cost what had been noted by its last checkpoint, and what it takes from
    there; the steps that it does twice count once.

    Args:
        accelerator: The process group.
        folder: Where costs are noted; None notes none.
        resume: Go on from what an earlier start noted there.
        began: When this start began, by ``time.perf_counter()``.
    """

    def __init__(self, accelerator: Accelerator, folder: Path | None, *, resume: bool, began: float) -> None:
        self._accelerator, self._began = accelerator, began
        self._path = folder / "examples" / "costs.json" if folder is not None else None
        self._earlier = {"seconds": 0.0, "denoiser_evaluations": 0}
        if resume and self._path is not None and self._path.exists():
            try:
                self._earlier = {**self._earlier, **json.loads(self._path.read_text())}
            except (OSError, ValueError) as error:
                raise ValueError(f"{self._path} is damaged ({error}); delete it to count from here.") from error
        self.counted = torch.zeros((), dtype=torch.int64)
        """Evaluations of this start on this process: samples that pass through a denoiser; a guided one is two."""

    def so_far(self) -> dict[str, float]:
        """Add up all starts and processes, which must all call this."""
        evaluations = int(self._accelerator.reduce(self.counted.to(self._accelerator.device)).item())
        seconds = self._earlier["seconds"] + time.perf_counter() - self._began
        return {
            "seconds": round(seconds, 1),
            "denoiser_evaluations": int(self._earlier["denoiser_evaluations"]) + evaluations,
        }

    def note(self) -> None:
        """Write them down; all processes must call this."""
        costs = self.so_far()
        if self._path is not None and self._accelerator.is_main_process:
            storage.write_text(self._path, json.dumps(costs))
