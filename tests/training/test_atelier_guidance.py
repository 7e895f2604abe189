"""What steers the embedded models is trained once, packed, and small enough to ship."""

import pytest
import torch

import sfumato
from sfumato import MinorityClassifier, OneMoreStepPipeline
from sfumato.training.atelier_guidance import NAMES, PackConfig, pack


def test_all_are_trained_once_and_packed_without_code(tmp_path, fashion_mnist):
    settings = {"pictures": 24, "classes": 6, "repeats": 1, "data_dir": fashion_mnist}
    config = PackConfig(str(tmp_path / "run"), str(tmp_path / "out"), steps=1, **settings)
    folders = pack(config)
    assert [folder.name for folder in folders] == list(NAMES)
    for folder in folders:
        assert 2e6 < sum(file.stat().st_size for file in folder.rglob("*.safetensors")) <= 3e6
        assert not list(folder.rglob("*.py")) and (folder / "README.md").is_file()
        assert fashion_mnist not in "".join(file.read_text() for file in folder.glob("*.[jmy]*"))
    step = OneMoreStepPipeline.from_pretrained(folders[0], base=sfumato.load("atelier"))
    step.base.set_progress_bar_config(disable=True)
    assert step("a red bag", num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)
    for folder, shape in zip(folders[1:], ((4, 8, 8), (1, 16, 16)), strict=True):
        assert MinorityClassifier.from_pretrained(folder)(torch.zeros(2, *shape), 9).shape == (2, 6)
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*.safetensors")}
    pack(PackConfig(config.run, str(tmp_path / "again"), steps=1, **settings))
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*.safetensors")} == written
    for change in ({"steps": 2}, {"classes": 5}, {"pictures": 20}):
        with pytest.raises(ValueError, match="was trained by other settings"):
            pack(PackConfig(config.run, str(tmp_path / "third"), **{"steps": 1, **settings, **change}))


def test_a_name_that_is_none_is_refused():
    with pytest.raises(ValueError, match="There is no 'atelier-xl' to pack; choose from atelier-one-more-step"):
        PackConfig("run", "out", names="atelier-minority,atelier-xl")
