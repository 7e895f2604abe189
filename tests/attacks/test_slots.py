import pytest
import torch

from sfumato.attacks.slots import Slots, text_of
from sfumato.families import family_of

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
        ("replace", [[S, 50, 51, E, P, P, P, P], [S, 60, 61, E, P, P, P, P]]),
    ],
)
def test_slots_go_where_they_should_and_padding_gives_way(place, expected):
    slots = Slots.placed(TOKENS, COUNTS, 2, place)
    assert slots.fill(TOKENS, NEW).tolist() == expected
    assert slots.count == 2 and slots.rows([1]).fill(TOKENS[1:], NEW[1:]).tolist() == expected[1:]


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
