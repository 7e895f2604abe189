"""What one more step does to brightness: ``python benchmarks/one_more_step.py --output bench-one-more-step``.

Pictures of the captions whose real renders are darkest and brightest are drawn by DDIM with and without the extra
step, from the same seeds. Printed, for each schedule: the signal that its first time still holds, the range of the
pictures' mean brightness (from the 1st to the 99th percentile), how far its distribution lies from that of real test
pictures with the same captions (Wasserstein distance, as a share of white), dark and bright captions apart, and what
the judge recognises, of these pictures and of all captions alike. ``one-more-step.png`` shows some of both. A second
table says how far the step's own prompt, which names a colour, chooses that of pictures whose prompts name none.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler

import sfumato
from sfumato import OneMoreStepPipeline, atelier, storage
from sfumato.arguments import make_parser
from sfumato.evaluation.judge import Judge
from sfumato.evaluation.metrics import Estimate, Proportion, bootstrap, wilson
from sfumato.evaluation.report import label_rows, picture_grid
from sfumato.loading import assets_folder, folder_of
from sfumato.progress import Track
from sfumato.randomness import generator_for, randint_for
from sfumato.settings import check_ranges, check_types

STREAM = 88  # of the seeds
SHOWN = 12
GARMENTS = len(atelier.GARMENTS)


@dataclass
class StepConfig:
    """What to compare.

    Attributes:
        output: Folder for the table and the picture.
        step: Folder or name of the extra step.
        schedules: Comma-separated spacings of times, each with its number of steps.
        captions: Looks (a style and a colour) that are asked for at either end.
        pictures: To draw of each look, as many of each garment.
        guidance_scale: Classifier-free guidance of the sampler.
        oms_guidance_scale: Of the extra step.
        colour_scales: Comma-separated guidance scales of the extra step that is told a colour.
        batch_size: Pictures at a time.
        seed: Of everything.
        data_dir: Folder with Fashion-MNIST's four files; None looks for Debian's package, then the Hub.
    """

    output: str = field()
    step: str = "atelier-one-more-step"
    schedules: str = "trailing:20,leading:20,leading:4"
    captions: int = 3
    pictures: int = 40
    guidance_scale: float = 3.0
    oms_guidance_scale: float = 1.0
    colour_scales: str = "1,2,4"
    batch_size: int = 60
    seed: int = 0
    data_dir: str | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        check_types(self)
        check_ranges(self, {"captions": 1, "pictures": 10, "batch_size": 1})
        for schedule in self.schedules.split(","):
            spacing, _, steps = schedule.partition(":")
            if spacing not in ("trailing", "leading", "linspace") or not steps.isdigit():
                raise ValueError(f"A schedule is a spacing and a number, as leading:20, not {schedule!r}.")


Look = tuple[int, int]
"""A style and a colour, by their numbers."""


def brightness(pictures: torch.Tensor) -> torch.Tensor:
    """Mean luma (Rec. 601) of pictures ``(N, 3, H, W)`` in [0, 1]: ``(N,)``."""
    return (pictures.mean((2, 3)) * torch.tensor([0.299, 0.587, 0.114])).sum(1)


def wasserstein(a: torch.Tensor, b: torch.Tensor) -> float:
    """Between two samples of numbers: the mean distance of their quantiles."""
    at = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    return float((a.double().quantile(at) - b.double().quantile(at)).abs().mean())


class Real:
    """Test pictures in every look.

    Args:
        data_dir: As for `sfumato.atelier.find_fashion_mnist`.
        count: How many of each garment.
    """

    def __init__(self, data_dir: str | None, count: int = 40) -> None:
        images, labels = (torch.from_numpy(part) for part in atelier.find_fashion_mnist(data_dir, "test"))
        self.images = torch.cat([images[labels == garment][:count] for garment in range(GARMENTS)])
        self.looks = [
            (style, colour) for style in range(len(atelier.STYLES)) for colour in range(len(atelier.COLOURS))
        ]
        self.brightness = {look: brightness(self.render(look)) for look in self.looks}

    def render(self, look: Look) -> torch.Tensor:
        """All of them in one look."""
        style, colour = (torch.full((len(self.images),), value) for value in look)
        return atelier.render(self.images, style, colour)

    def ends(self, count: int) -> dict[str, list[Look]]:
        """The darkest and the brightest looks."""
        ordered = sorted(self.looks, key=lambda look: float(self.brightness[look].mean()))
        return {"dark": ordered[:count], "bright": ordered[-count:]}

    def of(self, looks: Sequence[Look]) -> torch.Tensor:
        """Brightness of the pictures in some looks."""
        return torch.cat([self.brightness[look] for look in looks])


@dataclass(frozen=True)
class Wanted:
    """A picture that is asked for."""

    garment: int
    look: Look

    @property
    def prompt(self) -> str:
        """As the vocabulary words it."""
        style, colour = self.look
        return f"a {atelier.STYLES[style]} of a {list(atelier.COLOURS)[colour]} {atelier.GARMENTS[self.garment]}"


def drawn(pipe: OneMoreStepPipeline, config: StepConfig, steps: int, wanted: Sequence[Wanted], step: bool) -> Any:
    """Pictures ``(N, 3, 32, 32)``, with or without the extra step."""
    parts = []
    for start in Track(range(0, len(wanted), config.batch_size), f"{steps} steps{', one more' if step else ''}"):
        some = wanted[start : start + config.batch_size]
        generators = [generator_for(config.seed, STREAM, start + number) for number in range(len(some))]
        parts.append(
            pipe(
                [one.prompt for one in some], one_more_step=step, oms_guidance_scale=config.oms_guidance_scale,
                num_inference_steps=steps, guidance_scale=config.guidance_scale, generator=generators,
                output_type="pt",
            ).images.cpu()
        )  # fmt: skip
    return torch.cat(parts)


def recognised(judge: Judge, pictures: torch.Tensor, wanted: Sequence[Wanted]) -> dict[str, Proportion]:
    """What the judge sees of what was asked for."""
    seen = judge.predict(pictures)
    asked = {
        "garment": [one.garment for one in wanted], "style": [one.look[0] for one in wanted],
        "colour": [one.look[1] for one in wanted],
    }  # fmt: skip
    return {name: wilson(int((seen[name] == torch.tensor(asked[name])).sum()), len(wanted)) for name in asked}


class Compared:
    """What is drawn, and what it is measured by.

    Args:
        config: What to compare.
    """

    def __init__(self, config: StepConfig) -> None:
        self.config, self.real = config, Real(config.data_dir)
        self.judge = Judge.load(assets_folder() / "judge")
        base: Any = sfumato.load("atelier")
        base.set_progress_bar_config(disable=True)
        self.pipe = OneMoreStepPipeline.from_pretrained(folder_of(config.step), base=base)
        self.ends = self.real.ends(config.captions)
        self.wanted = [
            Wanted(number % GARMENTS, look)
            for looks in self.ends.values()
            for look in looks
            for number in range(config.pictures)
        ]
        self.bright = torch.tensor([wanted.look in self.ends["bright"] for wanted in self.wanted])
        looks = self.real.looks
        keys = [(config.seed, STREAM, number) for number in range(len(self.wanted))]
        self.alike = [
            Wanted(number % GARMENTS, looks[look])
            for number, look in enumerate(randint_for(keys, len(looks)).tolist())
        ]

    def row(self, spacing: str, steps: int, step: bool) -> tuple[dict[str, Any], torch.Tensor]:
        """Measure a schedule, with or without the extra step; gives some pictures too."""
        base = self.pipe.base
        base.scheduler = DDIMScheduler.from_config(base.scheduler.config, timestep_spacing=spacing)
        base.scheduler.set_timesteps(steps)
        pictures = drawn(self.pipe, self.config, steps, self.wanted, step)
        found = brightness(pictures)
        chosen = torch.cat([torch.where(these)[0][: SHOWN // 2] for these in (~self.bright, self.bright)])
        return {
            "signal": float(base.scheduler.alphas_cumprod[int(base.scheduler.timesteps[0])]) ** 0.5,
            "brightness": ends_of(found),
            "dark": self.apart(found[~self.bright], "dark"), "bright": self.apart(found[self.bright], "bright"),
            "these": recognised(self.judge, pictures, self.wanted),
            "all": recognised(self.judge, drawn(self.pipe, self.config, steps, self.alike, step), self.alike),
        }, pictures[chosen]  # fmt: skip

    def apart(self, own: torch.Tensor, end: str) -> Estimate:
        """How far brightness lies from that of real pictures."""
        other = self.real.of(self.ends[end])
        return bootstrap(
            lambda a, b: wasserstein(own[a], other[b]), [len(own), len(other)], seed=self.config.seed, least=0.0
        )

    def named(self, end: str) -> str:
        """The looks of an end, in words."""
        colours = list(atelier.COLOURS)
        return ", ".join(f"{colours[colour]} {atelier.STYLES[style]}" for style, colour in self.ends[end])


def colours_of(compared: Compared, spacing: str, steps: int, scale: float | None) -> tuple[Proportion, torch.Tensor]:
    """The share of pictures in the colour that the step alone was told, each in turn; without a step if no scale."""
    config, base, names = compared.config, compared.pipe.base, list(atelier.COLOURS)
    base.scheduler = DDIMScheduler.from_config(base.scheduler.config, timestep_spacing=spacing)
    told = [number // GARMENTS % len(names) for number in range(config.pictures * len(names))]
    parts = []
    for start in Track(range(0, len(told), config.batch_size), "colours"):
        numbers = range(start, min(start + config.batch_size, len(told)))
        parts.append(
            compared.pipe(
                [f"a {atelier.GARMENTS[number % GARMENTS]}" for number in numbers], one_more_step=scale is not None,
                oms_prompt=[f"something {names[told[number]]}" for number in numbers],
                oms_guidance_scale=scale or 1.0, num_inference_steps=steps, guidance_scale=config.guidance_scale,
                generator=[generator_for(config.seed, STREAM, number) for number in numbers], output_type="pt",
            ).images.cpu()
        )  # fmt: skip
    pictures = torch.cat(parts)
    right = int((compared.judge.predict(pictures)["colour"] == torch.tensor(told)).sum())
    return wilson(right, len(told)), pictures[:: GARMENTS // 2][:SHOWN]


def print_colours(compared: Compared, folder: Path) -> dict[str, Any]:
    """The second table."""
    print("\n| in the colour that the step was told | share |\n|---|---|")
    shares, shown = {}, []
    for schedule in compared.config.schedules.split(","):
        spacing, _, steps = schedule.partition(":")
        for scale in (None, *map(float, compared.config.colour_scales.split(","))):
            share, pictures = colours_of(compared, spacing, int(steps), scale)
            name = f"{spacing}, {steps} steps, " + ("no step" if scale is None else f"guidance {scale:g}")
            shares[name] = share.as_dict()
            print(f"| {name} | {share} |")
            shown.append(pictures)
    label_rows(picture_grid(torch.stack(shown), scale=2), list(shares)).save(folder / "one-more-step-colours.png")
    return shares


def ends_of(values: torch.Tensor) -> list[float]:
    """From the 1st to the 99th percentile."""
    return [float(values.quantile(share)) for share in (0.01, 0.99)]


def main(config: StepConfig) -> None:
    """Draw, measure, print the table, and draw the picture."""
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    compared = Compared(config)
    low, high = ends_of(compared.real.of(sum(compared.ends.values(), [])))
    rows, shown = {}, []
    for schedule in config.schedules.split(","):
        spacing, _, steps = schedule.partition(":")
        for step in (False, True):
            row, pictures = compared.row(spacing, int(steps), step)
            rows[f"{spacing}, {steps} steps{', one more' if step else ''}"] = row
            shown.append(pictures)
    print(
        f"darkest: {compared.named('dark')}; brightest: {compared.named('bright')}; {len(compared.wanted)} pictures\n"
    )
    print(
        "| | signal at first | brightness | dark, from real | bright, from real | garments | garments, all captions |"
    )
    print(f"|---|---|---|---|---|---|---|\n| real | | {low:.3f} to {high:.3f} | | | | |")
    for name, row in rows.items():
        cells = [f"{row['signal']:.3f}", "{:.3f} to {:.3f}".format(*row["brightness"])]
        cells += [f"{row[end]:.4f}" for end in ("dark", "bright")]
        cells += [f"{100 * row[of]['garment'].value:.1f} %" for of in ("these", "all")]
        print(f"| {name} | {' | '.join(cells)} |")
    label_rows(picture_grid(torch.stack(shown), scale=2), list(rows)).save(folder / "one-more-step.png")
    colours = print_colours(compared, folder)
    facts = {"config": asdict(config), "real": [low, high], "rows": rows, "colours": colours}
    storage.write_text(folder / "one-more-step.json", json.dumps(facts, indent=1, default=asdict))


if __name__ == "__main__":
    main(make_parser(StepConfig, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0])
