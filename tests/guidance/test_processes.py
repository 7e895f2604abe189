"""Two processes that share a batch, and the scoring, learn what one does."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from sfumato import storage

JOBS = str(Path(__file__).with_name("process_jobs.py"))
WEIGHTS = {"step": "unet/diffusion_pytorch_model.safetensors", "pixels": "diffusion_pytorch_model.safetensors"}


def norm(tensors):
    return sum(float(values.double().square().sum()) for values in tensors) ** 0.5


@pytest.fixture(scope="module")
def folders(launch, fashion_mnist, tmp_path_factory):
    made = {count: tmp_path_factory.mktemp(f"on-{count}") for count in (1, 2)}
    runpy.run_path(JOBS)["main"](fashion_mnist, made[1])
    done = launch(JOBS, fashion_mnist, made[2], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return made


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_weights_do_not_depend_on_the_processes(folders, name):
    manifests = [json.loads((folders[count] / name / "manifest.json").read_text()) for count in (1, 2)]
    assert [manifest["processes"] for manifest in manifests] == [1, 2]
    one, two = (storage.load_tensors(folders[count] / name / WEIGHTS[name]) for count in (1, 2))
    assert set(one) == set(two) and norm(one[key] - two[key] for key in one) <= 1e-5 * norm(one.values())
    losses = [[row["loss"] for row in json.loads((folders[k] / name / "history.json").read_text())] for k in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(set(losses[0])) == 4


def test_nor_do_scores(folders):
    one, two = (storage.load_tensors(folders[k] / "pixels" / "scores.safetensors")["scores"] for k in (1, 2))
    assert torch.allclose(one, two, rtol=1e-5) and len(one.unique()) == 24
