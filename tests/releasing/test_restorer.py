"""A restoration model as a release: it loads, shows what it does, says how it was made, and names no local folder."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import sfumato
from sfumato import cli, storage
from sfumato.loading import assets_folder
from sfumato.releasing import hub
from sfumato.releasing.restorer import release_restorer
from sfumato.restoration.job import main
from sfumato.training import rddm, resshift

SMALL = [
    "--size", "32", "--batch_size", "4", "--held_out_pictures", "3", "--channels", "8", "16", "--norm_num_groups", "4",
    "--attention_levels", "0", "--attention_head_dim", "8", "--steps", "2", "--warmup_steps", "0",
]  # fmt: skip


def train(script, config, *arguments):
    main(config, script.TRAINING, script.make, "", [*map(str, arguments)])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("someone") / "photos"
    folder.mkdir()
    for file in sorted((assets_folder() / "renders").glob("*.png"))[::40]:
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "enlarger"
    train(resshift, resshift.ResShiftConfig, "--data", photos, "--output", folder, *SMALL)
    return folder


@pytest.fixture(scope="module")
def released(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "released"
    cli.main(["release", str(trained), "--output", str(folder), "--license", "mit"])
    return folder


def restored(pipe):
    pipe.set_progress_bar_config(disable=True)
    picture = torch.linspace(0, 1, 192).reshape(3, 8, 8)
    return pipe(picture, generator=torch.Generator().manual_seed(0), output_type="pt").images


def test_it_loads_and_draws_the_same_pictures(trained, released):
    assert torch.equal(restored(sfumato.load(released)), restored(sfumato.load(trained)))
    assert {"pipeline_resshift.py", "recipe.yaml", "samples.png"} <= {file.name for file in released.iterdir()}
    assert (released / "scheduler" / "scheduling_resshift.py").is_file()


def test_its_card_has_scores_pictures_licence_and_use(released):
    card = ModelCard.load(released / "README.md")
    assert card.data.license == "mit" and card.data.pipeline_tag == "image-to-image"
    scores = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert scores.keys() == {"psnr", "ssim"} and 0 < scores["psnr"] < 40
    assert "trust_remote_code=True" in card.text and "# X4 super-resolution" not in card.text
    assert "# x4 super-resolution with ResShift" in card.text and "](samples.png)" in card.text
    assert Image.open(released / "samples.png").size == (3 * 68, 2 * 68)  # degraded, restored, clean of two


def test_its_recipe_repeats_the_training(trained, released, photos, tmp_path):
    again = tmp_path / "again"
    recipe = released / "recipe.yaml"
    train(resshift, resshift.ResShiftConfig, "--config", recipe, "--data", photos, "--output", again)
    found = [storage.read_json(folder / "manifest.json")["fingerprint"] for folder in (trained, again)]
    assert found[0] == found[1] == storage.read_json(released / "manifest.json")["result_fingerprint"]


def test_no_folder_of_whoever_trained_it_is_named(released, photos):
    for file in released.rglob("*"):
        if file.suffix in (".json", ".yaml", ".md"):
            assert str(photos.parent) not in file.read_text(), file
    assert "Bring your own for data." in (released / "README.md").read_text()


def test_two_networks_and_generation(photos, tmp_path):
    settings = ["--generation", "--two_networks", "--num_train_timesteps", "50"]
    train(rddm, rddm.RDDMConfig, "--data", photos, "--output", tmp_path / "run", *SMALL, *settings)
    folder = release_restorer(tmp_path / "run", tmp_path / "out", license="mit")
    assert "pipe(batch_size=4).images" in (folder / "README.md").read_text()
    assert type(sfumato.load(folder)).__name__ == "RDDMPipeline"


def test_without_code_it_is_for_users_of_this_package(trained, tmp_path):
    folder = release_restorer(trained, tmp_path / "out", license="mit", code=False)
    assert not list(folder.rglob("*.py"))
    assert "from sfumato import ResShiftPipeline" in (folder / "README.md").read_text()
    assert torch.equal(restored(sfumato.load(folder)), restored(sfumato.load(trained)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "state one with `license`"),
        ({"license": "my own"}, "must be an identifier"),
        ({"license": "mit", "formats": ["full"]}, "`formats` is for unlearning results"),
        ({"license": "mit", "attacks": ["attack.json"]}, "`attacks` is for unlearning results"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(trained, options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        sfumato.release(trained, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_the_runs_and_damaged_folders_are_refused(trained, released, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    changed = {name: value + 1 for name, value in storage.load_tensors(weights).items()}
    storage.save_tensors(weights, changed, {"format": "pt"})
    with pytest.raises(ValueError, match="changed after the run"):
        sfumato.release(folder, tmp_path / "out", license="mit")
    (folder / "validation.json").write_text(json.dumps({"of": {}, "rows": []}))
    with pytest.raises(ValueError, match="has no row"):
        sfumato.release(folder, tmp_path / "out", license="mit")
    with pytest.raises(FileExistsError, match="already holds something"):
        sfumato.release(trained, released, license="mit")


def test_an_upload_claims_the_repository_for_the_run_and_goes_on(trained, tmp_path, monkeypatch):
    asked, sent = [], []
    monkeypatch.setattr(hub, "check_push", lambda repo_id, run, **_: asked.append(run) or "absent")
    monkeypatch.setattr(hub, "push", lambda folder, repo_id, **how: sent.append((folder, repo_id, how["public"])))
    for _ in range(2):
        folder = sfumato.release(trained, tmp_path / "out", license="mit", push="me/enlarger")
    stated = storage.read_json(folder / "manifest.json")
    assert asked[0] == asked[1] and asked[0].items() <= stated.items()
    assert sent == [(folder, "me/enlarger", False)] * 2
    assert 'release = "me/enlarger"' in (folder / "README.md").read_text()
