"""Networks for restoration: a tiny random one, and two whose answers are known."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DModel, VQModel

import sfumato

SHAPE = {
    "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "add_attention": False,
    "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
}  # fmt: skip

TWO_HEADS = ("pred_res_noise", "pred_x0_noise", "pred_res_add_noise", "pred_x0_add_noise")


class Oracle(UNet2DModel):
    """Puts out what it was told to, `answer` `(B, channels, h, w)`, whatever it is given; keeps what that was."""

    answer: torch.Tensor
    patch_size = 1

    def forward(self, sample, timestep, return_dict=True):
        self.seen = sample, timestep
        return (F.pixel_unshuffle(self.answer, self.patch_size).to(sample.dtype),)


class Pointwise(UNet2DModel):
    """Looks at one place at a time: the first and the last convolution of a UNet, as 1 x 1."""

    calls = 0

    def forward(self, sample, timestep, return_dict=True):
        self.calls += 1
        middle = F.conv2d(sample, self.conv_in.weight.sum((2, 3), keepdim=True), self.conv_in.bias).tanh()
        return (F.conv2d(middle, self.conv_out.weight.sum((2, 3), keepdim=True), self.conv_out.bias).tanh(),)


def make_unet(in_channels, out_channels, kind=UNet2DModel, size=None, seed=0):
    torch.manual_seed(seed)
    return kind(sample_size=size, in_channels=in_channels, out_channels=out_channels, **SHAPE).eval()


def make_vae(kind, channels):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    common = {"block_out_channels": (4, 4, 4), "latent_channels": channels, "norm_num_groups": 2, **blocks}
    if kind == "vq":
        return VQModel(num_vq_embeddings=16, scaling_factor=1.0, mid_block_add_attention=False, **common).eval()
    return AutoencoderKL(mid_block_add_attention=False, **common).eval()


def make_pipe(
    kind="resshift", scale=1, patch_size=1, masked=False, conditioned=True, network=UNet2DModel, size=None, vae=None,
    steps=4, **settings,
):  # fmt: skip
    """A pipeline whose network has the channels that it needs."""
    shrink, channels = (1, 3) if vae is None else (4, vae.config.latent_channels)
    told = (3 + masked) * max(1, shrink // scale) ** 2 if conditioned else 0
    if kind == "resshift":
        own = {"num_train_timesteps": steps, "min_noise_level": 0.2, "latent_space": vae is not None}
        scheduler, heads = sfumato.ResShiftScheduler(**{**own, "clip_sample": vae is None, **settings}), 1
    else:
        own = {"sum_scale": 0.01, "prediction_type": "pred_res_noise"}
        scheduler = sfumato.RDDMScheduler(**{**own, **settings})
        heads = 2 if scheduler.config.prediction_type in TWO_HEADS else 1
    unet = make_unet((channels + told) * patch_size**2, heads * channels * patch_size**2, network, size)
    unet.patch_size = patch_size
    pipeline = sfumato.ResShiftPipeline if kind == "resshift" else sfumato.RDDMPipeline
    made = pipeline(
        unet, scheduler, vae=vae, scale=scale, patch_size=patch_size, masked=masked, conditioned=conditioned
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="session")
def restorers():
    """What this file makes, by name."""

    class Makers:
        pipe, unet, vae = staticmethod(make_pipe), staticmethod(make_unet), staticmethod(make_vae)
        oracle, pointwise = Oracle, Pointwise

    return Makers
