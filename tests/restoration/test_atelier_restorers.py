"""The embedded restoration models: what the script trains and packs is what the package loads."""

import pytest
import torch

import sfumato
from sfumato import cli, storage
from sfumato.loading import assets_folder
from sfumato.pipelines.restoration import degraded_start
from sfumato.restoration.degradations import Degradation
from sfumato.restoration.examples import hold_out
from sfumato.restoration.networks import NetworkConfig
from sfumato.restoration.pictures import folder_pictures
from sfumato.restoration.scores import score
from sfumato.restoration.validation import restore
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


@pytest.mark.parametrize("task", ["sr", "inpaint"])
def test_the_shipped_model_restores(task):
    """Far better than what it starts from, on pictures that it was not trained on."""
    degradation = Degradation(task=task)
    held_out = hold_out(folder_pictures(assets_folder() / "renders", 32, shown=False), degradation, 24, 0)
    pipe = sfumato.load(f"atelier-{task}")
    pipe.set_progress_bar_config(disable=True)
    start = (degraded_start(held_out.degraded.picture, degradation.factor) / 2 + 0.5).clamp(0, 1)
    before, after = (score(some, held_out.clean)["psnr"].mean() for some in (start, restore(pipe, held_out)))
    assert after > before + 7


@pytest.mark.parametrize("task", ["sr", "inpaint"])
def test_the_shipped_model_is_the_one_its_manifest_tells_of(task):
    folder = assets_folder() / f"atelier-{task}"
    manifest = storage.read_json(folder / "manifest.json")
    weights = dict(sfumato.load(f"atelier-{task}", dtype=torch.float16).unet.named_parameters())
    assert storage.fingerprint(weights.items()) == manifest["fingerprint"]
    assert manifest["settings"]["training"]["steps"] == atelier_restorers.STEPS
    assert {path.name for path in folder.iterdir()} >= {"README.md", "recipe.yaml", "samples.png"}


def test_the_shipped_models_are_known_by_name_to_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = next((assets_folder() / "renders").glob("*.png"))
    with pytest.raises(SystemExit, match="atelier-sr is a model for sr, not for denoise"):
        cli.main(["restore", str(picture), "--model", "atelier-sr", "--task", "denoise", "--output", "out"])
