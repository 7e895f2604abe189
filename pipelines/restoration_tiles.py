"""Tiles over the grid of a chain: a network sees parts of a large picture, its outputs are blended without seams."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Tiles", "Tiling"]


@dataclass(frozen=True)
class Tiling:
    """How a call wants large pictures to be tiled.

    Attributes:
        size: Side of a tile in pixels of the result; None takes the size that the network was trained on (if its
            config says it), 0 the whole picture at once.
        overlap: Of neighbouring tiles, in pixels of the result; None takes a quarter of the tile.
        batch_size: Tiles that the network is given at once, so that memory does not grow with the picture; 0 gives it
            all.
    """

    size: int | None = None
    overlap: int | None = None
    batch_size: int = 16

    def sides(self, trained: int, multiple: int) -> tuple[int, int]:
        """Give the side of a tile and the overlap, in pixels of the result; 0 and 0 for no tiles.

        Args:
            trained: Side that the network was trained on; 0 if that is not known.
            multiple: What sides must be whole multiples of.

        Raises:
            ValueError: If a setting is out of range.
        """
        size = -(-trained // multiple) * multiple if self.size is None else self.size
        if size < 0 or size % multiple:
            raise ValueError(
                f"`tile_size` must be a whole multiple of {multiple} pixels for this model, or 0 for no tiles, got"
                f" {size}."
            )
        overlap = size // 4 if self.overlap is None else self.overlap
        if overlap < 0 or 0 < size <= overlap:
            limit = f"from 0 to below the tile's {size} pixels" if size else "0 or more"
            raise ValueError(f"`tile_overlap` must be {limit}, got {overlap}.")
        if self.batch_size < 0:
            raise ValueError(f"`tile_batch_size` must be 0 or more, got {self.batch_size}.")
        return size, overlap if size else 0


@dataclass(frozen=True)
class Tiles:
    """Overlapping tiles over the grid of a chain, the last of each row and column shifted inwards to fit.

    Attributes:
        size: Height and width of a tile.
        rows, columns: Where tiles begin.
        row_weights, column_weights: Weights ``(tiles, side)`` along both axes; at each place they sum to one.
        batch_size: How many tiles the network is given at once; 0 gives it all.
    """

    size: tuple[int, int]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    row_weights: Tensor
    column_weights: Tensor
    batch_size: int

    @classmethod
    def over(cls, grid: Sequence[int], size: int, overlap: int, step: int, batch_size: int) -> Tiles:
        """Lay tiles over a grid.

        Args:
            grid: Its height and width.
            size: Side of a tile; smaller where the grid is.
            overlap: By how much neighbours overlap at least.
            step: Tiles begin at whole multiples of this.
            batch_size: See above.
        """
        sides = [min(size, side) for side in grid]
        stride = max(step, (size - overlap) // step * step)
        starts = [
            (*range(0, whole - side, stride), whole - side) for whole, side in zip(grid, sides, strict=True)
        ]  # fmt: skip
        weights = [
            _feather(start, side, whole, side - stride)
            for start, side, whole in zip(starts, sides, grid, strict=True)
        ]  # fmt: skip
        return cls((sides[0], sides[1]), starts[0], starts[1], weights[0], weights[1], batch_size)

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def blend(
        self, network: Callable[[Tensor, Tensor | None], Tensor], sample: Tensor, condition: Tensor | None
    ) -> Tensor:
        """Call a network on each tile and blend what it puts out.

        Args:
            network: Takes ``(n, C, *size)`` and ``(n, K, *size)`` or None, gives ``(n, channels, *size)``.
            sample: ``(B, C, h, w)``.
            condition: ``(B, K, h, w)`` or None.

        Returns:
            ``(B, channels, h, w)``.
        """
        if len(self) == 1:
            parts = sample.split(self.batch_size or len(sample))
            told = [None] * len(parts) if condition is None else condition.split(self.batch_size or len(sample))
            return torch.cat([network(part, known) for part, known in zip(parts, told, strict=True)])
        places = [
            (picture, row, column)
            for row in range(len(self.rows))
            for column in range(len(self.columns))
            for picture in range(len(sample))
        ]
        result: Any = None
        count = self.batch_size or len(places)
        for first in range(0, len(places), count):
            chosen = places[first : first + count]
            told = None if condition is None else self._cut(condition, chosen)
            outputs = network(self._cut(sample, chosen), told)
            if result is None:
                result = outputs.new_zeros(len(sample), outputs.shape[1], *sample.shape[-2:])
            for output, (picture, row, column) in zip(outputs, chosen, strict=True):
                weight = self.row_weights[row, :, None] * self.column_weights[column]
                self._view(result[picture], row, column).add_(weight.to(output.dtype).to(output.device) * output)
        return result

    def _cut(self, tensor: Tensor, places: Sequence[tuple[int, int, int]]) -> Tensor:
        return torch.stack([self._view(tensor[picture], row, column) for picture, row, column in places])

    def _view(self, picture: Tensor, row: int, column: int) -> Tensor:
        top, left = self.rows[row], self.columns[column]
        return picture[:, top : top + self.size[0], left : left + self.size[1]]


def _feather(starts: Sequence[int], side: int, whole: int, overlap: int) -> Tensor:
    """Weights `(tiles, side)` along one axis: raised cosines over the overlaps, scaled to sum to one at each place."""
    place = torch.arange(side, dtype=torch.float64) + 0.5
    depth = torch.minimum(place, side - place)
    window = torch.ones_like(place)
    if overlap > 0:
        window = torch.sin((depth / overlap).clamp(max=1) * math.pi / 2) ** 2
    total = torch.zeros(whole, dtype=torch.float64)
    for start in starts:
        total[start : start + side] += window
    return torch.stack([window / total[start : start + side] for start in starts])
