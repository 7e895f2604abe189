"""Compute the memory that training takes on models that do not fit here: ``python benchmarks/memory.py``.

A training step of the real architectures, beside the original as in every run, is run on tensors that have shapes but
no data, and every storage is counted from the operation that makes it until it is let go: weights, gradients, moments,
what the backward pass keeps, what is passing; and so is the end of a run, when adapters are merged and the result gets
all its weights for itself. Not counted: what libraries take for themselves (a CUDA context and workspaces, about 1
GB), and the gaps that an allocator leaves. The same count is compared with the memory that a step really takes on this
machine, for a network small enough (``--check``).
"""

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from sfumato.arguments import make_parser
from sfumato.unlearning.adapters import add_adapters
from sfumato.unlearning.working_copy import working_copy

CARD = 24e9
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
FLUX = {"guidance_embeds": True, "joint_attention_dim": 4096}
SMALL = {"sample_size": 32, "block_out_channels": (96, 192, 384, 384), "cross_attention_dim": 768}


@dataclass
class MemoryConfig:
    """What to compute.

    Attributes:
        check: Also compare the count with what a step of a small network takes on this machine.
    """

    check: bool = True


@dataclass(frozen=True)
class Case:
    """A run whose memory is counted.

    Attributes:
        name: What the table calls it.
        config: Of the denoiser.
        batch: Samples in a pass.
        companions: Make the rest of the pipeline.
        dtype: Of the passes.
        frozen: What the pipeline was loaded in.
        checkpointing: Compute once more what the backward pass needs.
        adapter_rank: Of adapters on cross-attention; 0 trains all weights.
        trains: Whether it is a training step, or a pass without a gradient.
        beside: Whether the original stands beside what is trained.
    """

    name: str
    config: dict[str, Any]
    batch: int
    companions: Callable[[], list[torch.nn.Module]]
    dtype: torch.dtype = torch.float32
    frozen: torch.dtype = torch.float32
    checkpointing: bool = False
    adapter_rank: int = 0
    trains: bool = True
    beside: bool = True


class Live(TorchDispatchMode):
    """Count the bytes of storages from the operation that makes them until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.finalize] = {}

    def hold(self, *tensors: torch.Tensor) -> None:
        """Count tensors that are there already."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                self.now += storage.nbytes()
                self._known[key] = weakref.finalize(storage, self._release, key, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def _release(self, key: int, size: int) -> None:
        self.now -= size
        del self._known[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it gives."""
        result = func(*args, **(kwargs or {}))
        self.hold(*(value for value in tree_iter(result) if isinstance(value, torch.Tensor)))
        return result


def inputs_of(config: dict[str, Any], batch: int) -> dict[str, torch.Tensor | dict[str, torch.Tensor]]:
    """What a denoiser is given at its native size."""
    if "joint_attention_dim" in config:  # Flux: 1024x1024 pixels are 64x64 tokens
        return {
            "hidden_states": torch.randn(batch, 4096, 64), "img_ids": torch.zeros(4096, 3),
            "encoder_hidden_states": torch.randn(batch, 512, 4096), "txt_ids": torch.zeros(512, 3),
            "pooled_projections": torch.randn(batch, 768), "timestep": torch.rand(batch),
            "guidance": torch.ones(batch),
        }  # fmt: skip
    added = {"text_embeds": torch.randn(batch, 1280), "time_ids": torch.randn(batch, 6)}
    return {
        "sample": torch.randn(batch, 4, config["sample_size"], config["sample_size"]),
        "timestep": torch.zeros(batch, dtype=torch.long),
        "encoder_hidden_states": torch.randn(batch, 77, config["cross_attention_dim"]),
        **({"added_cond_kwargs": added} if "addition_embed_type" in config else {}),
    }


def step_of(denoiser: torch.nn.Module, config: dict[str, Any], batch: int, dtype: torch.dtype) -> Callable[[], None]:
    """A training step with Adam: a teacher's prediction, the student's, its gradient, an update."""
    optimizer = torch.optim.Adam([p for p in denoiser.parameters() if p.requires_grad], lr=1e-5, foreach=False)
    given = inputs_of(config, batch)

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                target = denoiser(**given).sample.float()
            loss = (denoiser(**given).sample.float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def parts_of(case: Case) -> tuple[Any, list[torch.nn.Module]]:
    """The denoiser and the rest of the pipeline, without data."""
    with torch.device("meta"):
        torch.set_default_dtype(case.frozen)
        kind: Any = FluxTransformer2DModel if "joint_attention_dim" in case.config else UNet2DConditionModel
        found = kind(**case.config), case.companions()
        torch.set_default_dtype(torch.float32)
    return found


def trained_in(denoiser: torch.nn.Module, case: Case) -> list[str]:
    """The parameters that are trained, or get adapters: those of cross-attention."""
    return [name for name, _ in denoiser.named_parameters() if not case.adapter_rank or of_cross_attention(name)]


def count_steps(case: Case) -> float:
    """Bytes that two steps take at the most, or a pass without a gradient."""
    denoiser, others = parts_of(case)
    if case.adapter_rank:
        add_adapters(denoiser.requires_grad_(False), trained_in(denoiser, case), case.adapter_rank, 0)
    elif case.beside:
        others.append(parts_of(case)[0])  # the original, which shares nothing with what is trained whole
    if case.checkpointing:
        denoiser.enable_gradient_checkpointing()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (denoiser, *others):
            place(module)
        denoiser.train()
        live = Live()
        live.hold(*(p for module in (denoiser, *others) for p in module.parameters()))
        with live:
            if case.trains:
                step = step_of(denoiser, case.config, case.batch, case.dtype)
                step()
                step()
            else:
                with torch.no_grad(), torch.autocast("cpu", case.dtype):
                    denoiser(**inputs_of(case.config, case.batch))
        return live.peak


def count_end(case: Case) -> float:
    """Bytes that the end of a run takes at the most: adapters are merged, and the result gets all its weights."""
    denoiser, others = parts_of(case)
    live = Live()
    live.hold(*(p for module in (denoiser, *others) for p in module.parameters()))
    copying = working_copy(denoiser, trained_in(denoiser, case), adapter_rank=case.adapter_rank, mixed=True)
    with torch.device("meta"), live, copying:
        gc.collect()
        live.peak = live.now
    return live.peak


def of_cross_attention(name: str) -> bool:
    """Whether a weight is of what the methods train by default: Flux has it in its joint blocks."""
    return any(part in name for part in ("attn2", ".attn.add_", ".attn.to_add_out."))


def place(model: torch.nn.Module) -> None:
    """Put a model that has no place at all where tensors without data are; what is trained is float32."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                dtype = torch.float32 if parameter.requires_grad else parameter.dtype
                made = torch.empty(parameter.shape, dtype=dtype)
                module._parameters[name] = torch.nn.Parameter(made, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def companions_of_sd15() -> list[torch.nn.Module]:
    """The text encoder and the autoencoder."""
    return [CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)), vae()]


def companions_of_sdxl() -> list[torch.nn.Module]:
    """Both text encoders and the autoencoder."""
    large = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32, projection_dim=1280
    )
    small = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    return [CLIPTextModel(small), CLIPTextModelWithProjection(large), vae()]


