import torch

from sfumato.trainer import Shard
from sfumato.unlearning.noising import noisy_batch, resampled

WHOLE = Shard(0, 1)


def draw(family, examples, step=0, shard=WHOLE, seed=0, stream=9, **kwargs):
    return noisy_batch(family, examples, 4, step, shard, seed=seed, stream=stream, **kwargs)


def test_shards_are_slices_of_the_batch(family, forget):
    whole, parts = draw(family, forget, 3), [draw(family, forget, 3, Shard(k, 2)) for k in range(2)]
    assert torch.equal(whole.noisy, torch.cat([part.noisy for part in parts]))
    assert torch.equal(whole.timesteps, torch.cat([part.timesteps for part in parts]))
    assert torch.equal(whole.target, torch.cat([part.target for part in parts]))
    assert whole.captions == parts[0].captions + parts[1].captions


def test_noisy_latents_are_made_of_the_picture_and_the_noise_that_is_the_target(family, forget):
    batch = draw(family, forget)
    root = family.process.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1).float().sqrt()
    clean = (batch.noisy - (1 - root**2).sqrt() * batch.target) / root
    error = (clean - forget.mean[batch.rows]) / 0.1  # the posterior's own noise, of which root tells the error
    assert error.abs().max() < 6 and error.std() > 0.5
    assert batch.captions == [forget.prompts[row] for row in batch.rows]


def test_every_pass_shows_every_picture_once_in_another_order(family, forget):
    rows = [row for step in range(3) for row in draw(family, forget, step).rows]  # 12 of 6 pictures
    assert sorted(rows[:6]) == sorted(rows[6:]) == list(range(6))
    assert rows[:6] != rows[6:]


def test_examples_come_in_their_own_order_or_always_from_the_first(family, forget):
    for order, expected in ("sequential", [0, 1, 2, 3, 4, 5, 0, 1]), ("first", [0, 1, 2, 3, 0, 1, 2, 3]):
        batches = [draw(family, forget, step, order=order) for step in range(2)]
        assert [row for batch in batches for row in batch.rows] == expected
        halves = [row for k in range(2) for row in draw(family, forget, 1, Shard(k, 2), order=order).rows]
        assert halves == expected[4:]
        assert not torch.equal(batches[0].noisy, batches[1].noisy)


def test_resampling_changes_the_posterior_sample_and_neither_noise_nor_time(family, forget):
    batch = draw(family, forget)
    again = resampled(family, forget, batch)
    root = family.process.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1).float().sqrt()
    between = (again - batch.noisy) / root / forget.std[batch.rows]  # the difference of two samples of variance 1
    assert 0.8 < between.std() / 2**0.5 < 1.2
    drawn = type(forget)(forget.mean, torch.zeros_like(forget.std), forget.prompts)
    plain = draw(family, drawn)
    assert torch.equal(resampled(family, drawn, plain), plain.noisy)


def test_draws_differ_between_steps_seeds_and_streams(family, forget):
    first = draw(family, forget).noisy
    assert torch.equal(first, draw(family, forget).noisy)
    for other in ({"step": 1}, {"seed": 1}, {"stream": 10}):
        assert not torch.equal(first, draw(family, forget, **other).noisy)


def test_times_are_of_the_whole_schedule_unless_bounded(family, forget):
    times = torch.cat([draw(family, forget, step).timesteps for step in range(50)])
    assert times.min() < 100 and times.max() > 900
    assert torch.cat([draw(family, forget, step, max_timestep=1).timesteps for step in range(3)]).max() == 0
