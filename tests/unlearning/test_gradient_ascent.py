import copy

import pytest
import torch
import torch.nn.functional as F

import sfumato
from sfumato import storage
from sfumato.concepts import Concept
from sfumato.families import StableDiffusion
from sfumato.trainer import NonFiniteLossError, Shard, TrainingConfig, make_accelerator, train
from sfumato.unlearning.examples import PromptTable
from sfumato.unlearning.gradient_ascent import (
    FORGET_STREAM,
    RETAIN_STREAM,
    START_STREAM,
    GradientAscentConfig,
    GradientAscentObjective,
    starting_loss,
)
from sfumato.unlearning.noising import noisy_batch
from sfumato.unlearning.task import ExampleConfig, Task

PROMPTS = ["a sneaker", "a red sneaker", "a bag", "a coat", "a shirt"]
SMALL = {
    "forget_examples": 4, "retain_examples": 4, "example_steps": 2, "batch_size": 2, "steps": 3, "learning_rate": 1e-3,
    "verify": False,
}  # fmt: skip


def objective(family, forget, retain, ceiling=float("inf"), **config):
    return GradientAscentObjective(
        family, forget, retain, PromptTable(family, PROMPTS), GradientAscentConfig(batch_size=4, **config), 0, ceiling
    )


def per_picture(family, examples, stream, step=3):
    batch = noisy_batch(family, examples, 4, step, Shard(0, 1), seed=0, stream=stream)
    hidden_states = family.pipe.encode_prompt(batch.captions, "cpu", 1, False)[0]
    predicted = family.pipe.unet(batch.noisy, batch.timesteps, hidden_states).sample
    return torch.stack([F.mse_loss(a, b) for a, b in zip(predicted, batch.target, strict=True)])


def test_losses_are_the_equations(family, forget, retain):
    of_forget, of_retain = per_picture(family, forget, FORGET_STREAM), per_picture(family, retain, RETAIN_STREAM)
    ceiling = of_forget.sort().values[1:3].mean().item()  # two pictures are over it
    losses = objective(family, forget, retain, ceiling, retain_weight=0.3).losses(family.denoiser, 3, Shard(0, 1))
    bounded = [min(loss, ceiling) for loss in of_forget.tolist()]
    assert losses["forget"].item() == pytest.approx(-sum(bounded) / 4, rel=1e-4)
    assert losses["retain"].item() == pytest.approx(0.3 * of_retain.mean().item(), rel=1e-4)
    free = objective(family, forget, retain).losses(family.denoiser, 3, Shard(0, 1))
    assert free["forget"].item() == pytest.approx(-of_forget.mean().item(), rel=1e-4)


def test_velocity_prediction_ascends_the_velocity_s_loss(tiny_pipe_v, forget, retain):
    family = StableDiffusion(tiny_pipe_v)
    losses = objective(family, forget, retain).losses(family.denoiser, 3, Shard(0, 1))
    assert losses["forget"].item() == pytest.approx(
        -per_picture(family, forget, FORGET_STREAM).mean().item(), rel=1e-4
    )


@pytest.mark.parametrize("ceiling", [float("inf"), 1.2])
def test_losses_of_shards_average_to_those_of_the_whole(family, forget, retain, ceiling):
    ours = objective(family, forget, retain, ceiling)
    whole = ours.losses(family.denoiser, 2, Shard(0, 1))
    halves = [ours.losses(family.denoiser, 2, Shard(k, 2)) for k in range(2)]
    for name in whole:
        assert torch.allclose(whole[name], (halves[0][name] + halves[1][name]) / 2, rtol=1e-4)


def test_picture_over_the_bound_pulls_no_further(family, forget, retain):
    lowest = per_picture(family, forget, FORGET_STREAM).min().item()
    ours = objective(family, forget, retain, 0.9 * lowest)
    loss = ours.losses(family.denoiser, 3, Shard(0, 1))["forget"]
    gradients = torch.autograd.grad(loss, list(family.denoiser.parameters()), allow_unused=True)
    assert loss.item() == pytest.approx(-0.9 * lowest, rel=1e-5)
    assert all(gradient is None or not gradient.any() for gradient in gradients)


