"""The objective of One More Step is its equation, and its network has no time."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import nn

import sfumato
from sfumato import OneMoreStepPipeline
from sfumato.families import family_of
from sfumato.guidance.networks import NetworkConfig, make_timeless_unet
from sfumato.trainer import Shard
from sfumato.training.one_more_step import OneMoreStep, OneMoreStepConfig, OneMoreStepObjective
from sfumato.unlearning.examples import Examples
from sfumato.unlearning.noising import noisy_batch

WHOLE = Shard(0, 1)


@pytest.fixture(scope="module")
def family():
    return family_of(sfumato.load("atelier"))


@pytest.fixture(scope="module")
def examples():
    drawn = torch.randn(40, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return Examples(drawn, torch.full_like(drawn, 0.1), tuple(f"a picture {k}" for k in range(40)))


class Says(nn.Module):
    """Says a velocity; remembers what it is asked."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity

    def forward(self, noise, times, told):
        self.asked = noise, times, told
        return SimpleNamespace(sample=self.velocity)


def make(family, examples, dropped=0.1, batch_size=8, encode=lambda texts: torch.zeros(len(texts), 1, 96)):
    return OneMoreStepObjective(family, examples, encode, batch_size, 3, dropped)


def batch_of(family, examples, size=8, shard=WHOLE):
    return noisy_batch(family, examples, size, 5, shard, seed=3, stream=821)


def test_an_oracle_has_no_loss_and_0_has_the_mean_square_of_the_pictures(family, examples):
    objective, batch = make(family, examples), batch_of(family, examples)
    assert objective.losses(Says(-batch.clean), 5, WHOLE)["mse"] == 0
    found = objective.losses(Says(torch.zeros_like(batch.clean)), 5, WHOLE)["mse"]
    assert found.item() == pytest.approx(batch.clean.square().mean().item(), rel=1e-6)


def test_the_network_is_given_pure_noise_and_no_time(family, examples):
    """The noise is that of the sample's key, whatever the picture."""
    others = Examples(examples.mean + 5, examples.std, examples.prompts)
    seen = []
    for some in (examples, others):
        model = Says(torch.zeros(8, 4, 8, 8))
        make(family, some).losses(model, 5, WHOLE)
        seen.append(model.asked)
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][0], batch_of(family, examples).noise)
    assert not seen[0][1].any() and len(seen[0][1]) == 8
    batch = batch_of(family, examples, 512)
    pairs = torch.stack([batch.noise.flatten(), batch.clean.flatten()])
    assert abs(torch.corrcoef(pairs)[0, 1].item()) < 0.02 and batch.noise.std().item() == pytest.approx(1, abs=0.02)


def test_one_caption_in_ten_is_dropped_whoever_draws_it(family, examples):
    objective = make(family, examples, batch_size=2000)
    told = objective.captions(batch_of(family, examples, 2000))
    assert 0.08 < told.count("") / 2000 < 0.12
    halves = [objective.captions(batch_of(family, examples, 2000, Shard(k, 2))) for k in range(2)]
    assert told == halves[0] + halves[1]
    assert "" not in make(family, examples, dropped=0.0).captions(batch_of(family, examples))


def test_captions_are_told_as_the_pipeline_tells_prompts(family, examples):
    materials = SimpleNamespace(family=family, examples=examples, pictures=None, batch_size=2, seed=0)
    objective = OneMoreStep(OneMoreStepConfig()).objective(materials)
    unet = OneMoreStep(OneMoreStepConfig()).network(family, NetworkConfig(channels=[32], norm_num_groups=8))
    step = OneMoreStepPipeline(unet, base=family.pipe)
    texts = ["a photo of a red bag", ""]
    assert objective.dropped == 0.1 and torch.equal(objective.encode(texts), step.encode(texts))


def test_the_time_is_without_effect_and_not_trained():
    torch.manual_seed(0)
    unet = make_timeless_unet(NetworkConfig(channels=[32, 64]), (4, 8, 8), 6)
    frozen = [(name, value) for name, value in unet.named_parameters() if not value.requires_grad]
    assert frozen and all("time_emb" in name and not value.any() for name, value in frozen)
    noise, told = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 6)
    assert torch.equal(unet(noise, 0, told).sample, unet(noise, 999, told).sample)


def test_networks_are_sized_by_the_latents():
    small, large = (
        sum(value.numel() for value in make_timeless_unet(NetworkConfig(), shape, told).parameters())
        for shape, told in (((4, 8, 8), 96), ((4, 64, 64), 1024))
    )
    assert 1e6 < small < 1.4e6 and large == pytest.approx(154e6, rel=0.01)  # the published one
    with pytest.raises(ValueError, match="takes sides that 4 divides, and the model's are 6 x 6"):
        make_timeless_unet(NetworkConfig(channels=[32, 32, 32]), (4, 6, 6), 8)
    with pytest.raises(ValueError, match="`norm_num_groups` 8 does not divide the 36"):
        make_timeless_unet(NetworkConfig(channels=[36]), (4, 8, 8), 8)


def test_a_schedule_without_a_flaw_is_refused(family):
    usual = family.pipe.scheduler
    for kind in (diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler):  # 0 at the end, and 2^-24
        family.pipe.scheduler = kind.from_config(usual.config, rescale_betas_zero_snr=True)
        mended = family_of(family.pipe)
        family.pipe.scheduler = usual
        with pytest.raises(ValueError, match="zero terminal SNR.*nothing to mend"):
            OneMoreStep(OneMoreStepConfig()).check(mended, None)
    OneMoreStep(OneMoreStepConfig()).check(family, None)


def test_a_share_of_captions_is_a_share():
    with pytest.raises(ValueError, match=r"`caption_dropout` must lie in \[0, 1\), got 1"):
        OneMoreStepConfig(caption_dropout=1.0)
