"""The job: it resumes to the bit, leaves what loads, and says what is wrong before the long work."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import sfumato
from sfumato import MinorityClassifier, MinorityGuidanceScheduler, OneMoreStepPipeline, storage
from sfumato.guidance.job import JobConfig, main, train_guidance
from sfumato.guidance.networks import NetworkConfig
from sfumato.releasing.guidance import release_guidance
from sfumato.trainer import TrainingConfig
from sfumato.training import minority_classifier, one_more_step
from sfumato.training.minority_classifier import Minority, MinorityConfig
from sfumato.training.one_more_step import OneMoreStep, OneMoreStepConfig

NETWORK = {"channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 8}
SHORT = {"steps": 4, "learning_rate": 1e-3, "ema_decay": 0.9, "checkpoint_every": 2}
MODELS = {"step": "atelier", "classifier": "atelier", "pixels": "atelier-pixel"}


def method_of(kind):
    if kind == "step":
        return OneMoreStep(OneMoreStepConfig())
    return Minority(MinorityConfig(classes=6, repeats=1))


class Stopped(Exception):
    """Stands for a kill."""


def run(output, data_dir, kind="pixels", *, resume=False, stop=None, method=None, network=None, job=None, **how):
    method = method or method_of(kind)
    if stop is not None:
        made = method.objective

        def cut(materials):
            objective = made(materials)
            learn = objective.losses

            def losses(model, step, shard):
                if step == stop:
                    raise Stopped
                return learn(model, step, shard)

            objective.losses = losses
            return objective

        method.objective = cut
    given = {"model": MODELS[kind], "data_dir": data_dir, "pictures": 24, "batch_size": 8, **(job or {})}
    return train_guidance(
        method, JobConfig(str(output), resume=resume, **given), NetworkConfig(**{**NETWORK, **(network or {})}),
        TrainingConfig(**{**SHORT, **how}),
    )  # fmt: skip


def weights(folder):
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*model.safetensors"))}


@pytest.mark.parametrize("kind", ["step", "pixels"])
def test_a_run_cut_short_resumes_to_the_same_bits(tmp_path, fashion_mnist, kind, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, fashion_mnist, kind)
    with pytest.raises(Stopped):
        run(cut, fashion_mnist, kind, stop=3)
    assert not (cut / "manifest.json").exists()
    monkeypatch.setattr(minority_classifier, "minority_scores", None)  # they are kept
    run(cut, fashion_mnist, kind, resume=True)
    assert weights(whole) == weights(cut) != {}
    losses = [[row["loss"] for row in json.loads((folder / "history.json").read_text())] for folder in (whole, cut)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert sorted(entry.name for entry in cut.iterdir()) == sorted(entry.name for entry in whole.iterdir())
    found = [storage.read_json(folder / "manifest.json") for folder in (whole, cut)]
    assert found[0]["measured"] == found[1]["measured"] and not (cut / "checkpoints").exists()


def test_a_step_is_trained_loaded_drawn_with_and_released(tmp_path, fashion_mnist):
    folder = tmp_path / "out"
    made = run(folder, fashion_mnist, "step", steps=2, job={"save_dtype": "float16"})
    manifest = storage.read_json(folder / "manifest.json")
    assert manifest["method"] == "one-more-step" and manifest["beside"] == "atelier" and manifest["seed"] == 0
    assert set(manifest["settings"]) == {"job", "network", "method", "training"}
    assert manifest["pictures"]["pictures"] == 24 and manifest["measured"]["mean_square"] > 0
    assert not (folder / "text_encoder").exists()  # it is the model's own
    stored = storage.load_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert not any(value.any() for name, value in stored.items() if "time_emb" in name)
    assert manifest["fingerprint"] == storage.fingerprint(made.unet.named_parameters())
    base = sfumato.load("atelier")
    base.set_progress_bar_config(disable=True)
    release = release_guidance(folder, tmp_path / "release", license="apache-2.0", code=False)
    call = {"num_inference_steps": 2, "output_type": "np", "oms_guidance_scale": 2.0}
    drawn = [
        OneMoreStepPipeline.from_pretrained(place, base=base)(
            "a photo of a red bag", generator=torch.Generator().manual_seed(0), **call
        ).images
        for place in (folder, release)
    ]
    assert drawn[0].shape == (1, 32, 32, 3) and np.array_equal(*drawn)
    card = (release / "README.md").read_text()
    assert "license: apache-2.0" in card and "# One More Step for atelier" in card and not list(release.rglob("*.py"))
    assert fashion_mnist not in "".join(file.read_text() for file in release.glob("*.[jmy]*"))


@pytest.mark.parametrize("kind", ["classifier", "pixels"])
def test_a_classifier_is_trained_loaded_guided_by_and_released(tmp_path, fashion_mnist, kind):
    folder = tmp_path / "out"
    made = run(folder, fashion_mnist, kind, steps=2)
    loaded = MinorityClassifier.from_pretrained(folder)
    scores = storage.load_tensors(folder / "scores.safetensors")["scores"]
    assert len(scores) == 24 and loaded.config.num_classes == 6
    edges = loaded.config.thresholds
    assert [int((scores > edge).sum()) for edge in edges] == [20, 16, 12, 8, 4]
    pipe = sfumato.load(MODELS[kind])
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = MinorityGuidanceScheduler.from_config(pipe.scheduler.config, guidance_scale=2.0)
    prompt = {"class_labels": [3]} if kind == "pixels" else {"prompt": "a red bag"}
    drawn = []
    for classifier in (loaded, made, None):
        pipe.scheduler.set_classifier(classifier)
        if classifier is None:
            pipe.scheduler = MinorityGuidanceScheduler.from_config(pipe.scheduler.config, guidance_scale=0.0)
        call = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
        drawn.append(pipe(**prompt, **call).images)
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    release = release_guidance(folder, tmp_path / "release", license="mit")
    assert {file.name for file in release.iterdir()} == {
        "README.md", "config.json", "diffusion_pytorch_model.safetensors", "manifest.json", "minority_classifier.py",
        "recipe.yaml",
    }  # fmt: skip
    card = (release / "README.md").read_text()
    assert f"for {MODELS[kind]}" in card and "| 800 to 999 |" in card and "On 6 pictures that were held out" in card


def test_a_release_of_changed_weights_or_of_nothing_is_refused(tmp_path, fashion_mnist):
    folder = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json"):
        release_guidance(folder, tmp_path / "release", license="mit")
    run(folder, fashion_mnist, steps=1)
    file = folder / "diffusion_pytorch_model.safetensors"
    storage.save_tensors(file, {name: value + 1 for name, value in storage.load_tensors(file).items()})
    with pytest.raises(ValueError, match="were changed after the run"):
        release_guidance(folder, tmp_path / "release", license="mit")
    assert not (tmp_path / "release").exists()


def folder_of_pictures(renders, place, count=12, text=lambda k: f"a photo {k}"):
    place.mkdir()
    rows = []
    for number, file in enumerate(sorted(Path(renders).glob("*.png"))[:count]):
        shutil.copy(file, place)
        rows.append(json.dumps({"file_name": file.name, "text": text(number)}))
    (place / "metadata.jsonl").write_text("\n".join(rows))
    return str(place)


@pytest.mark.parametrize("kind", ["step", "pixels"])
def test_a_folder_of_pictures_will_do(tmp_path, renders, kind):
    """The pixel model gets them grey and small, with the names of its classes."""
    data = folder_of_pictures(renders, tmp_path / "data", text=lambda k: f"class {k % 10}")
    run(tmp_path / "out", None, kind, job={"data": data, "pictures": None}, steps=1)
    assert storage.read_json(tmp_path / "out" / "manifest.json")["pictures"]["source"] == "folder"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("pixels", {"job": {"pictures": 11}}, "6 classes need at least two pictures each, .* there are 11"),
        ("pixels", {"job": {"batch_size": 9}, "gradient_accumulation_steps": 2}, "can't be shared equally"),
        ("pixels", {"network": {"channels": [8, 10]}}, "`norm_num_groups` 4 does not divide the 10 of `channels`"),
        ("step", {"job": {"model": "atelier-pixel"}}, "is for Stable Diffusion 1, 2 and XL, and class-conditional"),
        ("step", {"job": {"model": "atelier-sr"}}, "ResShiftPipeline is not supported yet"),
        ("step", {"job": {"model": "./nowhere"}}, "There is no model folder"),
        ("step", {"job": {"data": "./nowhere", "pictures": None}}, "There is no image folder"),
        ("step", {"job": {"data": "./nowhere"}}, "`pictures` counts renders of atelier"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_left(tmp_path, fashion_mnist, kind, change, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(tmp_path / "out", fashion_mnist, kind, **change)
    assert not (tmp_path / "out").exists()


def test_captions_that_are_no_classes_are_refused(tmp_path, renders):
    data = folder_of_pictures(renders, tmp_path / "data")
    with pytest.raises(ValueError, match="The model has no class 'a photo 0'"):
        run(tmp_path / "out", None, job={"data": data, "pictures": None})


def test_another_run_is_not_gone_on_with_and_a_result_not_overwritten(tmp_path, fashion_mnist):
    folder = tmp_path / "out"
    with pytest.raises(Stopped):
        run(folder, fashion_mnist, stop=3)
    for change, said in (
        ({"job": {"pictures": 30}}, "pictures"),
        ({"method": Minority(MinorityConfig(classes=5, repeats=1))}, "settings.classes"),
        ({"network": {"channels": [16, 16]}}, "shape"),
        ({"learning_rate": 1e-4}, "training.learning_rate"),
    ):
        with pytest.raises(ValueError, match=f"checkpoint of another run: {said}"):
            run(folder, fashion_mnist, resume=True, **change)
    with pytest.raises(FileExistsError, match="holds an unfinished run"):
        run(folder, fashion_mnist)
    run(folder, fashion_mnist, resume=True)
    with pytest.raises(FileExistsError, match="already holds a finished model"):
        run(folder, fashion_mnist)


def command(script, *arguments):
    chosen = {one_more_step: (OneMoreStep, OneMoreStepConfig), minority_classifier: (Minority, MinorityConfig)}
    main(*chosen[script], script.TRAINING, "", [str(word) for word in arguments])


def test_the_command_line_takes_a_file_of_settings_and_goes_before_it(tmp_path, fashion_mnist):
    file = tmp_path / "settings.yaml"
    file.write_text("steps: 1\nchannels: [8, 16]\nnorm_num_groups: 4\nattention_head_dim: 8\nclasses: 9\nrepeats: 1\n")
    command(
        minority_classifier, "--config", file, "--output", tmp_path / "out", "--model", "atelier-pixel",
        "--classes", 3, "--pictures", 8, "--data_dir", fashion_mnist, "--batch_size", 4,
    )  # fmt: skip
    settings = storage.read_json(tmp_path / "out" / "manifest.json")["settings"]
    assert settings["method"]["classes"] == 3 and settings["training"]["steps"] == 1
    assert settings["training"]["weight_decay"] == 0.05 and settings["job"]["batch_size"] == 4


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (one_more_step, ["--pictures", "1"], "`pictures` must be at least 2"),
        (one_more_step, ["--caption_dropout", "2"], r"`caption_dropout` must lie in \[0, 1\)"),
        (minority_classifier, ["--classes", "1"], "`classes` must be at least 2"),
        (minority_classifier, ["--config", "no-such.yaml"], "no-such.yaml"),
    ],
)
def test_bad_settings_end_with_one_sentence(tmp_path, script, words, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        command(script, "--output", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
