"""Networks of restoration: the autoencoder is loaded whole, wherever it lies, or not at all."""

import shutil

import pytest
import torch
from diffusers import AutoencoderKL, VQModel

from sfumato import storage
from sfumato.loading import assets_folder
from sfumato.restoration.networks import load_autoencoder

WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


@pytest.fixture
def quantised(tmp_path):
    """A folder with a small VQModel."""
    model = VQModel(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=16,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "vq")
    return tmp_path / "vq"


def test_an_autoencoder_may_lie_in_a_pipeline_or_by_itself(quantised):
    parts = [load_autoencoder(name) for name in ("atelier", str(assets_folder() / "atelier" / "vae"))]
    assert all(isinstance(part, AutoencoderKL) and part.dtype == torch.float32 for part in parts)
    for a, b in zip(*(part.parameters() for part in parts), strict=True):
        assert torch.equal(a, b) and not a.requires_grad
    assert isinstance(load_autoencoder(str(quantised)), VQModel)


@pytest.mark.parametrize("whole", [True, False])
def test_of_the_hub_too_by_the_class_that_the_config_says(quantised, monkeypatch, whole):
    """Names are answered from a folder in the place of the Hub, which has a pipeline, or the autoencoder alone."""
    if whole:
        shutil.copytree(quantised, quantised.parent / "pipe" / "vae")
    place = {"maker/model": str(quantised.parent / "pipe" if whole else quantised)}
    for name, kind in (("load_config", AutoencoderKL), ("from_pretrained", VQModel)):
        real = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda source, *, _real=real, **how: _real(place[source], **how))
    assert isinstance(load_autoencoder("maker/model"), VQModel)


def test_weights_that_are_missing_or_damaged_are_refused(quantised):
    file = quantised / WEIGHTS
    stored = storage.load_tensors(file)
    storage.save_tensors(file, {name: value for name, value in stored.items() if "decoder" not in name})
    with pytest.raises(ValueError, match=r"lacks \d+ weights of its VQModel \(decoder.*fetch it again"):
        load_autoencoder(str(quantised))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=WEIGHTS):
        load_autoencoder(str(quantised))


def test_weights_under_the_names_of_old_releases_are_whole(tmp_path):
    folder = tmp_path / "vae"
    shutil.copytree(assets_folder() / "atelier" / "vae", folder)
    stored, renamed = storage.load_tensors(folder / WEIGHTS), {}
    for name, value in stored.items():
        for new, old in OLD.items():
            name = name.replace(new, old)
        renamed[name] = value
    assert renamed.keys() != stored.keys()
    storage.save_tensors(folder / WEIGHTS, renamed)
    parts = [load_autoencoder(name).state_dict() for name in (str(folder), "atelier")]
    assert all(torch.equal(value, parts[1][name]) for name, value in parts[0].items())
