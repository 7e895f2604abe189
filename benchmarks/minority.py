"""Compare the ways to rare samples: ``python benchmarks/minority.py --output bench-minority``.

Plain ancestral sampling, minority guidance by a classifier of noisy samples, self-guidance, Boost-and-Skip, and, for
text, MinorityPrompt draw the same prompts from the same seeds. Printed are means with 95 % intervals of the minority
score of what was drawn (L2), its distance to the nearest real test pictures and its local outlier factor among them,
in the judge's features; and the shares that lie among the real ones there (precision) and that the judge still takes
for the garment that was asked for. Real pictures stand beside them. ``minority-MODEL.png`` shows some; what is drawn
is kept, and not drawn again by a run with the same settings.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

import sfumato
from sfumato import MinorityGuidancePipeline, MinorityGuidanceScheduler, atelier, storage
from sfumato.arguments import make_parser
from sfumato.evaluation.judge import Judge
from sfumato.evaluation.manifolds import compare_manifolds, local_outlier_factors, neighbour_distances
from sfumato.evaluation.metrics import wilson
from sfumato.evaluation.report import label_rows, picture_grid
from sfumato.families import class_names
from sfumato.loading import assets_folder
from sfumato.minority_prompt import MinorityPromptConfig
from sfumato.progress import Track
from sfumato.randomness import generator_for, permuted_indices
from sfumato.restoration.pictures import Renders
from sfumato.restoration.scores import summarise
from sfumato.settings import check_ranges, check_types
from sfumato.training.atelier_release import blue_photos

GARMENTS = len(atelier.GARMENTS)
SETTINGS: dict[str, dict[str, Any]] = {  # about as much of each as leaves most garments recognisable
    "atelier": {"guidance_scale": 3.0, "classifier_scale": 10.0, "self_scale": 1.0, "boost": 2.0, "skip_steps": 2},
    "atelier-pixel": {
        "guidance_scale": 1.0,
        "classifier_scale": 3.0,
        "self_scale": 0.2,
        "boost": 3.0,
        "skip_steps": 4,
    },
}
STREAM = 77  # of the seeds
SHOWN = 12


@dataclass
class MinorityConfig:
    """What to compare.

    Attributes:
        output: Folder for the table and the pictures.
        model: ``atelier`` or ``atelier-pixel``.
        methods: Comma-separated: plain, classifier, self, boost, word.
        pictures: To draw with each, as many of each garment.
        real: Test pictures to measure distances to.
        steps: Of the sampler.
        guidance_scale: Classifier-free guidance; None, here and below, is the model's in `SETTINGS`.
        classifier_scale: Of minority guidance.
        self_scale: Of self-guidance, at every `self_every` steps.
        self_every: See there.
        boost: Deviation of the initial noise of Boost-and-Skip.
        skip_steps: Steps that it leaves out.
        word_stop_ratio: The word of MinorityPrompt is learnt above this share of the times.
        word_start: What it is learnt from: ``"gaussian"``, or a word.
        classifier: Folder of a classifier; None takes the embedded one.
        batch_size: Pictures at a time.
        seed: Of everything.
        data_dir: Folder with Fashion-MNIST's four files; None looks for Debian's package, then the Hub.
    """

    output: str = field()
    model: str = field(default="atelier", metadata={"choices": ["atelier", "atelier-pixel"]})
    methods: str = "plain,classifier,self,boost,word"
    pictures: int = 480
    real: int = 3000
    steps: int = 25
    guidance_scale: float | None = None
    classifier_scale: float | None = None
    self_scale: float | None = None
    self_every: int = 5
    boost: float | None = None
    skip_steps: int | None = None
    word_stop_ratio: float = 0.9
    word_start: str = "photo"
    classifier: str | None = None
    batch_size: int = 48
    seed: int = 0
    data_dir: str | None = None

    def __post_init__(self) -> None:
        """Check the settings."""
        check_types(self)
        check_ranges(self, {"pictures": 10, "real": 100, "steps": 2, "batch_size": 1})
        unknown = set(self.methods.split(",")) - set(METHODS)
        if unknown:
            raise ValueError(f"There is no method {sorted(unknown)[0]!r}; there are {', '.join(METHODS)}.")
        for name, value in SETTINGS[self.model].items():
            if getattr(self, name) is None:
                setattr(self, name, value)


Call = dict[str, Any]
Draw = Callable[[Sequence[int], Call], torch.Tensor]
"""Draws garments by their numbers: ``(B, C, H, W)`` in [0, 1]."""


def asked(pipe: DiffusionPipeline, garments: Sequence[int]) -> dict[str, Any]:
    """How a pipeline is asked for garments."""
    if class_names(pipe) is not None:
        return {"class_labels": list(garments)}
    return {"prompt": [f"a {atelier.GARMENTS[garment]}" for garment in garments]}


def scheduled(pipe: Any, **settings: Any) -> MinorityGuidanceScheduler:
    """The sampler that all share, ancestral steps; pixels are clipped, latents are not."""
    return MinorityGuidanceScheduler.from_config(pipe.scheduler.config, variance_type="fixed_small", **settings)


@contextmanager
def using(pipe: Any, scheduler: MinorityGuidanceScheduler) -> Iterator[Any]:
    """The pipeline with another scheduler, for as long as the context lasts."""
    own, pipe.scheduler = pipe.scheduler, scheduler
    try:
        yield pipe
    finally:
        pipe.scheduler = own


def stock(pipe: Any, scheduler: MinorityGuidanceScheduler) -> Draw:
    """Draw with the pipeline itself."""

    def draw(garments: Sequence[int], call: Call) -> torch.Tensor:
        with using(pipe, scheduler):
            return pipe(**asked(pipe, garments), **call, output_type="pt").images

    return draw


def by_classifier(pipe: Any, config: MinorityConfig) -> Draw:
    """Minority guidance towards the rarest of the classifier's classes."""
    scheduler = scheduled(pipe, guidance_scale=config.classifier_scale)
    scheduler.set_classifier(sfumato.load(config.classifier or f"{config.model}-minority"))
    return stock(pipe, scheduler)


