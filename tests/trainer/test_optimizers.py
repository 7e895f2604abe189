import copy
import sys
from types import SimpleNamespace

import pytest
import torch

from sfumato.trainer import TrainingConfig, make_accelerator, preflight, train


class Shrinking:
    batch_size = 2

    def losses(self, model, step, shard):
        return {"loss": torch.stack([parameter.square().mean() for parameter in model.parameters()]).sum()}


def test_eight_bit_moments_are_refused_where_they_do_not_work(tiny_unet, monkeypatch):
    config = TrainingConfig(optimizer="adamw8bit", weight_decay=0.1)
    asked = {"accelerator": make_accelerator(config), "output_dir": None, "identity": None, "resume": False}
    monkeypatch.setattr("sfumato.trainer.optimizers.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        preflight(tiny_unet, 2, config, **asked)
    monkeypatch.setattr("sfumato.trainer.optimizers.importlib.util.find_spec", lambda name: name)
    with pytest.raises(ValueError, match="An 8-bit optimizer works on a CUDA device with whole weights, not on cpu"):
        preflight(tiny_unet, 2, config, **asked)


def test_eight_bit_optimizers_are_those_of_bitsandbytes(tiny_unet, monkeypatch):
    made = []

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, parameters, **options):
            made.append(options)
            super().__init__(parameters, **options)

    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=SimpleNamespace(AdamW8bit=AdamW8bit)))
    monkeypatch.setattr("sfumato.trainer.loop.check_optimizer", lambda name, accelerator: None)
    model = copy.deepcopy(tiny_unet).requires_grad_(True)
    train(model, Shrinking(), TrainingConfig(steps=1, optimizer="adamw8bit", weight_decay=0.5))
    assert made == [{"lr": 1e-5, "weight_decay": 0.5}]
