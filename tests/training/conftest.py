"""What the objectives of restoration learn from here."""

import pytest
import torch


class Noise:
    """Pictures that are noise, each its own by its position."""

    size = 8

    def __len__(self):
        return 40

    def take(self, positions, keys=None):
        drawn = [torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(int(p))) for p in positions]
        return 2 * torch.stack(drawn) - 1

    def facts(self):
        return {}


@pytest.fixture
def noise():
    return Noise()
