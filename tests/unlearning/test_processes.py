"""One process, two that share a batch (DDP), the moments too (DeepSpeed), and the weights too (FSDP2) do the same."""

import json
from functools import cache

import pytest
import torch

from sfumato import storage
from sfumato.loading import assets_folder
from sfumato.unlearning.saliency import load_mask

JOBS = "tests/unlearning/process_jobs.py"
RUNS = ("salun", "salun-resumed", "salun-zero-mask", "esd", "advunlearn", "doco")
MORE = (
    "salun-average", "salun-adapters", "salun-decay", "esd-sgd", "esd-trained", "advunlearn-denoiser",
    "concept_ablation", "proximal", "gradient_ascent",
)  # fmt: skip
EVERY = [*RUNS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
KINDS = ("ddp", "fsdp2", "deepspeed")


def weights(folder, name):
    part, file = "unet", "diffusion_pytorch_model.safetensors"
    if name == "advunlearn":
        part, file = "text_encoder", "model.safetensors"
    return storage.load_tensors(folder / part / file)


def norm(tensors):
    return sum(float(values.double().square().sum()) for values in tensors) ** 0.5


@pytest.fixture(scope="module")
def made(launch, tmp_path_factory):
    """Give the folder of a run; a kind's quick runs are made together, and so are its others."""

    @cache
    def runs(kind, names):
        if kind == "deepspeed":
            pytest.importorskip("deepspeed")
        folder = tmp_path_factory.mktemp(kind)
        where = {} if kind == "one" else {"processes": 2, "config": kind}
        done = launch(JOBS, folder, ",".join(names), **where)
        assert done.returncode == 0, done.stderr[-3000:]
        if kind != "one":
            spread = [name for name in names if (kind, name) != ("deepspeed", "doco")]
            assert json.loads((folder / "how.json").read_text()) == dict.fromkeys(spread, kind)
        return folder

    return lambda kind, name: runs(kind, RUNS if name in RUNS else MORE)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_do_not_depend_on_the_processes(made, kind, name):
    one, two = made("one", name), made(kind, name)
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


@pytest.mark.parametrize("kind", KINDS)
def test_masks_do_not_depend_on_the_processes(made, kind):
    masks = (made(which, "salun") / "salun" / "saliency_mask.safetensors" for which in ("one", kind))
    expected, found = (load_mask(file)[0] for file in masks)
    same = sum(int((expected[name] == found[name]).sum()) for name in expected)
    assert same >= 0.999 * sum(mask.numel() for mask in expected.values())
