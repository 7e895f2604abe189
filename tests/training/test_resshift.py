"""ResShift's objective is its equation."""

import pytest
import torch
from torch import nn

from sfumato.restoration.degradations import Degradation
from sfumato.restoration.examples import Examples, hold_out
from sfumato.restoration.networks import load_autoencoder
from sfumato.trainer import Shard, TrainingConfig, make_accelerator
from sfumato.training.resshift import ResShiftConfig, ResShiftObjective

HALF = TrainingConfig(mixed_precision="bf16")
ROOTS = (0.1, 0.520096, 0.761382, 0.99)  # of eta, for T = 4, m = 0.2, k = 2: the sheet's


class Echo(nn.Module):
    """Gives back the first channels of what it is given, weighted; remembers it."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.channels = nn.Parameter(torch.tensor(0.7)), channels

    def forward(self, model_input, times, return_dict=False):
        self.seen = model_input, times
        return (self.weight * model_input[:, : self.channels],)


def folded(values):
    """Blocks of 2x2 in channels: c, row, column."""
    b, c, h, w = values.shape
    return values.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


@pytest.mark.parametrize("prediction_type", ["sample", "residual", "epsilon", "epsilon_scale"])
@pytest.mark.parametrize("task", ["sr", "inpaint"])
def test_loss_is_the_equation(noise, task, prediction_type):
    examples = Examples(noise, Degradation(task, scale=2 if task == "sr" else None), 6, seed=3)
    config, model = ResShiftConfig(prediction_type=prediction_type), Echo(12)
    found = ResShiftObjective(examples, config.scheduler(latent=False), 2, False).losses(model, 5, Shard(0, 1))
    batch = examples.draw(model, 5, Shard(0, 1))
    x0, y, drawn, times = batch.clean, batch.degraded, batch.noise(), batch.times(4)
    assert len(set(times.tolist())) > 1
    s = torch.tensor(ROOTS)[times].reshape(-1, 1, 1, 1)
    x = x0 + s**2 * (y - x0) + 2 * s * drawn
    told = torch.cat([x / (6 * s + 1), batch.condition], 1)
    assert torch.allclose(model.seen[0], folded(told), atol=1e-5)
    assert torch.equal(model.seen[1], times)
    target = {"sample": x0, "residual": y - x0, "epsilon": drawn, "epsilon_scale": 2 * s * drawn}[prediction_type]
    weights = 1 / (2 * s) ** 2 if prediction_type == "epsilon_scale" else torch.ones_like(s)
    expected = (weights * (target - 0.7 * x / (6 * s + 1)) ** 2).mean()
    assert found["mse"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_network_is_told_the_degraded_picture_and_the_mask(noise):
    examples = Examples(noise, Degradation("inpaint"), 4, seed=0)
    batch = examples.draw(Echo(12), 0, Shard(0, 1))
    picture, mask = batch.condition[:, :3], batch.condition[:, 3:]
    assert set(mask.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(picture, torch.where(mask > 0, -1.0, batch.clean)) and torch.equal(picture, batch.degraded)


def test_samples_do_not_depend_on_how_a_batch_is_shared(noise):
    examples = Examples(noise, Degradation("sr", scale=2, noise=0.1), 8, seed=1)
    whole = examples.draw(Echo(12), 2, Shard(0, 1))
    parts = [examples.draw(Echo(12), 2, Shard(k, 4)) for k in range(4)]
    for name in ("clean", "degraded", "condition"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    assert torch.equal(whole.noise(), torch.cat([part.noise() for part in parts]))
    assert torch.equal(whole.times(1000), torch.cat([part.times(1000) for part in parts]))
    assert not torch.equal(whole.clean, examples.draw(Echo(12), 3, Shard(0, 1)).clean)


@pytest.mark.parametrize("task", ["sr", "deblur"])
@pytest.mark.parametrize("latent", [False, True])
def test_pictures_are_degraded_and_encoded_in_float32_under_mixed_precision(noise, task, latent):
    vae = load_autoencoder("atelier") if latent else None
    examples, accelerator = Examples(noise, Degradation(task), 4, 1, vae), make_accelerator(HALF)
    plain = examples.draw(Echo(12), 0, Shard(0, 1))
    with accelerator.autocast():  # as the trainer asks for losses
        mixed = examples.draw(Echo(12), 0, Shard(0, 1))
    for name in ("clean", "degraded", "condition"):
        assert getattr(mixed, name).dtype == torch.float32
        assert torch.equal(getattr(mixed, name), getattr(plain, name))


def test_what_is_random_in_held_out_pictures_is_so_in_none_that_is_trained_on(noise):
    """Streams and positions are numbers alike: keys of the one must not be those of the other."""
    batch = Examples(noise, None, 40, 0).draw(Echo(3), 0, Shard(0, 1))
    held_out = hold_out(noise, None, 10, 0)
    trained = {(*key, *rest) for key in batch.keys for stream in range(1, 5) for rest in [(stream,), (stream, 3)]}
    assert not trained & {held_out.key(index) for index in range(10)}


def test_noise_level_is_the_published_one_for_4_and_15_steps():
    assert ResShiftConfig().min_noise_level == 0.2
    assert ResShiftConfig(num_train_timesteps=15).min_noise_level == 0.04
    assert ResShiftConfig(num_train_timesteps=15, min_noise_level=0.1).scheduler(True).config.min_noise_level == 0.1


def test_chains_without_a_meaning_are_refused():
    with pytest.raises(ValueError, match="`num_train_timesteps` must be a whole number from 2 on, got 1"):
        ResShiftConfig(num_train_timesteps=1)
    with pytest.raises(ValueError, match="prediction_type"):
        ResShiftConfig(prediction_type="velocity")
