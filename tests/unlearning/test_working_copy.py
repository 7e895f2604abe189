"""What is trained is the copy's own; all else is the original's, until the run is over."""

import copy
import json

import pytest
import torch

import sfumato
from sfumato.delta import fingerprint
from sfumato.trainer.update import GradientUpdate
from sfumato.unlearning.methods import METHODS
from sfumato.unlearning.working_copy import working_copy


def places(module):
    return {name: parameter.data_ptr() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("adapter_rank", [0, 2])
def test_second_network_costs_its_trained_weights(family, adapter_rank):
    names = set(family.trainable_parameters("xattn-kv"))
    part = family.denoiser
    before, own = fingerprint(part.named_parameters()), places(part)
    with working_copy(part, sorted(names), adapter_rank=adapter_rank) as (model, _):
        shared = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
        at = {parameter.data_ptr() for parameter in shared.values()}
        assert at <= set(own.values())
        assert len(at) == len(own) - (0 if adapter_rank else len(names))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 1
    assert not set(places(model).values()) & set(own.values())
    assert fingerprint(part.named_parameters()) == before
    assert all(parameter.requires_grad for parameter in part.parameters())
    changed = {
        n for (n, a), b in zip(model.named_parameters(), part.parameters(), strict=True) if not torch.equal(a, b)
    }
    assert changed == names


def test_original_keeps_its_flags_and_weights_when_a_run_fails(family):
    part = family.denoiser.requires_grad_(False)
    with pytest.raises(RuntimeError), working_copy(part, family.trainable_parameters("full")):
        raise RuntimeError
    assert not any(parameter.requires_grad for parameter in part.parameters())


@pytest.mark.parametrize("change", ["half", "prune"])
def test_nothing_is_shared_that_would_be_changed(family, change):
    part = family.denoiser.to(torch.bfloat16) if change == "half" else family.denoiser
    before = fingerprint(part.named_parameters())
    names = family.trainable_parameters("xattn-kv")
    with working_copy(part, names, prune_ratio=0.3 if change == "prune" else 0.0) as (model, kept):
        assert not set(places(model).values()) & set(places(part).values())
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        assert bool(kept) == (change == "prune")
    assert fingerprint(part.named_parameters()) == before


@pytest.mark.parametrize("method", ["esd", "concept_ablation"])
def test_sharing_changes_no_result(tiny_pipe, method, monkeypatch):
    from sfumato.unlearning import working_copy as module

    settings = {"batch_size": 2, "steps": 3, "learning_rate": 1e-2, "verify": False, "parameters": "xattn"}
    settings |= {"trajectory_steps": 2} if method == "esd" else {"anchor_examples": 4, "retain_examples": 4,
                                                                 "example_steps": 2}  # fmt: skip
    shared = sfumato.unlearn(tiny_pipe, "sneaker", method, **settings)
    monkeypatch.setattr(module.copy, "deepcopy", lambda part, memo=None, plain=copy.deepcopy: plain(part))
    alone = sfumato.unlearn(tiny_pipe, "sneaker", method, **settings)
    for one, other in zip(shared.unet.parameters(), alone.unet.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("settings", [{}, {"adapter_rank": 2}], ids=["weights", "adapters"])
def test_what_is_not_trained_stays_in_half_precision(tiny_pipe, settings, monkeypatch):
    """With autocast to match; what is trained is float32, and a LoRA is made before the result is rounded."""
    seen = []
    step = GradientUpdate.step
    monkeypatch.setattr(GradientUpdate, "step", lambda update, rate: seen.append(update.model) or step(update, rate))
    tiny_pipe.to(torch.bfloat16)
    before = {name: parameter.clone() for name, parameter in tiny_pipe.unet.named_parameters()}
    for method in ("esd", "concept_ablation", "gradient_ascent", "doco", "salun"):
        known = {name for config in METHODS[method].configs for name in config.__dataclass_fields__}
        own = {
            "forget_examples": 2, "retain_examples": 2, "anchor_examples": 2, "example_steps": 2, "batch_size": 2,
            "trajectory_steps": 2, "trajectories_per_prompt": 1, "discriminator_warmup": 1, "mask_ratio": 1.0,
        }  # fmt: skip
        result = sfumato.unlearn(
            tiny_pipe, "a sneaker", method, parameters="xattn-kv", mixed_precision="bf16", steps=2, learning_rate=1e-2,
            **settings, **{name: value for name, value in own.items() if name in known},
        )  # fmt: skip
        trained = {p.dtype for p in seen[-1].parameters() if p.requires_grad}
        assert trained <= {torch.float32}
        assert {parameter.dtype for parameter in result.unet.parameters()} == {torch.bfloat16}
        moved = {n for n, p in result.unet.named_parameters() if not torch.equal(p, before[n])}
        assert moved and all("attn2.to_k" in name or "attn2.to_v" in name for name in moved)


def test_lora_of_a_model_in_half_precision_is_that_of_the_change_before_it_was_rounded(tiny_pipe, tmp_path):
    settings = {
        "parameters": "xattn-kv", "steps": 4, "learning_rate": 1e-4, "trajectory_steps": 2, "batch_size": 2,
        "adapter_rank": 2, "save": ["lora"], "lora_rank": 2, "verify": False,
    }  # fmt: skip
    tiny_pipe.to(torch.bfloat16)
    sfumato.unlearn(tiny_pipe, "a sneaker", "esd", output_dir=tmp_path / "out", mixed_precision="bf16", **settings)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["saved"]["lora"]["missing"] < 1e-3
