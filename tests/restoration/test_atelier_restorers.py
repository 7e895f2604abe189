"""The embedded restoration models: what the script trains and packs is what the package loads."""

import pytest

import sfumato
from sfumato import storage
from sfumato.restoration.networks import NetworkConfig
from sfumato.training import atelier_restorers
from sfumato.training.atelier_restorers import PackConfig, pack


@pytest.fixture
def small(monkeypatch):
    shape = {"channels": [8, 16], "norm_num_groups": 4, "attention_levels": 0, "attention_head_dim": 8}
    monkeypatch.setattr(atelier_restorers, "NetworkConfig", lambda: NetworkConfig(**shape))


def test_both_are_trained_once_and_packed_without_code(small, tmp_path, fashion_mnist):
    config = PackConfig(str(tmp_path / "run"), str(tmp_path / "out"), steps=2, data_dir=fashion_mnist)
    folders = pack(config)
    assert [folder.name for folder in folders] == ["atelier-sr", "atelier-inpaint"]
    for folder, masked in zip(folders, (False, True), strict=True):
        pipe = sfumato.load(folder)
        assert pipe.config.masked == masked and not list(folder.rglob("*.py"))
        assert fashion_mnist not in (folder / "recipe.yaml").read_text()
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*.safetensors")}
    again = pack(PackConfig(config.run, str(tmp_path / "again"), steps=2, data_dir=fashion_mnist))
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*.safetensors")} == written
    found = [storage.read_json(folder / "manifest.json")["result_fingerprint"] for folder in (folders[0], again[0])]
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="was trained by other settings"):
        pack(PackConfig(config.run, str(tmp_path / "third"), steps=3, data_dir=fashion_mnist))
