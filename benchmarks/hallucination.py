"""How many made-up samples the trajectory variance finds: ``python benchmarks/hallucination.py --output DIR``.

The experiments of Aithal et al. (NeurIPS 2024, arXiv 2406.09358): narrow Gaussians on a line, or a grid of 25 in the
plane, and a small network that learns to denoise them; and pictures of up to three shapes, each of which has a column
to itself, and a small U-Net. Ancestral sampling, in a thousand steps or 200, draws some samples that the data can't
contain: eight standard deviations from all modes, or a column that shows nothing which was ever drawn in it. Samples
are scored by `sfumato.TrajectoryVariance`; the table says what share of the made-up ones goes with the thresholds that
keep 90, 96 and 99 % of the others, of these same samples. ``hallucination.png`` shows them, at 96 %.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DModel
from torch import nn

from sfumato import MinorityGuidanceScheduler, TrajectoryVariance, storage
from sfumato.arguments import make_parser
from sfumato.evaluation.metrics import wilson
from sfumato.progress import Track
from sfumato.settings import check_ranges, check_types
from sfumato.trajectory_variance import threshold_for

SPREAD = 0.05
FAR = 8 * SPREAD
SIDE, SHAPE = 24, 7
COLUMN = SIDE // 3
KEPT = (0.9, 0.96, 0.99)  # shares; the paper's is the second, which the picture shows
UNLIKE = 0.12  # mean squared difference, in [-1, 1], of a column and the nearest that was ever drawn
CORE, GONE = "#217a87", "#c8452e"


def line() -> torch.Tensor:
    """Four modes, with one missing between the second and the third: ``(4, 1)``."""
    return torch.tensor([[1.0], [2.0], [4.0], [5.0]])


def grid() -> torch.Tensor:
    """Twenty-five modes: ``(25, 2)``."""
    side = torch.arange(-2.0, 3.0)
    return torch.cartesian_prod(side, side)


def columns() -> torch.Tensor:
    """All that a column may show, empty first: ``(3, 1 + places, SIDE, COLUMN)`` in [-1, 1]."""
    rows, across = torch.meshgrid(torch.arange(SHAPE), torch.arange(SHAPE), indexing="ij")
    middle = (across - SHAPE // 2).abs()
    shapes = 2 * middle <= rows, torch.ones(SHAPE, SHAPE, dtype=torch.bool), middle + (rows - SHAPE // 2).abs() <= 3
    places = SIDE - SHAPE + 1
    shown = -torch.ones(3, 1 + places, SIDE, COLUMN)
    for column, shape in enumerate(shapes):
        for top in range(places):
            shown[column, 1 + top, top : top + SHAPE, :SHAPE][shape] = 1.0
    return shown


@dataclass
class HallucinationConfig:
    """What to run.

    Attributes:
        output: Folder for the table, the picture and the networks; one that is there is not trained again.
        experiments: Comma-separated: line, grid, shapes.
        steps: Of training of the network of points.
        batch_size: Points of a step.
        samples: Points to draw.
        shape_steps: Of training of the network of shapes.
        shape_batch_size: Pictures of a step.
        shape_samples: Pictures to draw.
        seed: Of everything.
    """

    output: str = field()
    experiments: str = "line,grid,shapes"
    steps: int = 30000
    batch_size: int = 512
    samples: int = 100000
    shape_steps: int = 3000
    shape_batch_size: int = 64
    shape_samples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        check_types(self)
        numbers = "steps batch_size samples shape_steps shape_batch_size shape_samples"
        check_ranges(self, dict.fromkeys(numbers.split(), 1))
        unknown = set(self.experiments.split(",")) - set(EXPERIMENTS)
        if unknown:
            raise ValueError(f"There is no experiment {sorted(unknown)[0]!r}; there are {', '.join(EXPERIMENTS)}.")


class PointDenoiser(nn.Module):
    """Three residual layers, each of which the time scales and shifts.

    Args:
        width: Of the samples.
        hidden: Of the layers.
    """

    def __init__(self, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.frequencies = nn.Buffer(10000 ** (-torch.arange(32) / 32))
        self.time = nn.Sequential(nn.Linear(64, hidden), nn.SiLU())
        self.first, self.last = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.layers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(3))
        self.looks = nn.ModuleList(nn.Linear(hidden, 2 * hidden) for _ in range(3))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Predict the noise in ``(B, width)`` at times ``(B,)`` or ``(1,)``."""
        angles = t[:, None] * self.frequencies
        told, state = self.time(torch.cat([angles.sin(), angles.cos()], dim=1)), self.first(x)
        for layer, look in zip(self.layers, self.looks, strict=True):
            scale, shift = look(told).chunk(2, dim=1)
            state = state + nn.functional.silu(layer(state) * (1 + scale) + shift)
        return self.last(state)


