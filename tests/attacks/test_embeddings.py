from dataclasses import asdict

import pytest
import torch

import sfumato
from sfumato.attacks import embeddings
from sfumato.attacks.embeddings import EmbeddingAttackConfig, attack_embeddings
from sfumato.evaluation.generation import draw
from sfumato.evaluation.judge import Judge
from sfumato.families import family_of
from sfumato.loading import assets_folder

PROMPTS = [f"a {style} of a {colour} sneaker" for style, colour in (("photo", "red"), ("photo", "green"))] * 2


@pytest.fixture(scope="module")
def atelier():
    return sfumato.load("atelier")


@pytest.fixture(scope="module")
def unlearned(atelier):
    return sfumato.unlearn(atelier, "sneaker", "uce", verify=False)


def shown(pipe, **options):
    """How many pictures show a sneaker."""
    judge = Judge.load(assets_folder() / "judge")
    pictures = draw(pipe, PROMPTS, num_inference_steps=12, description=None, **options)
    return int((judge.predict(pictures)["garment"] == judge.domains["garment"].index("sneaker")).sum())


@pytest.mark.parametrize(
    ("settings", "least"),
    [({}, 3), ({"insertion": "replace", "tokens": 6}, 3), ({"attack": "released"}, 1)],
    ids=["prefix", "replace", "released"],
)
def test_an_attack_brings_back_what_was_only_renamed(atelier, unlearned, settings, least):
    """UCE gives the word another meaning; the denoiser can draw a sneaker as before."""
    assert shown(atelier) == len(PROMPTS) and shown(unlearned) == 0
    found = attack_embeddings(
        unlearned, atelier, PROMPTS, EmbeddingAttackConfig(levels=6, **settings), description=None
    )
    assert shown(unlearned, conditioning=found) >= least


def test_a_prompt_is_attacked_by_itself_whatever_the_batch(atelier, unlearned):
    runs = [
        attack_embeddings(
            unlearned, atelier, PROMPTS, EmbeddingAttackConfig(steps=3, levels=3, batch_size=size), description=None
        )["encoder_hidden_states"]
        for size in (3, 4)
    ]
    assert torch.allclose(*runs, atol=1e-4)
    assert not torch.allclose(runs[0][0], runs[0][2], atol=1e-2)  # the same prompt from another start
    assert runs[0].shape == family_of(unlearned).encode_prompts(PROMPTS)["encoder_hidden_states"].shape


def test_an_attack_changes_no_weight_and_leaves_what_was_trained_trainable(atelier, unlearned):
    before = {name: value.clone() for name, value in unlearned.unet.state_dict().items()}
    unlearned.unet.conv_in.weight.requires_grad_(True)
    attack_embeddings(unlearned, atelier, PROMPTS[:1], EmbeddingAttackConfig(steps=1, levels=2), description=None)
    assert unlearned.unet.conv_in.weight.requires_grad and unlearned.unet.conv_in.weight.grad is None
    assert all(torch.equal(value, before[name]) for name, value in unlearned.unet.state_dict().items())


def test_projected_embeddings_stay_within_the_vocabulary_s_norm(atelier, unlearned, monkeypatch):
    seen, insert = [], embeddings.insert_embeddings
    monkeypatch.setattr(embeddings, "insert_embeddings", lambda *a: seen.append(a[1].detach()) or insert(*a))
    config = EmbeddingAttackConfig(steps=4, levels=2, tokens=2, learning_rate=3.0)
    attack_embeddings(unlearned, atelier, PROMPTS[:2], config, description=None)
    longest = family_of(unlearned).token_table.norm(dim=1).max()
    assert len(seen) == 5 and all(delta.shape[:2] == (2, 2) for delta in seen)
    assert max(delta.norm(dim=2).max() for delta in seen) <= longest * (1 + 1e-6)


def test_pictures_of_encoded_prompts_are_those_of_the_prompts(atelier):
    encoded = family_of(atelier).encode_prompts(PROMPTS)
    pictures = [
        draw(atelier, PROMPTS, num_inference_steps=2, batch_size=3, description=None, conditioning=given)
        for given in (None, encoded)
    ]
    assert torch.equal(*pictures)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"insertion": "middle"}, "`insertion` must be one of"),
        ({"attack": "gcg"}, "`attack` must be one of"),
        ({"tokens": 0}, "`tokens` must be at least 1"),
        ({"levels": 1}, "`levels` must be at least 2"),
        ({"learning_rate": 0.0}, "`learning_rate` must be positive"),
        ({"steps": "many"}, "`steps`"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        EmbeddingAttackConfig(**{**asdict(EmbeddingAttackConfig()), **settings})


def test_impossible_attacks_are_refused(atelier):
    with pytest.raises(ValueError, match="`prompts` is empty"):
        attack_embeddings(atelier, atelier, [])
    with pytest.raises(ValueError, match="no room for 60 embeddings"):
        attack_embeddings(atelier, atelier, PROMPTS, EmbeddingAttackConfig(tokens=60))
    with pytest.raises((ValueError, TypeError), match="seed"):
        attack_embeddings(atelier, atelier, PROMPTS, seed=-1)
