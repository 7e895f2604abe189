"""One process, two that share a batch (DDP), the moments too (DeepSpeed), and the weights too (FSDP2) do the same."""

import json

import pytest
import torch

from sfumato import storage
from sfumato.loading import assets_folder
from sfumato.unlearning.saliency import load_mask

JOBS = "tests/unlearning/process_jobs.py"
RUNS = (
    "salun", "salun-average", "salun-adapters", "salun-decay", "salun-resumed", "salun-zero-mask", "esd", "esd-sgd",
    "esd-trained", "advunlearn", "advunlearn-denoiser", "doco", "concept_ablation", "proximal", "gradient_ascent",
)  # fmt: skip


def weights(folder, name):
    part, file = "unet", "diffusion_pytorch_model.safetensors"
    if name == "advunlearn":
        part, file = "text_encoder", "model.safetensors"
    return storage.load_tensors(folder / part / file)


def norm(tensors):
    return sum(float(values.double().square().sum()) for values in tensors) ** 0.5


@pytest.fixture(scope="module")
def one(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    done = launch(JOBS, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module", params=["ddp", "fsdp2", "deepspeed"])
def two(request, launch, tmp_path_factory):
    if request.param == "deepspeed":
        pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp(request.param)
    done = launch(JOBS, folder, processes=2, config=request.param)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = [name for name in RUNS if (request.param, name) != ("deepspeed", "doco")]
    assert json.loads((folder / "how.json").read_text()) == dict.fromkeys(runs, request.param)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_weights_do_not_depend_on_the_processes(one, two, name):
    if name == "doco" and not (two / name).exists():
        pytest.skip("refused with DeepSpeed")
    assert json.loads((two / name / "manifest.json").read_text())["processes"] == 2
    expected, found = weights(one / name, name), weights(two / name, name)
    start = {name: values.float() for name, values in weights(assets_folder() / "atelier", name).items()}
    apart = norm(expected[name] - found[name] for name in expected)
    moved = norm(expected[name] - start[name] for name in expected)
    assert apart <= 1e-5 * norm(expected.values())
    if name == "salun-zero-mask":
        assert moved == 0 and all(torch.equal(start[name], found[name]) for name in start)
    else:
        assert apart < 0.01 * moved


def test_masks_do_not_depend_on_the_processes(one, two):
    expected, found = (load_mask(folder / "salun" / "saliency_mask.safetensors")[0] for folder in (one, two))
    same = sum(int((expected[name] == found[name]).sum()) for name in expected)
    assert same >= 0.999 * sum(mask.numel() for mask in expected.values())
