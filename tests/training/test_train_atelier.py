"""The script that makes the embedded models: what it refuses, and that it overwrites nothing."""

import gzip
import struct

import numpy as np
import pytest

from sfumato import storage
from sfumato.training.train_atelier import AtelierConfig, main


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sixty made-up garments in the format of Fashion-MNIST."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split in ("train", "t10k"):
        images = rng.integers(0, 256, (60, 28, 28), dtype=np.uint8)
        labels = np.arange(60, dtype=np.uint8) % 10
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": "judge,vase"}, "Unknown stage 'vase'"),
        ({"judge_steps": 0}, "`judge_steps` must be at least 1, got 0"),
        ({"measured_repeats": 0}, "`measured_repeats` must be at least 1"),
        ({"seed": -1}, "`seed` must be a whole number"),
        ({"mixed_precision": "int8"}, "`mixed_precision` must be"),
    ],
)
def test_bad_settings_of_any_stage_are_refused_before_the_first(settings, message):
    with pytest.raises(ValueError, match=message):
        AtelierConfig(**settings)


def test_a_finished_stage_is_kept_and_only_taken_for_the_same_settings(data, tmp_path):
    settings = {"output": str(tmp_path), "data_dir": data, "stages": "pixel", "checkpoint_every": 1}
    main(AtelierConfig(**settings, pixel_steps=2))
    finished = tmp_path / "pixel" / "finished.safetensors"
    before = storage.fingerprint(storage.load_tensors(finished).items())
    main(AtelierConfig(**settings, pixel_steps=2))
    assert storage.fingerprint(storage.load_tensors(finished).items()) == before
    for other, message in (({"pixel_steps": 3}, "steps 2, not 3"), ({"pixel_steps": 2, "seed": 5}, "seed 0, not 5")):
        with pytest.raises(FileExistsError, match=message):
            main(AtelierConfig(**{**settings, **other}))
    assert storage.fingerprint(storage.load_tensors(finished).items()) == before


def test_an_earlier_release_is_left_alone(data, tmp_path):
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not overwritten"):
        main(AtelierConfig(output=str(tmp_path), data_dir=data, stages="pixel", pixel_steps=1))
    assert (tmp_path / "assets" / "precious.txt").read_text() == "mine"
