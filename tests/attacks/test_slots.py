import runpy
from pathlib import Path

import pytest
import torch

from sfumato.attacks.slots import PLACES, Slots, text_of
from sfumato.families import family_of
from sfumato.unlearning.embedding_attack import insert_embeddings, insert_words

S, E, P = 90, 91, 92  # start, end, padding
TOKENS = torch.tensor([[S, 1, 2, 3, E, P, P, P], [S, 4, E, P, P, P, P, P]])
COUNTS = torch.tensor([3, 1])
NEW = torch.tensor([[50, 51], [60, 61]])


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("prefix", [[S, 50, 51, 1, 2, 3, E, P], [S, 60, 61, 4, E, P, P, P]]),
        ("suffix", [[S, 1, 2, 3, 50, 51, E, P], [S, 4, 60, 61, E, P, P, P]]),
        ("middle", [[S, 1, 50, 51, 2, 3, E, P], [S, 60, 61, 4, E, P, P, P]]),
        ("insert", [[S, 1, 50, 2, 51, 3, E, P], [S, 60, 61, 4, E, P, P, P]]),
        ("per_words", [[S, 50, 1, 2, 3, 51, E, P], [S, 60, 4, 61, E, P, P, P]]),
        ("replace", [[S, 50, 51, E, P, P, P, P], [S, 60, 61, E, P, P, P, P]]),
    ],
)
def test_slots_go_where_they_should_and_padding_gives_way(place, expected):
    slots = Slots.placed(TOKENS, COUNTS, 2, place)
    assert slots.fill(TOKENS, NEW).tolist() == expected
    assert slots.count == 2 and slots.rows([1]).fill(TOKENS[1:], NEW[1:]).tolist() == expected[1:]


@pytest.mark.parametrize(("count", "slots"), [(7, 2), (9, 3), (2, 4), (8, 1)])
def test_slots_in_between_are_those_of_the_released_program(count, slots):
    """Which cuts its embeddings into slices, and so puts what a short prompt has no room between at its end."""
    own, new = list(range(1, 1 + count)), list(range(50, 50 + slots))
    step, inserted = count // (slots + 1), []
    for k in range(slots):
        inserted += [*own[step * k : step * (k + 1)], new[k]]
    inserted += own[step * slots :]
    per_words = []
    for k in range(slots - 1):
        per_words += [new[k], *own[3 * k : 3 * (k + 1)]]
    per_words += [new[-1], *own[3 * (slots - 1) :]]
    tokens = torch.tensor([[S, *own, E, *[P] * 9]])
    for place, expected in (("insert", inserted), ("per_words", per_words)):
        filled = Slots.placed(tokens, torch.tensor([count]), slots, place).fill(tokens, torch.tensor([new]))
        assert filled[0, 1 : 1 + count + slots].tolist() == expected and filled[0, 1 + count + slots] == E


def test_embeddings_go_where_numbers_do():
    table = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    slots = Slots.placed(TOKENS, COUNTS, 2, "middle")
    assert torch.equal(slots.fill(table[TOKENS], table[NEW]), table[slots.fill(TOKENS, NEW)])


def test_spread_slots_follow_every_so_many_tokens():
    assert Slots.spread(TOKENS, COUNTS, 1).fill(TOKENS, torch.tensor([[50, 51, 52], [60, 61, 62]])).tolist() == [
        [S, 1, 50, 2, 51, 3, 52, E], [S, 4, 60, E, P, P, P, P],
    ]  # fmt: skip
    assert Slots.spread(TOKENS[:1], COUNTS[:1], 2).fill(TOKENS[:1], NEW[:1, :1]).tolist() == [
        [S, 1, 2, 50, 3, E, P, P]
    ]


def test_a_phrase_gives_way_to_one_slot_or_it_goes_behind():
    slots = Slots.instead(TOKENS, COUNTS, [[2, 3], [3]])
    assert slots.fill(TOKENS, NEW[:, :1]).tolist() == [[S, 1, 50, E, P, P, P, P], [S, 4, 60, E, P, P, P, P]]