class ShapeDenoiser(nn.Module):
    """A small U-Net on squares of four pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DModel(
            sample_size=SIDE // 2, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(24, 48, 48),
            down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D"), attention_head_dim=16,
            up_block_types=("UpBlock2D", "UpBlock2D", "UpBlock2D"), norm_num_groups=8,
        )  # fmt: skip

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Predict the noise in ``(B, 1, SIDE, SIDE)`` at times ``(B,)`` or ``(1,)``."""
        squares = nn.functional.pixel_unshuffle(x, 2)
        return nn.functional.pixel_shuffle(self.unet(squares, t.expand(len(x)), return_dict=False)[0], 2)


class Experiment(NamedTuple):
    """Data, a network, and what the data can't contain.

    Attributes:
        network: Makes the network.
        draw: Draws data, ``(B, ...)``.
        apart: How far samples are from the data, ``(B,)``.
        limit: Farther ones are made up.
        schedule: Settings of the scheduler.
        inference_steps: Of the sampler, of a thousand times.
        t_max: Scores are of the times from 0 to this.
        sizes: Names of the settings that say how long and how large.
    """

    network: Callable[[], nn.Module]
    draw: Callable[[int, torch.Generator], torch.Tensor]
    apart: Callable[[torch.Tensor], torch.Tensor]
    limit: float
    schedule: Mapping[str, Any]
    inference_steps: int
    t_max: int
    sizes: tuple[str, str, str]


def points(modes: torch.Tensor) -> Experiment:
    """Gaussians about modes ``(M, width)``; betas and the ten last times as in the released program."""

    def draw(count: int, random: torch.Generator) -> torch.Tensor:
        near = modes[torch.randint(len(modes), (count,), generator=random)]
        return near + SPREAD * torch.randn(near.shape, generator=random)

    return Experiment(
        lambda: PointDenoiser(modes.shape[1]), draw, lambda x: torch.cdist(x, modes).amin(1), FAR,
        {"beta_start": 0.001, "beta_end": 0.2}, 1000, 9, ("steps", "batch_size", "samples"),
    )  # fmt: skip


def shapes() -> Experiment:
    """Each column is empty or shows its shape somewhere, as likely one as the other."""
    shown = columns()

    def draw(count: int, random: torch.Generator) -> torch.Tensor:
        there = torch.rand(count, 3, generator=random) < 0.5
        place = 1 + torch.randint(shown.shape[1] - 1, (count, 3), generator=random)
        chosen = torch.where(there, place, 0)
        return torch.cat([shown[column][chosen[:, column]] for column in range(3)], dim=2)[:, None]

    def apart(pictures: torch.Tensor) -> torch.Tensor:
        parts = pictures[:, 0].unflatten(2, (3, COLUMN)).movedim(2, 0).flatten(2)  # (3, B, SIDE * COLUMN)
        nearest = torch.cdist(parts, shown.flatten(2)).amin(2).square() / (SIDE * COLUMN)
        return nearest.amax(0)

    sizes = ("shape_steps", "shape_batch_size", "shape_samples")
    return Experiment(ShapeDenoiser, draw, apart, UNLIKE, {}, 200, 40, sizes)


EXPERIMENTS: dict[str, Callable[[], Experiment]] = {
    "line": lambda: points(line()),
    "grid": lambda: points(grid()),
    "shapes": shapes,
}


def scheduler_of(experiment: Experiment) -> MinorityGuidanceScheduler:
    """Ancestral sampling without guidance, in float64: betas up to 0.2 leave 1e-46 of the signal."""
    return MinorityGuidanceScheduler(
        clip_sample=False, variance_type="fixed_large", guidance_scale=0.0, **experiment.schedule
    )


def trained(experiment: Experiment, steps: int, batch_size: int, seed: int, shown: bool = True) -> nn.Module:
    """Train an experiment's network to predict the noise."""
    random, scheduler = torch.Generator().manual_seed(seed), scheduler_of(experiment)
    torch.manual_seed(seed)
    network = experiment.network()
    adam = torch.optim.Adam(network.parameters(), lr=1e-3)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in Track(range(steps), "train", shown=shown):
        x = experiment.draw(batch_size, random)
        noise, times = torch.randn(x.shape, generator=random), torch.randint(1000, (len(x),), generator=random)
        loss = (network(scheduler.add_noise(x, noise, times), times) - noise).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        falling.step()
    return network.eval()


