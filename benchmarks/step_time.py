"""Time `step` of every scheduler against diffusers' DDIM: ``python benchmarks/step_time.py``.

The median of repeated runs of ten steps with a network that costs nothing, as ratios to DDIM measured in turn with
each scheduler; per call, so that EDICT's two calls a step count one by one.
"""

import json
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler

import sfumato
from sfumato.arguments import make_parser

SHAPES = ((1, 4, 64, 64), (8, 4, 128, 128))
LIMITS = {"BDIAScheduler": 1.2, "TimeShiftScheduler": 1.5, "EDICTScheduler": 1.5}
NAMES = ("BDIAScheduler", "BDIAScheduler exact", "BELMScheduler", "EDICTScheduler", "TimeShiftScheduler")


@dataclass
class StepTimeConfig:
    """How to measure.

    Attributes:
        repeats: Runs of ten steps of each scheduler and shape.
        threads: CPU threads; 0 leaves torch's own number.
        device: Where to measure.
    """

    repeats: int = 30
    threads: int = 0
    device: str = "cpu"


def make(name: str) -> Any:
    """A scheduler for Stable Diffusion's noise schedule, set to ten steps."""
    stock = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    if name == "DDIMScheduler":
        return stock
    options = {"exact": True} if name.endswith("exact") else {}
    return getattr(sfumato, name.split()[0]).from_config(stock.config, clip_sample=False, **options)


def run_seconds(scheduler: Any, sample: torch.Tensor, output: torch.Tensor) -> float:
    """Mean time of a call of `step` over one run, as a pipeline calls it."""
    scheduler.set_timesteps(10, device=sample.device)
    if sample.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for timestep in scheduler.timesteps:
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
    if sample.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(scheduler.timesteps)


def main(config: StepTimeConfig) -> None:
    """Measure, print a table, and JSON."""
    if config.threads:
        torch.set_num_threads(config.threads)
    rows = []
    for shape in SHAPES:
        sample, output = (torch.randn(shape, device=config.device) for _ in range(2))
        for name in NAMES:
            ours, stock = make(name), make("DDIMScheduler")
            pairs = [
                (run_seconds(ours, sample, output), run_seconds(stock, sample, output)) for _ in range(config.repeats)
            ]
            ratio = statistics.median(a / b for a, b in pairs)
            microseconds = 1e6 * statistics.median(a for a, _ in pairs)
            limit = LIMITS.get(name)
            rows.append(
                {"shape": shape, "scheduler": name, "ratio": ratio, "microseconds": microseconds, "limit": limit}
            )
            print(
                f"{'x'.join(map(str, shape)):12} {name:22} {ratio:5.2f} x DDIM  {microseconds:8.0f} us  limit {limit}"
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    main(make_parser(StepTimeConfig, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0])
