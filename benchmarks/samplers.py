"""Compare samplers in few steps: ``python benchmarks/samplers.py``.

For the pixel model and the latent one, at each number of steps and for each seed: the Fréchet distance between the
judge's features of generated pictures and of real ones (lower is better; compare only within a table), and the judge's
accuracy. `sfumato.tune_time_shift` chooses the window and the cutoff of the time shift, with real pictures of the
training split and a seed of its own.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, PNDMScheduler

import sfumato
from sfumato import atelier
from sfumato.arguments import make_parser
from sfumato.evaluation.judge import Judge
from sfumato.evaluation.metrics import frechet_distance, wilson
from sfumato.loading import assets_folder
from sfumato.training.atelier_release import blue_photos


@dataclass
class SamplersConfig:
    """What to compare.

    Attributes:
        pictures: Pictures of each run.
        steps: Numbers of steps, comma-separated.
        seeds: Seeds, comma-separated; window and cutoff are chosen on seed 1000, 200 drawn pictures and
            other real ones.
        models: ``pixel`` and ``atelier``, comma-separated.
        data_dir: Folder with Fashion-MNIST's ``*-ubyte.gz`` files; None looks for Debian's package, then the Hub.
    """

    pictures: int = 300
    steps: str = "5,10,20,50"
    seeds: str = "0,1,2"
    models: str = "pixel,atelier"
    data_dir: str | None = None


class Bench:
    """A model, what to ask of it, real pictures to compare with, and what tunes the time shift."""

    def __init__(
        self,
        judge: Judge,
        draw: Callable[..., torch.Tensor],
        truth: torch.Tensor,
        real: torch.Tensor,
        tune: Any = None,
    ) -> None:
        self.judge, self.draw, self.truth, self.tune = judge, draw, truth, tune
        with torch.no_grad():
            self.real = judge.features(real)

    @torch.no_grad()
    def score(self, scheduler: Any, steps: int, seed: int) -> tuple[float, int]:
        """Fréchet distance to the real pictures, and how many garments are recognised."""
        pictures = self.draw(scheduler, steps, seed)
        right = self.judge.predict(pictures)["garment"] == self.truth
        return frechet_distance(self.judge.features(pictures), self.real), int(right.sum())


def pixel_bench(config: SamplersConfig, judge: Judge) -> tuple[Bench, Any]:
    """The class-conditional pixel model without guidance."""
    pipe = sfumato.load("atelier-pixel")
    pipe.set_progress_bar_config(disable=True)
    labels = torch.arange(config.pictures) % len(atelier.GARMENTS)

    def draw(scheduler: Any, steps: int, seed: int) -> torch.Tensor:
        pipe.scheduler = scheduler
        generator = torch.Generator().manual_seed(seed)
        small = pipe(labels, num_inference_steps=steps, output_type="pt", return_dict=False, generator=generator)[0]
        return blue_photos(small)

    def tune(steps: int, solver: str) -> Any:
        return sfumato.tune_time_shift(
            pipe, grey_garments(config, "train"), num_inference_steps=steps, seed=1000, class_labels=labels[:200],
            windows=(10, 40, 80), cutoffs=(300, 500, 700), settings={"solver": solver},
        ).scheduler  # fmt: skip

    stock = pipe.scheduler.config
    return Bench(judge, draw, labels, blue_photos(grey_garments(config, "test")), tune), stock


def grey_garments(config: SamplersConfig, split: str) -> torch.Tensor:
    """Real pictures ``(5000, 1, 16, 16)`` in [0, 1], as the pixel model knows them."""
    images, _ = atelier.find_fashion_mnist(config.data_dir, split)
    return (atelier.small_garments(images[:5000]) + 1) / 2


def latent_bench(config: SamplersConfig, judge: Judge) -> tuple[Bench, Any]:
    """The text-to-image model at guidance 3."""
    pipe = sfumato.load("atelier")
    pipe.set_progress_bar_config(disable=True)
    garments, styles, colours = list(atelier.GARMENTS), list(atelier.STYLES), list(atelier.COLOURS)
    index = torch.arange(config.pictures)
    prompts = [
        f"a {styles[i // 10 % len(styles)]} of a {colours[i // 40 % len(colours)]} {garments[i % 10]}" for i in index
    ]

    def draw(scheduler: Any, steps: int, seed: int) -> torch.Tensor:
        pipe.scheduler = scheduler
        generator = torch.Generator().manual_seed(seed)
        parts = [
            pipe(
                prompts[k : k + 100], num_inference_steps=steps, guidance_scale=3.0, output_type="pt",
                generator=generator,
            ).images
            for k in range(0, len(prompts), 100)
        ]  # fmt: skip
        return torch.cat(parts).float()

    images = torch.from_numpy(atelier.find_fashion_mnist(config.data_dir, "test")[0][:5000])
    look = torch.arange(len(images)) % (len(styles) * len(colours))
    real = atelier.render(images, look % len(styles), look // len(styles))
    return Bench(judge, draw, index % 10, real), pipe.scheduler.config


def samplers(bench: Bench, stock: Any, steps: int) -> dict[str, Any]:
    """The samplers to compare, by name."""
    alike = {"clip_sample": False, "timestep_spacing": "trailing"}  # the invertible ones can't clip
    made: dict[str, Any] = {
        "DDIM": DDIMScheduler.from_config(stock),
        "PNDM": PNDMScheduler.from_config(stock),
        "DDIM, trailing": DDIMScheduler.from_config(stock, **alike),
        "BDIA 0.5": sfumato.BDIAScheduler.from_config(stock, gamma=0.5, **alike),
        "BDIA 1": sfumato.BDIAScheduler.from_config(stock, gamma=1.0, **alike),
        "O-BELM": sfumato.BELMScheduler.from_config(stock, **alike),
    }
    for name, solver in ("time shift", "ddim"), ("time shift, F-PNDM", "f_pndm"):
        if bench.tune and (solver == "ddim" or steps > 4):
            made[name] = bench.tune(steps, solver)
    return made


def row(bench: Bench, scheduler: Any, steps: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Scores of one sampler over the seeds."""
    scores = [bench.score(scheduler, steps, seed) for seed in seeds]
    distances = torch.tensor([distance for distance, _ in scores])
    accuracy = wilson(sum(right for _, right in scores), len(seeds) * len(bench.truth))
    spread = distances.std().item() if len(seeds) > 1 else 0.0
    return {"distance": distances.mean().item(), "spread": spread, "accuracy": accuracy.as_dict()}


