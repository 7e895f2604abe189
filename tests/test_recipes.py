from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

import sfumato
from sfumato.concepts import KINDS, kind_of, vocabulary_of
from sfumato.recipes import find_recipe, read_recipe
from sfumato.unlearning.methods import METHODS

SHIPPED = sorted(entry.name for entry in (files("sfumato.training") / "configs").iterdir())


@pytest.fixture(scope="module")
def atelier():
    return sfumato.load("atelier")


def test_every_method_has_a_recipe_for_every_kind_of_concept_and_for_stable_diffusion():
    expected = {f"{method}-atelier-{kind}.yaml" for method in METHODS for kind in KINDS}
    assert set(SHIPPED) == expected | {f"{method}-sd14.yaml" for method in METHODS}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_has_every_setting_of_its_method_and_says_why(name):
    method = name.split("-")[0]
    path = str(files("sfumato.training") / "configs" / name)
    recipe = read_recipe(path, method)
    configs = [
        cls(**{key: value for key, value in recipe.settings.items() if key in cls.__dataclass_fields__})
        for cls in METHODS[method].configs
    ]
    known = {key: value for config in configs for key, value in asdict(config).items()}
    places = {"forget_images", "retain_images", "mask_path", "log_with", "save", "lora_rank"}  # these are the user's
    assert set(known) - set(recipe.settings) == set(known) & places
    assert {key: known[key] for key in recipe.settings} == recipe.settings
    text = Path(path).read_text()
    assert text.startswith("# ") and yaml.safe_load(text)["method"] == method
    assert "seed" in recipe.settings or not METHODS[method].trains
    if "-atelier-" in name or recipe.expected:
        assert set(recipe.expected) == {"ua", "ira", "cra"}
        assert all(0 <= low <= high <= 100 for low, high in recipe.expected.values())


@pytest.mark.parametrize(
    ("forget", "kind"),
    [
        ("sneaker", "object"),
        ("a red sneaker", "object"),
        ("sketch", "style"),
        ("a red sketch", "style"),
        ("red", "attribute"),
        (["sneaker"], "object"),
        (["sneaker", "boot"], "global"),
    ],
    ids=str,
)
def test_the_kind_of_a_concept_chooses_the_recipe(atelier, forget, kind):
    vocabulary = vocabulary_of(atelier)
    assert kind_of(vocabulary, forget) == kind
    named = find_recipe("esd", None, "anything", f"esd-atelier-{kind}")
    assert find_recipe("esd", atelier, forget) == named and named.settings["steps"] > 0


def test_a_model_without_a_vocabulary_has_no_recipe_of_its_own():
    assert find_recipe("esd", None, "a dog").settings == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("steps: [", "not valid YAML"),
        ("- steps", "must map settings to values"),
        ("method: salun", "a recipe for salun, not for esd"),
        ("expected: 95", "`expected` must map figures to ranges"),
        ("expected: {ua: [100, 95]}", "`expected` must map figures to ranges"),
        ("expected: {ua: [95]}", "`expected` must map figures to ranges"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(content, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        find_recipe("esd", None, "a dog", tmp_path / "mine.yaml")
