import json

import pytest
import torch

import sfumato
from sfumato.unlearning.closed_form import Pairs, embedding_pairs, gram_of_prompts
from sfumato.unlearning.methods import METHODS
from sfumato.unlearning.result import OutputConfig
from sfumato.unlearning.uce import UCEConfig, solve

WIDTH = 6


def vectors(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers():
    return {"k": vectors(10, 3, WIDTH), "v": vectors(11, 5, WIDTH)}


def pairs():
    return Pairs(vectors(0, 4, WIDTH), vectors(1, 4, WIDTH), torch.tensor([0, 0, 1, 1]))


def outer(keep):
    return keep.T @ keep


@pytest.mark.parametrize("technique", ["replace", "tensor"])
def test_edit_is_each_layer_s_own_minimiser(technique):
    """Against torch.linalg.lstsq on the objective's square roots, layer by layer, with the targets written out."""
    given, keep, config = pairs(), vectors(2, 7, WIDTH), UCEConfig(edit_scale=2.0, lambda_abs=0.3, technique=technique)
    weights = layers()
    solve(weights, given, 0.4 * outer(keep), config)
    for name, old in layers().items():
        wished = given.targets @ old.T
        if technique == "tensor":
            for prompt in range(2):
                rows = given.owner == prompt
                own = given.inputs[rows] @ old.T
                unit = own / own.norm()
                wished[rows] -= (unit * wished[rows]).sum() * unit
        left = torch.cat([2**0.5 * given.inputs, 0.4**0.5 * keep, 0.3**0.5 * torch.eye(WIDTH).double()])
        right = torch.cat([2**0.5 * wished, 0.4**0.5 * keep @ old.T, 0.3**0.5 * old.T])
        assert torch.allclose(weights[name], torch.linalg.lstsq(left, right).solution.T, atol=1e-10)


def test_edit_is_the_paper_s_equation():
    given, keep, weights = pairs(), vectors(2, 2, WIDTH), layers()
    solve(weights, given, outer(keep), UCEConfig())
    for name, old in layers().items():
        first, second = 0.5 * old, 0.5 * torch.eye(WIDTH).double()
        for c, a in zip(given.inputs, given.targets, strict=True):
            first, second = first + torch.outer(old @ a, c), second + torch.outer(c, c)
        for k in keep:
            first, second = first + torch.outer(old @ k, k), second + torch.outer(k, k)
        assert torch.allclose(weights[name], first @ torch.linalg.inv(second), atol=1e-10)


def test_gradient_of_the_objective_is_zero_at_the_solution():
    given, keep, weights = pairs(), vectors(2, 7, WIDTH), layers()
    solve(weights, given, 0.4 * outer(keep), UCEConfig())
    for name, old in layers().items():
        new = weights[name].clone().requires_grad_()
        loss = ((given.inputs @ new.T - given.targets @ old.T) ** 2).sum() + 0.5 * ((new - old) ** 2).sum()
        (loss + 0.4 * ((keep @ new.T - keep @ old.T) ** 2).sum()).backward()
        assert new.grad.norm() < 1e-9


def test_outputs_to_keep_are_unchanged_as_their_weight_goes_to_infinity():
    given, keep = pairs(), vectors(2, 2, WIDTH)
    errors = []
    for scale in (1.0, 1e4, 1e8):
        weights = layers()
        solve(weights, given, scale * outer(keep), UCEConfig())
        errors.append(float((keep @ (weights["v"] - layers()["v"]).T).norm()))
    assert errors[1] < 1e-2 * errors[0] and errors[2] < 1e-6 * errors[0]


def test_outputs_of_the_concept_become_the_anchor_s_as_their_weight_goes_to_infinity():
    given, weights = pairs(), layers()
    solve(weights, given, torch.zeros(WIDTH, WIDTH).double(), UCEConfig(edit_scale=1e9))
    assert torch.allclose(given.inputs @ weights["v"].T, given.targets @ layers()["v"].T, atol=1e-6)


def test_tensor_technique_leaves_nothing_along_the_concept_s_own_outputs():
    given, weights = pairs(), layers()
    nothing = torch.zeros(WIDTH, WIDTH).double()
    solve(weights, given, nothing, UCEConfig(edit_scale=1e9, technique="tensor"))
    for name, old in layers().items():
        for prompt in range(2):
            rows = given.owner == prompt
            shared = ((given.inputs[rows] @ weights[name].T) * (given.inputs[rows] @ old.T)).sum()
            assert abs(float(shared)) < 1e-6


def test_pairs_of_weight_zero_are_as_if_they_were_not_there():
    given, keep = pairs(), outer(vectors(2, 2, WIDTH))
    weighted, alone = layers(), layers()
    solve(weighted, given, keep, UCEConfig(), scales=torch.tensor([1.0, 1.0, 0.0, 0.0]).double())
    solve(alone, Pairs(given.inputs[:2], given.targets[:2], given.owner[:2]), keep, UCEConfig())
    assert torch.allclose(weighted["k"], alone["k"])


def test_no_difference_between_concept_and_anchor_changes_no_bit():
    given, weights = pairs(), layers()
    solve(weights, Pairs(given.inputs, given.inputs, given.owner), outer(vectors(2, 2, WIDTH)), UCEConfig())
    assert all(torch.equal(weights[name], old) for name, old in layers().items())


def test_half_precision_layers_get_the_rounded_double_precision_solution():
    given, double, single = pairs(), layers(), {name: weight.float() for name, weight in layers().items()}
    double = {name: weight.double() for name, weight in single.items()}
    for weights in (double, single):
        solve(weights, given, outer(vectors(2, 2, WIDTH)), UCEConfig())
    assert torch.equal(single["v"], double["v"].float())


def unlearned(pipe, **settings):
    return sfumato.unlearn(pipe, "a sneaker", "uce", verify=False, **settings)


def test_only_keys_and_values_of_cross_attention_move(tiny_pipe):
    result = unlearned(tiny_pipe, anchor="a bag")
    after = dict(result.unet.named_parameters())
    for name, before in tiny_pipe.unet.named_parameters():
        moved = "attn2.to_k" in name or "attn2.to_v" in name
        assert torch.equal(before, after[name]) != moved, name
    assert result.text_encoder is tiny_pipe.text_encoder


def test_edited_model_answers_the_concept_much_as_the_original_answers_the_anchor(tiny_pipe):
    """Much, since 22 token vectors of a prompt are asked of 16 dimensions."""
    result = unlearned(
        tiny_pipe, anchor="a bag", templates="bare", edit_scale=1e6, preserve_scale=0.0, lambda_abs=1e-3
    )
    latents, time = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([500])

    def predict(unet, prompt):
        return unet(latents, time, tiny_pipe.encode_prompt([prompt], "cpu", 1, False)[0]).sample

    with torch.no_grad():
        wished, before = predict(tiny_pipe.unet, "a bag"), predict(tiny_pipe.unet, "a sneaker")
        assert (predict(result.unet, "a sneaker") - wished).norm() < 0.5 * (before - wished).norm()


def test_run_solves_the_equations_of_prompts_and_retain_set(tiny_pipe, family):
    result = unlearned(tiny_pipe, anchor="a bag", retain=["a coat"], templates="object", preserve_scale=0.7)
    words = ("{}", "image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}")
    asked = [(form.format("a sneaker"), form.format("a bag")) for form in words]
    kept = 0.7 * gram_of_prompts(family, ["a coat", ""], "aligned")
    weights = {
        name: parameter.detach().clone()
        for name, parameter in tiny_pipe.unet.named_parameters()
        if "attn2.to_k" in name or "attn2.to_v" in name
    }
    solve(weights, embedding_pairs(family, asked, "aligned"), kept, UCEConfig())
    after = dict(result.unet.named_parameters())
    assert all(torch.allclose(after[name], weight, atol=1e-6) for name, weight in weights.items())


def test_positions_and_several_concepts_are_one_system(tiny_pipe):
    both, last = (
        sfumato.unlearn(tiny_pipe, ["sneaker", "boot"], "uce", verify=False, positions=positions).unet
        for positions in ("aligned", "last")
    )
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    one = unlearned(tiny_pipe).unet
    assert not torch.allclose(both.get_parameter(name), one.get_parameter(name))
    assert not torch.allclose(both.get_parameter(name), last.get_parameter(name))


def test_manifest_says_how_well_the_equations_are_solved(tiny_pipe, tmp_path):
    unlearned(tiny_pipe, anchor="a bag", output_dir=tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["method"] == "uce" and manifest["lambda"] == 0.5
    assert manifest["normal_equations_residual"] < 1e-5
    assert manifest["edited_embeddings"] > 0 and manifest["denoiser_evaluations"] == 0
    assert json.loads((tmp_path / "history.json").read_text()) == []


def test_registry_says_that_it_needs_neither_training_nor_pictures():
    assert not METHODS["uce"].trains and not METHODS["uce"].examples
    assert METHODS["uce"].configs == (UCEConfig, OutputConfig)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"technique": "erase"}, "`technique` must be one of replace, tensor, got 'erase'"),
        ({"steps": 10}, "Unknown setting 'steps'"),
        ({"anchor": "a  sneaker"}, "is the concept itself"),
        ({"retain": []}, "retain set is empty"),
        ({"lambda_abs": 0.0}, "both 0"),
    ],
)
def test_bad_input_gets_one_sentence_and_writes_nothing(tiny_pipe, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        unlearned(tiny_pipe, output_dir=tmp_path / "out", **settings)
    assert not (tmp_path / "out" / "model_index.json").exists()