def main(config: SamplersConfig) -> None:
    """Measure, print tables, and JSON."""
    judge = Judge.load(assets_folder() / "judge")
    seeds, rows = [int(seed) for seed in config.seeds.split(",")], []
    for model in config.models.split(","):
        bench, stock = {"pixel": pixel_bench, "atelier": latent_bench}[model](config, judge)
        for steps in (int(value) for value in config.steps.split(",")):
            for name, scheduler in samplers(bench, stock, steps).items():
                shift = {key: scheduler.config[key] for key in ("window", "cutoff") if key in scheduler.config}
                scores = row(bench, scheduler, steps, seeds)
                rows.append({"model": model, "steps": steps, "sampler": name, **shift, **scores})
                last, accuracy = rows[-1], rows[-1]["accuracy"]
                print(
                    f"{model:8} {steps:3} {name:22} {last['distance']:7.2f} ± {last['spread']:.2f}   "
                    f"{accuracy['value']:.1%} [{accuracy['low']:.1%}, {accuracy['high']:.1%}]"
                    + "".join(f" {key} {value}" for key, value in shift.items()), flush=True,
                )  # fmt: skip
    print(json.dumps({"pictures": config.pictures, "seeds": seeds, "rows": rows}))


if __name__ == "__main__":
    main(make_parser(SamplersConfig, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0])
