"""Time the shared generation pass against a loop over prompts: ``python benchmarks/evaluation_speed.py``.

The same pictures of atelier, drawn (a) one prompt at a time by the stock pipeline, (b) in batches by the pass, into an
empty cache, and (c) by the pass again, from the cache, as a second metric or a second run finds them. Each is timed
several times, in turn, and the medians are printed. What a metric then adds is (c), so an evaluation of several
metrics that each draw for themselves takes that many times (a), and one that shares the pass (b) and some (c).
"""

import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass

import torch

import sfumato
from sfumato.arguments import make_parser
from sfumato.concepts import vocabulary_of
from sfumato.evaluation.pictures import Request, draw_pictures
from sfumato.evaluation.sheet import vocabulary_sheet
from sfumato.randomness import generator_for


@dataclass
class SpeedConfig:
    """What to time.

    Attributes:
        pictures: How many.
        num_inference_steps: Sampler steps.
        batch_size: Of the pass.
        rounds: How often each is timed.
        metrics: That an evaluation computes from the same pictures, for the total.
        threads: Of torch; its own choice by default.
    """

    pictures: int = 96
    num_inference_steps: int = 20
    batch_size: int = 32
    rounds: int = 3
    metrics: int = 4
    threads: int | None = None


def one_at_a_time(pipe, requests: list[Request], steps: int) -> torch.Tensor:
    """The stock pipeline's call, once a prompt."""
    pipe.set_progress_bar_config(disable=True)
    pictures = [
        pipe(
            request.prompt, generator=generator_for(*request.seed), num_inference_steps=steps, guidance_scale=3.0,
            output_type="np",
        ).images[0]
        for request in requests
    ]  # fmt: skip
    return torch.stack([torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures])


def timed(call) -> tuple[float, torch.Tensor]:
    """Seconds, and what the call gave."""
    began = time.perf_counter()
    pictures = call()
    return time.perf_counter() - began, pictures


def measure(config: SpeedConfig) -> dict[str, float]:
    """Medians of all three, in seconds, their ratios, and how far the pictures are apart."""
    pipe = sfumato.load("atelier")
    sheet = vocabulary_sheet(vocabulary_of(pipe), ["sneaker"], seed=0, forget_repeats=1, retain_repeats=1)
    requests = [seen.request for seen in sheet][: config.pictures]
    settings = {
        "num_inference_steps": config.num_inference_steps, "batch_size": config.batch_size, "description": None,
    }  # fmt: skip
    one_at_a_time(pipe, requests[:2], 2)  # what is only done once
    times: dict[str, list[float]] = {"loop": [], "pass": [], "cached": []}
    for _ in range(config.rounds):
        with tempfile.TemporaryDirectory() as cache:
            seconds, expected = timed(lambda: one_at_a_time(pipe, requests, config.num_inference_steps))
            times["loop"].append(seconds)
            for name in ("pass", "cached"):
                seconds, pictures = timed(lambda folder=cache: draw_pictures(pipe, requests, cache=folder, **settings))
                times[name].append(seconds)
    loop, batched, cached = (statistics.median(values) for values in times.values())
    return {
        "loop_seconds": loop, "pass_seconds": batched, "cached_seconds": cached, "batching": loop / batched,
        "caching": batched / cached, "evaluation": config.metrics * loop / (batched + (config.metrics - 1) * cached),
        "largest_difference": float((pictures - expected).abs().max()),
    }  # fmt: skip


def main(config: SpeedConfig) -> None:
    """Print the figures."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    found = measure(config)
    print(f"{config.pictures} pictures, {config.num_inference_steps} steps, {torch.get_num_threads()} threads")
    for label, name in (("one at a time, stock", "loop"), ("the pass, empty cache", "pass"), ("from cache", "cached")):
        seconds = found[f"{name}_seconds"]
        print(f"{label:22} {seconds:7.2f} s  {config.pictures / seconds:8.1f} pictures/s")
    print(f"by batching {found['batching']:.2f} x; from the cache {found['caching']:.0f} x faster than the first pass")
    print(f"{config.metrics} metrics that share the pictures: {found['evaluation']:.1f} x")
    print(f"largest difference of a pixel {255 * found['largest_difference']:.2f} of 255")
    print(json.dumps({**asdict(config), **found}))


if __name__ == "__main__":
    main(make_parser(SpeedConfig, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0])
