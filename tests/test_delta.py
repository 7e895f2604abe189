"""A delta leads from one model to another and back, bit for bit, and nowhere else."""

import copy
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors import safe_open

from sfumato import delta, storage
from sfumato.delta import apply_delta, fingerprint, read_metadata, revert_delta, save_delta


def make_pipe(dtype=torch.float32):
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    return DDPMPipeline(network.to(dtype), DDPMScheduler())


@torch.no_grad()
def changed(pipe, share=0.5):
    """Another pipeline: one tensor changed as a whole, one in a share of its entries, the others not at all."""
    network = copy.deepcopy(pipe.unet)
    network.conv_in.weight += 1
    weight = network.mid_block.resnets[0].conv1.weight
    where = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < share
    weight[where] *= -1
    return DDPMPipeline(network, pipe.scheduler), int(where.sum()) + network.conv_in.weight.numel()


def same(one, other):
    return fingerprint(one.unet.named_parameters()) == fingerprint(other.unet.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_applied_it_is_the_result_and_taken_back_the_original_bit_for_bit(dtype, tmp_path):
    base = make_pipe(dtype)
    result, count = changed(base)
    assert save_delta(tmp_path / "d.safetensors", base, result) == {"unet": count}
    pipe = make_pipe(dtype)
    apply_delta(pipe, tmp_path / "d.safetensors")
    assert same(pipe, result) and not same(pipe, base)
    revert_delta(pipe, tmp_path / "d.safetensors")
    assert same(pipe, base)


def test_nothing_is_rounded_however_small_the_change(tmp_path):
    base = make_pipe()
    result = DDPMPipeline(copy.deepcopy(base.unet), base.scheduler)
    with torch.no_grad():
        weight = result.unet.conv_in.weight
        weight[0, 0, 0, 0] = torch.nextafter(weight[0, 0, 0, 0], torch.tensor(9.0))
        weight[1, 0, 0, 0], base.unet.conv_in.weight[1, 0, 0, 0] = -0.0, 0.0
    assert save_delta(tmp_path / "d.safetensors", base, result) == {"unet": 2}
    apply_delta(base, tmp_path / "d.safetensors")
    assert same(base, result)


def test_file_holds_what_changed_and_a_bit_for_each_other_weight_of_these_tensors(tmp_path):
    base = make_pipe()
    result, count = changed(base)
    save_delta(tmp_path / "d.safetensors", base, result, {"forget": "sneaker"})
    with safe_open(tmp_path / "d.safetensors", "pt") as opened:
        names = list(opened.keys())
        sizes = {name: opened.get_tensor(name).numel() for name in names}
    half = result.unet.mid_block.resnets[0].conv1.weight.numel()
    assert sizes.pop("mask/unet/mid_block.resnets.0.conv1.weight") == half // 8
    assert sum(sizes.values()) == count and set(sizes) == {
        "bits/unet/conv_in.weight", "bits/unet/mid_block.resnets.0.conv1.weight",
    }  # fmt: skip
    stated = read_metadata(tmp_path / "d.safetensors")
    assert stated["facts"] == {"forget": "sneaker"}
    assert stated["components"]["unet"]["base"] == storage.fingerprint(base.unet.named_parameters())


def test_of_another_model_or_state_it_is_refused_and_changes_nothing(tmp_path):
    base = make_pipe()
    result, _ = changed(base)
    path = tmp_path / "d.safetensors"
    save_delta(path, base, result)
    with pytest.raises(ValueError, match="is not applied"):
        revert_delta(base, path)
    other, _ = changed(base, 0.2)
    before = fingerprint(other.unet.named_parameters())
    with pytest.raises(ValueError, match=r"is for other weights of unet \(float32, fingerprint"):
        apply_delta(other, path)
    assert fingerprint(other.unet.named_parameters()) == before
    with pytest.raises(ValueError, match=r"than these \(bfloat16"):
        apply_delta(make_pipe(torch.bfloat16), path)
    apply_delta(base, path)
    with pytest.raises(ValueError, match="already applied"):
        apply_delta(base, path)


def test_two_deltas_of_one_base_are_not_added_up(tmp_path):
    base = make_pipe()
    for number, share in enumerate((0.3, 0.6)):
        save_delta(tmp_path / f"{number}.safetensors", base, changed(base, share)[0])
    apply_delta(base, tmp_path / "0.safetensors")
    with pytest.raises(ValueError, match="take back other deltas first"):
        apply_delta(base, tmp_path / "1.safetensors")


def test_damaged_file_leaves_the_model_as_it_was(tmp_path):
    base, path = make_pipe(), tmp_path / "d.safetensors"
    save_delta(path, base, changed(base)[0])
    before = fingerprint(base.unet.named_parameters())
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # a bit of a weight
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged; fetch it again"):
        apply_delta(base, path)
    assert fingerprint(base.unet.named_parameters()) == before
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is not a delta, or is damaged"):
        apply_delta(base, path)
    storage.save_tensors(path, {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="is not a delta of this kind"):
        apply_delta(base, path)
    with pytest.raises(FileNotFoundError, match="There is no delta"):
        apply_delta(base, tmp_path / "none.safetensors")


def test_pipelines_that_can_not_be_compared_are_refused(tmp_path):
    base = make_pipe()
    with pytest.raises(ValueError, match="there is no delta to write"):
        save_delta(tmp_path / "d.safetensors", base, base)
    with pytest.raises(ValueError, match="is not of one name, shape and dtype"):
        save_delta(tmp_path / "d.safetensors", base, make_pipe(torch.float16))
    assert not list(tmp_path.iterdir())


def test_file_alone_applies_a_delta_where_sfumato_is_not_installed(tmp_path):
    base = make_pipe()
    result, _ = changed(base)
    base.save_pretrained(tmp_path / "base")
    save_delta(tmp_path / "delta.safetensors", base, result)
    shutil.copy(delta.__file__, tmp_path / "delta.py")
    block = "import sys; sys.modules['sfumato'] = None; import runpy; runpy.run_path('delta.py', run_name='__main__')"
    for direction, source, target in ("apply", "base", "out"), ("revert", "out", "back"):
        command = [sys.executable, "-c", block, direction, source, "delta.safetensors", target]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert same(DDPMPipeline.from_pretrained(tmp_path / "out"), result)
    assert same(DDPMPipeline.from_pretrained(tmp_path / "back"), base)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 1 and "back exists; name a folder that does not" in again.stderr
