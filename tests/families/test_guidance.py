"""What steers a model is trained for the families that it is for, and refused of others by their name."""

import pytest
import torch
from PIL import Image

from sfumato import MinorityClassifier, OneMoreStepPipeline
from sfumato.families import class_names, family_of
from sfumato.guidance.job import JobConfig, train_guidance
from sfumato.guidance.networks import NetworkConfig
from sfumato.trainer import TrainingConfig
from sfumato.training.minority_classifier import Minority, MinorityConfig
from sfumato.training.one_more_step import OneMoreStep, OneMoreStepConfig

FLOWS = ("sd3", "flux", "flux-guided")


@pytest.fixture
def data(tmp_path):
    """Eight pictures, each in a colour of its own."""
    (tmp_path / "data").mkdir()
    for number in range(8):
        Image.new("RGB", (16, 16), (30 * number, 60, 200 - 20 * number)).save(tmp_path / "data" / f"{number}.png")
    return str(tmp_path / "data")


@pytest.fixture
def train(pipe, data, tmp_path):
    """Train a method for a step beside the tiny pipeline."""
    pipe.save_pretrained(tmp_path / "tiny")

    def run(method):
        network = NetworkConfig(channels=[8, 8], norm_num_groups=4, attention_head_dim=4)
        job = JobConfig(str(tmp_path / "out"), str(tmp_path / "tiny"), data, batch_size=4)
        return train_guidance(method, job, network, TrainingConfig(steps=1))

    return run


def test_one_more_step_is_for_stable_diffusion(kind, pipe, train, tmp_path):
    method = OneMoreStep(OneMoreStepConfig())
    if kind not in ("sd", "sd-v", "sdxl"):
        reason = "is a flow, which starts from pure noise" if kind in FLOWS else "is none of these"
        with pytest.raises(ValueError, match=f"One More Step is for Stable Diffusion 1, 2 and XL, and .* {reason}"):
            train(method)
        assert not (tmp_path / "out").exists()
        return
    made = train(method)
    assert made.unet.config.cross_attention_dim == (20 if kind == "sdxl" else 8)  # both encoders, side by side
    loaded = OneMoreStepPipeline.from_pretrained(tmp_path / "out", base=pipe)
    pipe.set_progress_bar_config(disable=True)
    pictures = loaded("a red bag", num_inference_steps=2, output_type="np", oms_guidance_scale=2.0).images
    assert pictures.shape == (1, 16, 16, 3)


def test_minority_classifiers_are_for_all_but_flows(kind, pipe, train, tmp_path):
    method = Minority(MinorityConfig(classes=2, repeats=1))
    if kind in FLOWS:
        with pytest.raises(ValueError, match="is a flow, and minority guidance is for models of DDPM's kind"):
            train(method)
        assert not (tmp_path / "out").exists()
        return
    train(method)
    told = [(tmp_path / "out" / name).read_text() for name in ("README.md", "manifest.json")]
    assert "for MODEL" in told[0] and '"beside": "tiny"' in told[1]  # a local folder's name is of no use to others
    family = family_of(pipe)
    loaded = MinorityClassifier.from_pretrained(tmp_path / "out")
    assert loaded(torch.zeros(1, *family.latent_shape), 3).shape == (1, 2) and len(loaded.config.thresholds) == 1
    assert (class_names(pipe) is not None) == (kind in ("dit", "ddpm"))
