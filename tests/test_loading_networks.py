"""Networks that are no part of a pipeline, by `sfumato.load`: classifiers; anything else is refused by name."""

import json
import shutil

import pytest
import torch
from diffusers import UNet2DModel

import sfumato
from sfumato import MinorityClassifier, storage

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return MinorityClassifier(
        num_classes=3, in_channels=2, sample_size=8, block_out_channels=(32,), layers_per_block=1,
        attention_head_dim=8, norm_num_groups=4,
    )  # fmt: skip


@pytest.fixture
def folder(classifier, tmp_path):
    classifier.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_classifier_is_one_ready_to_guide(classifier, folder, dtype):
    loaded = sfumato.load(folder, **({} if dtype is torch.float32 else {"dtype": dtype}))
    assert type(loaded) is MinorityClassifier and not loaded.training
    assert {value.dtype for value in loaded.parameters()} == {dtype} and loaded.device.type == "cpu"
    pairs = zip(loaded.parameters(), classifier.parameters(), strict=True)
    assert all(torch.equal(found, value.to(dtype)) for found, value in pairs)
    sample = torch.ones(1, 2, 8, 8)
    assert torch.allclose(
        loaded(sample, 7), classifier.eval()(sample, 7), atol=1e-5 if dtype is torch.float32 else 0.1
    )


def test_half_precision_on_disk_is_float32_unless_asked_for(classifier, tmp_path):
    MinorityClassifier.from_config(classifier.config).half().save_pretrained(tmp_path)
    assert sfumato.load(tmp_path).dtype == torch.float32
    assert sfumato.load(str(tmp_path), dtype=torch.float16).dtype == torch.float16


def test_what_a_training_leaves_beside_it_is_no_matter(folder):
    (folder / "history.json").write_text("[]")
    storage.save_tensors(folder / "scores.safetensors", {"scores": torch.zeros(3)})
    assert type(sfumato.load(folder)) is MinorityClassifier


def test_a_pickle_is_refused_however_harmless(classifier, folder):
    classifier.save_pretrained(folder, safe_serialization=False)
    assert (folder / "diffusion_pytorch_model.bin").is_file()
    assert type(sfumato.load(folder)) is MinorityClassifier  # of both, safetensors are read
    (folder / WEIGHTS).unlink()
    for options in ({}, {"use_safetensors": False}):
        with pytest.raises(ValueError, match="classifier/diffusion_pytorch_model.bin is a pickle"):
            sfumato.load(folder, **options)


def test_truncated_weights_are_named(folder):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match=f"{file} is corrupt or cut short"):
        sfumato.load(folder)


def test_weights_of_another_network_are_refused(folder, tmp_path):
    other = UNet2DModel(
        block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )  # fmt: skip
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"The model in {folder} can't be loaded .*conv_in"):
        sfumato.load(folder)


def test_one_missing_weight_is_refused(folder):
    weights = storage.load_tensors(folder / WEIGHTS)
    del weights["classify.bias"]
    storage.save_tensors(folder / WEIGHTS, weights)
    with pytest.raises(
        ValueError, match=rf"{WEIGHTS} lacks 1 of the \d+ weights of MinorityClassifier .classify.bias"
    ):
        sfumato.load(folder)


def test_a_classifier_of_another_shape_is_refused_by_name(folder):
    config = json.loads((folder / "config.json").read_text())
    for change in ({"num_classes": 5}, {"num_classes": 1}, {"pool": "max"}):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=f"The model in {folder} can't be loaded"):
            sfumato.load(folder)


@pytest.mark.parametrize("options", [{"base": None}, {"variant": "fp16"}, {"torch_dtype": torch.float16}])
def test_unknown_options_are_refused(folder, options):
    with pytest.raises(
        ValueError, match=f"A classifier is loaded with `dtype` alone, not with `{next(iter(options))}`"
    ):
        sfumato.load(folder, **options)


@pytest.mark.parametrize(
    "content", [{"_class_name": "UNet2DModel"}, {"model_type": "clip"}, {"_class_name": ["x"]}, {}]
)
@pytest.mark.parametrize("pickled", [False, True])
def test_other_networks_are_no_pipelines(tmp_path, content, pickled):
    (tmp_path / "config.json").write_text(json.dumps(content))
    if pickled:
        torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} is not a diffusers pipeline: it has no model_index.json"):
        sfumato.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_config_is_named(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json (is not valid JSON|must hold a JSON object)"):
        sfumato.load(folder)
