"""Pipelines of ours load where this package is not installed."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file

import sfumato
from sfumato.releasing.custom_code import ship_code

ELSEWHERE = textwrap.dedent("""
    import sys
    sys.modules["sfumato"] = None  # importing it fails
    import torch
    from diffusers import DiffusionPipeline
    from safetensors.torch import save_file
    torch.set_num_threads(1)
    found = {}
    for name in ("resshift", "rddm"):
        pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        picture = torch.linspace(0, 1, 75).reshape(3, 5, 5)
        call = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
        found[name] = pipe(picture, tile_size=8, **call).images
    save_file(found, "found.safetensors")
""")

SAVED_AGAIN = textwrap.dedent("""
    import torch
    from diffusers import DiffusionPipeline
    for name in ("resshift", "rddm"):
        pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
        assert type(pipe).__module__.startswith("diffusers_modules.")
        pipe.save_pretrained(f"{name}-again")
""")


def run(code, folder, home):
    environment = {**os.environ, "HF_HOME": str(folder / home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]


def make(name):
    torch.manual_seed(0)
    unet = UNet2DModel(
        in_channels=6, out_channels=3 if name == "resshift" else 6, block_out_channels=(8,), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    if name == "rddm":
        return sfumato.RDDMPipeline(unet, sfumato.RDDMScheduler(sum_scale=0.01), scale=2)
    scheduler = sfumato.ResShiftScheduler(4, 0.2, latent_space=False, clip_sample=True)
    return sfumato.ResShiftPipeline(unet, scheduler, scale=2)


def restore(pipe):
    pipe.set_progress_bar_config(disable=True)
    picture = torch.linspace(0, 1, 75).reshape(3, 5, 5)
    call = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    return pipe(picture, tile_size=8, **call).images


def test_restoration_pipelines_load_where_this_package_is_not_installed(tmp_path):
    for name in ("resshift", "rddm"):
        make(name).save_pretrained(tmp_path / name)
        ship_code(tmp_path / name)
    run(ELSEWHERE, tmp_path, "hub")
    found = load_file(tmp_path / "found.safetensors")
    for name in ("resshift", "rddm"):
        assert torch.allclose(found[name], restore(make(name)), atol=1e-5)


def test_a_model_that_came_with_its_code_is_saved_with_it_again(tmp_path):
    for name in ("resshift", "rddm"):
        make(name).save_pretrained(tmp_path / name)
        ship_code(tmp_path / name)
    run(SAVED_AGAIN, tmp_path, "hub")
    for name in ("resshift", "rddm"):
        again = tmp_path / f"{name}-again"
        loaded = sfumato.load(again)
        assert type(loaded).from_pretrained(again).scheduler.config == loaded.scheduler.config
        assert torch.allclose(restore(loaded), restore(make(name)), atol=1e-5)
        shutil.rmtree(tmp_path / name)
        again.rename(tmp_path / name)
    run(ELSEWHERE, tmp_path, "another-hub")  # nothing of the first process is left
    found = load_file(tmp_path / "found.safetensors")
    for name in ("resshift", "rddm"):
        assert torch.allclose(found[name], restore(make(name)), atol=1e-5)


def test_a_folder_that_names_code_which_is_gone_is_read_with_the_installed(tmp_path):
    pipe = make("resshift")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["scheduler"][0] = "diffusers_modules.local.scheduling_resshift"  # as a release that was saved again had it
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for load in (sfumato.load, type(pipe).from_pretrained):
        assert type(load(tmp_path).scheduler) is sfumato.ResShiftScheduler


@pytest.mark.parametrize("name", ["resshift", "rddm"])
def test_where_it_is_installed_no_shipped_code_is_run(name, tmp_path):
    pipe = make(name)
    pipe.save_pretrained(tmp_path)
    ship_code(tmp_path)
    for code in tmp_path.rglob("*.py"):
        code.write_text("raise AssertionError('this was run')")
    for load in (sfumato.load, type(pipe).from_pretrained):
        loaded = load(tmp_path)
        assert type(loaded) is type(pipe) and type(loaded.scheduler) is type(pipe.scheduler)
        assert torch.allclose(restore(loaded), restore(pipe), atol=1e-5)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert type(sfumato.load(again)) is type(pipe)


def test_shipping_again_renews_the_code_and_no_pipeline_is_an_error(tmp_path):
    model = tmp_path / "model"
    make("rddm").save_pretrained(model)
    ship_code(model)
    before = {path.name: path.read_bytes() for path in model.rglob("*.*") if path.is_file()}
    assert {"pipeline_rddm.py", "restoration.py", "scheduling_rddm.py", "carried_state.py"} <= set(before)
    (model / "pipeline_rddm.py").write_text("old")
    ship_code(model)
    assert {path.name: path.read_bytes() for path in model.rglob("*.*") if path.is_file()} == before
    with pytest.raises(FileNotFoundError):
        ship_code(tmp_path)
