import copy

import pytest
import torch
import torch.nn.functional as F

import sfumato
from sfumato import storage
from sfumato.concepts import Concept
from sfumato.families import StableDiffusion
from sfumato.trainer import Shard, TrainingConfig, make_accelerator, train
from sfumato.unlearning.concept_ablation import (
    ANCHOR_STREAM,
    PRIOR_STREAM,
    ConceptAblationConfig,
    ConceptAblationObjective,
    run,
    start_token_without_gradient,
)
from sfumato.unlearning.examples import Examples, PromptTable
from sfumato.unlearning.noising import noisy_batch
from sfumato.unlearning.original import OriginalModel
from sfumato.unlearning.task import ExampleConfig, Task

PROMPTS = ("a sneaker", "a red sneaker")
ANCHORS = ("a bag", "a red bag")
SMALL = {
    "anchor_examples": 4, "retain_examples": 4, "example_steps": 2, "batch_size": 2, "steps": 3, "learning_rate": 1e-3,
    "verify": False,
}  # fmt: skip


@pytest.fixture
def anchor(forget):
    return Examples(forget.mean, forget.std, tuple(ANCHORS[k % 2] for k in range(len(forget))))


def objective(family, anchor, kept=None, teacher=None, **config):
    targets = [PROMPTS[k % 2] for k in range(len(anchor))]
    table = PromptTable(family, [*PROMPTS, *ANCHORS, *(kept.prompts if kept else ())])
    return ConceptAblationObjective(
        family, teacher or family.denoiser, anchor, targets, kept, table,
        ConceptAblationConfig(batch_size=4, **config), seed=0,
    )  # fmt: skip


def by_hand(pipe, batch, captions):
    return pipe.unet(batch.noisy, batch.timesteps, pipe.encode_prompt(captions, "cpu", 1, False)[0]).sample


@pytest.mark.parametrize("kind", ["model", "noise"])
def test_losses_are_the_equations(family, anchor, retain, kind):
    losses = objective(family, anchor, retain, objective=kind, prior="retain", prior_weight=0.3).losses(
        family.denoiser, 5, Shard(0, 1)
    )
    batch = noisy_batch(family, anchor, 4, 5, Shard(0, 1), seed=0, stream=ANCHOR_STREAM)
    kept = noisy_batch(family, retain, 4, 5, Shard(0, 1), seed=0, stream=PRIOR_STREAM)
    assert batch.captions == [ANCHORS[row % 2] for row in batch.rows] and len(set(batch.captions)) == 2
    student = by_hand(family.pipe, batch, [PROMPTS[row % 2] for row in batch.rows])
    target = by_hand(family.pipe, batch, batch.captions) if kind == "model" else batch.target
    assert torch.allclose(losses["ablation"], F.mse_loss(student, target), rtol=1e-4)
    prior = 0.3 * F.mse_loss(by_hand(family.pipe, kept, kept.captions), kept.target)
    assert torch.allclose(losses["prior"], prior, rtol=1e-4)


def test_no_prior_is_no_term(family, anchor):
    assert set(objective(family, anchor).losses(family.denoiser, 0, Shard(0, 1))) == {"ablation"}


def test_velocity_prediction_is_taught_the_velocity(tiny_pipe_v, anchor):
    family = StableDiffusion(tiny_pipe_v)
    ours = objective(family, anchor, objective="noise")
    batch = noisy_batch(family, anchor, 4, 0, Shard(0, 1), seed=0, stream=ANCHOR_STREAM)
    root = family.process.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1).float().sqrt()
    clean = root * batch.noisy - (1 - root**2).sqrt() * batch.target
    noise = (batch.noisy - root * clean) / (1 - root**2).sqrt()
    assert torch.allclose(batch.target, tiny_pipe_v.scheduler.get_velocity(clean, noise, batch.timesteps), atol=1e-4)
    student = by_hand(tiny_pipe_v, batch, [PROMPTS[row % 2] for row in batch.rows])
    loss = ours.losses(family.denoiser, 0, Shard(0, 1))["ablation"]
    assert torch.allclose(loss, F.mse_loss(student, batch.target), rtol=1e-4)


def test_losses_of_shards_average_to_those_of_the_whole(family, anchor, retain):
    ours = objective(family, anchor, retain, prior="retain")
    whole = ours.losses(family.denoiser, 2, Shard(0, 1))
    halves = [ours.losses(family.denoiser, 2, Shard(k, 2)) for k in range(2)]
    for name in whole:
        assert torch.allclose(whole[name], (halves[0][name] + halves[1][name]) / 2, rtol=1e-4)


