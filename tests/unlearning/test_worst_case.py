import copy
from itertools import combinations

import pytest
import torch

from sfumato import concepts, storage
from sfumato.families import StableDiffusion
from sfumato.trainer import Shard, TrainingConfig, train
from sfumato.unlearning import uce
from sfumato.unlearning.closed_form import embedding_pairs, gram_of_prompts
from sfumato.unlearning.residual import DenoisingResidual
from sfumato.unlearning.worst_case import (
    Candidate,
    SignDescentObjective,
    by_name,
    candidates_of,
    indicator,
    project,
    sign_descent,
    weighted_uce,
    worst_case_forget_set,
)

WORDS = ["sneaker", "coat", "red", "bag"]


def vectors(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("total", [1, 2.5, 7])
def test_projection_meets_the_conditions_of_the_nearest_point(seed, total):
    """KKT: w - p is one constant where p is inside (0, 1), no more than it at 0, no less at 1."""
    weights = 3 * vectors(seed, 9)
    point = project(weights, total)
    assert point.sum().item() == pytest.approx(total, abs=1e-12) and ((point >= 0) & (point <= 1)).all()
    shift, inside = weights - point, (point > 0) & (point < 1)
    constants = shift[inside]
    if len(constants):
        assert torch.allclose(constants, constants[0].expand_as(constants))
    low = shift[point == 0].max() if (point == 0).any() else -torch.inf
    high = shift[point == 1].min() if (point == 1).any() else torch.inf
    assert low <= high + 1e-12
    assert all(low - 1e-12 <= value <= high + 1e-12 for value in constants)


def test_projection_is_idempotent_and_leaves_what_is_inside():
    point = project(5 * vectors(0, 12), 4)
    assert torch.allclose(project(point, 4), point, atol=1e-12)
    assert torch.allclose(project(torch.full((8,), 0.25), 2), torch.full((8,), 0.25).double())


def test_projection_agrees_with_bisection():
    weights = vectors(3, 30)
    low, high = weights.min() - 1, weights.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (weights - middle).clamp(0, 1).sum() > 11 else (low, middle)
    assert torch.allclose(project(weights, 11), (weights - low).clamp(0, 1), atol=1e-12)


def test_projection_ignores_a_constant_and_takes_ties_and_extremes():
    weights = vectors(1, 6)
    assert torch.allclose(project(weights + 100, 3), project(weights, 3), atol=1e-10)
    assert torch.allclose(project(torch.ones(4), 1), torch.full((4,), 0.25).double())
    assert torch.equal(project(weights, 0), torch.zeros(6).double())
    assert torch.equal(project(weights, 6), torch.ones(6).double())


@pytest.mark.parametrize(
    ("weights", "total"), [(torch.ones(3), 4), (torch.ones(3), -1), (torch.tensor([torch.nan]), 1)]
)
def test_impossible_projection_is_refused(weights, total):
    with pytest.raises(ValueError, match="projection needs finite weights"):
        project(weights, total)


def test_indicator_takes_the_greatest_and_of_equal_ones_the_first():
    assert indicator(torch.tensor([0.2, 0.9, 0.2, 0.5]), 2).tolist() == [0, 1, 0, 1]
    assert indicator(torch.full((4,), 0.5), 2).tolist() == [1, 1, 0, 0]


class Simple:
    """An unlearner whose residuals can be written down: forgetting candidate i by w raises its loss by `ease_i w`."""

    def __init__(self, pipe, base, ease):
        self.pipe, self.base, self.ease, self.seen = pipe, torch.tensor(base), torch.tensor(ease), []

    def __call__(self, weights):
        self.seen.append(weights.clone())
        return self.pipe

    def score(self, pipe):
        return self.base + self.ease * self.seen[-1]

    def residual(self, chosen):
        return float((self.base + self.ease)[list(chosen)].mean())


def test_search_finds_the_set_that_exhaustive_search_finds(tiny_pipe):
    simple = Simple(tiny_pipe, [1.0, 1.0, 1.2, 0.9], [0.5, 3.0, 0.1, 2.0])
    found = worst_case_forget_set(tiny_pipe, WORDS, 2, unlearner=simple, scorer=simple.score, rounds=30)
    best = min(combinations(range(4), 2), key=simple.residual)
    assert found.chosen == tuple(WORDS[k] for k in best) == ("sneaker", "red")
    assert found.residual == pytest.approx(simple.residual(best))
    assert found.residual == min(found.sets.values())
    assert found.weights.sum().item() == pytest.approx(2)
    assert len(found.history) == 30 and len(found.history[0]["scores"]) == 4


def test_first_step_is_the_projected_gradient_step(tiny_pipe):
    simple = Simple(tiny_pipe, [1.0, 1.4, 1.2, 0.9], [0.5, 3.0, 0.1, 2.0])
    found = worst_case_forget_set(
        tiny_pipe, WORDS, 2, unlearner=simple, scorer=simple.score, rounds=1, learning_rate=0.2, gamma=0.7
    )
    start = torch.full((4,), 0.5).double()
    scores = simple.base + simple.ease * start
    assert found.history[0]["weights"] == start.tolist()
    assert found.history[0]["objective"] == pytest.approx(float(start @ scores.double()) + 0.7 * 4 * 0.25)
    assert torch.allclose(found.weights, project(start - 0.2 * (scores.double() + 2 * 0.7 * start), 2))


def test_regulariser_spreads_the_weights(tiny_pipe):
    def weights(gamma):
        simple = Simple(tiny_pipe, [1.0, 1.4, 1.2, 0.9], [0.0] * 4)
        return worst_case_forget_set(
            tiny_pipe, WORDS, 2, unlearner=simple, scorer=simple.score, rounds=20, gamma=gamma
        ).weights

    assert weights(2.0).std() < weights(0.0).std()


PHRASES = ["sneaker", "coat"]


def candidates(pipe):
    return candidates_of(pipe, PHRASES, anchor="bag")


def test_weighted_uce_edits_by_weight_and_keeps_by_what_is_left(tiny_pipe, family):
    """Against the equations put together by hand for two concepts of unequal weight."""
    given = candidates(tiny_pipe)
    edited = weighted_uce(tiny_pipe, given, preserve_scale=0.5)(torch.tensor([0.75, 0.25]).double())
    one, other = ([*zip(c.prompts, c.anchors, strict=True)] for c in given)
    pairs = embedding_pairs(family, one + other, "aligned")
    scales = torch.where(pairs.owner < len(one), 0.75, 0.25).double()
    both = [set(concepts.resolve(tiny_pipe, phrase).retain) for phrase in PHRASES]
    kept = gram_of_prompts(family, [*(both[0] & both[1]), ""], "aligned")
    kept = kept + sum(
        share * gram_of_prompts(family, c.prompts, "aligned") for share, c in zip((0.25, 0.75), given, strict=True)
    )
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    weights = {name: tiny_pipe.unet.get_parameter(name).detach().clone()}
    uce.solve(weights, pairs, 0.5 * kept, uce.UCEConfig(preserve_scale=0.5), scales=scales)
    assert torch.allclose(edited.unet.get_parameter(name), weights[name], atol=1e-6)


def objective(pipe, weights, pictures=2):
    given = candidates(pipe)
    measure = DenoisingResidual(pipe, [c.prompts[0] for c in given], pictures=pictures, times=1, num_inference_steps=2)
    return SignDescentObjective(
        StableDiffusion(pipe), measure, [c.anchors[0] for c in given], torch.tensor(weights).double(), 4, 0
    )


def test_lower_level_weighs_forgetting_by_w_and_retaining_by_the_rest(tiny_pipe):
    forget_all, keep_all, mixed = (
        objective(tiny_pipe, weights).losses(copy.deepcopy(tiny_pipe.unet), 0, Shard(0, 1))
        for weights in ([1.0, 1.0], [0.0, 0.0], [0.3, 0.3])
    )
    assert keep_all["forget"].item() == 0 and forget_all["retain"].item() == 0
    assert mixed["forget"].item() == pytest.approx(0.3 * forget_all["forget"].item(), rel=1e-5)
    assert mixed["retain"].item() == pytest.approx(0.7 * keep_all["retain"].item(), rel=1e-5)


def test_lower_level_is_the_equation_on_one_picture(tiny_pipe, family):
    from sfumato.randomness import permuted_indices, randint_for, randn_for

    ours = objective(tiny_pipe, [0.8, 0.1])
    ours.batch_size = 1
    with torch.no_grad():
        losses = ours.losses(tiny_pipe.unet, 3, Shard(0, 1))
        row = int(permuted_indices(402, 4, 3, 1)[0])
        noise, time = randn_for([(0, 403, 3, 0)], (4, 4, 4)), randint_for([(0, 403, 3, 1)], 1000)
        noisy = tiny_pipe.scheduler.add_noise(ours.measure.latents[[row]], noise, time)
        caption = candidates(tiny_pipe)[row // 2].prompts[0]
        own = tiny_pipe.unet(noisy, time, **family.encode_prompts([caption])).sample
        wished = tiny_pipe.unet(noisy, time, **family.encode_prompts(["bag"])).sample
    weight = [0.8, 0.1][row // 2]
    assert losses["forget"].item() == pytest.approx(weight * float((own - wished).square().mean()), rel=1e-4)
    assert losses["retain"].item() == pytest.approx((1 - weight) * float((own - noise).square().mean()), rel=1e-4)


def test_losses_of_shards_average_to_those_of_the_whole(tiny_pipe):
    ours = objective(tiny_pipe, [0.8, 0.1])
    model = copy.deepcopy(tiny_pipe.unet)
    with torch.no_grad():
        model.conv_in.bias += 0.1
        whole = ours.losses(model, 1, Shard(0, 1))
        halves = [ours.losses(model, 1, Shard(k, 2)) for k in range(2)]
    for name in whole:
        assert torch.allclose(whole[name], (halves[0][name] + halves[1][name]) / 2, rtol=1e-4)


def test_every_weight_moves_by_beta_or_not_at_all(tiny_pipe):
    model = copy.deepcopy(tiny_pipe.unet)
    training = TrainingConfig(steps=1, learning_rate=1e-3, optimizer="sgd")
    train(model, objective(tiny_pipe, [0.7, 0.2]), training)
    moved = torch.cat(
        [(a - b).abs().flatten() for a, b in zip(model.parameters(), tiny_pipe.unet.parameters(), strict=True)]
    )
    assert ((moved - 1e-3).abs() < 1e-6).logical_or(moved < 1e-7).all()
    assert (moved > 5e-4).float().mean() > 0.9


def test_as_released_a_weight_moves_by_its_gradient(tiny_pipe):
    training = TrainingConfig(steps=1, learning_rate=1e-3, optimizer="sgd")
    ours = objective(tiny_pipe, [0.7, 0.2])
    ours.signed = False
    model = copy.deepcopy(tiny_pipe.unet).requires_grad_(True)
    sum(ours.losses(model, 0, Shard(0, 1)).values()).backward()
    expected = [p.detach() - 1e-3 * p.grad for p in model.parameters()]
    model.zero_grad()
    train(model, ours, training)
    for weight, wished in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(weight, wished, atol=1e-8)
    given = candidates(tiny_pipe)
    one, other = (
        sign_descent(tiny_pipe, given, steps=1, batch_size=2, signed=signed)(torch.ones(2).double() / 2)
        for signed in (True, False)
    )
    assert storage.fingerprint(one.unet.named_parameters()) != storage.fingerprint(other.unet.named_parameters())


def test_each_round_of_sign_descent_begins_at_the_original(tiny_pipe):
    before = storage.fingerprint(tiny_pipe.unet.named_parameters())
    unlearn = sign_descent(tiny_pipe, candidates(tiny_pipe), steps=2, batch_size=2)
    first, other, again = (
        storage.fingerprint(unlearn(torch.tensor(weights).double()).unet.named_parameters())
        for weights in ([1.0, 0.0], [0.0, 1.0], [1.0, 0.0])
    )
    assert first == again != other
    assert storage.fingerprint(tiny_pipe.unet.named_parameters()) == before


def test_sign_descent_refuses_half_precision_in_words(tiny_pipe):
    given = candidates(tiny_pipe)
    with pytest.raises(ValueError, match="needs a model in float32, got torch.bfloat16"):
        sign_descent(tiny_pipe.to(torch.bfloat16), given)


def test_sign_descent_forgets_what_has_weight_more_than_what_has_none(tiny_pipe):
    given = candidates(tiny_pipe)
    measure = DenoisingResidual(tiny_pipe, [c.prompts[0] for c in given], pictures=2, times=4, num_inference_steps=2)
    unlearn = sign_descent(tiny_pipe, given, steps=15, learning_rate=2e-3, batch_size=4, parameters="full")
    one, other = (measure(unlearn(torch.tensor(weights).double())) for weights in ([1.0, 0.0], [0.0, 1.0]))
    assert one[0] > other[0] and other[1] > one[1]


def test_any_method_by_name_forgets_the_chosen_set(tiny_pipe):
    import sfumato

    given = candidates_of(tiny_pipe, WORDS[:3])
    result = by_name(tiny_pipe, given, 2, "rece", epochs=1)(torch.tensor([0.4, 0.9, 0.7]))
    expected = sfumato.unlearn(tiny_pipe, ["coat", "red"], "rece", epochs=1, verify=False)
    assert storage.fingerprint(result.unet.named_parameters()) == storage.fingerprint(expected.unet.named_parameters())


@pytest.mark.parametrize(
    ("name", "settings"), [("uce", {}), ("sign_descent", {"steps": 1, "batch_size": 2}), ("rece", {"epochs": 1})]
)
def test_search_runs_with_each_kind_of_unlearner_and_repeats_itself(tiny_pipe, name, settings):
    first, again = (
        worst_case_forget_set(tiny_pipe, WORDS[:3], 1, unlearner=name, rounds=2, settings=settings) for _ in range(2)
    )
    assert len(first.chosen) == 1 and first.chosen[0] in WORDS
    assert first.chosen == again.chosen and torch.equal(first.weights, again.weights)
    assert first.residual == min(first.sets.values())


def test_candidate_is_resolved_as_unlearn_resolves_it(tiny_pipe):
    concept = concepts.resolve(tiny_pipe, "sneaker", anchor="bag")
    assert candidates(tiny_pipe)[0] == Candidate("sneaker", concept.prompts, concept.anchors)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"m": 0}, "`m` must lie between 1 and the number of candidates less one, 3; got 0"),
        ({"m": 4}, "`m` must lie between"),
        ({"candidates": ["a", "a", "b"]}, "list of different phrases"),
        ({"candidates": "sneaker"}, "list of different phrases"),
        ({"rounds": 0}, "`rounds` must be at least 1"),
        ({"learning_rate": 0.0}, "`learning_rate` must be positive"),
        ({"unlearner": "salsa"}, "Unknown method 'salsa'"),
        ({"settings": {"lambda_abs": -1.0}}, "`lambda_abs` must not be negative"),
        ({"scorer": lambda pipe: torch.zeros(2)}, "scorer must give 4 finite numbers"),
        (
            {"unlearner": lambda weights: None, "settings": {"steps": 1}},
            "`settings` are for an unlearner given by name",
        ),
    ],
)
def test_bad_input_gets_one_sentence(tiny_pipe, changed, message):
    with pytest.raises(ValueError, match=message):
        worst_case_forget_set(tiny_pipe, **{"candidates": WORDS, "m": 2, "rounds": 1, **changed})


def test_weighted_uce_takes_the_wordings_that_uce_does(tiny_pipe):
    import sfumato

    given = candidates_of(tiny_pipe, ["sneaker"])
    edited = weighted_uce(tiny_pipe, given, templates="object", preserve_scale=0.5)(torch.ones(1).double())
    other = weighted_uce(tiny_pipe, given, preserve_scale=0.5)(torch.ones(1).double())
    expected = sfumato.unlearn(
        tiny_pipe, "sneaker", "uce", templates="object", preserve_scale=0.5, verify=False,
        retain=concepts.resolve(tiny_pipe, "sneaker").retain,
    )  # fmt: skip
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert torch.allclose(edited.unet.get_parameter(name), expected.unet.get_parameter(name), atol=1e-6)
    assert not torch.allclose(edited.unet.get_parameter(name), other.unet.get_parameter(name), atol=1e-6)