def test_starting_loss_is_the_mean_over_a_pass_of_the_forget_set(family, forget):
    training = TrainingConfig()
    concept = Concept("sneaker", ("a sneaker",), ("a bag",), ("a coat",))
    task = Task(family, concept, family.denoiser, ExampleConfig(), training, {}, make_accelerator(training))
    batches = [noisy_batch(family, forget, 3, number, Shard(0, 1), seed=0, stream=START_STREAM) for number in range(2)]
    assert sorted(row for batch in batches for row in batch.rows) == list(range(6))
    expected = 0.0
    for batch in batches:
        hidden_states = family.pipe.encode_prompt(batch.captions, "cpu", 1, False)[0]
        predicted = family.pipe.unet(batch.noisy, batch.timesteps, hidden_states).sample
        expected += F.mse_loss(predicted, batch.target).item() / 2
    assert starting_loss(task, forget, PromptTable(family, PROMPTS), 3) == pytest.approx(expected, rel=1e-5)


def test_bound_stops_an_ascent_that_would_otherwise_ruin_the_model(family, forget, retain):
    config = TrainingConfig(steps=20, learning_rate=0.1, optimizer="sgd")
    model = copy.deepcopy(family.denoiser)
    history = train(model, objective(family, forget, retain, 2.5, retain_weight=0.0), config)
    assert -history[-1]["forget"] > 2 * -history[0]["forget"]
    assert 2 < -objective(family, forget, retain).losses(model, 3, Shard(0, 1))["forget"].item() < 6
    with pytest.raises(NonFiniteLossError):
        train(copy.deepcopy(family.denoiser), objective(family, forget, retain, retain_weight=0.0), config)


def test_retain_term_holds_the_retain_loss_down(family, forget, retain):
    held = {}
    for weight in (0.0, 1.0):
        model = copy.deepcopy(family.denoiser)
        ours = objective(family, forget, retain, 2.5, retain_weight=weight)
        train(model, ours, TrainingConfig(steps=20, learning_rate=1e-2))
        held[weight] = objective(family, forget, retain, retain_weight=1.0).losses(model, 3, Shard(0, 1))["retain"]
    assert held[1.0] < 0.7 * held[0.0]


def test_bound_goes_into_the_manifest_and_can_be_switched_off(tiny_pipe, tmp_path):
    for name, bound in (("on", 4.0), ("off", None)):
        sfumato.unlearn(tiny_pipe, "a sneaker", "gradient_ascent", bound=bound, output_dir=tmp_path / name, **SMALL)
    on, off = (storage.read_json(tmp_path / name / "manifest.json") for name in ("on", "off"))
    assert 0.5 < on["starting_forget_loss"] < 3
    assert "starting_forget_loss" not in off and off["settings"]["bound"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bound": 1.0}, "`bound` must be above 1, where the loss starts, or None, got 1.0"),
        ({"bound": "no"}, "`bound` must be a finite number, got 'no'"),
        ({"retain_weight": -0.1}, "`retain_weight` must not be negative, got -0.1"),
        ({"forget_images": "nowhere"}, "no image folder nowhere"),
        ({"forget_examples": 0}, "`forget_examples` must be at least 1"),
        ({"retain": []}, "retain set is empty"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
    ],
)
def test_bad_input_gets_one_sentence_before_the_long_work(tiny_pipe, tmp_path, settings, message):
    with pytest.raises((ValueError, OSError), match=message):
        sfumato.unlearn(
            tiny_pipe, "a sneaker", "gradient_ascent", output_dir=tmp_path / "out", **{**SMALL, **settings}
        )
    assert not (tmp_path / "out" / "model_index.json").exists()
