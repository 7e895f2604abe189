import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    Dinov2Config,
    Dinov2Model,
)

from sfumato.evaluation.detectors import find_detector
from sfumato.evaluation.features import clip_scorer, extract, find_features
from sfumato.evaluation.judge import Judge
from sfumato.loading import assets_folder

PICTURES = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(assets_folder() / "atelier" / "tokenizer")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    text |= {"eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return str(folder)


def test_the_judges_features_are_its_own():
    judge = Judge.load(assets_folder() / "judge")
    with torch.no_grad():
        expected = judge.features(PICTURES)
    found = extract(find_features("judge", judge), PICTURES, batch_size=2)
    assert torch.allclose(found, expected, atol=1e-5) and not found.requires_grad
    with pytest.raises(ValueError, match="no judge"):
        find_features("judge")


@pytest.mark.parametrize("load", ["clip", "dinov2", "scorer", "clip detector", "classifier detector"])
def test_a_network_of_pickled_weights_is_refused(clip, dino, tmp_path, load):
    source = dino if load == "dinov2" else clip
    folder = shutil.copytree(source, tmp_path / "old")
    file = folder / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(ValueError, match=r"old/pytorch_model\.bin is a pickle"):
        if load == "scorer":
            clip_scorer(str(folder))
        elif load.endswith("detector"):
            find_detector(f"{load.split()[0]}:{folder}", ["bag"])
        else:
            find_features(f"{load}:{folder}")


def test_networks_give_a_row_a_picture_whatever_the_batch(clip, dino):
    for name, width in ((f"clip:{clip}", 8), (f"dinov2:{dino}", 12)):
        extractor = find_features(name)
        found = extract(extractor, PICTURES)
        assert found.shape == (5, width)
        assert torch.allclose(found, extract(extractor, PICTURES, batch_size=2), atol=1e-5)
        assert not torch.allclose(found[0], found[1], atol=1e-4)


def test_functions_are_found_by_name_and_checked():
    assert torch.equal(extract(find_features("torch:sigmoid"), PICTURES[0, 0]), PICTURES[0, 0].sigmoid())
    with pytest.raises(ValueError, match=r"Features must be \(N, F\).*\(5, 3, 32, 32\)"):
        extract(find_features("torch:sigmoid"), PICTURES)


@pytest.mark.parametrize(("name", "error"), [("vgg", ValueError), ("no.module:name", ImportError)])
def test_unknown_features_are_named(name, error):
    with pytest.raises(error, match=name):
        find_features(name)


def test_weights_that_are_not_there_are_named(tmp_path):
    with pytest.raises(OSError, match=f"clip:{tmp_path}"):
        find_features(f"clip:{tmp_path}")


def test_features_of_fid_say_what_they_need():
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="torch-fidelity"):
            find_features("inception")


def test_clip_scores_are_cosines_whatever_the_batch(clip):
    prompts = ["a bag", "a boot", "a red bag " * 30, "", "a coat"]
    found = clip_scorer(clip)(PICTURES, prompts)
    assert found.shape == (5,) and (found >= 0).all() and (found <= 100).all()
    assert torch.allclose(found, clip_scorer(clip, batch_size=1)(PICTURES, prompts), atol=1e-3)
    other = clip_scorer(clip)(PICTURES.flip(0), prompts)
    assert not torch.allclose(found, other, atol=1e-3)
