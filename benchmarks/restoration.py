"""Compare restoration on held-out pictures: ``python benchmarks/restoration.py --output bench-restoration``.

Renders of Fashion-MNIST are enlarged four times (or their holes filled) by bicubic interpolation, by one pass through
a network that was trained with L1, by ResShift in 15 and 4 steps and by RDDM in 5, the networks of the same size and
trained as long on the same pairs. What the folder lacks is trained first, forty minutes each on a CPU core; a run that
was killed goes on. Then all restore the same test pictures, none of which was trained on. Printed are means with 95 %
intervals over the pictures, how far the methods are apart picture by picture, and whether a search for the initial
noise (`sfumato.find_boundary`, on other test pictures) pays; ``restored-sr.png`` shows some.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sfumato import find_boundary, storage
from sfumato.arguments import make_parser
from sfumato.evaluation.metrics import Estimate
from sfumato.pipelines.pipeline_rddm import RDDMPipeline
from sfumato.pipelines.pipeline_resshift import ResShiftPipeline
from sfumato.pipelines.restoration import degraded_start
from sfumato.restoration import regression
from sfumato.restoration.degradations import Degradation
from sfumato.restoration.examples import HeldOut, hold_out
from sfumato.restoration.job import Method
from sfumato.restoration.networks import NetworkConfig
from sfumato.restoration.pictures import Renders
from sfumato.restoration.scores import find_distance, score, summarise
from sfumato.restoration.validation import grid_picture, restore
from sfumato.training import rddm, resshift
from sfumato.training.atelier_restorers import STEPS, train_once, training_of

SHOWN = 6
START = {"sr": "bicubic", "inpaint": "with holes"}
SEARCHED = ", searched noise"


@dataclass
class CompareConfig:
    """What to compare.

    Attributes:
        output: Folder for the models, the table and the picture.
        task: ``sr`` (x4) or ``inpaint``.
        methods: Comma-separated: regression, resshift-15, resshift-4, rddm.
        steps: Of training, each.
        learning_rate: Of training, falling to zero as a cosine.
        noise: Of the degraded pictures, in units of [0, 1].
        pictures: To restore.
        timed: Pictures restored one by one, for the time that one takes.
        candidates: Initial noises to search, on `pairs` other pictures; 0 searches none.
        pairs: Pictures for the search.
        seed: Of training; the next one chooses and degrades the pictures.
        data_dir: Folder with Fashion-MNIST's four files; None looks for Debian's package, then the Hub.
    """

    output: str
    task: str = "sr"
    methods: str = "regression,resshift-15,resshift-4,rddm"
    steps: int = STEPS
    learning_rate: float = 1e-3
    noise: float = 0.0
    pictures: int = 500
    timed: int = 20
    candidates: int = 32
    pairs: int = 64
    seed: int = 0
    data_dir: str | None = None


class Compared(NamedTuple):
    """A method: what trains it, what reads the result, and how it is called."""

    make: Callable[[NetworkConfig], Method]
    load: Callable[[Path], Any]
    settings: dict[str, Any]


def _resshift(steps: int) -> Compared:
    config = resshift.ResShiftConfig(num_train_timesteps=steps)
    return Compared(lambda network: resshift.make(config, network), ResShiftPipeline.from_pretrained, {})


METHODS: dict[str, Callable[[], Compared]] = {
    "regression": lambda: Compared(
        lambda network: regression.make(regression.RegressionConfig(), network),
        regression.Regression.from_pretrained,
        {},
    ),
    "resshift-15": lambda: _resshift(15),
    "resshift-4": lambda: _resshift(4),
    "rddm": lambda: Compared(
        lambda network: rddm.make(rddm.RDDMConfig(), network),
        RDDMPipeline.from_pretrained,
        {"num_inference_steps": 5},
    ),
}


def trained(name: str, config: CompareConfig, degradation: Degradation) -> Any:
    """The method's pipeline, from the folder or, if it is not there yet, trained."""
    method, folder = METHODS[name](), Path(config.output) / f"{config.task}-{name}"
    how = training_of(config.steps, config.learning_rate, config.seed)
    train_once(method.make, folder, degradation, how, config.data_dir)
    pipe = method.load(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seconds_of_one(restoring: Callable[[int], Any], count: int) -> float:
    """Mean seconds of a picture that is restored by itself, after a first that does not count."""
    restoring(0)
    began = time.perf_counter()
    for index in range(count):
        restoring(index)
    return (time.perf_counter() - began) / count


def part(held_out: HeldOut, first: int, count: int) -> HeldOut:
    """Some of the pictures."""
    assert held_out.degraded is not None
    some, mask = slice(first, first + count), held_out.degraded.mask
    degraded = type(held_out.degraded)(held_out.degraded.picture[some], None if mask is None else mask[some])
    return HeldOut(held_out.clean[some], degraded, held_out.seed)


class Restored(NamedTuple):
    """What a method made of the pictures, how long one took, and how well the ranks of initial noises agreed."""

    pictures: torch.Tensor
    seconds: float
    rank_correlation: float | None = None


def restore_all(
    config: CompareConfig, held_out: HeldOut, searched: HeldOut, degradation: Degradation
) -> dict[str, Restored]:
    """Restore the pictures by what needs no training, then by every method, with drawn and with searched noise."""
    assert held_out.degraded is not None
    given = held_out.degraded.picture

    def enlarged(some: torch.Tensor) -> torch.Tensor:
        return (degraded_start(some, degradation.factor) / 2 + 0.5).clamp(0, 1)

    seconds = seconds_of_one(lambda index: enlarged(given[index : index + 1]), config.timed)
    found = {START[config.task]: Restored(enlarged(given), seconds)}
    for name in config.methods.split(","):
        pipe, settings = trained(name, config, degradation), METHODS[name]().settings

        def one(index: int, pipe: Any = pipe, settings: Any = settings) -> torch.Tensor:
            return restore(pipe, part(held_out, index, 1), **settings)

        found[name] = Restored(restore(pipe, held_out, **settings), seconds_of_one(one, config.timed))
        if config.candidates and name != "regression":
            found[name + SEARCHED] = from_boundary(config, pipe, held_out, searched, found[name].seconds, settings)
    return found


def from_boundary(
    config: CompareConfig, pipe: Any, held_out: HeldOut, searched: HeldOut, seconds: float, settings: Mapping[str, Any]
) -> Restored:
    """Restore from the noise that a search on other pictures found best."""
    assert searched.degraded is not None
    given, masks = searched.degraded
    columns = [given / 2 + 0.5, searched.clean, *([] if masks is None else [masks])]
    boundary = find_boundary(
        pipe, list(zip(*columns, strict=True)), candidates=config.candidates, progress=False, seed=config.seed,
        batch_size=64, **settings,
    )  # fmt: skip
    noise = boundary.noise_for(pipe, settings.get("num_inference_steps"))
    return Restored(restore(pipe, held_out, latents=noise, **settings), seconds, boundary.rank_correlation)


def print_means(means: Mapping[str, Mapping[str, Estimate]], restored: Mapping[str, Restored]) -> None:
    """A line a method."""
    print("| | PSNR (dB) | SSIM | distance | ms a picture |\n|---|---|---|---|---|")
    for name, found in means.items():
        cells = (f"{found['psnr']:.2f}", f"{found['ssim']:.3f}", f"{found['distance']:.3f}")
        print(f"| {name} | {' | '.join(cells)} | {1000 * restored[name].seconds:.1f} |")


def print_differences(scores: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, Any]:
    """How far methods are apart on the same pictures: each from the first, and ResShift in 4 steps from others."""
    names = list(scores)
    pairs = [(name, names[0]) for name in names[1:] if not name.endswith(SEARCHED)]
    pairs += [("resshift-4", name) for name in ("regression", "resshift-15") if {"resshift-4", name} <= set(names)]
    pairs += [(name, name.removesuffix(SEARCHED)) for name in names if name.endswith(SEARCHED)]
    print("\n| difference, picture by picture | PSNR (dB) | distance |\n|---|---|---|")
    apart = {}
    for a, b in pairs:
        found = summarise({key: scores[a][key] - scores[b][key] for key in ("psnr", "distance")})
        apart[f"{a} - {b}"] = {key: estimate.as_dict() for key, estimate in found.items()}
        print(f"| {a} - {b} | {found['psnr']:.2f} | {found['distance']:.3f} |")
    return apart


def main(config: CompareConfig) -> None:
    """Train what is missing, restore, and print the tables."""
    unknown = set(config.methods.split(",")) - METHODS.keys()
    if unknown or config.task not in START:
        raise ValueError(f"There is no {sorted(unknown)[0] if unknown else config.task}; see --help.")
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    degradation = Degradation(task=config.task, noise=config.noise)
    test = hold_out(Renders(config.data_dir, "test"), degradation, config.pictures + config.pairs, config.seed + 1)
    held_out, searched = part(test, 0, config.pictures), part(test, config.pictures, config.pairs)
    restored = restore_all(config, held_out, searched, degradation)
    distance = find_distance("judge")
    scores = {name: score(found.pictures, held_out.clean, distance) for name, found in restored.items()}
    means = {name: summarise(values) for name, values in scores.items()}
    threads = torch.get_num_threads()
    print(f"{config.task}, {len(held_out)} pictures, {config.steps} steps of training, {threads} threads\n")
    print_means(means, restored)
    apart = print_differences(scores)
    for name, one in restored.items():
        if one.rank_correlation is not None:
            print(f"{name}: the candidates' ranks on two halves of {config.pairs} pairs: {one.rank_correlation:.2f}")
    columns = [found.pictures[:SHOWN] for name, found in restored.items() if not name.endswith(SEARCHED)]
    grid_picture(*columns, held_out.clean[:SHOWN]).save(folder / f"restored-{config.task}.png")
    facts = {
        "config": asdict(config), "differences": apart, "seconds": {n: found.seconds for n, found in restored.items()},
        "rank_correlations": {n: found.rank_correlation for n, found in restored.items() if n.endswith(SEARCHED)},
        "means": {name: {key: e.as_dict() for key, e in found.items()} for name, found in means.items()},
    }  # fmt: skip
    storage.write_text(folder / f"{config.task}.json", json.dumps(facts, indent=1))


if __name__ == "__main__":
    main(make_parser(CompareConfig, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0])
