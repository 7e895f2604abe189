"""Time training steps with and without what makes them faster or smaller: ``python benchmarks/training_speed.py``.

A denoiser learns to predict noise, by a plain float32 loop of PyTorch and by the trainer: as it is, in bf16, with
gradient checkpointing, and with every kernel of attention that the device has. ``--model sd15`` is Stable Diffusion
1.5's UNet with random weights, for an accelerator; many CPUs have no bf16, and emulate it. Medians of steps, but for
the first two of each run; every case is run several times, in turn, and its fastest run counts.
"""

import copy
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from timing import step_times

import sfumato
from sfumato.arguments import make_parser
from sfumato.trainer import Shard, TrainingConfig, train


@dataclass
class SpeedConfig:
    """What to time.

    Attributes:
        model: ``"atelier"`` or ``"sd15"``.
        batch_size: Samples in a step.
        steps: Steps that count, of each run.
        rounds: Runs of each case.
    """

    model: str = field(default="atelier", metadata={"choices": ["atelier", "sd15"]})
    batch_size: int = 32
    steps: int = 5
    rounds: int = 2


class Denoising:
    """Predict the noise in random latents."""

    def __init__(self, config: Any, batch_size: int, device: torch.device) -> None:
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(0)
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        self.latents, self.noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
        self.text = torch.randn(batch_size, 77, config.cross_attention_dim, generator=generator).to(device)
        self.times = torch.randint(1000, (batch_size,), generator=generator).to(device)
        self.noisy = DDPMScheduler().add_noise(self.latents, self.noise, self.times)

    def losses(self, model: torch.nn.Module, step: int, shard: Shard) -> Mapping[str, torch.Tensor]:
        """The denoising loss."""
        return {"loss": F.mse_loss(model(self.noisy, self.times, self.text).sample.float(), self.noise)}


def plain_loop(unet: torch.nn.Module, objective: Denoising, steps: int) -> None:
    """What a script does by itself."""
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-5)
    for step in range(steps):
        loss = objective.losses(unet, step, Shard(0, 1))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()


def cases_of(device: torch.device) -> dict[str, dict[str, Any]]:
    """Settings of the trainer, by name."""
    cases: dict[str, dict[str, Any]] = {
        "the trainer": {},
        "bf16": {"mixed_precision": "bf16"},
        "checkpointing": {"gradient_checkpointing": True},
        "bf16, checkpointing": {"mixed_precision": "bf16", "gradient_checkpointing": True},
        "attention: math": {"attention": "math"},
    }
    if device.type == "cpu":
        return cases | {"attention: flash": {"attention": "flash"}}
    half = {"mixed_precision": "bf16"}
    cases |= {f"bf16, attention: {kind}": {**half, "attention": kind} for kind in ("math", "flash", "efficient")}
    if find_spec("xformers") is not None:
        cases["bf16, attention: xformers"] = {**half, "attention": "xformers"}
    return cases


def main(config: SpeedConfig) -> None:
    """Print a row a case, and JSON."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.model == "atelier":
        unet: Any = sfumato.load("atelier").unet
    else:
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    objective = Denoising(unet.config, config.batch_size, device)
    rows: dict[str, dict[str, float]] = {}

    def measure(name: str, call: Any) -> None:
        model = copy.deepcopy(unet).to(device).train().requires_grad_(True)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rate = 1 / statistics.median(step_times(lambda: call(model)))
        row = rows.setdefault(name, {"steps_per_second": 0.0})
        row["steps_per_second"] = max(row["steps_per_second"], rate)
        if device.type == "cuda":
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9

    for _ in range(config.rounds):
        measure("a plain loop", lambda model: plain_loop(model, objective, config.steps + 2))
        for name, settings in cases_of(device).items():
            training = TrainingConfig(steps=config.steps + 2, **settings)
            measure(name, lambda model, training=training: train(model, objective, training))
    print(f"{config.model} on {device}, batch {config.batch_size}, {torch.get_num_threads()} threads")
    for name, row in rows.items():
        memory = f" {row['peak_gb']:6.1f} GB" if "peak_gb" in row else ""
        print(f"{name:28} {row['steps_per_second']:7.2f} steps a second{memory}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main(make_parser(SpeedConfig, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0])
