"""What a run leaves: each format leads to the same model, in stock diffusers."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

import sfumato
from sfumato.delta import apply_delta, fingerprint, revert_delta

SMALL = {
    "forget_examples": 4, "retain_examples": 4, "example_steps": 2, "batch_size": 2, "steps": 3, "learning_rate": 1e-3,
    "verify": False,
}  # fmt: skip


def weights(module):
    return fingerprint(module.named_parameters())


def test_every_format_holds_the_result(tiny_pipe, tmp_path):
    result = sfumato.unlearn(
        tiny_pipe, "sneaker", "esd", output_dir=tmp_path / "out", save=["full", "part", "delta", "lora"], lora_rank=16,
        parameters="xattn-kv", batch_size=2, steps=3, learning_rate=1e-3, trajectory_steps=2, verify=False,
    )  # fmt: skip
    out = tmp_path / "out"
    assert weights(StableDiffusionPipeline.from_pretrained(out).unet) == weights(result.unet)
    assert weights(UNet2DConditionModel.from_pretrained(out / "unet")) == weights(result.unet)
    before = weights(tiny_pipe.unet)
    apply_delta(tiny_pipe, out / "delta" / "delta.safetensors")
    assert weights(tiny_pipe.unet) == weights(result.unet)
    revert_delta(tiny_pipe, out / "delta" / "delta.safetensors")
    assert weights(tiny_pipe.unet) == before
    saved = json.loads((out / "manifest.json").read_text())["saved"]
    keys = [p for name, p in result.unet.named_parameters() if "attn2.to_k" in name or "attn2.to_v" in name]
    assert 0 < saved["delta"]["changed_weights"]["unet"] <= sum(p.numel() for p in keys)
    assert saved["lora"] == {"rank": 16, "missing": pytest.approx(0, abs=1e-5)}
    tiny_pipe.load_lora_weights(out / "lora", weight_name="pytorch_lora_weights.safetensors")
    tiny_pipe.fuse_lora()
    for name, wanted in result.unet.named_parameters():
        found = dict(tiny_pipe.unet.named_parameters()).get(name.replace(".weight", ".base_layer.weight"))
        assert found is None or torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("save", ["part", "delta"])
def test_without_the_pipeline_the_folder_is_small_and_finished(tiny_pipe, tmp_path, save):
    settings = {"train": "text_encoder", "attack_steps": 1, "trajectory_steps": 2, "retain_trajectories": 2,
                "retain_batch_size": 2, "warmup_rounds": 1}  # fmt: skip
    result = sfumato.unlearn(
        tiny_pipe, "sneaker", "advunlearn", output_dir=tmp_path / "out", save=save, batch_size=2, steps=2,
        learning_rate=1e-3, verify=False, **settings,
    )  # fmt: skip
    out = tmp_path / "out"
    found = {path.name for path in out.iterdir()}
    assert found == {"history.json", "manifest.json", {"part": "text_encoder", "delta": "delta"}[save]}
    if save == "part":
        assert weights(CLIPTextModel.from_pretrained(out / "text_encoder")) == weights(result.text_encoder)
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="already holds a finished model"):
            sfumato.unlearn(tiny_pipe, "sneaker", output_dir=out, resume=resume, **SMALL)


def test_delta_of_a_run_is_applied_by_its_own_file(tiny_pipe, tmp_path):
    result = sfumato.unlearn(tiny_pipe, "sneaker", output_dir=tmp_path / "out", save="delta", **SMALL)
    tiny_pipe.save_pretrained(tmp_path / "base")
    folder = tmp_path / "out" / "delta"
    block = "import runpy, sys; sys.modules['sfumato'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    command = [sys.executable, "-c", block, folder / "delta.py", "apply", "base", folder / "delta.safetensors", "new"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert weights(StableDiffusionPipeline.from_pretrained(tmp_path / "new").unet) == weights(result.unet)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save": ["all"]}, "`save` takes full, part, delta, lora, got 'all'"),
        ({"save": []}, "`save` takes full, part, delta, lora, got nothing"),
        ({"lora_rank": 0}, "`lora_rank` must be at least 1"),
    ],
)
def test_what_can_not_be_saved_is_refused_at_once(tiny_pipe, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        sfumato.unlearn(tiny_pipe, "sneaker", output_dir=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_run_that_changes_nothing_still_leaves_its_model(tiny_pipe, tmp_path):
    settings = {
        "forget_examples": 2, "retain_examples": 2, "example_steps": 1, "batch_size": 2, "steps": 1, "verify": False,
        "mask_ratio": 0.0,
    }  # fmt: skip
    sfumato.unlearn(
        tiny_pipe, "a sneaker", output_dir=tmp_path / "out", save=["full", "delta", "lora"], lora_rank=2, **settings
    )
    saved = json.loads((tmp_path / "out" / "manifest.json").read_text())["saved"]
    assert saved == {"full": {}, "delta": None, "lora": None}
    assert (tmp_path / "out" / "model_index.json").exists() and not (tmp_path / "out" / "delta").exists()
