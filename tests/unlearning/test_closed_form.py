import copy

import pytest
import torch

from sfumato.concepts import Concept
from sfumato.trainer import TrainingConfig, make_accelerator
from sfumato.unlearning import closed_form
from sfumato.unlearning.closed_form import (
    EditConfig,
    NormalEquations,
    Pairs,
    edit_map,
    embedding_pairs,
    gram_of_prompts,
    preserve_scale,
    prompt_pairs,
    stack,
    write,
)
from sfumato.unlearning.task import ExampleConfig, Task


def vectors(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_residual_of_the_normal_equations_is_tiny_even_when_the_matrix_is_nearly_singular():
    inputs = vectors(0, 40, 768)  # squared norm near 768, as Stable Diffusion's; far fewer than dimensions
    config = EditConfig(lambda_abs=1e-6)
    equations = NormalEquations(inputs, torch.ones(40).double(), torch.zeros(768, 768).double(), config)
    solution = equations.solve(vectors(1, 5, 768))
    residual = (solution @ equations.matrix - vectors(1, 5, 768)).norm() / vectors(1, 5, 768).norm()
    assert residual < 1e-5
    assert equations.residual == pytest.approx(float(residual), rel=1e-6)


def test_edit_is_the_ordinary_least_squares_solution_as_lambda_goes_to_zero():
    """Against lstsq with more equations than unknowns, on each layer by itself."""
    inputs, targets = vectors(0, 12, 4), vectors(1, 12, 4)
    pairs, ones = Pairs(inputs, targets, torch.zeros(12).long()), torch.ones(12).double()
    equations = NormalEquations(inputs, ones, torch.zeros(4, 4).double(), EditConfig(lambda_abs=1e-12))
    for seed, rows in ((2, 3), (3, 5)):
        weight = vectors(seed, rows, 4)
        expected = torch.linalg.lstsq(inputs, targets @ weight.T).solution.T
        assert torch.allclose(weight + weight @ edit_map(equations, pairs, ones), expected, atol=1e-8)


def test_relative_lambda_is_a_multiple_of_the_mean_eigenvalue():
    inputs, kept = vectors(0, 7, 4), vectors(1, 4, 4)
    kept = kept @ kept.T
    scales = torch.full((7,), 2.0).double()
    equations = NormalEquations(inputs, scales, kept, EditConfig(lambda_abs=0.25, lambda_rel=0.1))
    mean = torch.linalg.eigvalsh(2 * inputs.T @ inputs + kept).mean()
    assert equations.ridge == pytest.approx(0.25 + 0.1 * float(mean))


def test_relative_lambda_gives_the_same_edit_whatever_the_scale_of_the_embeddings():
    inputs, targets = vectors(0, 3, 6), vectors(1, 3, 6)
    ones, config = torch.ones(3).double(), EditConfig(lambda_abs=0.0, lambda_rel=0.3)
    maps = []
    for size in (1.0, 28.0):
        pairs = Pairs(size * inputs, size * targets, torch.zeros(3).long())
        maps.append(edit_map(NormalEquations(pairs.inputs, ones, torch.zeros(6, 6).double(), config), pairs, ones))
    assert torch.allclose(*maps)


def test_matrix_without_a_solution_is_refused_in_words():
    kept = -10 * torch.eye(3).double()
    with pytest.raises(ValueError, match="no stable solution at lambda = 0.5; raise `lambda_abs`"):
        NormalEquations(vectors(0, 2, 3), torch.ones(2).double(), kept, EditConfig())


def test_stack_and_write_are_inverse_and_nothing_is_written_if_anything_is_not_finite():
    weights = {name: torch.randn(rows, 3) for name, rows in (("a", 2), ("b", 4))}
    before = copy.deepcopy(weights)
    stacked = stack(weights)
    assert stacked.dtype == torch.float64 and stacked.shape == (6, 3)
    write(weights, 2 * stacked)
    assert all(torch.equal(weights[name], 2 * before[name]) for name in weights)
    stacked[5, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        write(weights, stacked)
    assert all(torch.equal(weights[name], 2 * before[name]) for name in weights)


def states(family, prompt):
    return family.pipe.encode_prompt([prompt], "cpu", 1, False)[0][0].double()  # (T, width)


def ends(family, prompt):
    """Where the last token of a prompt stands: attention_mask.sum() - 2."""
    return sum(family.pipe.tokenizer(prompt).attention_mask) - 2


def test_last_pairs_the_last_tokens_of_subject_and_anchor(family):
    pairs = embedding_pairs(family, [("a sneaker", "a red bag")], "last")
    assert torch.allclose(pairs.inputs, states(family, "a sneaker")[[2]])
    assert torch.allclose(pairs.targets, states(family, "a red bag")[[3]])
    assert ends(family, "a sneaker") == 2


def test_aligned_pairs_everything_from_the_last_subject_token_on_cut_to_equal_length(family):
    pairs = embedding_pairs(family, [("a sneaker", "a red bag")], "aligned")
    length = family.pipe.tokenizer.model_max_length
    assert torch.allclose(pairs.inputs, states(family, "a sneaker")[2 : length - 1])
    assert torch.allclose(pairs.targets, states(family, "a red bag")[3:])


def test_subject_ends_where_prompt_and_anchor_begin_to_read_alike(family):
    prompt, anchor = "a red sneaker as a mosaic", "a red bag as a mosaic"
    place = family.pipe.tokenizer(prompt).input_ids.index(family.pipe.tokenizer("sneaker").input_ids[1])
    pairs = embedding_pairs(family, [(prompt, anchor)], "last")
    assert torch.allclose(pairs.inputs, states(family, prompt)[[place]])
    assert torch.allclose(pairs.targets, states(family, anchor)[[place]])
    aligned = embedding_pairs(family, [(prompt, anchor)], "aligned")
    assert torch.allclose(aligned.inputs, states(family, prompt)[place:])


def test_empty_anchor_is_the_start_token_and_then_the_padding_of_the_empty_prompt(family):
    pairs = embedding_pairs(family, [("a sneaker", "")], "aligned")
    empty, prompt = states(family, ""), states(family, "a sneaker")
    assert torch.allclose(pairs.targets, empty[: len(empty) - 2])
    assert torch.allclose(pairs.inputs, prompt[2:])


def test_anchor_that_ends_like_the_prompt_never_moves_the_start_token(family):
    pairs = embedding_pairs(family, [("sneaker", "a red sneaker")], "last")
    assert torch.allclose(pairs.inputs, states(family, "sneaker")[[1]])
    assert torch.allclose(pairs.targets, states(family, "a red sneaker")[[3]])


def test_all_pairs_each_position_with_itself(family):
    pairs = embedding_pairs(family, [("a sneaker", "a bag"), ("a coat", "")], "all")
    length = family.pipe.tokenizer.model_max_length
    assert torch.allclose(pairs.targets[length:], states(family, ""))
    assert pairs.owner.tolist() == [0] * length + [1] * length


def test_prompts_in_many_batches_are_the_same_pairs(family, monkeypatch):
    prompts = [("a sneaker", "a bag"), ("a red sneaker", "a red bag"), ("sneaker", "")]
    whole, gram = embedding_pairs(family, prompts, "aligned"), gram_of_prompts(family, ["a", "coat", ""], "all")
    monkeypatch.setattr(closed_form, "_BATCH", 1)
    single = embedding_pairs(family, prompts, "aligned")
    assert torch.allclose(whole.inputs, single.inputs) and torch.equal(whole.owner, single.owner)
    assert torch.allclose(gram, gram_of_prompts(family, ["a", "coat", ""], "all"))


def test_kept_embeddings_are_all_tokens_or_the_last_of_each_prompt(family):
    every = torch.cat([states(family, "a red coat"), states(family, "")])
    assert torch.allclose(gram_of_prompts(family, ["a red coat", ""], "all"), every.T @ every)
    last = torch.stack([states(family, "a red coat")[3], states(family, "")[0]])
    assert torch.allclose(gram_of_prompts(family, ["a red coat", ""], "last"), last.T @ last)


def test_prompt_that_reads_like_its_anchor_is_refused(family):
    with pytest.raises(ValueError, match="'a  sneaker' and its anchor 'a sneaker' the same embeddings"):
        embedding_pairs(family, [("a  sneaker", "a sneaker")], "aligned")


CONCEPT = Concept(
    "sneaker, coat", ("a sneaker", "a red sneaker", "coat"), ("a bag", "a red bag", ""), ("a dress",),
    phrases=("sneaker", "coat"),
)  # fmt: skip


def test_templates_choose_and_word_the_edited_prompts():
    assert prompt_pairs(CONCEPT, "concept") == [("a sneaker", "a bag"), ("a red sneaker", "a red bag"), ("coat", "")]
    assert prompt_pairs(CONCEPT, "bare") == [("a sneaker", "a bag"), ("coat", "")]
    art = prompt_pairs(CONCEPT, "art")
    assert len(art) == 12
    assert art[1] == ("painting by a sneaker", "painting by a bag") and art[-1] == ("style of coat", "style of")


def test_synonym_that_no_prompt_has_is_refused_where_phrases_are_needed():
    other = Concept("trainer", ("a sneaker",), ("a bag",), ("a dress",))
    assert prompt_pairs(other, "concept") == [("a sneaker", "a bag")]
    with pytest.raises(ValueError, match="No prompt of the concept has the words 'trainer'"):
        prompt_pairs(other, "bare")


def test_default_preserve_scale_is_one_over_the_number_of_prompts_but_a_tenth_at_least():
    assert preserve_scale(EditConfig(), 4) == 0.25
    assert preserve_scale(EditConfig(), 40) == 0.1
    assert preserve_scale(EditConfig(preserve_scale=3.0), 40) == 3.0


def test_model_that_transforms_its_embeddings_first_is_refused(family):
    model = copy.deepcopy(family.denoiser)
    model.requires_grad_(False)
    model.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k = torch.nn.Linear(12, 8, bias=False)
    task = Task(
        family, CONCEPT, model, ExampleConfig(), TrainingConfig(), {}, make_accelerator(TrainingConfig())
    )  # fmt: skip
    with pytest.raises(ValueError, match="takes 12 numbers a token and the text encoder gives 16"):
        closed_form.check_width(task)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"positions": "first"}, "`positions` must be one of last, aligned, all, got 'first'"),
        ({"templates": "poem"}, "`templates` must be one of concept, art, object, bare, got 'poem'"),
        ({"edit_scale": 0.0}, "`edit_scale` must be positive, got 0.0"),
        ({"preserve_scale": -1.0}, "`preserve_scale` must not be negative, got -1.0"),
        ({"lambda_abs": -0.5}, "`lambda_abs` must not be negative"),
        ({"lambda_rel": "1"}, "`lambda_rel` must be a finite number"),
        ({"lambda_abs": 0.0}, "both 0"),
    ],
)
def test_bad_settings_get_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        EditConfig(**settings)


def test_anchor_that_ends_as_the_subject_does_keeps_its_last_token():
    """ "grumpy cat" becomes "cat": cat is given what cat gives, not grumpy what the start token gives."""
    from sfumato.families import Segment
    from sfumato.unlearning.closed_form import _aligned

    for own, anchor, places in (([5, 7], [7], (2, 1)), ([5, 7], [], (2, 0)), ([5, 7, 8], [6, 7, 8], (1, 1))):
        segments = ([Segment(0, 10, 1, [tokens])] for tokens in (own, anchor))
        assert _aligned(*segments, 0, 10, "last") == ([places[0]], [places[1]])
