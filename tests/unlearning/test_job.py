"""The real thing: ``accelerate launch`` of ``training/salun.py`` on atelier, on one process and on two, and killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sfumato
from sfumato import storage
from sfumato.loading import assets_folder

ROOT = Path(__file__).parents[2]
SMALL = [
    "--forget_examples", "8", "--retain_examples", "8", "--example_steps", "3", "--example_batch_size", "4",
    "--batch_size", "4", "--steps", "6", "--learning_rate", "1e-3", "--checkpoint_every", "2", "--no_verify",
]  # fmt: skip


def launch(*arguments, processes=1, wait=True):
    """``accelerate launch``; several CPU processes go through the same launcher as several GPUs."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu" if processes == 1 else "--multi_gpu",
        "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--num_cpu_threads_per_process", "1", "--main_process_port", "0", *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    if not wait:
        return subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400)


def salun(output, *arguments, **kwargs):
    return launch("training/salun.py", "--forget", "sneaker", "--output", str(output), *SMALL, *arguments, **kwargs)


def weights(folder):
    return storage.load_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "out"
    done = salun(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_job_writes_a_model_that_stock_diffusers_loads(one_process):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(one_process, dtype=torch.float32)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    manifest = json.loads((one_process / "manifest.json").read_text())
    assert manifest["forget"] == "sneaker" and manifest["processes"] == 1 and manifest["peak_memory_mb"] > 100
    assert {path.name for path in one_process.iterdir()} >= {
        "saliency_mask.safetensors",
        "concepts.json",
        "history.json",
    }


def test_call_and_job_give_the_same_bits(one_process):
    settings = {
        "forget_examples": 8, "retain_examples": 8, "example_steps": 3, "example_batch_size": 4, "batch_size": 4,
        "steps": 6, "learning_rate": 1e-3,
    }  # fmt: skip
    result = sfumato.unlearn(sfumato.load("atelier"), "sneaker", **settings)
    stored = weights(one_process)
    assert all(torch.equal(value, stored[name]) for name, value in result.unet.state_dict().items())


def test_job_killed_at_any_moment_resumes_to_the_same_bits(one_process, tmp_path):
    process = salun(tmp_path / "out", wait=False)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "out" / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        assert process.poll() is None, "the job ended before it could be killed"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "model_index.json").exists()
    refused = salun(tmp_path / "out")
    assert refused.returncode != 0 and "--resume" in refused.stderr
    resumed = salun(tmp_path / "out", "--resume", "True")
    assert resumed.returncode == 0, resumed.stderr
    expected, found = weights(one_process), weights(tmp_path / "out")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_two_processes_give_the_result_of_one(one_process, tmp_path):
    done = salun(tmp_path / "out", processes=2)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["processes"] == 2
    expected, found = weights(one_process), weights(tmp_path / "out")
    start = storage.load_tensors(assets_folder() / "atelier" / "unet" / "diffusion_pytorch_model.safetensors")
    moved = sum(float((expected[name] - start[name].float()).pow(2).sum()) for name in expected) ** 0.5
    apart = sum(float((expected[name] - found[name]).pow(2).sum()) for name in expected) ** 0.5
    assert apart < 0.02 * moved


def test_zero_mask_changes_no_bit_under_weight_decay_and_two_processes(tmp_path):
    done = salun(tmp_path / "out", "--mask_ratio", "0", "--optimizer", "adamw", "--weight_decay", "0.5", processes=2)
    assert done.returncode == 0, done.stderr
    base = sfumato.load("atelier").unet.state_dict()
    found = weights(tmp_path / "out")
    assert set(base) == set(found)
    assert all(torch.equal(base[name], found[name]) for name in base)


def test_job_that_diverges_says_so_in_one_sentence_and_writes_no_model(tmp_path):
    arguments = ["--output", str(tmp_path / "out"), "--forget", "sneaker", *SMALL, "--learning_rate", "1e30"]
    command = [sys.executable, "-m", "sfumato.training.salun", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "error: The " in done.stderr and "Traceback" not in done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"examples", "saliency_mask.safetensors"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--forget", "snaeker"], "error: atelier does not know the concept 'snaeker'. Did you mean 'sneaker'"),
        (["--forget", ""], "error: There is nothing to forget"),
        (["--forget", "sneaker", "--mask_ratio", "7"], "error: `mask_ratio` must lie in [0, 1], got 7.0"),
        (["--forget", "sneaker", "--model", "./nowhere"], "error: There is no model folder ./nowhere"),
    ],
)
def test_bad_command_line_gets_one_sentence(tmp_path, arguments, message):
    command = [sys.executable, "-m", "sfumato.training.salun", "--output", str(tmp_path / "out"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
