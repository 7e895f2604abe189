"""Compare the unlearning methods on the embedded model: ``python benchmarks/unlearning.py --output bench-unlearning``.

Every method forgets every concept with every seed, by its recipe, in a process of its own; the result is drawn and
judged against the original, and then attacked with adversarial embeddings, the same attack for all: one embedding,
found in 40 steps, and for the methods named in ``--stronger`` also four, found in 100. Finished cells are kept in the
output folder, so a run that was cut short goes on. The table has a row a method, pooled over concepts and seeds, with
95 % Wilson intervals, and a second table a row for every concept; the picture shows one concept.
"""

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

import sfumato
from sfumato import storage
from sfumato.arguments import make_parser
from sfumato.attacks.embeddings import EmbeddingAttackConfig, attack_embeddings
from sfumato.concepts import Vocabulary, kind_of, vocabulary_of
from sfumato.evaluation.generation import draw
from sfumato.evaluation.judge import Judge
from sfumato.evaluation.metrics import Proportion, frechet_distance, wilson
from sfumato.evaluation.report import label_rows, picture_grid
from sfumato.evaluation.unlearning import Protocol, score, shows
from sfumato.families import latent_space_of
from sfumato.loading import assets_folder
from sfumato.unlearning.methods import METHODS

NEIGHBOURS = {"sneaker": ("sandal", "boot")}
ATTACKS = {"attacked": EmbeddingAttackConfig(), "stronger": EmbeddingAttackConfig(tokens=4, steps=100)}

COSTS = ("seconds", "peak_memory_mb", "denoiser_evaluations")


@dataclass
class UnlearningConfig:
    """What to compare.

    Attributes:
        output: Folder for the cells, the table and the picture.
        methods: Comma-separated; all by default.
        concepts: Comma-separated; those to forget together are joined by "+".
        seeds: Of training and of the pictures, comma-separated.
        pictures: Pictures of the concept to judge, about; three times as many of everything else.
        attacked: Prompts of the concept to attack; 0 attacks none.
        stronger: Methods to attack once more, comma-separated.
        num_inference_steps: Sampler steps of each picture.
        strip: The concept and seed to show for every method.
    """

    output: str
    methods: str = ",".join(METHODS)
    concepts: str = "sneaker,bag,sketch,red"
    seeds: str = "0,1,2"
    pictures: int = 72
    attacked: int = 24
    stronger: str = "esd,advunlearn"
    num_inference_steps: int = 20
    strip: str = "sneaker,0"

    @property
    def drawing(self) -> dict[str, Any]:
        """How all pictures are drawn."""
        return {"num_inference_steps": self.num_inference_steps, "guidance_scale": 3.0}


