"""DeepSpeed; that it trains as one process does is in tests/unlearning/test_processes.py."""

import pytest
from accelerate.state import AcceleratorState

from sfumato.trainer import TrainingConfig, make_accelerator


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """As the launcher asks for DeepSpeed."""
    for name, value in {
        "ACCELERATE_USE_CPU": "true",
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_DEEPSPEED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_precision_that_needs_a_scaler_is_refused():
    with pytest.raises(ValueError, match="mixed_precision='no' or 'bf16' here, not 'fp16'"):
        make_accelerator(TrainingConfig(mixed_precision="fp16"))


@pytest.mark.parametrize("stage", ["0", "3"])
def test_other_stages_are_refused(monkeypatch, stage):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    with pytest.raises(ValueError, match=f"zero_stage 1 or 2 here, not {stage}: .*fsdp2.yaml"):
        make_accelerator(TrainingConfig())


def test_half_precision_of_its_own_is_refused(monkeypatch, tmp_path):
    pytest.importorskip("deepspeed")
    file = tmp_path / "deepspeed.json"
    file.write_text('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}, "train_batch_size": "auto"}')
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    with pytest.raises(ValueError, match="Leave bf16 out of DeepSpeed's config"):
        make_accelerator(TrainingConfig())


def test_eight_bit_moments_are_refused(monkeypatch):
    pytest.importorskip("deepspeed")
    from sfumato.trainer.optimizers import check_optimizer

    monkeypatch.setattr("sfumato.trainer.optimizers.importlib.util.find_spec", lambda name: name)
    with pytest.raises(ValueError, match="not on weights that DeepSpeed spreads"):
        check_optimizer("adamw8bit", make_accelerator(TrainingConfig()))