def companions_of_flux() -> list[torch.nn.Module]:
    """T5-XXL, CLIP and the autoencoder."""
    t5 = T5EncoderModel(T5Config(vocab_size=32128, d_model=4096, d_ff=10240, num_layers=24, num_heads=64))
    return [t5, CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)), vae()]


def vae() -> torch.nn.Module:
    """Stable Diffusion's autoencoder."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def measured(batch: int) -> float:
    """Bytes that the same steps of the small network take in a process of its own."""
    code = (
        "import resource, torch; torch.set_num_threads(1); import memory as m; "
        "from diffusers import UNet2DConditionModel; u = UNet2DConditionModel(**m.SMALL).train(); "
        "s = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; n = sum(p.numel() for p in u.parameters()); "
        f"b = s() * 1024 - 4 * n; step = m.step_of(u, m.SMALL, {batch}, torch.float32); step(); step(); "
        "print(s() * 1024 - b)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    )
    return float(done.stdout.split()[-1])


def cases() -> list[Case]:
    """What is counted."""
    half = torch.bfloat16
    sd15 = Case("SD 1.5, all weights, batch 8, float32", SD15, 8, companions_of_sd15)
    sdxl = Case(
        "SDXL, adapters (rank 16), batch 1, bf16, checkpointing", SDXL, 1, companions_of_sdxl, dtype=half,
        checkpointing=True, adapter_rank=16,
    )  # fmt: skip
    flux = replace(
        sdxl, name="Flux.1-dev in bf16, adapters (rank 16), batch 1 a process, checkpointing", config=FLUX,
        companions=companions_of_flux, frozen=half,
    )  # fmt: skip
    walking = {"batch": 16, "checkpointing": False, "frozen": half, "trains": False}
    return [
        sd15,
        replace(sd15, name="SD 1.5, all weights, batch 8, bf16, checkpointing", dtype=half, checkpointing=True),
        sdxl,
        replace(sdxl, name=f"SDXL loaded in bf16, {sdxl.name.removeprefix('SDXL, ')}", frozen=half),
        replace(sdxl, name="SDXL in bf16, walking eight guided trajectories at once", **walking),
        flux,
        replace(flux, name="Flux.1-dev in bf16, walking eight guided trajectories at once", **walking),
    ]


def main(config: MemoryConfig) -> None:
    """Print a table, and JSON."""
    rows = []
    for case in cases():
        found = {"run": count_steps(case), "end": count_end(case)}
        rows.append({"case": case.name, **{f"{when}_gb": round(size / 1e9, 2) for when, size in found.items()}})
        said = f"{found['run'] / 1e9:5.1f} GB, at the end {found['end'] / 1e9:5.1f}"
        print(f"{case.name:72} {said}{'' if max(found.values()) < CARD - 1e9 else ', more than 24 GB'}", flush=True)
        gc.collect()
    if config.check:
        counted = count_steps(Case("check", SMALL, 4, list, beside=False))
        taken = measured(4)
        rows.append({"case": "check", "run_gb": round(counted / 1e9, 2), "measured_gb": round(taken / 1e9, 2)})
        print(f"a small network on this CPU: counted {counted / 1e9:.2f} GB, measured {taken / 1e9:.2f} GB")
    print(json.dumps(rows))


if __name__ == "__main__":
    main(make_parser(MemoryConfig, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0])
