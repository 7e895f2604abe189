"""Time the saliency mask against the released way of making it: ``python benchmarks/mask.py``.

Both get the same gradients, of a UNet of Stable Diffusion 1.5's make, each in a process of its own: the released
program joins all tensors, sorts them twice for the rank of each weight, and writes masks of 64-bit integers. Extra
memory is what a process takes beyond the gradients; the masks that it makes are part of it. ``--weights 860`` is the
whole size, for which the released way wants more memory than most machines have.
"""

import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from sfumato.arguments import make_parser
from sfumato.unlearning.saliency import save_mask, top_mask

LIMITS = {"seconds": 15, "extra_mb": 8, "file_mb": 60}


@dataclass
class MaskConfig:
    """What to compare.

    Attributes:
        weights: Millions of weights, about.
        ratio: The share that the mask lets move.
        threads: Of torch.
        only: "sfumato" or "released": what a process of its own does; the benchmark starts both.
    """

    weights: int = 50
    ratio: float = 0.5
    threads: int = 2
    only: str = ""


def gradients(millions: int) -> dict[str, torch.Tensor]:
    """Random gradients of a UNet as wide as so many weights ask for."""
    width = max(1, round(320 / 16 * math.sqrt(millions / 860))) * 16
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            cross_attention_dim=768,
            attention_head_dim=8,
            norm_num_groups=16,
        )
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(p.shape, generator=generator) for name, p in unet.named_parameters()}


def released(found: dict[str, torch.Tensor], ratio: float, folder: Path) -> Path:
    """Rank all weights by sorting twice."""
    flat = -torch.cat([values.abs().flatten() for values in found.values()])
    ranks = torch.argsort(torch.argsort(flat))
    chosen, start, masks = int(len(flat) * ratio), 0, {}
    for name, values in found.items():
        own = ranks[start : start + values.numel()].reshape(values.shape)
        masks[name] = torch.zeros_like(own)
        masks[name][own < chosen] = 1
        start += values.numel()
    torch.save(masks, folder / "mask.pt")
    return folder / "mask.pt"


def sfumato(found: dict[str, torch.Tensor], ratio: float, folder: Path) -> Path:
    """Find the threshold by two histograms; the gradients' sizes take the place of the gradients."""
    masks, _ = top_mask({name: values.abs_() for name, values in found.items()}, ratio)
    return save_mask(folder / "mask.safetensors", masks, {})


def run(config: MaskConfig) -> None:
    """Make one mask, and print what it took."""
    torch.set_num_threads(config.threads)
    found = gradients(config.weights)
    top_mask({"warm": torch.rand(10)}, config.ratio)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        file = (released if config.only == "released" else sfumato)(found, config.ratio, Path(folder))
        seconds = time.perf_counter() - began
        size = file.stat().st_size / 1e6
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6
    count = sum(values.numel() for values in found.values())
    print(json.dumps({"weights": count, "seconds": seconds, "extra_mb": extra, "file_mb": size}))


def main(config: MaskConfig) -> None:
    """Run both, print a table, and JSON."""
    if config.only:
        return run(config)
    rows = {}
    for name in ("released", "sfumato"):
        own = ["--weights", str(config.weights), "--ratio", str(config.ratio), "--threads", str(config.threads)]
        done = subprocess.run(
            [sys.executable, __file__, *own, "--only", name], capture_output=True, text=True, check=True
        )
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        row = rows[name]
        print(
            f"{name:9} {row['weights'] / 1e6:6.1f} M weights {row['seconds']:7.2f} s {row['extra_mb']:8,.0f} MB more "
            f"memory {row['file_mb']:7.1f} MB file",
            flush=True,
        )
    for name, limit in LIMITS.items():
        print(f"{name}: 1/{rows['released'][name] / rows['sfumato'][name]:.0f} (limit 1/{limit})")
    print(json.dumps(rows))


if __name__ == "__main__":
    main(make_parser(MaskConfig, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0])
