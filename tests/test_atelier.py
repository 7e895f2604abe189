import gzip
import struct
from itertools import combinations

import numpy as np
import pytest
import torch

from sfumato import atelier
from sfumato.randomness import rng_for


def write_idx(path, array):
    header = b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def garment():
    picture = torch.zeros(1, 28, 28, dtype=torch.uint8)
    picture[0, 6:22, 8:20] = 200
    return picture


def test_idx_files_are_read_in_their_shape(tmp_path):
    images = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.array([3, 9], np.uint8))
    found, labels = atelier.find_fashion_mnist(tmp_path)
    assert np.array_equal(found, images) and labels.tolist() == [3, 9]


def test_missing_data_names_all_three_ways(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        atelier.find_fashion_mnist(tmp_path / "nothing")
    for way in ("apt install dataset-fashion-mnist", "zalando-datasets/fashion_mnist", "--data-dir"):
        assert way in str(caught.value)


def test_data_that_is_cut_short_is_named(tmp_path):
    path = tmp_path / "x-ubyte.gz"
    path.write_bytes(gzip.compress(b"\x00\x00\x08\x01" + struct.pack(">I", 10) + b"123"))
    with pytest.raises(ValueError, match="cut short: its header promises 10 bytes, it has 3"):
        atelier.read_idx(path)
    path.write_bytes(path.read_bytes()[:12])
    with pytest.raises(ValueError, match="can't be read"):
        atelier.read_idx(path)
    path.write_bytes(gzip.compress(b"hello there"))
    with pytest.raises(ValueError, match="not an IDX file"):
        atelier.read_idx(path)


def test_every_look_is_a_picture_of_its_own(garment):
    looks = [(s, c) for s in range(len(atelier.STYLES)) for c in range(len(atelier.COLOURS))]
    styles, colours = (torch.tensor(column) for column in zip(*looks, strict=True))
    pictures = atelier.render(garment.expand(len(looks), -1, -1), styles, colours)
    assert pictures.shape == (24, 3, 32, 32)
    assert pictures.min() >= 0 and pictures.max() <= 1
    assert len({picture.numpy().tobytes() for picture in pictures}) == 24


def test_colour_of_the_cloth_is_the_colour_asked_for(garment):
    silhouette = torch.full((6,), atelier.STYLES.index("silhouette"))
    pictures = atelier.render(garment.expand(6, -1, -1), silhouette, torch.arange(6))
    for picture, colour in zip(pictures, atelier.COLOURS.values(), strict=True):
        assert torch.allclose(picture[:, 16, 16], torch.tensor(colour), atol=1e-6)


def test_render_of_a_picture_does_not_depend_on_its_batch(garment):
    styles, colours = torch.tensor([0, 1, 2, 3]), torch.tensor([5, 4, 3, 2])
    together = atelier.render(garment.expand(4, -1, -1), styles, colours)
    alone = torch.cat([atelier.render(garment, styles[k : k + 1], colours[k : k + 1]) for k in range(4)])
    assert torch.equal(together, alone)


def test_captions_name_what_they_are_given_in_varied_words():
    attributes = {"garment": "boot", "style": "sketch", "colour": "green"}
    captions = {atelier.caption(attributes, rng_for(seed)) for seed in range(50)}
    assert len(captions) == 5
    assert all(word in caption for caption in captions for word in attributes.values())
    assert atelier.caption({}, rng_for(0)) == ""


def test_every_subset_of_attributes_has_a_wording():
    words = {"garment": "bag", "style": "photo", "colour": "red"}
    for count in (1, 2, 3):
        for subset in combinations(words, count):
            caption = atelier.caption({name: words[name] for name in subset}, rng_for(1))
            assert all(words[name] in caption for name in subset)
