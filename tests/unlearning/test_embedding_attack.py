import pytest
import torch

from sfumato.families import StableDiffusion
from sfumato.unlearning.embedding_attack import (
    accumulated_descent,
    insert_embeddings,
    projected_descent,
    room_for,
)

# positions 0 .. 7 are: start, two tokens, end, padding; each embedding is its position, the attack is 100, 101
PROMPT = torch.arange(8.0).view(1, 8, 1)
DELTA = torch.tensor([100.0, 101.0]).view(1, 2, 1)


def composed(insertion, count=2, **options):
    return insert_embeddings(PROMPT, DELTA, torch.tensor([count]), insertion, **options).flatten().tolist()


def test_prefix_goes_between_start_and_prompt_and_displaces_padding():
    assert composed("prefix") == [0, 100, 101, 1, 2, 3, 6, 7]


def test_suffix_goes_between_prompt_and_end():
    assert composed("suffix") == [0, 1, 2, 100, 101, 3, 6, 7]


def test_replacement_takes_the_prompt_s_place():
    assert composed("replace") == [0, 100, 101, 3, 4, 5, 6, 7]


def test_addition_keeps_the_places():
    assert composed("add") == [0, 101, 103, 3, 4, 5, 6, 7]
    assert composed("add", count=1) == [0, 101, 2, 3, 4, 5, 6, 7]


def test_released_prefix_lets_the_positions_behind_the_prompt_give_way():
    assert composed("prefix", drop_end=True) == [0, 100, 101, 1, 2, 5, 6, 7]


def test_counting_words_instead_of_tokens_displaces_tokens():
    assert composed("prefix", count=1, drop_end=True) == [0, 100, 101, 1, 4, 5, 6, 7]


def test_prompts_of_different_lengths_share_a_batch():
    both = insert_embeddings(PROMPT.repeat(2, 1, 1), DELTA.repeat(2, 1, 1), torch.tensor([2, 4]), "suffix")
    assert both[1].flatten().tolist() == [0, 1, 2, 3, 4, 100, 101, 5]
    assert both[0].flatten().tolist() == composed("suffix")


def test_gradient_reaches_the_attack_and_nothing_else_of_it():
    delta = DELTA.clone().requires_grad_()
    insert_embeddings(PROMPT, delta, torch.tensor([2]), "prefix").sum().backward()
    assert delta.grad.flatten().tolist() == [1, 1]


@pytest.mark.parametrize(
    ("insertion", "tokens", "fits"),
    [("prefix", 4, True), ("prefix", 5, False), ("suffix", 5, False), ("replace", 6, True), ("replace", 7, False),
     ("add", 9, True)],
)  # fmt: skip
def test_room_is_what_prompt_and_ends_leave(insertion, tokens, fits):
    assert room_for(8, 2, tokens, insertion) is fits


def test_released_attack_is_adam_on_the_running_sum_of_gradients():
    """Losses whose gradients are 1, then -3: written out, Adam sees 1, then -2."""
    found = accumulated_descent(
        lambda delta, n: (1.0, -3.0)[n] * delta.sum((1, 2)), torch.zeros(1, 1, 1), steps=2, learning_rate=0.1
    )
    first, second = 0.1 * 1, 0.9 * 0.1 * 1 + 0.1 * -2
    moment, square = second / (1 - 0.9**2), (0.999 * 0.001 + 0.001 * 4) / (1 - 0.999**2)
    assert first == 0.1
    assert found.item() == pytest.approx(-0.1 - 0.1 * moment / square**0.5, rel=1e-4)


def test_released_fast_attack_adds_the_next_gradient_to_the_sign():
    """Gradients 5, then -0.5: the sum is the sign 1, then 1 - 0.5 with the sign 1, so both steps go the same way."""
    found = accumulated_descent(
        lambda delta, n: (5.0, -0.5)[n] * delta.sum((1, 2)), torch.zeros(1, 1, 1), steps=2, learning_rate=0.1,
        fast=True,
    )  # fmt: skip
    assert found.item() == pytest.approx(-0.2, rel=1e-4)


def test_projected_attack_takes_steps_of_one_length_along_the_gradient_of_the_step():
    found = projected_descent(
        lambda delta, n: (torch.tensor([3.0, 4.0]) * delta).sum((1, 2)), torch.zeros(1, 1, 2), steps=2,
        learning_rate=0.1, radius=10.0,
    )  # fmt: skip
    assert torch.allclose(found, torch.tensor([[[-0.12, -0.16]]]))


def test_fast_projected_attack_steps_along_signs():
    found = projected_descent(
        lambda delta, n: (torch.tensor([3.0, -4.0]) * delta).sum((1, 2)), torch.zeros(1, 1, 2), steps=1,
        learning_rate=0.1, radius=10.0, fast=True,
    )  # fmt: skip
    assert torch.allclose(found, torch.tensor([[[-0.1, 0.1]]]))


def test_projected_attack_stays_in_its_ball():
    start = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    found = projected_descent(
        lambda d, n: (d - 9).square().sum((1, 2)), start, steps=50, learning_rate=0.1, radius=0.7
    )
    assert torch.allclose(found.norm(dim=2), torch.full((3, 2), 0.7), atol=1e-5)
    assert (found > 0).all()


@pytest.mark.parametrize("descent", [accumulated_descent, projected_descent])
def test_rows_are_attacked_independently(descent):
    options = {"steps": 5, "learning_rate": 0.1, **({"radius": 9.0} if descent is projected_descent else {})}
    goals = torch.tensor([1.0, -5.0]).view(2, 1, 1)
    together = descent(lambda d, n: (d - goals).square().sum((1, 2)), torch.zeros(2, 1, 3), **options)
    alone = descent(lambda d, n: (d - goals[1:]).square().sum((1, 2)), torch.zeros(1, 1, 3), **options)
    assert torch.allclose(together[1:], alone)


def test_start_is_left_alone():
    start = torch.ones(1, 1, 2)
    accumulated_descent(lambda d, n: d.sum((1, 2)), start, steps=3, learning_rate=0.1)
    projected_descent(lambda d, n: d.sum((1, 2)), start, steps=3, learning_rate=0.1, radius=0.1)
    assert torch.equal(start, torch.ones(1, 1, 2)) and not start.requires_grad


def test_encoding_given_embeddings_is_encoding_the_prompt(tiny_pipe):
    family, prompts = StableDiffusion(tiny_pipe), ["a sneaker", "a red t-shirt"]
    tokens, counts = family.tokenize(prompts)
    found = family.encode_embeddings(tiny_pipe.text_encoder, tokens, family.token_table[tokens])
    assert torch.equal(found["encoder_hidden_states"], family.encode_prompts(prompts)["encoder_hidden_states"])
    assert counts.tolist() == [len(tiny_pipe.tokenizer(prompt)["input_ids"]) - 2 for prompt in prompts]
    assert not tiny_pipe.text_encoder.get_input_embeddings()._forward_hooks


def test_encoder_is_itself_again_after_an_error(tiny_pipe):
    family = StableDiffusion(tiny_pipe)
    tokens, _ = family.tokenize(["a sneaker"])
    with pytest.raises(RuntimeError):
        family.encode_embeddings(tiny_pipe.text_encoder, tokens, torch.zeros(1, 3, 5))
    assert not tiny_pipe.text_encoder.get_input_embeddings()._forward_hooks
