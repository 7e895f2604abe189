"""Settings of the whole suite, tiny pipelines of every kind, made-up garments, and jobs on several processes."""

import gzip
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sfumato.loading import assets_folder

# The models here are tiny: more threads cost more than they save (a pipeline suite went from 214 s to 70 s with one).
torch.set_num_threads(1)

LONGEST = (
    "test_readme.py", "test_docs.py", "test_processes.py", "test_job.py", "test_every_method.py", "test_benchmark.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Put the files that take minutes first: one worker has a file, and would be alone with it in the end."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@cache
def unet(in_channels=4, xl=False):
    torch.manual_seed(0)
    size = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=in_channels, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=8,
        attention_head_dim=2, **({**size, "projection_class_embeddings_input_dim": 56} if xl else {}),
    ).eval()  # fmt: skip


@cache
def vae():
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, shift_factor=0.0).eval()


@cache
def pixel_unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ).eval()  # fmt: skip


@cache
def sd3_transformer():
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=4,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip


@cache
def flux_transformer():
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip


def tensor(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TEXT = ("text_encoder", "tokenizer")
PROMPT = {"prompt_embeds": torch.ones(1, 4, 8), "negative_prompt_embeds": torch.zeros(1, 4, 8)}
POOLED = {"pooled_prompt_embeds": torch.ones(1, 8), "negative_pooled_prompt_embeds": torch.zeros(1, 8)}
FLUX = {"prompt_embeds": torch.ones(1, 4, 8), "pooled_prompt_embeds": torch.ones(1, 8)}
INPAINT = {
    "image": tensor(1, 3, 8, 8).clamp(-1, 1),
    "mask_image": (torch.arange(8) < 4).float().expand(1, 1, 8, 8),
    "height": 8,
    "width": 8,
}


@dataclass(frozen=True)
class Kind:
    """A kind of pipeline: its class, its denoiser, the scheduler its models come with, and how to call it."""

    pipeline: str
    denoiser: Callable[[], Any]
    name: str  # of the denoiser, among the components
    stock: Callable[[], Any]
    call: dict[str, Any] = field(default_factory=dict)
    texts: tuple[str, ...] = TEXT
    strength: float | None = None
    shape: tuple[int, ...] = (1, 4, 8, 8)


def ddim():
    return diffusers.DDIMScheduler(**SD, clip_sample=False, steps_offset=1)


def flow():
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def dynamic_flow():
    return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


TEXT_2, TEXT_3 = (*TEXT, "text_encoder_2", "tokenizer_2"), (*TEXT, *(f"{t}_{n}" for t in TEXT for n in (2, 3)))
LATENTS = {"image": tensor(1, 4, 8, 8)}
KINDS = {
    "sd": Kind("StableDiffusionPipeline", unet, "unet", ddim, PROMPT),
    "sd img2img": Kind("StableDiffusionImg2ImgPipeline", unet, "unet", ddim, {**PROMPT, **LATENTS}, strength=0.6),
    "sd inpaint": Kind(
        "StableDiffusionInpaintPipeline", lambda: unet(9), "unet", ddim, {**PROMPT, **INPAINT}, strength=0.6
    ),
    "sd inpaint, 4 channels": Kind(
        "StableDiffusionInpaintPipeline", unet, "unet", ddim, {**PROMPT, **INPAINT}, strength=1.0
    ),
    "sdxl": Kind("StableDiffusionXLPipeline", lambda: unet(xl=True), "unet", ddim, {**PROMPT, **POOLED}, TEXT_2),
    "sdxl img2img": Kind(
        "StableDiffusionXLImg2ImgPipeline", lambda: unet(xl=True), "unet", ddim, {**PROMPT, **POOLED, **LATENTS},
        TEXT_2, strength=0.6,
    ),
    "sdxl, edm": Kind(
        "StableDiffusionXLPipeline", lambda: unet(xl=True), "unet", diffusers.EDMEulerScheduler,
        {**PROMPT, **POOLED}, TEXT_2,
    ),
    "sd3": Kind(
        "StableDiffusion3Pipeline", sd3_transformer, "transformer", flow,
        {**PROMPT, **POOLED, "height": 8, "width": 8}, TEXT_3,
    ),
    "sd3 img2img": Kind(
        "StableDiffusion3Img2ImgPipeline", sd3_transformer, "transformer", flow,
        {**PROMPT, **POOLED, **LATENTS, "height": 8, "width": 8}, TEXT_3, strength=0.6,
    ),
    "flux": Kind(
        "FluxPipeline", flux_transformer, "transformer", dynamic_flow, {**FLUX, "height": 8, "width": 8}, TEXT_2,
        shape=(1, 16, 16),
    ),
    "flux img2img": Kind(
        "FluxImg2ImgPipeline", flux_transformer, "transformer", dynamic_flow,
        {**FLUX, "image": INPAINT["image"], "height": 8, "width": 8}, TEXT_2, strength=0.6, shape=(1, 16, 16),
    ),
    "ddim pixels": Kind("DDIMPipeline", pixel_unet, "unet", diffusers.DDIMScheduler, texts=(), shape=(1, 3, 8, 8)),
    "ddpm pixels": Kind("DDPMPipeline", pixel_unet, "unet", diffusers.DDPMScheduler, texts=(), shape=(1, 3, 8, 8)),
}  # fmt: skip


class Tiny:
    """A tiny pipeline of a kind with a scheduler, and one call of it."""

    def __init__(self, kind, scheduler_class, **config):
        self.kind = KINDS[kind]
        pipeline_class = getattr(diffusers, self.kind.pipeline)
        components = {self.kind.name: self.kind.denoiser(), "scheduler": self.kind.stock()}
        components |= dict.fromkeys(self.kind.texts)
        if self.kind.texts:
            components["vae"] = vae()
        if self.kind.pipeline.startswith("StableDiffusion") and len(self.kind.texts) == 2:
            components |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        self.pipe = pipeline_class(**components)
        self.use(scheduler_class, **config)
        self.pipe.set_progress_bar_config(disable=True)

    def use(self, scheduler_class, **config):
        """Swap the scheduler, from the config of the one that the model came with."""
        self.pipe.scheduler = scheduler_class.from_config(self.kind.stock().config, **config)
        return self.pipe.scheduler

    def cast(self, dtype):
        """Cast copies of the models; returns the arguments of a call that must have their dtype."""
        for name, part in self.pipe.components.items():
            if isinstance(part, torch.nn.Module):
                setattr(self.pipe, name, deepcopy(part).to(dtype))
        return {key: value.to(dtype) for key, value in self.kind.call.items() if isinstance(value, torch.Tensor)}

    def __call__(self, steps=6, seed=0, **kwargs):
        """The latents or pixels that a call ends with, and the times that the denoiser was told in it."""
        seen, denoiser = [], getattr(self.pipe, self.kind.name)
        name = "hidden_states" if self.kind.name == "transformer" else "sample"

        def record(module, args, given):
            seen.append((given["timestep"] if "timestep" in given else args[1]).reshape(-1)[0].item())
            self.shape = (given[name] if name in given else args[0]).shape

        hook = denoiser.register_forward_pre_hook(record, with_kwargs=True)
        call = {**self.kind.call, "num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed)}
        if self.kind.strength is not None:
            call["strength"] = self.kind.strength
        try:
            output = self.pipe(**{**call, "output_type": "latent" if self.kind.texts else "pt", **kwargs})
        finally:
            hook.remove()
        return output.images, seen


@pytest.fixture(scope="session")
def tiny():
    """`tiny(kind, scheduler_class, **config)` gives a [`Tiny`] pipeline; `tiny.kinds` names the kinds."""
    return Tiny


@pytest.fixture
def tiny_unet():
    """A `UNet2DConditionModel` of its own."""
    return deepcopy(unet())


@pytest.fixture(scope="session")
def launch():
    """``accelerate launch``; several CPU processes go through the same launcher as several GPUs."""
    root = Path(__file__).parents[1]
    environment = {
        **os.environ, "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip

    def start(*arguments, processes=1, config="ddp", wait=True):
        file = root / "training" / "launch" / f"{config}.yaml"
        kind = ["--config_file", str(file)] if processes > 1 else ["--cpu"]
        command = [
            sys.executable, "-m", "accelerate.commands.launch", *kind, "--num_processes", str(processes),
            "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
            "--num_cpu_threads_per_process", "1", "--main_process_port", "0", *map(str, arguments),
        ]  # fmt: skip
        if wait:
            return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=900)
        return subprocess.Popen(command, env=environment, cwd=root, start_new_session=True, stderr=subprocess.DEVNULL)

    return start


@pytest.fixture(scope="session")
def fashion_mnist(tmp_path_factory):
    """A folder of sixty garments, blobs of several sizes, in each split."""
    folder, rng = tmp_path_factory.mktemp("fashion"), np.random.default_rng(0)
    across, down = np.meshgrid(np.arange(28), np.arange(28))
    for split in ("train", "t10k"):
        radii = rng.uniform(4, 13, (60, 2, 1, 1))
        inside = ((across - 14) / radii[:, 0]) ** 2 + ((down - 14) / radii[:, 1]) ** 2 < 1
        images = (inside * rng.integers(80, 256, (60, 28, 28))).astype(np.uint8)
        labels = np.arange(60, dtype=np.uint8) % 10
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{split}-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return str(folder)


@pytest.fixture(scope="session")
def renders():
    """The folder of 240 renders, 32x32."""
    return str(assets_folder() / "renders")


@pytest.fixture
def ctrl_c():
    """SIGINT interrupts, also what a test starts; a shell lets what runs in its background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
