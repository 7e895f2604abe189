"""The job: it learns, resumes to the bit, leaves a pipeline, and says what is wrong before the long work."""

import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato import RDDMPipeline, ResShiftPipeline, storage
from sfumato.restoration import regression
from sfumato.restoration.degradations import Degradation
from sfumato.restoration.examples import HeldOut
from sfumato.restoration.job import JobConfig, main, train_restoration
from sfumato.restoration.networks import NetworkConfig
from sfumato.restoration.regression import Regression, RegressionConfig
from sfumato.restoration.scores import psnr
from sfumato.restoration.validation import Validation, restore
from sfumato.trainer import TrainingConfig
from sfumato.training import rddm, resshift

NETWORK = {"channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 8, "attention_levels": 0}
SHORT = {"steps": 6, "learning_rate": 1e-3, "ema_decay": 0.9, "checkpoint_every": 2}
KINDS = {
    "resshift": (resshift, resshift.ResShiftConfig),
    "rddm": (rddm, rddm.RDDMConfig),
    "regression": (regression, RegressionConfig),
}


class Stopped(Exception):
    """Stands for a kill."""


class Until:
    """An objective that is cut short at a step."""

    def __init__(self, objective, step):
        self.objective, self.step, self.batch_size = objective, step, objective.batch_size

    def losses(self, model, step, shard):
        if step == self.step:
            raise Stopped
        return self.objective.losses(model, step, shard)


def run(
    output, data, kind="resshift", task="sr", network=None, settings=None, resume=False, stop=None, degradation=None,
    job=None, **how,
):  # fmt: skip
    script, config = KINDS[kind]
    shape = NetworkConfig(**{**NETWORK, **(network or {})})
    method = script.make(config(**(settings or {})), shape)
    if stop is not None:
        made = method.objective
        method = replace(method, objective=lambda examples: Until(made(examples), stop))
    given = {"data": data, "size": 32, "batch_size": 8, "held_out_pictures": 6, **(job or {})}
    return train_restoration(
        method, JobConfig(str(output), resume=resume, **given), Degradation(task, **(degradation or {})), shape,
        TrainingConfig(**{**SHORT, **how}),
    )  # fmt: skip


def files(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*unet/*.safetensors"))}


def rows(folder):
    found = json.loads((folder / "validation.json").read_text())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found["rows"]]


@pytest.mark.parametrize(("kind", "task"), [("resshift", "sr"), ("rddm", "inpaint")])
def test_a_run_cut_short_resumes_to_the_same_bits(tmp_path, renders, kind, task):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, renders, kind, task)
    with pytest.raises(Stopped):
        run(cut, renders, kind, task, stop=5)
    seen = json.loads((cut / "validation.json").read_text())
    assert [row["step"] for row in seen["rows"]] == [2, 4] and not (cut / "model_index.json").exists()
    seen["rows"].pop()  # as if the kill had come before the last look was written
    storage.write_text(cut / "validation.json", json.dumps(seen))
    run(cut, renders, kind, task, resume=True)
    assert files(whole) == files(cut) != {}
    assert rows(whole) == rows(cut) and [row["step"] for row in rows(cut)] == [2, 4, 6]
    assert sorted(entry.name for entry in cut.iterdir()) == sorted(entry.name for entry in whole.iterdir())
    assert not (cut / "checkpoints").exists()


def test_training_learns_and_the_result_restores(tmp_path, renders):
    """A minute of training would pass bicubic; this one only has to come nearer, from noise."""
    folder = tmp_path / "learnt"
    made = run(folder, renders, steps=60, learning_rate=4e-3, checkpoint_every=15, job={"distance": "judge"})
    losses = [row["loss"] for row in json.loads((folder / "history.json").read_text())]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])
    seen = rows(folder)
    assert [row["step"] for row in seen] == [15, 30, 45, 60]
    assert seen[-1]["psnr"]["value"] > seen[0]["psnr"]["value"] + 1
    assert seen[-1]["distance"]["value"] < seen[0]["distance"]["value"]
    baseline = json.loads((folder / "validation.json").read_text())["baseline"]
    assert set(baseline) == {"psnr", "ssim", "distance"} and all(score["low"] for score in baseline.values())
    loaded = ResShiftPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    assert len(loaded.scheduler.timesteps) == 4 and loaded.config.scale == 4 and loaded.config.patch_size == 2
    small = Image.open(f"{renders}/000-t-shirt-photo-red.png").resize((8, 8), Image.Resampling.BICUBIC)
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    made.set_progress_bar_config(disable=True)
    found = [pipe(small, generator=seed).images[0] for pipe, seed in zip((made, loaded), seeds, strict=True)]
    assert found[0].size == (32, 32) and np.array_equal(*map(np.asarray, found))


def test_validation_is_of_the_averaged_weights_with_the_pipeline_of_the_result(tmp_path, renders):
    from sfumato.restoration.examples import hold_out
    from sfumato.restoration.pictures import folder_pictures, split

    made = run(tmp_path / "out", renders)
    made.set_progress_bar_config(disable=True)
    others = split(folder_pictures(renders, 32, shown=False), 6, seed=0)[1]
    held_out = hold_out(others, Degradation("sr"), 6, seed=0)
    expected = psnr(restore(made, held_out, batch_size=4), held_out.clean)
    assert rows(tmp_path / "out")[-1]["psnr"]["value"] == pytest.approx(float(expected.mean()), rel=1e-5)


def test_what_a_run_leaves(tmp_path, renders):
    folder = tmp_path / "out"
    run(folder, renders, task="deblur", degradation={"blur": 1.0}, job={"save_dtype": "float16"})
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["method"] == "resshift" and manifest["seed"] == 0 and manifest["scale"] == 1
    assert set(manifest["settings"]) == {"job", "degradation", "network", "method", "training"}
    assert manifest["settings"]["degradation"]["blur"] == 1.0 and manifest["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in (folder / "manifest.json").read_text()
    stored = storage.load_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert manifest["parameters"] == sum(value.numel() for value in stored.values())
    assert manifest["fingerprint"] == storage.fingerprint(stored.items())
    sheet = Image.open(folder / "validation" / "step-00000006.png")
    assert sheet.size == (3 * 68, 6 * 68)  # degraded, restored, clean of 64x64 with a margin
    card = (folder / "README.md").read_text()
    assert "# Deblurring with ResShift" in card and "validation/step-00000006.png" in card and renders not in card
    with pytest.raises(FileExistsError, match="already holds a finished model"):
        run(folder, renders)


def test_rddm_generates_too_and_two_networks_load(tmp_path, renders):
    settings = {"generation": True, "two_networks": True, "num_train_timesteps": 100}
    folder = tmp_path / "out"
    run(folder, renders, "rddm", settings=settings, job={"distance": "judge"}, steps=2)
    pipe = RDDMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.noise_unet is not None and not pipe.config.conditioned
    assert pipe(batch_size=2, output_type="pt").images.shape == (2, 3, 32, 32)
    assert rows(folder)[-1]["distance"]["value"] > 0
    assert "# Generation with RDDM" in (folder / "README.md").read_text()


def test_regression_trains_by_the_same_job(tmp_path, renders):
    folder = tmp_path / "out"
    made = run(folder, renders, "regression", steps=30, learning_rate=4e-3, checkpoint_every=10)
    assert rows(folder)[-1]["psnr"]["value"] > rows(folder)[0]["psnr"]["value"]
    picture = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    loaded = Regression.from_pretrained(folder)
    assert torch.equal(loaded(picture).images, made(picture).images)
    assert loaded(picture).images.shape == (2, 3, 32, 32)
    network = resshift.make(resshift.ResShiftConfig(), NetworkConfig(**NETWORK))
    assert network.heads == 1  # so that both have the same weights


def test_regression_keeps_what_is_known(tmp_path, renders):
    made = run(tmp_path / "out", renders, "regression", "inpaint", steps=2)
    picture, mask = torch.rand(2, 3, 32, 32), torch.zeros(2, 1, 32, 32)
    mask[..., 8:20, 4:9] = 1
    found = made(picture, mask).images
    assert torch.equal(found == picture, (mask == 0).expand_as(found))


def test_the_chain_may_run_in_the_latents_of_an_autoencoder(tmp_path, renders):
    network = {"vae": "atelier", "patch_size": 1}
    run(tmp_path / "out", renders, network=network, steps=2)
    pipe = ResShiftPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae is not None and pipe.scheduler.config.latent_space and not pipe.scheduler.config.clip_sample
    assert pipe.unet.config.in_channels == 4 + 3
    assert pipe(torch.rand(1, 3, 8, 8), output_type="pt").images.shape == (1, 3, 32, 32)


def test_renders_are_drawn_from_the_training_garments_and_validated_on_the_test_ones(tmp_path, fashion_mnist):
    run(tmp_path / "out", "atelier", steps=2, job={"data_dir": fashion_mnist})
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["pictures"]["split"] == "train" and manifest["settings"]["job"]["distance"] == "judge"
    assert {"psnr", "ssim", "distance"} <= set(rows(tmp_path / "out")[-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"job": {"size": 24}, "degradation": {"scale": 5}}, "`scale` 5 does not divide the pictures' size, 24"),
        (
            {"network": {"channels": [8, 8, 8, 8], "patch_size": 8}},
            "takes sides that 64 divides, and the chain's is 32",
        ),
        ({"network": {"channels": [8, 10]}}, "`norm_num_groups` 4 does not divide the 10 of `channels`"),
        ({"settings": {"num_train_timesteps": 1}}, "from 2 on, got 1"),
        ({"job": {"distance": "eyes"}}, "There are no features 'eyes'"),
        ({"job": {"batch_size": 9}, "gradient_accumulation_steps": 2}, "can't be shared equally"),
        ({"job": {"data": "atelier", "size": 64}}, "The pictures of atelier are 32x32, not 64"),
        ({"job": {"size": 48}}, "smaller than the crops of 48x48"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_left(tmp_path, renders, change, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(tmp_path / "out", **{"data": renders, **change})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "named"),
    [({"task": "inpaint"}, "task='inpaint', scale=1"), ({"degradation": {"noise": 0.1}}, "noise=0.1")],
    ids=["task", "noise"],
)
def test_generation_undoes_nothing(tmp_path, renders, asked, named):
    with pytest.raises(ValueError, match=f"`generation` draws pictures and undoes nothing: leave out {named}."):
        run(tmp_path / "out", renders, "rddm", settings={"generation": True}, **asked)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["data", "held_out"])
def test_a_result_among_the_pictures_is_refused(tmp_path, renders, name):
    inner, link = tmp_path / "photos" / "runs" / "out", tmp_path / "link"
    (tmp_path / "photos").mkdir()
    for file in sorted(Path(renders).glob("*.png"))[:12]:
        shutil.copy(file, tmp_path / "photos")
    link.symlink_to(tmp_path / "photos", target_is_directory=True)
    for photos in (tmp_path / "photos", link):
        with pytest.raises(ValueError, match=f"lies in `{name}`, .*{photos.name}, .*: choose one elsewhere"):
            run(inner, **{"data": renders, "job": {name: str(photos)}})
    assert not inner.parent.exists()
    run(tmp_path / "photos-out", str(tmp_path / "photos"), steps=1, job={"batch_size": 2})  # beside it


def test_a_folder_without_an_autoencoder_is_refused(tmp_path, renders):
    with pytest.raises(ValueError, match=r"holds no autoencoder: there is no config\.json"):
        run(tmp_path / "out", renders, network={"vae": renders})
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="must be one of AutoencoderKL, VQModel, and .* holds UNet2DModel"):
        run(tmp_path / "out", renders, network={"vae": str(tmp_path)})


def test_no_pictures_and_broken_ones_are_refused_and_nothing_is_left(tmp_path, renders):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    with pytest.raises(FileNotFoundError, match="There are no pictures"):
        run(tmp_path / "out", str(pictures))
    (pictures / "one.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"one\.png: can't be read"):
        run(tmp_path / "out", str(pictures))
    assert not (tmp_path / "out").exists()


def test_pictures_to_validate_with_are_not_trained_on(tmp_path, renders):
    with pytest.raises(ValueError, match="All pictures of .* are in .* too"):
        run(tmp_path / "out", renders, job={"held_out": renders})
    data = tmp_path / "data"
    (data / "inner").mkdir(parents=True)
    for place, file in enumerate(sorted(Path(renders).glob("*.png"))[:12]):
        shutil.copy(file, data / "inner" if place < 4 else data)
    run(tmp_path / "out", str(data), steps=2, job={"held_out": str(data / "inner"), "batch_size": 2})
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["pictures"]["pictures"] == 8


def test_a_run_of_other_settings_or_pictures_is_not_resumed(tmp_path, renders):
    folder = tmp_path / "out"
    with pytest.raises(Stopped):
        run(folder, renders, stop=3)
    for change, said in (
        ({"degradation": {"noise": 0.1}}, "degradation"),
        ({"settings": {"kappa": 1.0}}, "settings"),
        ({"network": {"layers_per_block": 2}}, "network"),
        ({"network": {"attention_head_dim": 4}}, "shape.attention_head_dim"),
        ({"network": {"norm_num_groups": 2}}, "shape.norm_num_groups"),
        ({"learning_rate": 1e-4}, "training.learning_rate"),
        ({"job": {"held_out_pictures": 12}}, "pictures"),
    ):
        with pytest.raises(ValueError, match=f"checkpoint of another run: {said}"):
            run(folder, renders, resume=True, **change)
    with pytest.raises(FileExistsError, match="holds an unfinished run"):
        run(folder, renders)


def test_curves_of_another_distance_or_of_other_pictures_are_not_gone_on_with(tmp_path, renders):
    folder, pictures = tmp_path / "out", sorted(Path(renders).glob("*.png"))
    for name, chosen in (("one", pictures[:4]), ("other", pictures[4:8])):
        (tmp_path / name).mkdir()
        for file in chosen:
            shutil.copy(file, tmp_path / name)
    data = tmp_path / "data"
    data.mkdir()
    for file in pictures[8:24]:
        shutil.copy(file, data)
    given = {"held_out": str(tmp_path / "one"), "distance": "judge"}
    with pytest.raises(Stopped):
        run(folder, str(data), stop=3, job=given)
    for change, said in (
        ({"distance": "none"}, "have the distance 'judge', not 'none'"),
        ({"held_out": str(tmp_path / "other")}, "were drawn from other held-out pictures"),
    ):
        with pytest.raises(ValueError, match=f"The curves in .* {said}: resume with the same, or delete"):
            run(folder, str(data), resume=True, job={**given, **change})
    assert [row["step"] for row in rows(folder)] == [2]  # nothing was trained
    (folder / "validation.json").unlink()
    run(folder, str(data), resume=True, job={**given, "distance": "none"})
    assert [row["step"] for row in rows(folder)] == [2, 4, 6] and "distance" not in rows(folder)[-1]


def test_curves_leave_out_rows_without_the_score(tmp_path):
    pytest.importorskip("matplotlib")
    looking = Validation(HeldOut(torch.zeros(2, 3, 16, 16), None, 0), 1, None, tmp_path)
    looking.rows = [{"step": 2, "psnr": {"value": 1.0}, "distance": {"value": 1.0}}, {"step": 4, "psnr": {"value": 2}}]
    looking.draw_curves(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size


def test_curves_that_are_not_drawn_are_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("sfumato.restoration.validation.find_spec", lambda name: None)
    looking = Validation(HeldOut(torch.zeros(2, 3, 16, 16), None, 0), 1, None, tmp_path)
    looking.draw_curves(tmp_path / "curves.png")
    assert caplog.messages == []  # there is nothing to draw
    looking.rows = [{"step": 2, "psnr": {"value": 1.0}}]
    looking.draw_curves(tmp_path / "curves.png")
    assert caplog.messages == ["curves.png is left out: it is drawn by matplotlib (pip install 'sfumato[train]')."]
    assert not (tmp_path / "curves.png").exists()
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert any(line.startswith("matplotlib") for line in project["optional-dependencies"]["train"])


def command(output, *arguments):
    main(resshift.ResShiftConfig, resshift.TRAINING, resshift.make, "", ["--output", str(output), *arguments])


def test_the_command_line_takes_a_file_of_settings_and_goes_before_it(tmp_path, renders):
    file = tmp_path / "settings.yaml"
    file.write_text("steps: 2\nchannels: [8, 16]\nnorm_num_groups: 4\nattention_head_dim: 8\nscale: 2\nkappa: 1.5\n")
    command(tmp_path / "out", "--config", str(file), "--data", renders, "--size", "32", "--scale", "4")
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert settings["degradation"]["scale"] == 4 and settings["method"]["kappa"] == 1.5
    assert settings["training"]["steps"] == 2 and settings["training"]["ema_decay"] == 0.999


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps: 2", "'stepps' is none"),
        ("output: here", "'output' is none"),
        ("- 2", "must map settings to values"), ("a: [", "not valid YAML"),
        ("kappa: [1]", "`kappa` must be a finite number, got"),
    ],
)  # fmt: skip
def test_a_file_of_settings_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(SystemExit, match=message):
        command(tmp_path / "out", "--config", str(tmp_path / "settings.yaml"))
    with pytest.raises(SystemExit, match="error: .*no-such.yaml"):
        command(tmp_path / "out", "--config", str(tmp_path / "no-such.yaml"))
