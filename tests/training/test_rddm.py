"""RDDM's objective is its equation."""

import pytest
import torch
from torch import nn

from sfumato.restoration.degradations import Degradation
from sfumato.restoration.examples import Examples
from sfumato.restoration.networks import Grid, NetworkConfig, TwoNetworks, make_unet
from sfumato.trainer import Shard
from sfumato.training.rddm import RDDMConfig, RDDMObjective

T = 10


class Echo(nn.Module):
    """Gives back the state, weighted otherwise for each head; remembers what it is told."""

    def __init__(self, heads):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.7, -0.4])[:heads])

    def forward(self, model_input, times, return_dict=False):
        self.seen = model_input, times
        return (torch.cat([weight * model_input[:, :3] for weight in self.weights], 1),)


def levels(times, sum_scale):
    """A and B at these times, of weights that fall and rise linearly."""
    steps = torch.arange(T)
    a = (2 * (T - steps) / (T * (T + 1))).cumsum(0)
    b = (2 * (steps + 1) / (T * (T + 1)) * sum_scale).cumsum(0).sqrt()
    return a[times].reshape(-1, 1, 1, 1), b[times].reshape(-1, 1, 1, 1)


def made(pictures, heads, two_networks=False, degradation=None, conditioned=True, **settings):
    config = RDDMConfig(num_train_timesteps=T, two_networks=two_networks, **settings)
    examples = Examples(pictures, degradation, 6, seed=3, conditioned=conditioned)
    objective = RDDMObjective(examples, config.scheduler(latent=False), 1, config.loss, two_networks)
    model = Echo(heads)
    losses = objective.losses(model, 4, Shard(0, 1))
    return model, losses, examples.draw(model, 4, Shard(0, 1)), config


@pytest.mark.parametrize(
    "kind", ["pred_res_noise", "pred_x0_noise", "pred_res_add_noise", "pred_x0_add_noise", "pred_res", "pred_noise"]
)
def test_restoration_is_the_sum_of_absolute_errors(noise, kind):
    heads = 1 if kind in ("pred_res", "pred_noise") else 2
    model, losses, batch, _ = made(noise, heads, prediction_type=kind, degradation=Degradation("denoise"))
    x0, y, drawn, times = batch.clean, batch.degraded, batch.noise(), batch.times(T)
    a, b = levels(times, 0.01)
    x = (1 - a) * x0 + a * y + b * drawn
    assert torch.allclose(model.seen[0], torch.cat([x, y], 1), atol=1e-6) and torch.equal(model.seen[1], times)
    first = y - x0 if "res" in kind else x0
    targets = {"pred_res": [first], "pred_noise": [drawn]}.get(
        kind, [first, first + drawn if "add" in kind else drawn]
    )
    expected = [(target - w * x).abs().mean() for target, w in zip(targets, (0.7, -0.4), strict=False)]
    assert [x.item() for x in losses.values()] == pytest.approx([x.item() for x in expected], rel=1e-4)


def test_generation_is_the_sum_of_squared_errors_with_a_residual_of_minus_x0(noise):
    model, losses, batch, config = made(noise, 2, generation=True, conditioned=False)
    a, b = levels(batch.times(T), 1.0)
    x = (1 - a) * batch.clean + b * batch.noise()
    assert torch.allclose(model.seen[0], x, atol=1e-6) and batch.degraded is None and not config.conditioned
    expected = [((-batch.clean - 0.7 * x) ** 2).mean(), ((batch.noise() + 0.4 * x) ** 2).mean()]
    assert [x.item() for x in losses.values()] == pytest.approx([x.item() for x in expected], rel=1e-4)


def test_without_a_condition_the_network_sees_the_state_alone(noise):
    model, *_ = made(noise, 1, degradation=Degradation("denoise"), conditioned=False)
    assert model.seen[0].shape[1] == 3


def test_two_networks_are_told_levels_in_the_place_of_the_time(noise):
    model, _, batch, _ = made(noise, 2, two_networks=True, degradation=Degradation("denoise"))
    a, b = levels(batch.times(T), 0.01)
    for told, level in zip(model.seen[1], (a, b), strict=True):
        assert torch.allclose(told, T * level.reshape(-1), rtol=1e-5)


def test_two_networks_answer_one_head_each():
    torch.manual_seed(0)
    config = NetworkConfig(channels=[8], norm_num_groups=4, attention_head_dim=4, attention_levels=0)
    unets = [make_unet(config, Grid(3, 8, 3), heads=1) for _ in range(2)]
    state, times = torch.randn(2, 24, 4, 4), torch.tensor([1.0, 2.0])
    (both,) = TwoNetworks(*unets)(state, (times, 3 * times))
    for half, unet, time in zip(both.chunk(2, 1), unets, (times, 3 * times), strict=True):
        assert torch.equal(half, unet(state, time).sample)


def test_restoration_learns_the_residual_and_generation_the_noise_too():
    assert RDDMConfig().prediction_type == "pred_res"
    assert {RDDMConfig(generation=True).prediction_type, RDDMConfig(two_networks=True).prediction_type} == {
        "pred_res_noise"
    }


def test_generation_clips_to_the_range_of_pictures_and_restoration_to_that_of_residuals():
    for config, expected in (
        (RDDMConfig(), 2),
        (RDDMConfig(generation=True), 1),
        (RDDMConfig(generation=True, clip_sample_range=3.0), 3),
    ):
        assert config.scheduler(latent=False).config.clip_sample_range == expected


@pytest.mark.parametrize("kind", ["pred_res_noise", "pred_x0_noise", "pred_res"])
def test_what_is_learnt_well_fills_a_hole_with_white(kind):
    """There the residual is -2, which the released programs' clipping would halve."""
    scheduler = RDDMConfig(prediction_type=kind).scheduler(latent=False)
    x0, y = torch.full((1, 3, 4, 4), 0.98), torch.full((1, 3, 4, 4), -1.0)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(5)
    x = scheduler.initial_sample(y, noise)
    for time in scheduler.timesteps:
        x = scheduler.step(scheduler.training_target(x0, noise, time[None], y), time, x, y).prev_sample
    assert torch.allclose(x, x0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "huber"}, "`loss` must be l1 or l2, got 'huber'"),
        ({"prediction_type": "pred_res", "two_networks": True}, "`two_networks` needs a prediction of two heads"),
        ({"prediction_type": "pred_all"}, "`prediction_type` must be one of"),
        ({"prediction_type": "epsilon"}, "is that of a model of DDPM"),
        ({"num_train_timesteps": 1}, "`num_train_timesteps` must be a whole number from 2 on"),
        ({"sum_scale": 2.0}, "`sum_scale` is a variance"),
        ({"alpha_schedule": "steep"}, "alpha_schedule"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RDDMConfig(**settings)
