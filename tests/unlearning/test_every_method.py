"""Every method on the embedded model by its own recipe, shortened, through the command line; and what all refuse."""

import json
import logging

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import sfumato
from sfumato import recipes
from sfumato.cli import main
from sfumato.concepts import resolve
from sfumato.unlearning import job
from sfumato.unlearning.methods import METHODS

FEW = {
    "steps": 3, "forget_examples": 4, "retain_examples": 4, "anchor_examples": 4, "example_steps": 2, "batch_size": 4,
    "discriminator_warmup": 1, "trajectories_per_prompt": 1, "trajectory_steps": 2, "warmup_rounds": 1,
    "retain_trajectories": 4, "retain_batch_size": 4, "attack_steps": 2, "epochs": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def atelier():
    return sfumato.load("atelier")


def shortened(method):
    """The flags of `FEW` that a method has."""
    known = {name for config in METHODS[method].configs for name in config.__dataclass_fields__}
    return [word for name, value in FEW.items() if name in known for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("method", METHODS)
def test_method_forgets_two_concepts_on_the_embedded_model(method, atelier, tmp_path):
    output = tmp_path / "out"
    main(
        ["unlearn", method, "--forget", "sneaker", "boot", "--output", str(output), "--no_verify", *shortened(method)]
    )
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["method"] == method and manifest["forget"] == "sneaker, boot" and manifest["model"] == "atelier"
    assert manifest["concept"]["phrases"] == ["sneaker", "boot"] and manifest["seconds"] > 0
    recipe = recipes.find_recipe(method, atelier, ["sneaker", "boot"]).settings
    kept = {name: value for name, value in recipe.items() if name not in FEW}
    assert {name: manifest["settings"][name] for name in kept} == kept
    result = DiffusionPipeline.from_pretrained(output, dtype=torch.float32)
    part = "text_encoder" if method == "advunlearn" else "unet"
    for name in ("unet", "text_encoder", "vae"):
        before, after = atelier.components[name].state_dict(), result.components[name].state_dict()
        assert all(torch.equal(value, after[key]) for key, value in before.items()) == (name != part)
        assert all(torch.isfinite(value).all() for value in after.values())


def test_the_list_names_every_method(capsys):
    main(["methods"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in METHODS)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.anchors])
def test_a_setting_without_effect_is_said_to_have_none(method, atelier, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="`steps` must be at least 1"):
        sfumato.unlearn(atelier, "sneaker", method, anchor="bag", steps=0)
    assert f"{method} has no use for `anchor`" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1.0", "Unknown setting 'learning_rat'. Did you mean 'learning_rate'?"),
        ("learning_rate: 1e-5", "`learning_rate` must be"),
        ("1: 2", "Unknown setting 1."),
    ],
)
def test_a_recipe_with_a_mistake_is_refused_by_the_job(content, message, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(content)
    words = ["--forget", "sneaker", "--output", str(tmp_path / "out"), "--recipe", str(tmp_path / "recipe.yaml")]
    with pytest.raises(SystemExit) as stopped:
        job.main("salun", words)
    assert message in str(stopped.value)
    assert not (tmp_path / "out").exists()


def test_concepts_of_several_domains_are_never_replaced_by_each_other(atelier):
    concept = resolve(atelier, ["sneaker", "sketch"])
    assert not [text for text in (*concept.anchors, *concept.retain) if "sneaker" in text or "sketch" in text]


def test_pictures_can_not_be_forgotten_and_retained(atelier, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "one.png")
    folder = str(tmp_path)
    with pytest.raises(ValueError, match="are to be forgotten and retained; give two folders"):
        sfumato.unlearn(atelier, "sneaker", forget_images=folder, retain_images=folder)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "one.png", "text": "a red sneaker"}')
    with pytest.raises(ValueError, match="'a red sneaker' is to be retained but names 'sneaker'"):
        sfumato.unlearn(atelier, "sneaker", retain_images=folder)
    for content in ("[1]", '{"file_name": "one.png", "text": 5}'):
        (tmp_path / "metadata.jsonl").write_text(content)
        with pytest.raises(ValueError, match=r"metadata.jsonl is malformed"):
            sfumato.unlearn(atelier, "sneaker", retain_images=folder)
