"""Attack throughput: prompts side by side against one at a time: ``python benchmarks/attack_speed.py``.

Both are `sfumato.attack` on the embedded model after UCE, with the same prompts, in the same run; one with a batch of
one prompt, as the released programs work, the other with all at once. Nothing succeeds before the end, so that both
do the same work.
"""

import os
import time
from dataclasses import dataclass

import torch

import sfumato
from sfumato.arguments import make_parser
from sfumato.evaluation.detectors import FunctionDetector, Rule


@dataclass
class SpeedConfig:
    """What to time.

    Attributes:
        prompts: How many, and the larger batch.
        times: Times of UnlearnDiffAtk, after each of which every prompt is drawn.
        iterations: Its steps at each time.
        num_inference_steps: Sampler steps of each picture.
        rounds: How often both are timed, in turn; the fastest of each counts.
        threads: Of torch; 0 leaves it to it.
    """

    prompts: int = 16
    times: int = 2
    iterations: int = 20
    num_inference_steps: int = 20
    rounds: int = 2
    threads: int = 0


def main(config: SpeedConfig) -> None:
    """Time both, in turn, and print prompts a second."""
    if config.threads:
        torch.set_num_threads(config.threads)
    original = sfumato.load("atelier")
    unlearned = sfumato.unlearn(original, "sneaker", "uce", verify=False)
    blind = FunctionDetector(lambda pictures: [False] * len(pictures), "blind"), Rule((("concept",),), 0.5)
    asked = {
        "times": config.times, "iterations": config.iterations, "num_inference_steps": config.num_inference_steps,
        "guidance_scale": 3.0, "count": config.prompts, "detector": blind,
    }  # fmt: skip
    seconds: dict[int, list[float]] = {1: [], config.prompts: []}
    for _ in range(config.rounds):
        for size, taken in seconds.items():
            began = time.perf_counter()
            sfumato.attack(unlearned, original, "sneaker", audit_batch_size=size, **asked)
            taken.append(time.perf_counter() - began)
    for size, taken in seconds.items():
        print(f"{size:3} at a time  {config.prompts / min(taken):6.2f} prompts/s  {min(taken):6.1f} s")
    print(f"{min(seconds[1]) / min(seconds[config.prompts]):.1f} x, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    main(make_parser(SpeedConfig, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0])