class Bench:
    """The original model, its judge, and real pictures."""

    def __init__(self, config: UnlearningConfig) -> None:
        self.config, self.folder = config, Path(config.output)
        self.pipe = sfumato.load("atelier")
        vocabulary = vocabulary_of(self.pipe)
        assert vocabulary is not None  # atelier ships with one
        self.vocabulary, self.judge = vocabulary, Judge.load(assets_folder() / "judge")
        renders = assets_folder() / "renders"
        self.rows = [json.loads(line) for line in (renders / "metadata.jsonl").read_text().splitlines()]
        pictures = [Image.open(renders / row["file_name"]).convert("RGB") for row in self.rows]
        with torch.no_grad():
            self.real = self.judge.features(latent_space_of(self.pipe).preprocess(pictures))

    def cell(self, method: str, concept: str, seed: int) -> dict[str, Any]:
        """Scores of one run; what is in the folder is not done again."""
        path = self.folder / "cells" / f"{method}-{concept}-{seed}.json"
        scores: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        attacks = ["attacked"] if self.config.attacked and method != "original" else []
        attacks += ["stronger"] if attacks and method in self.config.stronger.split(",") else []
        missing = [name for name in attacks if name not in scores]
        if scores and not missing:
            return scores
        pipe = self.pipe if method == "original" else self.trained(method, concept, seed)
        if not scores:
            scores = {**self.score(pipe, concept, seed), **self.facts(method, concept, seed)}
        for name in missing:
            scores[name] = self.attack(pipe, concept, seed, ATTACKS[name])
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_text(path, json.dumps(scores, indent=1))
        return scores

    def model_folder(self, method: str, concept: str, seed: int) -> Path:
        """Where the result of a run is kept."""
        return self.folder / "models" / f"{method}-{concept}-{seed}"

    def trained(self, method: str, concept: str, seed: int) -> DiffusionPipeline:
        """The result of a run, from the folder if it is there."""
        folder = self.model_folder(method, concept, seed)
        if not (folder / "model_index.json").exists():
            self.train(method, concept, seed, folder)
        return DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)

    def facts(self, method: str, concept: str, seed: int) -> dict[str, float]:
        """What a run cost, from its manifest."""
        if method == "original":
            return {}
        manifest = json.loads((self.model_folder(method, concept, seed) / "manifest.json").read_text())
        return {key: manifest[key] for key in COSTS}

    def train(self, method: str, concept: str, seed: int, output: Path) -> None:
        """Run the job, in a process of its own: its memory is then its own too."""
        command = [
            sys.executable, "-m", "sfumato.cli", "unlearn", method, "--forget", *concept.split("+"),
            "--output", str(output), "--no_verify", *(["--seed", str(seed)] if METHODS[method].trains else []),
            *(["--resume"] if output.exists() else []),
        ]  # fmt: skip
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command[2:])}\nfailed: {done.stderr.strip().splitlines()[-1]}")

    def score(self, pipe: DiffusionPipeline, concept: str, seed: int) -> dict[str, Any]:
        """Draw and judge the protocol of a concept."""
        once = Protocol.for_concept(self.vocabulary, concept.split("+"), forget_repeats=1, retain_repeats=0)
        count, every = len(once.prompts), len(self.vocabulary.combinations({}))
        protocol = Protocol.for_concept(
            self.vocabulary, concept.split("+"), forget_repeats=max(1, round(self.config.pictures / count)),
            retain_repeats=max(1, round(3 * self.config.pictures / (every - count))),
        )  # fmt: skip
        pictures = draw(pipe, protocol.prompts, seed=seed, description=None, **self.config.drawing)
        scores: dict[str, Any] = score(protocol, self.judge, pictures).as_dict()
        kept = torch.tensor([not shows(row, protocol.targets) for row in protocol.attributes])
        real = torch.tensor([not shows(row, protocol.targets) for row in self.rows])
        with torch.no_grad():
            scores["distance"] = frechet_distance(self.judge.features(pictures[kept]), self.real[real])
        for name in NEIGHBOURS.get(concept, ()):
            wanted = self.vocabulary.parse(name)
            at = [k for k, row in enumerate(protocol.attributes) if wanted.items() <= dict(row).items()]
            right = [
                seen[domain] == word for seen in self.judge.describe(pictures[at]) for domain, word in wanted.items()
            ]
            scores.setdefault("neighbours", {})[name] = wilson(sum(right), len(right)).as_dict()
        return scores

    def attack(
        self, pipe: DiffusionPipeline, concept: str, seed: int, config: EmbeddingAttackConfig | None = None
    ) -> dict[str, float]:
        """Share of attacked prompts whose picture shows the concept again."""
        protocol = Protocol.for_concept(self.vocabulary, concept.split("+"), forget_repeats=1, retain_repeats=0)
        count = len(protocol.prompts)
        prompts = [protocol.prompts[k * count // self.config.attacked] for k in range(self.config.attacked)]
        found = attack_embeddings(pipe, self.pipe, prompts, config, seed=seed, description=None)
        pictures = draw(pipe, prompts, seed=seed, description=None, conditioning=found, **self.config.drawing)
        words = self.judge.describe(pictures)
        return wilson(sum(shows(word, protocol.targets) for word in words), len(words)).as_dict()


def pooled(cells: list[dict[str, Any]], key: str) -> Proportion:
    """One proportion of several."""
    return wilson(sum(cell[key]["successes"] for cell in cells), sum(cell[key]["total"] for cell in cells))


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the table: shares pooled, figures averaged."""
    row: dict[str, Any] = {key: pooled(cells, key).as_dict() for key in ("ua", "ira", "cra")}
    for key in ("distance", *COSTS):
        values = [cell[key] for cell in cells if key in cell]
        row[key] = sum(values) / len(values) if values else None
    for key in ATTACKS:
        attacked = [cell for cell in cells if key in cell]
        if attacked:
            row[key] = pooled(attacked, key).as_dict()
    with_neighbours = [cell["neighbours"] for cell in cells if "neighbours" in cell]
    for name in dict.fromkeys(name for found in with_neighbours for name in found):
        row[name] = pooled(with_neighbours, name).as_dict()
    return row


def shown(share: Mapping[str, float]) -> str:
    """A share with its interval, in percent."""
    return f"{100 * share['value']:.1f} [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows in Markdown."""
    neighbours = list(dict.fromkeys(name for names in NEIGHBOURS.values() for name in names))
    neighbours = [name for name in neighbours if any(name in row for row in rows.values())]
    head = ["", "UA", "IRA", "CRA", *neighbours, *ATTACKS, "distance", "seconds", "MB", "evaluations"]
    lines = [head, ["---"] * len(head)]
    for name, row in rows.items():
        shares = [shown(row[key]) if key in row else "" for key in ("ua", "ira", "cra", *neighbours, *ATTACKS)]
        costs = ["" if row[key] is None else f"{row[key]:,.0f}" for key in COSTS]
        lines.append([name, *shares, f"{row['distance']:.2f}", *costs])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def expected(
    cells: Mapping[str, Mapping[str, list[dict[str, Any]]]], vocabulary: Vocabulary
) -> dict[str, dict[str, list[int]]]:
    """What each recipe is to expect: in percent, the hull of the intervals of all its runs."""
    found: dict[str, list[dict[str, Any]]] = {}
    for method in cells.keys() - {"original"}:
        for concept, some in cells[method].items():
            kind = kind_of(vocabulary, concept.split("+"))
            found.setdefault(f"{method}-{vocabulary.name}-{kind}", []).extend(some)
    return {
        recipe: {
            key: [
                math.floor(100 * min(cell[key]["low"] for cell in some)),
                math.ceil(100 * max(cell[key]["high"] for cell in some)),
            ]
            for key in ("ua", "ira", "cra")
        }
        for recipe, some in sorted(found.items())
    }


def strip(bench: Bench, methods: list[str], concept: str, seed: int) -> Image.Image:
    """One concept across all methods: a row each, the same prompts and seeds; its own prompts, then others."""
    protocol = Protocol.for_concept(bench.vocabulary, concept.split("+"), forget_repeats=1, retain_repeats=1)
    count = sum(shows(row, protocol.targets) for row in protocol.attributes)
    others = len(protocol.prompts) - count
    chosen = [k * count // 6 for k in range(6)] + [count + k * others // 9 for k in range(9)]
    prompts = [protocol.prompts[k] for k in chosen]
    drawing = {"seed": seed, "description": None, **bench.config.drawing}
    pictures = [draw(bench.pipe, prompts, **drawing)]
    pictures += [draw(bench.trained(method, concept, seed), prompts, **drawing) for method in methods]
    return label_rows(picture_grid(torch.stack(pictures), scale=2), ["original", *methods])


def main(config: UnlearningConfig) -> None:
    """Run what is missing, print the tables, write them and the picture."""
    bench, methods = Bench(config), config.methods.split(",")
    concepts, seeds = config.concepts.split(","), [int(seed) for seed in config.seeds.split(",")]
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for method in ["original", *methods]:
        for concept in concepts:
            for seed in seeds:
                last = bench.cell(method, concept, seed)
                cells.setdefault(method, {}).setdefault(concept, []).append(last)
                print(
                    f"{method:18} {concept:10} {seed}  UA {shown(last['ua'])}  IRA {shown(last['ira'])}  "
                    f"CRA {shown(last['cra'])}", flush=True,
                )  # fmt: skip
    rows = {method: summary([cell for some in of.values() for cell in some]) for method, of in cells.items()}
    by_concept = {
        f"{method}, {concept}": summary(some) for method, of in cells.items() for concept, some in of.items()
    }
    print(table(rows), table(by_concept), sep="\n\n")
    results = {"methods": rows, "concepts": by_concept, "expected": expected(cells, bench.vocabulary)}
    storage.write_text(bench.folder / "table.json", json.dumps(results, indent=1))
    name, seed = config.strip.split(",")
    if name in concepts and int(seed) in seeds:
        strip(bench, methods, name, int(seed)).save(bench.folder / "methods.png", optimize=True)


if __name__ == "__main__":
    main(make_parser(UnlearningConfig, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0])