def by_itself(pipe: Any, config: MinorityConfig) -> Draw:
    """Self-guidance."""
    rare = MinorityGuidancePipeline(
        base=pipe, scheduler=scheduled(pipe, guidance_scale=config.self_scale, scale_by_variance=False)
    )
    return lambda garments, call: (
        rare(**asked(pipe, garments), **call, guide_every=config.self_every, output_type="pt").images
    )


def by_word(pipe: Any, config: MinorityConfig) -> Draw:
    """MinorityPrompt, with the same sampler."""
    own = scheduled(pipe, guidance_scale=0.0)
    learning = MinorityPromptConfig(stop_ratio=config.word_stop_ratio, start=config.word_start)

    def draw(garments: Sequence[int], call: Call) -> torch.Tensor:
        with using(pipe, own):
            prompts = asked(pipe, garments)["prompt"]
            return sfumato.draw_minority(pipe, prompts, learning, **call, output_type="pt").images

    return draw


METHODS: dict[str, Callable[[Any, MinorityConfig], Draw]] = {
    "plain": lambda pipe, config: stock(pipe, scheduled(pipe, guidance_scale=0.0)),
    "classifier": by_classifier,
    "self": by_itself,
    "boost": lambda pipe, config: stock(
        pipe, scheduled(pipe, guidance_scale=0.0, boost=config.boost, skip_steps=config.skip_steps)
    ),
    "word": by_word,
}
OWN_SETTINGS = {
    "plain": (), "classifier": ("classifier", "classifier_scale"), "self": ("self_scale", "self_every"),
    "boost": ("boost", "skip_steps"), "word": ("word_stop_ratio", "word_start"),
}  # fmt: skip
"""What a method's pictures depend on, besides what all depend on."""
LABELS = {
    "real": "real test pictures", "plain": "plain sampling", "classifier": "minority guidance, classifier",
    "self": "self-guidance", "boost": "Boost-and-Skip", "word": "MinorityPrompt",
}  # fmt: skip


class Sight:
    """What pictures of a model are measured with.

    Args:
        pipe: The model.
        config: What to compare.
    """

    def __init__(self, pipe: DiffusionPipeline, config: MinorityConfig) -> None:
        self.pipe, self.config, self.names = pipe, config, class_names(pipe)
        self.judge = Judge.load(assets_folder() / "judge")
        images, labels = atelier.find_fashion_mnist(config.data_dir, "test")
        chosen = permuted_indices(config.seed, len(images), 0, config.real)
        self.garments = torch.from_numpy(labels).long()[chosen].tolist()
        if self.names is None:
            self.real = Renders(config.data_dir, "test").take(chosen.tolist()) / 2 + 0.5
        else:
            self.real = (atelier.small_garments(images[chosen]) / 2 + 0.5).clamp(0, 1)
        self.near = self.features(self.real)

    def seen(self, pictures: torch.Tensor) -> torch.Tensor:
        """Pictures as the judge knows them, ``(N, 3, 32, 32)``."""
        return pictures if self.names is None else blue_photos(pictures)

    @torch.no_grad()
    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """The judge's, ``(N, F)``."""
        return torch.cat([self.judge.features(some) for some in self.seen(pictures).split(250)])

    def measure(self, pictures: torch.Tensor, garments: Sequence[int], apart: bool = True) -> dict[str, Any]:
        """Scores of pictures; distances to real ones only where they are not these."""
        names = self.names or [f"a {garment}" for garment in atelier.GARMENTS]
        scores = sfumato.minority_scores(
            self.pipe, pictures, [names[garment] for garment in garments], batch_size=100, progress=False
        )
        values = {"score": scores}
        if apart:
            features = self.features(pictures)
            values["distance"] = neighbour_distances(features, self.near)
            values["outlier"] = local_outlier_factors(features, self.near)
        right = int((self.judge.predict(self.seen(pictures))["garment"] == torch.tensor(garments)).sum())
        shares = {"asked": wilson(right, len(pictures))}
        if apart:
            shares["precision"] = compare_manifolds(features, self.near).precision
        return {**summarise(values), **shares}


