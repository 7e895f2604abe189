import json

import pytest
import torch

import sfumato
from sfumato.unlearning.closed_form import EditConfig, NormalEquations, Pairs, edit_map, gram_of_prompts
from sfumato.unlearning.methods import METHODS
from sfumato.unlearning.rece import RECEConfig, adversary, recoverable, solve

WIDTH = 5
REGULARISERS = ("regzero", "standardreg", "surrogate_1st", "surrogate_2nd", "surrogate_both")


def vectors(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def original():
    return [vectors(10, 3, WIDTH), vectors(11, 4, WIDTH)]


def gram():
    return sum(weight.T @ weight for weight in original())


def pairs():
    return Pairs(vectors(0, 3, WIDTH), vectors(1, 3, WIDTH), torch.zeros(3).long())


def current():
    return torch.eye(WIDTH).double() + 0.4 * vectors(3, WIDTH, WIDTH)


def objective(x, c, a, kind, weight):
    """RECE's objective for one embedding, summed over layers, as the paper and the released variants have it."""
    now = [old @ current() for old in original()]
    fit = sum(((new @ x - old @ c) ** 2).sum() for new, old in zip(now, original(), strict=True))
    outputs = sum(((new @ x - new @ c) ** 2).sum() for new in now)
    near = ((x - c) ** 2).sum()
    return fit + weight * {
        "regzero": (x**2).sum(), "standardreg": ((x - a) ** 2).sum(), "surrogate_1st": outputs,
        "surrogate_2nd": near, "surrogate_both": outputs + near,
    }[kind]  # fmt: skip


@pytest.mark.parametrize("kind", REGULARISERS)
def test_gradient_of_the_objective_vanishes_at_the_adversarial_embedding(kind):
    given, config = pairs(), RECEConfig(regulariser=kind, lambda_r=0.3)
    found = adversary(gram(), current(), given, config)
    for k in range(3):
        x = found[k].clone().requires_grad_()
        objective(x, given.inputs[k], given.targets[k], kind, 0.3).backward()
        assert x.grad.norm() < 1e-10
        start = given.inputs[k].clone().requires_grad_()
        objective(start, given.inputs[k], given.targets[k], kind, 0.3).backward()
        assert start.grad.norm() > 1e-2


def test_adversary_of_the_unedited_model_is_the_concept_itself():
    found = adversary(gram(), torch.eye(WIDTH).double(), pairs(), RECEConfig(lambda_r=1e-10))
    assert torch.allclose(found, pairs().inputs, atol=1e-6)


def test_smaller_lambda_r_brings_more_back():
    shares = [
        recoverable(gram(), current(), pairs(), adversary(gram(), current(), pairs(), RECEConfig(lambda_r=weight)))
        for weight in (10.0, 0.1, 1e-6)
    ]
    assert shares[0] < shares[1] < shares[2] and shares[2] > 0.999


def test_recoverable_compares_outputs_with_those_of_the_anchor():
    given, inputs = pairs(), vectors(7, 3, WIDTH)
    left = sum((((old @ current()) @ inputs.T - old @ given.inputs.T) ** 2).sum() for old in original())
    most = sum(((old @ given.targets.T - old @ given.inputs.T) ** 2).sum() for old in original())
    assert recoverable(gram(), current(), given, inputs) == pytest.approx(float(1 - left / most))


def test_epoch_is_the_uce_edit_of_the_current_weights_of_each_layer():
    """Against lstsq on each layer, whose weights are carried along instead of one map of embeddings."""
    given, keep = pairs(), vectors(4, 6, WIDTH)
    config = RECEConfig(epochs=2, lambda_r=0.2, erase_preserve_scale=0.5, erase_lambda=0.3)
    maps, history, residual = solve(gram(), current(), given, 0.5 * keep.T @ keep, config)
    weights = [old @ current() for old in original()]
    for _ in range(2):
        left = sum(new.T @ new for new in weights) + 0.2 * torch.eye(WIDTH).double()
        right = sum(new.T @ old for new, old in zip(weights, original(), strict=True))
        found = (torch.linalg.inv(left) @ right @ given.inputs.T).T
        rows = torch.cat([found, 0.5**0.5 * keep, 0.3**0.5 * torch.eye(WIDTH).double()])
        for k, new in enumerate(weights):
            wished = torch.cat([given.targets @ new.T, 0.5**0.5 * keep @ new.T, 0.3**0.5 * new.T])
            weights[k] = torch.linalg.lstsq(rows, wished).solution.T
    for new, old in zip(weights, original(), strict=True):
        assert torch.allclose(old @ maps[-1], new, atol=1e-10)
    assert len(maps) == 3 and len(history) == 2 and residual < 1e-5


def test_concept_s_own_embeddings_keep_the_later_edits_from_bringing_it_back():
    """What is left of the concept after the paper's edits, and after those with `concept_scale`."""
    given, keep = pairs(), 0.1 * vectors(4, WIDTH, WIDTH)
    ones = torch.ones(3).double()
    config = EditConfig(lambda_abs=0.05)
    first = torch.eye(WIDTH).double() + edit_map(
        NormalEquations(given.inputs, ones, keep.T @ keep, config), given, ones
    )  # fmt: skip
    held = []
    for scale in (0.0, 1.0):
        maps, _, _ = solve(gram(), first, given, keep.T @ keep, RECEConfig(epochs=3, concept_scale=scale))
        outputs = given.inputs @ maps[-1].T - given.targets  # what is left between the concept's and the anchor's
        held.append(float(((outputs @ gram()) * outputs).sum()))
    assert held[1] < 0.7 * held[0]


def test_each_epoch_blocks_the_embedding_that_it_found():
    config = RECEConfig(epochs=3, lambda_r=1e-3)
    _, history, _ = solve(gram(), current(), pairs(), 0.1 * torch.eye(WIDTH).double(), config)
    assert all(row["recoverable_after"] < row["recoverable"] for row in history)
    assert [row["epoch"] for row in history] == [0, 1, 2]


def test_singular_attack_is_refused_in_words():
    config = RECEConfig(regulariser="surrogate_1st")
    with pytest.raises(ValueError, match="no stable adversarial embedding at lambda_r = 0.1; raise `lambda_r`"):
        adversary(torch.zeros(WIDTH, WIDTH).double(), current(), pairs(), config)


NAME = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"


def unlearned(pipe, method="rece", **settings):
    result = sfumato.unlearn(pipe, "a sneaker", method, anchor="a bag", verify=False, **settings)
    return result.unet.get_parameter(NAME)


def test_no_epoch_is_uce(tiny_pipe):
    assert torch.allclose(unlearned(tiny_pipe, epochs=0), unlearned(tiny_pipe, "uce"), atol=1e-7)


def test_each_setting_of_the_later_edits_matters(tiny_pipe):
    base = unlearned(tiny_pipe)
    for changed in (
        {"epochs": 1}, {"lambda_r": 1e-3}, {"regulariser": "standardreg"}, {"erase_scale": 3.0},
        {"erase_preserve_scale": 5.0}, {"erase_lambda": 3.0}, {"keep": "anchor"}, {"concept_scale": 1.0},
    ):  # fmt: skip
        assert not torch.allclose(unlearned(tiny_pipe, **changed), base, atol=1e-6), changed


def test_released_choice_keeps_the_anchor_alone(tiny_pipe, family):
    """The run against the equations put together by hand, from embeddings on."""
    settings = {"templates": "bare", "retain": ["a coat"], "preserve_scale": 0.5, "epochs": 1, "keep": "anchor"}
    weight = tiny_pipe.unet.get_parameter(NAME).detach().double()
    everything = torch.cat(
        [p.detach() for name, p in tiny_pipe.unet.named_parameters() if "attn2.to_k" in name or "attn2.to_v" in name]
    ).double()
    with torch.no_grad():
        concept, anchor = tiny_pipe.encode_prompt(["a sneaker", "a bag"], "cpu", 1, False)[0].double()
    none = torch.zeros(len(concept)).long()
    ones, eye = torch.ones(len(concept)).double(), torch.eye(16).double()
    aligned = Pairs(concept[2:], anchor[2:], none[2:])
    first = NormalEquations(
        aligned.inputs, ones[2:], 0.5 * gram_of_prompts(family, ["a coat", ""], "all"), EditConfig()
    )  # fmt: skip
    edited = eye + edit_map(first, aligned, ones[2:])
    gram = everything.T @ everything
    found = torch.linalg.solve(edited.T @ gram @ edited + 0.1 * eye, edited.T @ gram @ concept.T).T
    second = NormalEquations(
        found, ones, 0.1 * gram_of_prompts(family, ["a bag"], "all"), EditConfig(lambda_abs=0.1)
    )  # fmt: skip
    expected = weight @ edited @ (eye + edit_map(second, Pairs(found, anchor, none), ones))
    assert torch.allclose(unlearned(tiny_pipe, **settings), expected.float(), atol=1e-6)


def test_held_out_prompts_work_in_half_precision(tiny_pipe, tmp_path):
    tiny_pipe.to(torch.bfloat16)
    result = sfumato.unlearn(
        tiny_pipe, "a sneaker", "rece", held_out_prompts=["my old sneaker"], held_out_pictures=1, epochs=1
    )
    assert result.unet.dtype == torch.bfloat16


def test_held_out_prompts_choose_the_epoch_with_the_greatest_loss_on_their_pictures(tiny_pipe, tmp_path):
    chosen = unlearned(
        tiny_pipe, held_out_prompts=["my old sneaker"], held_out_pictures=1, epochs=2, output_dir=tmp_path
    )
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    residuals = manifest["held_out_residuals"]
    assert len(residuals) == 3 and manifest["chosen_epochs"] == residuals.index(max(residuals))
    assert torch.equal(chosen, unlearned(tiny_pipe, epochs=manifest["chosen_epochs"]))
    assert len(json.loads((tmp_path / "history.json").read_text())) == 2
    assert manifest["normal_equations_residual"] < 1e-5


def test_registry_says_that_it_needs_neither_training_nor_pictures():
    assert not METHODS["rece"].trains and not METHODS["rece"].examples


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": -1}, "`epochs` must not be negative, got -1"),
        ({"lambda_r": 0.0}, "`lambda_r` must be positive, got 0.0"),
        ({"erase_lambda": 0.0}, "`erase_lambda` must be positive"),
        ({"erase_scale": -1.0}, "`erase_scale` must be positive"),
        ({"erase_preserve_scale": -1.0}, "`erase_preserve_scale` must not be negative"),
        ({"concept_scale": -1.0}, "`concept_scale` must not be negative"),
        ({"regulariser": "l1"}, "`regulariser` must be one of regzero, standardreg"),
        ({"keep": "all"}, "`keep` must be one of retain, anchor"),
        ({"held_out_prompts": []}, "`held_out_prompts` is empty"),
        ({"held_out_prompts": ["a sneaker"]}, "'a sneaker' is edited and held out"),
        ({"held_out_pictures": 0}, "`held_out_pictures` must be at least 1"),
        ({"technique": "tensor"}, "Unknown setting 'technique'"),
    ],
)
def test_bad_input_gets_one_sentence(tiny_pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        unlearned(tiny_pipe, **settings)
