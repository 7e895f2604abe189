from itertools import pairwise

import pytest
import torch

from sfumato.pipelines.restoration_tiles import Tiles


@pytest.mark.parametrize("grid", [(8, 8), (24, 8), (20, 36), (64, 12)])
@pytest.mark.parametrize(("size", "overlap"), [(8, 0), (8, 3), (16, 4), (16, 12), (128, 32)])
def test_tiles_cover_every_place_with_weights_that_sum_to_one(grid, size, overlap):
    tiles = Tiles.over(grid, size, overlap, 4, 0)
    total = torch.zeros(grid, dtype=torch.float64)
    for row, top in enumerate(tiles.rows):
        for column, left in enumerate(tiles.columns):
            weights = tiles.row_weights[row, :, None] * tiles.column_weights[column]
            assert (weights > 0).all()
            total[top : top + tiles.size[0], left : left + tiles.size[1]] += weights
    assert torch.allclose(total, torch.ones(grid, dtype=torch.float64), atol=1e-12)
    assert all(start % 4 == 0 for start in (*tiles.rows, *tiles.columns))
    for starts, side in zip((tiles.rows, tiles.columns), tiles.size, strict=True):
        assert all(after - before <= side - min(overlap, side - 4) for before, after in pairwise(starts))


def test_overlapping_tiles_leave_no_seams_where_others_do():
    """Of a network that answers each tile by its mean: the worst it can do to its neighbours."""

    def mean(sample, condition):
        return sample.mean(dim=(2, 3), keepdim=True).expand(-1, -1, *sample.shape[-2:])

    picture = torch.zeros(1, 1, 8, 32)
    picture[..., 16:] = 1
    steps = {
        overlap: Tiles.over((8, 32), 16, overlap, 4, 0).blend(mean, picture, None).diff(dim=-1).abs().max()
        for overlap in (0, 8)
    }
    assert steps[0] == 1
    assert steps[8] < 0.15


@pytest.mark.parametrize("batch_size", [0, 1, 5])
def test_every_tile_is_seen_with_its_part_of_the_condition(batch_size):
    sample = torch.rand(2, 3, 12, 20)
    condition = torch.cat([sample, -sample], dim=1)
    sizes = []

    def network(part, told):
        assert torch.equal(torch.cat([part, -part], dim=1), told)
        sizes.append(len(part))
        return torch.cat([part, part], dim=1)

    blended = Tiles.over((12, 20), 8, 4, 4, batch_size).blend(network, sample, condition)
    assert torch.allclose(blended, torch.cat([sample, sample], dim=1), atol=1e-6)
    assert sum(sizes) == 2 * 2 * 4 and max(sizes) == (batch_size or 16)


@pytest.mark.parametrize(("batch_size", "expected"), [(0, [5]), (2, [2, 2, 1]), (16, [5])])
@pytest.mark.parametrize("told", [True, False])
def test_pictures_of_one_tile_are_seen_so_many_at_once_too(batch_size, expected, told):
    sample, sizes = torch.rand(5, 3, 8, 8), []

    def network(part, known):
        assert known is None if not told else torch.equal(known, -part)
        sizes.append(len(part))
        return 2 * part

    blended = Tiles.over((8, 8), 8, 4, 4, batch_size).blend(network, sample, -sample if told else None)
    assert torch.equal(blended, 2 * sample) and sizes == expected
