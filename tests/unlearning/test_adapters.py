"""Adapters train in the place of weights, and the result is a model without them."""

import copy

import pytest
import torch

import sfumato
from sfumato.lora import extract_lora
from sfumato.unlearning.adapters import add_adapters, merge_adapters

STEPS = {"batch_size": 2, "steps": 3, "learning_rate": 1e-2, "verify": False, "adapter_rank": 2}
PICTURES = {"forget_examples": 4, "retain_examples": 4, "anchor_examples": 4, "example_steps": 2}
CASES = {
    "salun": {**PICTURES, "mask_ratio": 1.0, "parameters": "full"},
    "esd": {"trajectory_steps": 2, "parameters": "xattn-kv"},
    "concept_ablation": {**PICTURES, "frozen_teacher": True},
    "doco": {**PICTURES, "discriminator_warmup": 1},
    "gradient_ascent": {**PICTURES, "parameters": "xattn"},
    "advunlearn": {"attack_steps": 1, "trajectory_steps": 2, "retain_trajectories": 2, "retain_batch_size": 2,
                   "warmup_rounds": 1},
}  # fmt: skip


@pytest.mark.parametrize("method", CASES)
def test_every_method_that_can_trains_adapters_and_gives_a_plain_model_of_low_rank_change(tiny_pipe, method):
    result = sfumato.unlearn(tiny_pipe, "sneaker", method, **STEPS, **CASES[method])
    part = "text_encoder" if method == "advunlearn" else "unet"
    before, after = getattr(tiny_pipe, part), getattr(result, part)
    assert [name for name, _ in after.named_parameters()] == [name for name, _ in before.named_parameters()]
    assert type(after) is type(before) and not any("lora" in name for name, _ in after.named_modules())
    changed = {
        name
        for (name, a), b in zip(after.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    weights = {f"{n}.weight" for n, m in before.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    assert changed and changed <= weights
    assert extract_lora(tiny_pipe, result, 2).missing < 1e-4


def test_adapters_change_nothing_before_they_are_trained_and_depend_on_the_seed(tiny_pipe):
    models = []
    for seed in (0, 0, 1):
        models.append(copy.deepcopy(tiny_pipe.unet))
        add_adapters(models[-1], [name for name, _ in models[-1].named_parameters()], 3, seed)
    trained = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in models]
    assert all("lora_" in name for name in trained[0])
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    assert not all(torch.equal(trained[0][name], trained[2][name]) for name in trained[0])
    noisy, hidden = torch.randn(1, 4, 4, 4), torch.randn(1, 5, 16)
    with torch.no_grad():
        wanted = tiny_pipe.unet(noisy, 10, hidden).sample
        assert torch.equal(models[0](noisy, 10, hidden).sample, wanted)
        for parameter in trained[0].values():
            parameter += 0.1
        moved = models[0](noisy, 10, hidden).sample
        merge_adapters(models[0])
        assert not torch.allclose(moved, wanted, atol=1e-3)
        assert torch.allclose(models[0](noisy, 10, hidden).sample, moved, atol=1e-4)
    assert not hasattr(models[0], "peft_config")


def test_a_run_with_adapters_resumes(tiny_pipe, tmp_path, monkeypatch):
    settings = {**STEPS, **CASES["esd"], "steps": 4, "checkpoint_every": 2}
    whole = sfumato.unlearn(tiny_pipe, "sneaker", "esd", **settings)
    from sfumato.unlearning import working_copy

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(working_copy, "merge_adapters", stop)
        sfumato.unlearn(tiny_pipe, "sneaker", "esd", output_dir=tmp_path / "out", **settings)
    resumed = sfumato.unlearn(tiny_pipe, "sneaker", "esd", output_dir=tmp_path / "out", resume=True, **settings)
    for one, other in zip(whole.unet.parameters(), resumed.unet.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("salun", {"adapter_rank": 2}, "A saliency mask is over weights"),
        ("proximal", {"adapter_rank": 2}, "leave out adapter_rank"),
        ("esd", {"adapter_rank": -1}, "`adapter_rank` must not be negative"),
        ("esd", {"adapter_rank": 2, "prune_ratio": 0.3}, "leave out one of both"),
    ],
)
def test_what_adapters_can_not_do_is_refused(tiny_pipe, method, settings, message):
    with pytest.raises(ValueError, match=message):
        sfumato.unlearn(tiny_pipe, "sneaker", method, **settings)