def test_teacher_moves_with_the_model_unless_it_is_frozen(family, anchor):
    model = copy.deepcopy(family.denoiser)
    frozen = objective(family, anchor, teacher=OriginalModel(model))
    moving = objective(family, anchor, teacher=model)
    before = frozen.losses(model, 0, Shard(0, 1))["ablation"].item()
    assert moving.losses(model, 0, Shard(0, 1))["ablation"].item() == pytest.approx(before, rel=1e-4)
    with torch.no_grad():
        model.conv_out.bias += 1  # moves student and moving teacher alike
    assert moving.losses(model, 0, Shard(0, 1))["ablation"].item() == pytest.approx(before, rel=1e-3)
    assert frozen.losses(model, 0, Shard(0, 1))["ablation"].item() > before + 0.5


def test_original_model_remembers_only_what_is_trained(family):
    model = copy.deepcopy(family.denoiser).requires_grad_(False)
    model.conv_out.requires_grad_(True)
    original = OriginalModel(model)
    assert set(original._remembered) == {"conv_out.weight", "conv_out.bias"}
    inputs = (torch.randn(2, 4, 4, 4), torch.tensor([3, 500]), torch.randn(2, 5, 16))
    before = model(*inputs).sample
    with torch.no_grad():
        model.conv_out.weight.mul_(2)
    assert torch.equal(original(*inputs).sample, before)
    assert not original(*inputs).sample.requires_grad
    assert not torch.equal(model(*inputs).sample, before)


def gradient_of(family, *, detach, hidden_states, checkpointing=False):
    """Gradient of a sum of outputs with respect to a key projection and to the hidden states."""
    model = copy.deepcopy(family.denoiser)
    if checkpointing:
        model.enable_gradient_checkpointing()
    hidden_states = hidden_states.clone().requires_grad_()
    keys = model.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))

    def run_model():
        output = model(latents, torch.tensor([300, 600]), hidden_states).sample
        return torch.autograd.grad((output * latents).sum(), [keys, hidden_states], allow_unused=True)

    if not detach:
        return run_model()
    with start_token_without_gradient(family, model):
        return run_model()


def only_first_token_differs(shape):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(shape, generator=generator)


def test_start_token_passes_no_gradient_to_the_projections_or_to_the_text(family):
    """Written out for one layer by hand: the gradient of W is that of all tokens but the first."""
    hidden_states = only_first_token_differs((2, 5, 16))
    weight, text = gradient_of(family, detach=True, hidden_states=hidden_states)
    full_weight, full_text = gradient_of(family, detach=False, hidden_states=hidden_states)
    assert not text[:, 0].any() and full_text[:, 0].any()
    assert torch.allclose(text[:, 1:], full_text[:, 1:], atol=1e-6)

    model = copy.deepcopy(family.denoiser)
    projection, kept = model.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k, []
    projection.register_forward_hook(lambda module, args, output: kept.append(output) or output.retain_grad())
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    (model(latents, torch.tensor([300, 600]), hidden_states).sample * latents).sum().backward()
    of_keys = kept[0].grad  # dL/dk, (B, tokens, width)
    assert torch.allclose(full_weight, torch.einsum("btk,bth->kh", of_keys, hidden_states), atol=1e-5)
    others = torch.einsum("btk,bth->kh", of_keys[:, 1:], hidden_states[:, 1:])
    assert torch.allclose(weight, others, atol=1e-5)
    assert not torch.allclose(weight, full_weight, rtol=0.01)


def test_detaching_the_first_hidden_state_would_not_do(family):
    """Why it is the output of the projections that is detached: their input leaves the weight's gradient as it is."""
    hidden_states = only_first_token_differs((2, 5, 16))
    model = copy.deepcopy(family.denoiser)
    keys = model.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    text = hidden_states.requires_grad_()
    text = torch.cat([text[:, :1].detach(), text[:, 1:]], 1)
    (naive,) = torch.autograd.grad((model(latents, torch.tensor([300, 600]), text).sample * latents).sum(), [keys])
    full, _ = gradient_of(family, detach=False, hidden_states=hidden_states.detach())
    ours, _ = gradient_of(family, detach=True, hidden_states=hidden_states.detach())
    assert torch.allclose(naive, full, atol=1e-6)
    assert not torch.allclose(naive, ours, rtol=0.01)


def test_start_token_is_detached_under_gradient_checkpointing_too(family):
    hidden_states = only_first_token_differs((2, 5, 16))
    plain = gradient_of(family, detach=True, hidden_states=hidden_states)
    again = gradient_of(family, detach=True, hidden_states=hidden_states, checkpointing=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, again, strict=True))


