"""Captioned pictures of a model's kind."""

import json

import pytest
import torch
from PIL import Image

import sfumato
from sfumato import atelier
from sfumato.families import family_of
from sfumato.guidance.pictures import Renders, pictures_for
from sfumato.randomness import rng_for


@pytest.fixture(scope="module")
def families():
    return {name: family_of(sfumato.load(name)) for name in ("atelier", "atelier-pixel")}


def test_one_caption_in_ten_of_atelier_is_empty_and_attributes_may_be_left_out():
    captions = [atelier.random_caption(9, 1, 0, rng_for(0, k)) for k in range(2000)]
    assert 0.08 < captions.count("") / 2000 < 0.12
    for word, least, most in (("sketch", 0.6, 0.75), ("red", 0.6, 0.75), ("boot", 0.72, 0.9)):
        assert least < sum(word in text for text in captions) / 2000 < most


def test_renders_show_what_their_captions_say_and_a_part_is_the_beginning_of_all(families, fashion_mnist):
    whole = pictures_for(families["atelier"], "atelier", fashion_mnist, None, 0)
    part = pictures_for(families["atelier"], "atelier", fashion_mnist, 20, 0)
    assert len(whole.captions) == 60 and whole.captions[:20] == part.captions
    pictures = whole.take(range(60))
    assert torch.equal(pictures[:20], part.take(range(20))) and pictures.shape == (60, 3, 32, 32)
    red = [k for k, text in enumerate(whole.captions) if "red" in text]
    cyan = [k for k, text in enumerate(whole.captions) if "cyan" in text]
    warm = pictures[:, 0].mean((1, 2)) - pictures[:, 2].mean((1, 2))
    assert red and cyan and warm[red].min() > warm[cyan].max()
    assert Renders(fashion_mnist, None, 1).captions != whole.captions
    assert part.facts() != whole.facts() != Renders(fashion_mnist, None, 1).facts()


def test_garments_come_with_the_names_of_their_classes(families, fashion_mnist):
    found = pictures_for(families["atelier-pixel"], "atelier", fashion_mnist, 12, 0)
    assert found.captions == [f"class {k % 10}" for k in range(12)]
    pictures = found.take(range(3, 7))
    assert pictures.shape == (4, 1, 16, 16) and pictures.min() >= 0 and pictures.max() <= 1


def test_pictures_of_a_folder_are_made_to_fit_the_model(families, tmp_path):
    for number, colour in enumerate(("red", "black")):
        Image.new("RGB", (40, 50), colour).save(tmp_path / f"{number}.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": "class 3"}))
    small = pictures_for(families["atelier-pixel"], str(tmp_path), None, None, 0)
    large = pictures_for(families["atelier"], str(tmp_path), None, None, 0)
    assert small.captions == large.captions == ["", "class 3"]
    assert small.take(range(2)).shape == (2, 1, 16, 16) and large.take(range(2)).shape == (2, 3, 32, 32)
    before = large.facts()
    Image.new("RGB", (40, 50), "blue").save(tmp_path / "0.png")
    assert pictures_for(families["atelier"], str(tmp_path), None, None, 0).facts() != before


def test_pictures_of_another_size_than_the_model_draws_are_refused(families, fashion_mnist, monkeypatch):
    family = families["atelier-pixel"]
    monkeypatch.setattr(type(family), "image_size", property(lambda self: (64, 64)))
    with pytest.raises(ValueError, match="this model .* draws 64 x 64: name a folder of its kind with `data`"):
        pictures_for(family, "atelier", fashion_mnist, None, 0)