def drawn(name: str, pipe: Any, config: MinorityConfig) -> tuple[torch.Tensor, float]:
    """All pictures of a method, and the seconds that one took; drawn at most once."""
    shared = ("model", "pictures", "steps", "guidance_scale", "batch_size", "seed")
    key = {"method": name} | {setting: getattr(config, setting) for setting in (*shared, *OWN_SETTINGS[name])}
    file = Path(config.output) / f"minority-{config.model}-{name}.safetensors"
    kept = storage.load_tensors_of(file, key)
    if kept is not None:
        return kept["pictures"], float(kept["seconds"])
    draw, garments = METHODS[name](pipe, config), [number % GARMENTS for number in range(config.pictures)]
    parts, began = [], time.perf_counter()
    for start in Track(range(0, len(garments), config.batch_size), LABELS[name]):
        some = garments[start : start + config.batch_size]
        generators = [generator_for(config.seed, STREAM, start + k) for k in range(len(some))]
        call = {"generator": generators, "num_inference_steps": config.steps, "guidance_scale": config.guidance_scale}
        parts.append(draw(some, call).float().cpu())
    pictures, seconds = torch.cat(parts), (time.perf_counter() - began) / len(garments)
    storage.save_tensors(file, {"pictures": pictures, "seconds": torch.tensor(seconds)}, {"key": key})
    return pictures, seconds


COLUMNS = {  # heading, and how its figures are written
    "score": ("minority score", ".2f"),
    "distance": ("distance to real", ".2f"),
    "outlier": ("local outlier factor", ".3f"),
    "precision": ("among the real", ""),
    "asked": ("garment as asked", ""),
}


def main(config: MinorityConfig) -> None:
    """Draw, measure, print the table, and draw the picture."""
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    pipe: Any = sfumato.load(config.model)
    pipe.set_progress_bar_config(disable=True)
    methods = [name for name in config.methods.split(",") if name != "word" or class_names(pipe) is None]
    sight, garments = Sight(pipe, config), [number % GARMENTS for number in range(config.pictures)]
    found = {"real": (sight.measure(sight.real, sight.garments, apart=False), None)}
    shown = []
    for name in methods:
        pictures, seconds = drawn(name, pipe, config)
        found[name] = sight.measure(pictures, garments), seconds
        shown.append(pictures[:SHOWN].expand(-1, 3, -1, -1))
    lines = [f"| | {' | '.join(heading for heading, _ in COLUMNS.values())} | s a picture |", "|---" * 7 + "|"]
    for name, (values, seconds) in found.items():
        cells = [f"{values[column]:{how}}" if column in values else "" for column, (_, how) in COLUMNS.items()]
        lines.append(f"| {LABELS[name]} | {' | '.join(cells)} | {'' if seconds is None else f'{seconds:.2f}'} |")
    print(f"{config.model}, {config.pictures} pictures, {config.steps} steps, {torch.get_num_threads()} threads\n")
    print("\n".join(lines))
    sheet = picture_grid(torch.stack(shown), scale=2 if class_names(pipe) is None else 4)
    label_rows(sheet, [LABELS[name] for name in methods]).save(folder / f"minority-{config.model}.png")
    facts = {
        "config": asdict(config), "seconds": {name: seconds for name, (_, seconds) in found.items()},
        "found": {name: {key: one.as_dict() for key, one in values.items()} for name, (values, _) in found.items()},
    }  # fmt: skip
    storage.write_text(folder / f"minority-{config.model}.json", json.dumps(facts, indent=1))


if __name__ == "__main__":
    main(make_parser(MinorityConfig, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0])
