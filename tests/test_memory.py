import re
import sys

import pytest
import torch

from sfumato.memory import _LESS, explained, peak_memory_mb, reset_peak_memory
from sfumato.unlearning.methods import METHODS

CPU = torch.device("cpu")
SETTINGS = {"gradient_checkpointing", "batch_size", "seed"}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_says_what_needs_less_and_what_is_kept(tmp_path, error):
    (tmp_path / "checkpoints" / "step-00000500").mkdir(parents=True)
    with pytest.raises(MemoryError, match="not enough memory on cpu") as caught, explained(CPU, tmp_path, SETTINGS):
        raise error
    assert "gradient_checkpointing" in str(caught.value)
    assert "step-00000500 is kept: go on from there with resume." in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("method", METHODS)
def test_only_settings_of_the_method_are_advised(method):
    settings = {field for config in METHODS[method].configs for field in config.__dataclass_fields__}
    with pytest.raises(MemoryError) as caught, explained(CPU, None, settings):
        raise torch.OutOfMemoryError("no")
    advised = {name for name in _LESS if name in re.split(r"\W+", str(caught.value))}
    assert advised == _LESS.keys() & settings
    assert ("trajectory_batch_size" in advised) == (method in ("esd", "advunlearn"))


def test_a_run_that_can_be_told_nothing_is_told_nothing():
    with pytest.raises(MemoryError) as caught, explained(CPU, None, ()):
        raise torch.OutOfMemoryError("no")
    assert "Less is needed" not in str(caught.value)


def test_without_a_checkpoint_nothing_is_said_of_one(tmp_path):
    for folder in (None, tmp_path):
        with pytest.raises(MemoryError) as caught, explained(CPU, folder, SETTINGS):
            raise torch.OutOfMemoryError("no")
        assert "kept" not in str(caught.value)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), explained(CPU, None, SETTINGS):
        raise RuntimeError("shapes differ")


def test_an_allocation_that_is_too_large_is_recognised():
    with pytest.raises(MemoryError, match="not enough memory"), explained(CPU, None, SETTINGS):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_peak_memory_grows_with_what_is_held():
    reset_peak_memory(CPU)
    before = peak_memory_mb(CPU)
    held = torch.ones(200_000_000, dtype=torch.uint8)
    assert peak_memory_mb(CPU) >= before
    assert held[-1] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep the peak of the whole process")
def test_what_was_let_go_before_is_not_counted():
    reset_peak_memory(CPU)
    held = torch.ones(300_000_000, dtype=torch.uint8)
    before = peak_memory_mb(CPU)
    del held
    reset_peak_memory(CPU)
    assert peak_memory_mb(CPU) < before - 200
    held = torch.ones(300_000_000, dtype=torch.uint8)
    assert held[-1] == 1 and peak_memory_mb(CPU) == pytest.approx(before, abs=100)


def test_without_a_way_to_begin_anew_the_peak_is_that_of_the_process(monkeypatch, tmp_path):
    lifetime = peak_memory_mb(CPU)
    monkeypatch.setattr("sfumato.memory._CLEAR", tmp_path / "no" / "such")
    monkeypatch.setattr("sfumato.memory._STATUS", tmp_path / "none")
    reset_peak_memory(CPU)
    assert peak_memory_mb(CPU) >= 0.9 * lifetime
