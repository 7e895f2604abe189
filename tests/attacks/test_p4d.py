import pytest
import torch
import torch.nn.functional as F

from sfumato.attacks.attack import Answer
from sfumato.attacks.p4d import LEVEL_STREAM, NOISE_STREAM, P4DConfig, _nearest, attack, slots_of
from sfumato.families import family_of
from sfumato.randomness import generator_for

PROMPTS = ("a red sneaker", "sketch of a green sneaker")


def converse(batch, config, answer):
    talk, found = attack(batch, config), []
    with torch.no_grad():
        try:
            asked = next(talk)
            while True:
                found.append(asked)
                asked = talk.send(answer(asked, len(found)))
        except StopIteration:
            return found


def nothing(asked, number):
    return Answer((False,) * len(asked.rows), torch.zeros(len(asked.rows), 3, 32, 32))


def test_the_picture_most_like_the_original_is_the_candidate(batch_of):
    batch = batch_of(*PROMPTS)

    def second_is_alike(asked, number):
        pictures = batch.targets if number == 2 else torch.zeros_like(batch.targets)
        return Answer((False,) * 2, pictures)

    found = converse(batch, P4DConfig(n=4, steps=6, evaluate_every=2), second_is_alike)
    assert [one.iterations for one in found] == [2, 4, 6, 6]
    assert [one.final for one in found] == [False, False, False, True]
    assert found[-1].prompts == found[1].prompts != found[0].prompts


def test_any_candidate_ends_the_search(batch_of):
    def shown(asked, number):
        return Answer(tuple(row == 1 for row in asked.rows), torch.zeros(len(asked.rows), 3, 32, 32))

    found = converse(batch_of(*PROMPTS), P4DConfig(n=4, steps=4, evaluate_every=2, select="any"), shown)
    assert [one.rows for one in found] == [(0, 1), (0,)] and all(one.final for one in found)


def test_likeness_needs_features(batch_of):
    from dataclasses import replace

    batch = batch_of(PROMPTS[0])
    blind = replace(batch, setting=replace(batch.setting, features=None))
    with pytest.raises(ValueError, match="name a CLIP, or use select='any'"):
        converse(blind, P4DConfig(n=2, steps=1), nothing)


def test_nearest_is_by_the_cosine():
    table = torch.tensor([[10.0, 0.0], [0.0, 0.1], [-1.0, -1.0]])
    assert _nearest(torch.tensor([[[0.2, 0.3], [0.3, 0.2], [-9.0, -8.0]]]), table).tolist() == [[1, 0, 2]]


def test_gradient_is_taken_at_the_vocabulary_and_applied_to_the_embedding(batch_of):
    """One step of one prompt, with the equations as they stand."""
    batch = batch_of(PROMPTS[0])
    config = P4DConfig(n=2, steps=1, evaluate_every=1, learning_rate=5.0, weight_decay=0.0)
    spelled = converse(batch, config, nothing)[0].prompts[0]
    victim, source, table = batch.setting.victim, batch.setting.source, batch.setting.victim.token_table
    from sfumato.attacks.p4d import START_STREAM

    draws = [torch.randint(len(table), (1,), generator=generator_for(0, START_STREAM, 0, k)).item() for k in range(2)]
    soft = table[draws].clone()
    time = torch.randint(1000, (1,), generator=generator_for(0, LEVEL_STREAM, 0, 0))
    noise = torch.randn(batch.latents.shape[1:], generator=generator_for(0, NOISE_STREAM, 0, 0))[None]
    noisy = victim.add_noise(batch.latents, noise, time)
    wanted = source.ask(source.denoiser, noisy, time, source.encode_prompts(PROMPTS[:1]))
    hard = table[draws].clone().requires_grad_()
    empty = victim.embed_tokens(victim.tokenize([""])[0])
    sequence = torch.cat([empty[:, :1], hard[None], empty[:, 1:-2]], 1)
    told = victim.encode_embeddings(victim.pipe.text_encoder, victim.tokenize([""])[0], sequence)
    loss = (victim.ask(victim.denoiser, noisy, time, told) - wanted).square().mean()
    gradient = torch.autograd.grad(loss, hard)[0]
    moved = soft - 5.0 * gradient / (gradient.abs() + 1e-8)  # the first step of Adam
    ids = (F.normalize(moved, dim=-1) @ F.normalize(table, dim=-1).T).argmax(-1)
    assert spelled == victim.pipe.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_a_prompt_of_fewer_tokens_gets_one_behind_it(atelier):
    tokens, counts = family_of(atelier).tokenize(["a sneaker", "a photo of a red sneaker"])
    assert counts.tolist() == [2, 6]
    slots = slots_of(tokens, counts, P4DConfig(variant="k", k=3))
    length = tokens.shape[1]
    assert slots.origin[0, :4].tolist() == [0, 1, 2, length] and slots.sizes == (3, 8)
    assert slots.origin[1, :9].tolist() == [0, 1, 2, 3, length, 4, 5, 6, length + 1]
