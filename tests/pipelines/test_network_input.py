"""What a network is given when pictures are restored, held against what it is given in training."""

import pytest
import torch

from sfumato.restoration.degradations import Degradation
from sfumato.restoration.examples import Examples
from sfumato.trainer import Shard


class Noise:
    """Pictures of random bytes `(B, 3, 32, 32)` in [-1, 1]."""

    def __len__(self):
        return 8

    def take(self, positions, keys=None):
        generator = torch.Generator().manual_seed(0)
        bytes_ = torch.randint(0, 256, (len(self), 3, 32, 32), generator=generator)
        return bytes_[list(positions)] / 255 * 2 - 1


@pytest.mark.parametrize("kind", ["resshift", "rddm"])
@pytest.mark.parametrize("latents", [None, "kl", "vq"])
@pytest.mark.parametrize("task", ["sr", "inpaint", "denoise", "deblur"])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_a_network_is_given_what_it_was_trained_on(restorers, monkeypatch, kind, latents, task, patch_size):
    vae = None if latents is None else restorers.vae(latents, 3)
    degradation, masked = Degradation(task), task == "inpaint"
    made, apply = [], Degradation.apply
    monkeypatch.setattr(Degradation, "apply", lambda *a, **k: made.append(apply(*a, **k)) or made[-1])
    pipe = restorers.pipe(
        kind, scale=degradation.factor, masked=masked, vae=vae, patch_size=patch_size, network=restorers.pointwise
    )
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    batch = Examples(Noise(), degradation, 4, 0, vae).draw(pipe.unet, 0, Shard(0, 1))
    (degraded,) = made
    without_noise = torch.zeros(1, *pipe.latents_shape(*degraded.picture.shape[-2:]))
    mask = {"mask_image": degraded.mask} if masked else {}
    pipe(degraded.picture / 2 + 0.5, latents=without_noise, num_inference_steps=2, output_type="pt", **mask)
    # the chain starts from the degraded picture and the noise, here none; both as the scheduler scales them
    state = pipe.scheduler.scale_model_input(batch.degraded, pipe.scheduler.timesteps[0])
    expected = torch.nn.functional.pixel_unshuffle(torch.cat([state, batch.condition], dim=1), patch_size)
    assert seen[0].shape == expected.shape and batch.degraded.shape == batch.clean.shape
    assert torch.allclose(seen[0], expected, atol=1e-5)
