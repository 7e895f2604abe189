"""Every method on every family that it is defined for, and a clear sentence where it is not."""

import copy
import runpy
from pathlib import Path

import pytest
import torch

import sfumato
from sfumato.families import StableDiffusion, TextFamily, family_of
from sfumato.unlearning.methods import METHODS

EXAMPLES = {"forget_examples": 4, "retain_examples": 4, "example_steps": 2, "example_batch_size": 4}
PAIRS = {"anchor_examples": 4, "retain_examples": 4, "example_steps": 2, "example_batch_size": 4}
WALKS = {"trajectories_per_prompt": 1, "trajectory_steps": 3, "trajectory_batch_size": 8}
TRAINING = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3}
SETTINGS = {
    "salun": {**EXAMPLES, **TRAINING},
    "proximal": {**EXAMPLES, **TRAINING, "schedule": "fixed"},
    "gradient_ascent": {**EXAMPLES, **TRAINING},
    "concept_ablation": {**PAIRS, **TRAINING, "parameters": "full", "train_start_token": False},
    "doco": {**PAIRS, **TRAINING, "parameters": "full", "discriminator_warmup": 1},
    "esd": {**WALKS, **TRAINING, "parameters": "full"},
    "advunlearn": {**WALKS, **TRAINING, "warmup_rounds": 1, "attack_steps": 2, "retain_batch_size": 2,
                   "retain_trajectories": 2},
    "uce": {}, "rece": {"epochs": 1},
}  # fmt: skip


def unlearned(pipe, method, **settings):
    forget = "sneaker" if isinstance(family_of(pipe), TextFamily) else family_of(pipe).names[1]
    return sfumato.unlearn(pipe, forget, method, verify=False, **{**SETTINGS[method], **settings})


def changed(before, after):
    """Names of components with other weights."""
    return {
        name for name, part in before.components.items()
        if isinstance(part, torch.nn.Module)
        and any(
            not torch.equal(x, y)
            for x, y in zip(part.parameters(), after.components[name].parameters(), strict=True)
        )
    }  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_method_changes_the_denoiser_alone_or_says_that_it_is_not_defined(pipe, method):
    family = family_of(pipe)
    if not isinstance(family, METHODS[method].family):
        with pytest.raises(ValueError, match=f"{method} is not defined for {family.label}: "):
            unlearned(pipe, method)
        return
    before = {name: value.clone() for name, value in family.denoiser.state_dict().items()}
    settings = {"train": "denoiser"} if method == "advunlearn" else {}
    result = unlearned(pipe, method, **settings)
    assert type(result) is type(pipe) and changed(pipe, result) == {family.denoiser_name}
    assert all(torch.equal(value, before[name]) for name, value in family.denoiser.state_dict().items())
    if not METHODS[method].trains:
        edited = set(family.trainable_parameters("text"))
        state = family_of(result).denoiser.state_dict()
        assert {name for name, value in before.items() if not torch.equal(value, state[name])} <= edited


def test_advunlearn_changes_all_text_encoders(pipe):
    family = family_of(pipe)
    if not isinstance(family, StableDiffusion):
        pytest.skip("no text encoders to train")
    result = unlearned(pipe, "advunlearn")
    assert changed(pipe, result) == set(family.encoders)


def test_result_says_what_became_of_the_concept(pipe, capsys):
    family = family_of(pipe)
    forget = "sneaker" if isinstance(family, TextFamily) else family.names[1]
    settings = {**SETTINGS["esd"], "steps": 1}
    sfumato.unlearn(pipe, forget, "esd", **settings)
    assert forget in capsys.readouterr().err


def test_dit_keeps_the_names_of_its_classes(tmp_path):
    from diffusers import DiffusionPipeline

    pipe = runpy.run_path(str(Path(__file__).with_name("conftest.py")))["KINDS"]["dit"]()
    pipe.labels = {"goldfish": 1, "tench": 0, "Tinca tinca": 0}
    result = unlearned(pipe, "esd", output_dir=tmp_path / "out")
    assert result.labels == pipe.labels
    assert DiffusionPipeline.from_pretrained(tmp_path / "out").labels == pipe.labels


def test_every_weight_of_the_text_encoders_that_is_trained_has_a_gradient(pipe):
    """Or several processes would wait for it."""
    family = family_of(pipe)
    if not isinstance(family, StableDiffusion):
        pytest.skip("no text encoders to train")
    encoder = copy.deepcopy(family.parts["text_encoder"]).requires_grad_(True)
    tokens, _ = family.tokenize(["a sneaker"])
    told = family.encode_embeddings(encoder, tokens, family.embed_tokens(tokens))
    sum(values.square().sum() for values in told.values()).backward()
    parameters = dict(encoder.named_parameters())
    names = family.trainable_parameters("full", "text_encoder")
    assert names and all(parameters[name].grad is not None for name in names)
