"""The real thing: ``accelerate launch`` of ``training/salun.py`` on atelier, on one process and on two, and killed."""

import json
import subprocess
import sys
import time

import psutil
import pytest
import torch

import sfumato
from sfumato import storage

SMALL = [
    "--forget_examples", "8", "--retain_examples", "8", "--example_steps", "3", "--example_batch_size", "4",
    "--batch_size", "4", "--steps", "6", "--learning_rate", "1e-3", "--checkpoint_every", "2", "--no_verify",
]  # fmt: skip


@pytest.fixture(scope="module")
def salun(launch):
    def start(output, *arguments, **kwargs):
        return launch("training/salun.py", "--forget", "sneaker", "--output", output, *SMALL, *arguments, **kwargs)

    return start


def weights(folder):
    return storage.load_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def one_process(salun, tmp_path_factory):
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


@pytest.fixture(scope="module")
def two_processes(salun, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "out"
    done = salun(folder, processes=2, config="fsdp2")
    assert done.returncode == 0, done.stderr
    return folder


def kill_after_a_checkpoint(process, output):
    deadline = time.monotonic() + 300
    while not list((output / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        assert process.poll() is None, "the job ended before it could be killed"
        time.sleep(0.02)
    for one in (*psutil.Process(process.pid).children(recursive=True), process):
        one.kill()  # SIGKILL; a launcher's workers would outlive it
    process.wait()


@pytest.mark.parametrize(("processes", "uninterrupted"), [(1, "one_process"), (2, "two_processes")])
def test_job_killed_at_any_moment_resumes_to_the_same_bits(salun, request, tmp_path, processes, uninterrupted):
    """Two processes share the weights too (FSDP2): a checkpoint is put together and spread again."""
    expected = weights(request.getfixturevalue(uninterrupted))
    settings = {"processes": processes, "config": "fsdp2"}
    kill_after_a_checkpoint(salun(tmp_path / "out", wait=False, **settings), tmp_path / "out")
    assert not (tmp_path / "out" / "model_index.json").exists()
    refused = salun(tmp_path / "out")
    assert refused.returncode != 0 and "--resume" in refused.stderr
    resumed = salun(tmp_path / "out", "--resume", "True", **settings)
    assert resumed.returncode == 0, resumed.stderr
    found = weights(tmp_path / "out")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_of_two_processes_is_finished_by_one(salun, two_processes, tmp_path):
    """Another number of processes only rounds otherwise, which is said; so do more passes."""
    kill_after_a_checkpoint(salun(tmp_path / "out", processes=2, config="fsdp2", wait=False), tmp_path / "out")
    resumed = salun(tmp_path / "out", "--resume", "True", "--gradient_accumulation_steps", "2")
    assert resumed.returncode == 0, resumed.stderr
    assert "is of a run of 2 processes, now there are 1" in resumed.stderr
    expected, found = weights(two_processes), weights(tmp_path / "out")
    size = sum(float(values.square().sum()) for values in expected.values()) ** 0.5
    apart = sum(float((values - found[name]).square().sum()) for name, values in expected.items()) ** 0.5
    assert 0 < apart < 1e-3 * size


def test_zero_mask_changes_no_bit_under_weight_decay_and_two_processes(salun, tmp_path):
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


def test_two_runs_into_one_folder_do_not_overwrite_each_other(tmp_path):
    """Closed forms write nothing until they are done, so that both pass the first check."""
    command = [sys.executable, "-m", "sfumato.cli", "unlearn", "uce", "--output", str(tmp_path / "out"), "--no_verify"]
    runs = [
        subprocess.Popen([*command, "--forget", word], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for word in ("sneaker", "bag")
    ]
    said = [run.communicate(timeout=200)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 1]
    word, other = ("sneaker", "bag") if runs[0].returncode == 0 else ("bag", "sneaker")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["forget"] == word
    refused = said[("sneaker", "bag").index(other)]
    assert "Another run is writing into" in refused or "already holds a finished model" in refused
    assert not (tmp_path / "out" / ".running").exists()