def test_no_room_is_refused_and_the_prompt_named():
    Slots.placed(TOKENS, COUNTS, 3, "prefix")
    with pytest.raises(ValueError, match="Prompt 1 has 7 tokens with those of the attack, .* takes 6"):
        Slots.placed(TOKENS, COUNTS, 4, "prefix")


def test_prompts_are_spelled_as_they_were_typed(atelier):
    family = family_of(atelier)
    tokens, counts = family.tokenize(["a red sneaker", "a bag"])
    blue, _ = family.tokenize(["blue"])
    slots = Slots.placed(tokens, counts, 1, "suffix")
    assert text_of(family, slots, tokens, blue[:, 1:2].expand(2, 1)) == ["a red sneaker blue", "a bag blue"]


@pytest.fixture(scope="module")
def sdxl():
    """A tiny SDXL whose second tokenizer pads with a word, as that of the released models."""
    torch.manual_seed(0)
    pipe = runpy.run_path(str(Path(__file__).parents[1] / "families" / "conftest.py"))["sdxl"]()
    pipe.tokenizer_2.pad_token = pipe.tokenizer_2.convert_ids_to_tokens(5)
    return family_of(pipe)


def told_and_typed(family, numbers, told):
    """What an encoder makes of embeddings that were put in, and of the same tokens given as numbers."""
    encoder = family.parts["text_encoder"]
    return told, family.encode_embeddings(encoder, numbers, family.embed_tokens(numbers))


@pytest.mark.parametrize("end", ["named", "highest"])
@pytest.mark.parametrize("place", [*PLACES, "instead"])
def test_pooled_embedding_is_taken_where_the_end_token_then_stands(sdxl, place, end, monkeypatch):
    """Of SDXL's second encoder; older configs find the end token as the highest number."""
    if end == "highest":
        encoder = sdxl.pipe.text_encoder_2.text_model
        monkeypatch.setattr(encoder, "eos_token_id", 2)
    tokens, counts = sdxl.tokenize(["a red sneaker", "a bag"])
    new = torch.tensor([[320, 351], [360, 320]])
    if place == "instead":
        slots, new = Slots.instead(tokens, counts, [tokens[0, 2:4, 0].tolist()]), new[:, :1]
    else:
        slots = Slots.placed(tokens, counts, 2, place)
    both = new[..., None].expand(-1, -1, 2)
    told, typed = told_and_typed(
        sdxl, slots.fill(tokens, both), slots.encode(sdxl, tokens, sdxl.embed_tokens(both).requires_grad_())
    )
    assert all(torch.allclose(told[name], typed[name], atol=1e-6) for name in typed)
    told["text_embeds"].sum().backward()


@pytest.mark.parametrize("insertion", ["prefix", "suffix", "replace"])
def test_pooled_embedding_of_adversarial_embeddings_too(sdxl, insertion):
    tokens, counts = sdxl.tokenize(["a red sneaker", "a bag"])
    new = torch.tensor([[320, 351], [360, 320]])[..., None].expand(-1, -1, 2)
    embeddings = insert_embeddings(sdxl.embed_tokens(tokens), sdxl.embed_tokens(new), counts, insertion)
    numbers = insert_words(tokens, 2, sdxl.plain_token, counts, insertion)
    told = sdxl.encode_embeddings(sdxl.parts["text_encoder"], numbers, embeddings)
    told, typed = told_and_typed(sdxl, insert_embeddings(tokens, new, counts, insertion), told)
    assert all(torch.allclose(told[name], typed[name], atol=1e-6) for name in typed)
    assert insert_words(tokens, 2, sdxl.plain_token, counts, "add") is tokens


def test_candidates_are_padded_for_each_encoder_as_prompts_are(sdxl):
    """So a prompt's own tokens are at no distance from it."""
    from sfumato.attacks.ring_a_bell import _costs, _encode

    tokens, _ = sdxl.tokenize(["red sneaker"])
    empty, none = sdxl.tokenize([""])
    people = tokens[:, None, 1:3, 0].numpy()
    slot = Slots.placed(empty, none, 2, "replace")
    assert _costs(sdxl, slot, empty, people, _encode(sdxl, tokens), 4).item() < 1e-9