@torch.no_grad()
def drawn(
    experiment: Experiment, network: nn.Module, count: int, seed: int, shown: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw samples ``(N, ...)``; gives them and their scores ``(N,)``."""
    random, scheduler = torch.Generator().manual_seed(seed), scheduler_of(experiment)
    x = torch.randn(count, *experiment.draw(1, random).shape[1:], generator=random, dtype=torch.float64)
    scheduler.set_timesteps(experiment.inference_steps)
    watch = TrajectoryVariance(0, experiment.t_max)
    with watch.watching(_Loop(scheduler)):
        for t in Track(scheduler.timesteps, "draw", shown=shown):
            x = scheduler.step(network(x.float(), t[None]).double(), t, x, generator=random).prev_sample
    return x.float(), watch.scores


@dataclass
class _Loop:
    """What is watched has a scheduler."""

    scheduler: MinorityGuidanceScheduler


def share(right: torch.Tensor) -> str:
    """Of those ``(N,)``, in percent, with a 95 % interval; a dash if there are none."""
    if not len(right):
        return "–"
    return str(wilson(int(right.sum()), len(right)))


def main(config: HallucinationConfig) -> None:
    """Train, draw, score, print the table, and draw the picture."""
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    removed = [f"of these removed, {100 * kept:.0f} % of the others kept" for kept in KEPT]
    heads = ["data", "samples", "made up", *removed, "s"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    found = {}
    for name in config.experiments.split(","):
        began, experiment = time.perf_counter(), EXPERIMENTS[name]()
        steps, batch_size, samples = (getattr(config, size) for size in experiment.sizes)
        facts, file = {"steps": steps, "batch_size": batch_size, "seed": config.seed}, folder / f"{name}.safetensors"
        if file.exists() and storage.read_metadata(file) == facts:
            network = experiment.network().eval()
            network.load_state_dict(storage.load_tensors(file))
        else:
            network = trained(experiment, steps, batch_size, config.seed)
            storage.save_tensors(file, network.state_dict(), facts)
        pictures, scores = drawn(experiment, network, samples, config.seed + 1)
        made_up = experiment.apart(pictures) > experiment.limit
        others = scores[~made_up]
        limits = [threshold_for(others, kept) if len(others) else float("inf") for kept in KEPT]
        cells = [f"{100 * made_up.float().mean():.2f} %", *(share(scores[made_up] > limit) for limit in limits)]
        lines.append(f"| {name} | {len(pictures):,} | {' | '.join(cells)} | {time.perf_counter() - began:.0f} |")
        found[name] = pictures, made_up, scores > limits[1]
    storage.write_text(folder / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    _picture(found, folder / "hallucination.png")


def _picture(found: Mapping[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]], file: Path) -> None:
    """Samples before and after; of shapes those within the data, and made-up ones, framed if they go."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 2, squeeze=False)
    for row, (name, (samples, made_up, gone)) in zip(panels, found.items(), strict=True):
        if samples.ndim == 4:
            for panel, chosen, title in zip(
                row, (~made_up, made_up), ("of the data's kind", "made up: those that go are framed"), strict=True
            ):
                _sheet(panel, samples[chosen], gone[chosen])
                panel.set_title(f"{name}, {title}")
            continue
        for panel, kept in zip(row, (torch.ones_like(gone), ~gone), strict=True):
            some, limits = samples[kept], (samples[:, 0].min().item(), samples[:, 0].max().item())
            if some.shape[1] == 1:
                panel.hist(some[:, 0].numpy(), bins=200, range=limits, color=CORE, log=True)
            else:
                panel.scatter(*some.T.numpy(), s=1, color=CORE)
            panel.set_title(f"{name}, {'all samples' if kept.all() else 'those that are kept'}")
            panel.set_xlim(*limits)
    figure.savefig(file, dpi=110)


def _sheet(panel: Any, pictures: torch.Tensor, gone: torch.Tensor, rows: int = 4, across: int = 10) -> None:
    """Pictures (N, 1, SIDE, SIDE) side by side."""
    from matplotlib.patches import Rectangle

    step = SIDE + 3
    sheet = torch.zeros(rows * step, across * step)
    for number, picture in enumerate(pictures[: rows * across]):
        top, left = number // across * step, number % across * step
        sheet[top : top + SIDE, left : left + SIDE] = picture[0].clamp(-1, 1)
        if gone[number]:
            panel.add_patch(Rectangle((left - 1.5, top - 1.5), SIDE + 2, SIDE + 2, fill=False, color=GONE, lw=1.5))
    panel.imshow(sheet.numpy(), cmap="gray", vmin=-1, vmax=1)
    panel.set_axis_off()


if __name__ == "__main__":
    parser = make_parser(HallucinationConfig, description=__doc__.splitlines()[0])
    main(parser.parse_args_into_dataclasses()[0])
