"""Data for restoration: made-up garments in the format of Fashion-MNIST, and the renders that ship."""

import gzip
import struct

import numpy as np
import pytest

from sfumato.loading import assets_folder


@pytest.fixture(scope="session")
def fashion_mnist(tmp_path_factory):
    """A folder of sixty garments, blobs of several sizes, in each split."""
    folder, rng = tmp_path_factory.mktemp("fashion"), np.random.default_rng(0)
    across, down = np.meshgrid(np.arange(28), np.arange(28))
    for split in ("train", "t10k"):
        radii = rng.uniform(4, 13, (60, 2, 1, 1))
        inside = ((across - 14) / radii[:, 0]) ** 2 + ((down - 14) / radii[:, 1]) ** 2 < 1
        images = (inside * rng.integers(80, 256, (60, 28, 28))).astype(np.uint8)
        labels = np.arange(60, dtype=np.uint8) % 10
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return str(folder)


@pytest.fixture(scope="session")
def renders():
    """The folder of 240 renders, 32x32."""
    return str(assets_folder() / "renders")
