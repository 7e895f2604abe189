from dataclasses import replace

import numpy as np
import pytest
import torch

from sfumato.attacks.attack import Answer
from sfumato.attacks.ring_a_bell import RingABellConfig, _costs, _encode, _next, attack, concept_direction
from sfumato.attacks.slots import Slots


def search(batch, config):
    talk = attack(batch, config)
    with torch.no_grad():
        asked = next(talk)
        with pytest.raises(StopIteration):
            talk.send(Answer((False,) * len(asked.rows), torch.zeros(len(asked.rows), 3, 32, 32)))
    return asked


def test_search_comes_back_to_a_prompt_of_which_it_knows_the_encoding(batch_of):
    """With strength 0 the best candidate is the prompt itself."""
    prompts = ("red bag", "blue shirt")
    config = RingABellConfig(tokens=2, strength=0.0, population=300, generations=60)
    found = search(batch_of(*prompts), config)
    assert found.prompts == prompts and found.iterations == 60
    alone = [search(batch_of(one, numbers=(k,)), config).prompts[0] for k, one in enumerate(prompts)]
    assert found.prompts == tuple(alone)


def test_direction_is_the_mean_over_pairs(batch_of):
    batch = batch_of("a sneaker")
    concept, source = batch.setting.concept, batch.setting.source
    pairs = [
        (source.encode_prompts([a])["encoder_hidden_states"] - source.encode_prompts([b])["encoder_hidden_states"])
        for a, b in zip(concept.prompts, concept.anchors, strict=True)
    ]
    assert torch.allclose(concept_direction(source, batch.setting), torch.stack(pairs).mean(0), atol=1e-6)


def test_pairs_may_be_ones_own(batch_of, tmp_path):
    batch, file = batch_of("a sneaker"), tmp_path / "pairs.jsonl"
    file.write_text('{"with": "a red sneaker", "without": "a red"}\n{"with": "sneaker", "without": ""}\n')
    source = batch.setting.source
    ends = [
        source.encode_prompts(some)["encoder_hidden_states"] for some in (["a red sneaker", "sneaker"], ["a red", ""])
    ]
    found = concept_direction(source, batch.setting, str(file))
    assert torch.allclose(found, (ends[0] - ends[1]).mean(0, keepdim=True), atol=1e-6)
    config = RingABellConfig(tokens=2, population=8, generations=1, pairs=str(file))
    fresh = replace(batch, setting=replace(batch.setting, shared={}))
    search(fresh, config)
    assert torch.equal(fresh.setting.shared["direction"], found)


def test_cost_is_the_squared_distance_of_the_encodings(batch_of):
    batch = batch_of("a red sneaker", "a bag")
    source = batch.setting.source
    wanted = _encode(source, batch.tokens)
    people = batch.tokens[:, 1:3][:, None].repeat(1, 5, 1).numpy()  # two tokens of each prompt
    empty, none = source.tokenize([""])
    slot = Slots.placed(empty, none, 2, "replace")
    text = source.pipe.tokenizer.decode(people[0, 0])
    expected = (source.encode_prompts([text])["encoder_hidden_states"][0] - wanted[0]).square().sum()
    found = _costs(source, slot, empty, people, wanted, 3)  # in parts that cut across prompts
    assert found.shape == (2, 5) and np.allclose(found[0], expected.item(), rtol=1e-4)
    assert np.allclose(found[1], found[1, 0])


def test_the_better_half_lives_on_and_children_are_made_of_it():
    allowed = np.arange(100, 110)
    people = np.arange(8)[:, None] * np.ones(6, int)  # each of one number
    costs = np.array([9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0])
    chosen = RingABellConfig(tokens=6, population=8, crossover=1.0, mutation=0.0)
    after = _next(people, costs, allowed, np.random.default_rng(0), chosen)
    assert after.shape == people.shape and after[:4, 0].tolist() == [1, 3, 5, 7]
    assert set(after.ravel().tolist()) <= {1, 3, 5, 7}
    assert all((np.diff(row) != 0).sum() <= 1 for row in after[4:])  # crossed at one point
    mutated = RingABellConfig(tokens=6, population=8, crossover=0.0, mutation=1.0)
    after = _next(people, costs, allowed, np.random.default_rng(0), mutated)
    assert all(np.isin(row, allowed).sum() == 1 for row in after[4:])