def test_detaching_changes_no_value_and_leaves_nothing_behind(family):
    model, inputs = family.denoiser, (torch.randn(1, 4, 4, 4), torch.tensor([10]), torch.randn(1, 5, 16))
    before = model(*inputs).sample
    with start_token_without_gradient(family, model):
        assert torch.equal(model(*inputs).sample, before)
        assert sum(len(module._forward_hooks) for module in model.modules()) > 0
    assert sum(len(module._forward_hooks) for module in model.modules()) == 0


def test_run_detaches_the_start_token_unless_told_otherwise(tiny_pipe):
    one, other = (
        sfumato.unlearn(tiny_pipe, "a sneaker", "concept_ablation", train_start_token=train_it, **SMALL)
        for train_it in (False, True)
    )
    assert storage.fingerprint(one.unet.named_parameters()) != storage.fingerprint(other.unet.named_parameters())


def test_only_keys_and_values_of_cross_attention_move_by_default(tiny_pipe):
    after = dict(sfumato.unlearn(tiny_pipe, "a sneaker", "concept_ablation", **SMALL).unet.named_parameters())
    moved = {name for name, before in tiny_pipe.unet.named_parameters() if not torch.equal(before, after[name])}
    assert moved == {name for name in after if "attn2.to_k" in name or "attn2.to_v" in name}


def test_target_of_a_picture_is_the_concept_prompt_it_is_an_anchor_of(family):
    """Over a whole run: with the anchor's own prompts as the concept's, there is nothing to learn."""
    for prompts, silent in ((("a bag", "a red bag", "a coat"), True), (("a coat", "a bag", "a red bag"), False)):
        concept = Concept("bag", prompts, ("a bag", "a red bag", "a coat "), ("a shirt",))  # a blank: same tokens
        training = TrainingConfig(steps=2, learning_rate=1e-6)
        sources = ExampleConfig(anchor_examples=5, example_steps=2)
        model = copy.deepcopy(family.denoiser)
        identity = {"base": "", "examples": {}}
        task = Task(family, concept, model, sources, training, identity, make_accelerator(training))
        history, _ = run(task, ConceptAblationConfig(batch_size=4))
        assert (history[0]["ablation"] < 1e-12) == silent


@pytest.mark.parametrize("settings", [{"objective": "noise"}, {"frozen_teacher": True}, {"prior": "retain"}])
def test_each_switch_changes_the_result(tiny_pipe, settings):
    plain = sfumato.unlearn(tiny_pipe, "a sneaker", "concept_ablation", **SMALL)
    other = sfumato.unlearn(tiny_pipe, "a sneaker", "concept_ablation", **SMALL, **settings)
    assert storage.fingerprint(plain.unet.named_parameters()) != storage.fingerprint(other.unet.named_parameters())


def test_training_moves_the_concept_to_its_anchor(family, anchor):
    model = copy.deepcopy(family.denoiser)
    with torch.no_grad():  # make prompts matter to the random network
        for name in family.trainable_parameters("xattn-kv"):
            model.get_parameter(name).mul_(10)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("attn2" in name)
    ours = objective(family, anchor, teacher=OriginalModel(model))
    history = train(model, ours, TrainingConfig(steps=40, learning_rate=1e-2))
    first, last = (sum(row["ablation"] for row in rows) for rows in (history[:5], history[-5:]))
    assert last < 0.7 * first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "text"}, "`objective` must be one of model, noise, got 'text'"),
        ({"prior": "all"}, "`prior` must be one of none, anchor, retain, got 'all'"),
        ({"prior_weight": -1.0}, "`prior_weight` must not be negative, got -1.0"),
        ({"objective": "noise", "frozen_teacher": True}, "the noise-based objective has no teacher"),
        ({"frozen_teacher": "yes"}, "`frozen_teacher` must be True or False, got 'yes'"),
        ({"parameters": "embedding"}, "`parameters` must be one of full, xattn"),
        ({"anchor_examples": 0}, "`anchor_examples` must be at least 1"),
        ({"retain": []}, "retain set is empty"),
        ({"batch_size": 3, "gradient_accumulation_steps": 2}, "can't be shared equally"),
    ],
)
def test_bad_input_gets_one_sentence_before_the_long_work(tiny_pipe, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        sfumato.unlearn(
            tiny_pipe, "a sneaker", "concept_ablation", output_dir=tmp_path / "out", **{**SMALL, **settings}
        )
    assert not (tmp_path / "out" / "model_index.json").exists()
