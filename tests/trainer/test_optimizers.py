import copy
import sys
from types import SimpleNamespace
from typing import ClassVar

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


class AdamW8bit(torch.optim.Optimizer):
    """Keeps its state as bitsandbytes does: in few values, counted in whole numbers, and hidden in `state_dict`."""

    wrapped = "__bnb_optimizer_quant_state__"
    made: ClassVar[list[dict]] = []

    def __init__(self, parameters, **options):
        self.made.append(options)
        self.table = torch.linspace(-1, 1, 256)
        super().__init__(parameters, options)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state |= {"step": 0, "state1": torch.full(parameter.shape, 128, dtype=torch.uint8)}
                    state |= {"qmap1": self.table, "absmax1": torch.ones(1)}
                assert type(state["step"]) is int
                state["step"] += 1
                moment = state["absmax1"] * state["qmap1"][state["state1"].long()] + parameter.grad
                state["absmax1"] = moment.abs().max().view(1)
                state["state1"] = ((moment / state["absmax1"] + 1) * 127.5).round().byte()
                parameter.sub_(group["lr"] / state["step"] * moment)

    def state_dict(self):
        found = super().state_dict()
        entries = found["state"].items()
        count = {index: {"step": entry["step"]} for index, entry in entries}
        hidden = {index: {key: entry[key] for key in entry if key != "step"} for index, entry in entries}
        return {**found, "state": {index: {**count[index], self.wrapped: hidden[index]} for index in count}}

    def load_state_dict(self, state_dict):
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, entry in copy.deepcopy(state_dict["state"]).items():
            self.state[parameters[index]] = {**entry, **entry.pop(self.wrapped, {})}


@pytest.fixture(params=["in its manner", "itself"])
def bitsandbytes(request, monkeypatch):
    monkeypatch.setattr("sfumato.trainer.loop.check_optimizer", lambda name, accelerator: None)
    if request.param == "itself":
        return pytest.importorskip("bitsandbytes")
    AdamW8bit.made.clear()
    module = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=AdamW8bit))
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    return module


@pytest.mark.parametrize("bitsandbytes", ["in its manner"], indirect=True)
def test_eight_bit_optimizers_are_those_of_bitsandbytes(tiny_unet, bitsandbytes):
    model = copy.deepcopy(tiny_unet).requires_grad_(True)
    train(model, Shrinking(), TrainingConfig(steps=1, optimizer="adamw8bit", weight_decay=0.5))
    assert AdamW8bit.made == [{"lr": 1e-5, "weight_decay": 0.5}]


def layers():
    """Two that are large enough for bitsandbytes to keep their moments in 8 bits, and their biases, which are not."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))


class DyingAfter(Shrinking):
    def __init__(self, steps):
        self.steps = steps

    def losses(self, model, step, shard):
        if step == self.steps:
            raise KeyboardInterrupt
        return super().losses(model, step, shard)


@pytest.mark.parametrize("masked", [False, True])
def test_a_run_with_eight_bit_moments_resumes_to_the_same_bits(bitsandbytes, masked, tmp_path):
    config = TrainingConfig(steps=6, learning_rate=1e-2, optimizer="adamw8bit", weight_decay=0.1, checkpoint_every=2)
    whole, cut, resumed = layers(), layers(), layers()
    mask = torch.rand(64, 64) < 0.5
    call = {"masks": {"0.weight": mask} if masked else None}
    train(whole, Shrinking(), config, **call)
    with pytest.raises(KeyboardInterrupt):
        train(cut, DyingAfter(3), config, output_dir=tmp_path, **call)
    train(resumed, Shrinking(), config, output_dir=tmp_path, resume=True, **call)
    for name, weight in resumed.named_parameters():
        assert torch.equal(weight, whole.get_parameter(name))
    before, after = layers()[0].weight, whole[0].weight
    assert (before == after)[~mask].all() == masked and (before != after)[mask].any()
