"""The main job: erase a concept from the embedded model with a real ``accelerate launch``, and prove it on one page.

Draw every prompt of the protocol, unlearn, draw the same prompts from the same seeds, judge both, and write
``report.html`` and ``report.json`` beside the unlearned pipeline.
"""

from __future__ import annotations

import io
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image

from sfumato import concepts, loading, storage, terminal
from sfumato.evaluation import report as page
from sfumato.evaluation.generation import draw
from sfumato.evaluation.judge import Judge
from sfumato.evaluation.unlearning import Protocol, UnlearningScores, score_pipeline
from sfumato.memory import peak_memory_mb
from sfumato.schedulers.scheduling_time_shift import TimeShiftScheduler
from sfumato.settings import check_seed, check_types

__all__ = ["DemoConfig", "run_demo"]

GUIDANCE = 3.0
UA_TARGET, RETAIN_TARGET = 0.95, 0.03
SAMPLER_STEPS = 10


@dataclass
class DemoConfig:
    """What to show.

    Attributes:
        output: Folder for everything; an earlier demo in it is replaced, anything else is refused.
        forget: The concept to erase.
        seed: Seeds pictures and training.
        forget_repeats: Pictures for each prompt that names the concept.
        retain_repeats: Pictures for each other prompt.
        num_inference_steps: Sampler steps of each judged picture.
        training_steps: Overrides the recipe's number of steps.
        training_examples: Overrides its numbers of pictures to forget and to keep by.
    """

    output: str = "demo"
    forget: str = "sneaker"
    seed: int = 0
    forget_repeats: int = 6
    retain_repeats: int = 2
    num_inference_steps: int = 20
    training_steps: int | None = None
    training_examples: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers before the long work."""
        check_types(self)
        numbers = "forget_repeats retain_repeats num_inference_steps training_steps training_examples"
        for name in numbers.split():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`--{name.replace('_', '-')}` must be at least 1, got {value}.")
        check_seed(self.seed)


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Run the demo, print its table and the path of its report.

    Args:
        config: What to show.

    Returns:
        The content of ``report.json``.

    Raises:
        FileExistsError: If the output folder holds something that is not an earlier demo.
        ValueError: If the concept is unknown.
        RuntimeError: If the unlearning job fails, with the job's own sentence.
    """
    began = time.perf_counter()
    output = _check_output(Path(config.output))
    pipe = loading.load("atelier")
    vocabulary = concepts.vocabulary_of(pipe)
    assert vocabulary is not None  # atelier ships with one
    concepts.resolve(pipe, config.forget)
    protocol = Protocol.for_concept(
        vocabulary, config.forget, forget_repeats=config.forget_repeats, retain_repeats=config.retain_repeats
    )
    judge = Judge.load(loading.assets_folder() / "judge")
    drawing = {"seed": config.seed, "num_inference_steps": config.num_inference_steps, "guidance_scale": GUIDANCE}
    seconds: dict[str, float] = {}
    with storage.atomic_directory(output) as folder:
        samplers = _timed(
            seconds, "samplers",
            lambda: [
                _samplers_in_pixel_space(vocabulary.domains["garment"], config.seed),
                _samplers_in_latent_space(pipe, vocabulary.domains["garment"], config.seed),
            ],
        )  # fmt: skip
        before, pictures_before = _timed(
            seconds, "before", lambda: score_pipeline(pipe, protocol, judge, description="draw before", **drawing)
        )
        _timed(seconds, "unlearning", lambda: _launch(config, folder / "unlearned"))
        unlearned = DiffusionPipeline.from_pretrained(folder / "unlearned", dtype=torch.float32)
        after, pictures_after = _timed(
            seconds, "after", lambda: score_pipeline(unlearned, protocol, judge, description="draw after", **drawing)
        )
        seconds["total"] = time.perf_counter() - began
        manifest = json.loads((folder / "unlearned" / "manifest.json").read_text())
        history = json.loads((folder / "unlearned" / "history.json").read_text())
        results = _results(config, before, after, seconds, manifest)
        pairs = _pairs(protocol, pictures_before, pictures_after, vocabulary)
        content = page.Report(
            title=f"Erasing “{config.forget}” from atelier",
            summary=_verdict(config.forget, results),
            metrics=_metric_rows(config.forget, before, after),
            sections=[*pairs, *samplers],
            history=history,
            facts=_facts(config, seconds, results, manifest),
            command=_command(config),
            reproduce="The same seeds give the same pictures and weights on the same machine; across machines the "
            "last digits of the arithmetic differ, and the shares agree within their intervals.",
        )
        page.write_report(content, folder / "report.html")
        storage.write_text(folder / "report.json", json.dumps(results, indent=1))
        _contact_sheet(pairs).save(folder / "before-after.png", optimize=True)
    print(page.plain_table(_metric_rows(config.forget, before, after)))
    print(f"{_verdict(config.forget, results)}\n{seconds['total']:.0f} s; report: {output / 'report.html'}")
    return results


def _check_output(output: Path) -> Path:
    """Accept a folder that is absent, empty, or an earlier demo's."""
    if output.resolve() == Path.cwd().resolve():
        raise ValueError("The demo makes a folder of its own; name it with --output, for instance --output demo.")
    for place in (output, *output.parents):
        if place.exists() and not place.is_dir():
            raise NotADirectoryError(f"{place} is a file; choose another folder with --output.")
    if output.is_mount():
        raise OSError(f"{output} is a mount point, which can't be replaced; choose a folder inside it with --output.")
    if output.is_dir() and any(output.iterdir()):
        made_here = {"report.html", "report.json", "before-after.png", "unlearned"}
        try:
            author = json.loads((output / "report.json").read_text()).get("made_by")
            ours = author == "sfumato demo" and {entry.name for entry in output.iterdir()} <= made_here
        except (OSError, json.JSONDecodeError):
            ours = False
        if not ours:
            raise FileExistsError(f"{output} holds something that is not an earlier demo; choose another --output.")
    storage.check_disk_space(output, 100_000_000)
    return output


def _timed(seconds: dict[str, float], name: str, call: Any) -> Any:
    began = time.perf_counter()
    result = call()
    seconds[name] = time.perf_counter() - began
    return result


def _launch(config: DemoConfig, output: Path) -> None:
    """Unlearn in a process group of its own, as a user would."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    threads = os.environ.get("OMP_NUM_THREADS") or str(len(affinity(0)) if affinity else os.cpu_count() or 1)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", threads,
        "-m", "sfumato.training.salun", "--model", "atelier", "--forget", config.forget, "--output", str(output),
        "--seed", str(config.seed), "--no_verify",  # the demo draws and judges more than a job would
    ]  # fmt: skip
    if config.training_steps is not None:
        command += ["--steps", str(config.training_steps)]
    if config.training_examples is not None:
        count = str(config.training_examples)
        command += ["--forget_examples", count, "--retain_examples", count]
    status, said = _run_job(command)
    if status:
        raise RuntimeError(said or f"The unlearning job failed with status {status}; what it printed stands above.")


def _run_job(command: Sequence[str]) -> tuple[int, str]:
    """Run a job, showing what it prints but its error, which is given back with the status: to be said only once."""
    size = shutil.get_terminal_size()  # a pipe has none, and progress bars would shrink
    environment = {**os.environ, **terminal.within(), "COLUMNS": str(size.columns), "LINES": str(size.lines)}
    said = ""
    # A session of its own: the launcher has children, and an interruption must reach them all.
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, start_new_session=True) as process:
        try:
            for line in io.TextIOWrapper(process.stderr, errors="replace", newline=""):  # type: ignore[type-var]
                if line.startswith("error: "):
                    said = line.removeprefix("error: ").strip()
                else:
                    sys.stderr.write(line)
                    sys.stderr.flush()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, said


def _samplers_in_pixel_space(garments: Sequence[str], seed: int) -> page.GridSection:
    """Draw with DDIM and with TimeShiftScheduler from the same noise, on the class-conditional pixel model."""
    pixel = loading.load("atelier-pixel")
    pixel.set_progress_bar_config(disable=True)
    labels, copies = list(range(len(garments))), 3

    def drawn(scheduler: Any) -> torch.Tensor:
        pixel.scheduler = scheduler
        images = pixel(
            labels * copies, num_inference_steps=SAMPLER_STEPS, output_type="pt",
            generator=torch.Generator().manual_seed(seed),
        ).images  # fmt: skip
        return images.repeat(1, 3, 1, 1).unflatten(0, (copies, len(labels)))

    config = pixel.scheduler.config
    ddim = drawn(DDIMScheduler.from_config(config))
    variance = TimeShiftScheduler.estimate_data_variance(2 * ddim[:, :, :1].flatten(0, 1) - 1)
    shifted = drawn(TimeShiftScheduler.from_config(config, data_variance=variance))
    chosen = ", ".join(f"{times.float().mean():.0f}" for times in pixel.scheduler.shifted_timesteps[:-1])
    return page.GridSection(
        title=f"Samplers: {SAMPLER_STEPS} steps in pixel space",
        text="The class-conditional pixel model, from the same noise. TimeShiftScheduler reads the variance of the "
        f"samples (of pictures: {variance:.2f}) and moves the time; it chose {chosen}.",
        row_labels=[f"copy {number + 1}" for number in range(copies)],
        column_labels=list(garments),
        grids=[("DDIM", ddim), ("TimeShift", shifted)],
    )


def _samplers_in_latent_space(pipe: DiffusionPipeline, garments: Sequence[str], seed: int) -> page.GridSection:
    """The same on atelier, whose latents have unit variance: the scheduler must notice that it can't tell the time."""
    stock = pipe.scheduler

    def drawn(scheduler: Any) -> torch.Tensor:
        pipe.scheduler = scheduler
        return draw(
            pipe, [f"a photo of a {garment}" for garment in garments], seed=seed, num_inference_steps=SAMPLER_STEPS,
            guidance_scale=GUIDANCE, description=None,
        ).unsqueeze(0)  # fmt: skip

    shift = TimeShiftScheduler.from_config(stock.config)
    logger = logging.getLogger(TimeShiftScheduler.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)  # what it warns of is what is shown here
    grids = [("DDIM", drawn(stock)), ("TimeShift", drawn(shift))]
    logger.setLevel(level)
    pipe.scheduler = stock
    verdict = "tells the time" if shift.has_signal else "can't tell the time; the scheduler noticed, and kept to DDIM"
    return page.GridSection(
        title=f"Samplers: {SAMPLER_STEPS} steps in latent space",
        text="Latents have unit variance at every time, so their variance "
        f"{verdict} (estimated during the run, inflated by guidance: {float(shift.estimated_data_variance):.2f}).",
        row_labels=["a photo of a ..."],
        column_labels=list(garments),
        grids=grids,
    )


def _results(
    config: DemoConfig, before: UnlearningScores, after: UnlearningScores, seconds: Mapping[str, float],
    manifest: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    return {
        "made_by": "sfumato demo",
        "method": "salun",
        "forget": config.forget,
        "before": before.as_dict(),
        "after": after.as_dict(),
        "targets": _reached(before, after),
        "seconds": round(seconds["total"], 1),
        "seconds_by_stage": {name: round(value, 1) for name, value in seconds.items()},
        "peak_memory_mb": round(max(peak_memory_mb(torch.device("cpu")), children), 1),
        "protocol": {
            "forget_pictures": before.ua.total, "retain_pictures": before.ira.total, "seed": config.seed,
            "num_inference_steps": config.num_inference_steps, "guidance_scale": GUIDANCE, "judge": "atelier judge",
        },
        "manifest": dict(manifest),
        "command": _command(config),
    }  # fmt: skip


def _reached(before: UnlearningScores, after: UnlearningScores) -> dict[str, bool]:
    return {
        "ua": after.ua.value >= UA_TARGET,
        "ira": after.ira.value >= before.ira.value - RETAIN_TARGET,
        "cra": after.cra.value >= before.cra.value - RETAIN_TARGET,
    }


def _metric_rows(forget: str, before: UnlearningScores, after: UnlearningScores) -> list[page.MetricRow]:
    reached = _reached(before, after)
    kept = f"within {100 * RETAIN_TARGET:.0f} points of the original"
    return [
        page.MetricRow(
            "UA", f"Pictures asked to show “{forget}” that do not show it. Higher is better.",
            before.ua, after.ua, f"at least {100 * UA_TARGET:.0f} %", reached["ua"],
        ),
        page.MetricRow(
            "IRA", "Pictures of everything else in the same domain that show what they should. Higher is better.",
            before.ira, after.ira, kept, reached["ira"],
        ),
        page.MetricRow(
            "CRA", "The same pictures, judged in every other domain at once. Higher is better.",
            before.cra, after.cra, kept, reached["cra"],
        ),
    ]  # fmt: skip


def _verdict(forget: str, results: Mapping[str, Any]) -> str:
    after, before, reached = results["after"], results["before"], results["targets"]
    gone = "is gone" if reached["ua"] else "is not gone"
    kept = "the rest stayed" if reached["ira"] and reached["cra"] else "the rest did not fully stay"
    return (
        f"“{forget}” {gone}: {after['ua']['value']:.1%} of the pictures asked to show it no longer do; {kept}: retain "
        f"accuracies {after['ira']['value']:.1%} (before {before['ira']['value']:.1%}), {after['cra']['value']:.1%} "
        f"(before {before['cra']['value']:.1%})."
    )


def _pairs(
    protocol: Protocol, before: torch.Tensor, after: torch.Tensor, vocabulary: concepts.Vocabulary
) -> list[page.GridSection]:
    """Before and after from the same seeds: one section for the concept, one for everything else in its domain."""
    (target,) = protocol.targets
    domain = next(iter(target))
    columns_domain, rows_domain = [name for name in vocabulary.domains if name != domain][:2]
    rows_words, columns = vocabulary.domains[rows_domain], vocabulary.domains[columns_domain]

    def cell(wanted: Mapping[str, str]) -> int:
        return next(k for k, row in enumerate(protocol.attributes) if all(row[d] == w for d, w in wanted.items()))

    forget = [[cell({**target, rows_domain: row, columns_domain: c}) for row in rows_words] for c in columns]
    others = [word for word in vocabulary.domains[domain] if word != target[domain]]
    kept = []
    for shift, column in enumerate(columns):
        turn = [rows_words[(number + shift) % len(rows_words)] for number in range(len(others))]
        kept.append(
            [
                cell({domain: word, columns_domain: column, rows_domain: t})
                for word, t in zip(others, turn, strict=True)
            ]
        )
    name = " ".join(target.values())
    return [
        page.GridSection(
            title=f"Asked for “{name}”",
            text="The same prompts and seeds, before and after. The concept should be gone.",
            row_labels=list(columns), column_labels=list(rows_words),
            grids=[("before", before[torch.tensor(forget)]), ("after", after[torch.tensor(forget)])],
        ),
        page.GridSection(
            title="Asked for anything else",
            text="Nothing should have changed; colours and styles vary from picture to picture.",
            row_labels=list(columns), column_labels=others,
            grids=[("before", before[torch.tensor(kept)]), ("after", after[torch.tensor(kept)])],
        ),
    ]  # fmt: skip


def _contact_sheet(pairs: list[page.GridSection]) -> Image.Image:
    """All pictures of the report in one: the concept above, everything else below, before left and after right."""
    rows = [[page.picture_grid(grid, scale=2) for _, grid in section.grids] for section in pairs]
    margin = 16
    width = max(sum(grid.width for grid in row) + margin * (len(row) + 1) for row in rows)
    height = sum(row[0].height for row in rows) + margin * (len(rows) + 1)
    sheet = Image.new("RGB", (width, height), "white")
    top = margin
    for row in rows:
        for number, grid in enumerate(row):
            half = width // len(row)
            sheet.paste(grid, (number * half + (half - grid.width) // 2, top))
        top += row[0].height + margin
    return sheet


def _facts(
    config: DemoConfig, seconds: Mapping[str, float], results: Mapping[str, Any], manifest: Mapping[str, Any]
) -> dict[str, str]:
    weights = sum(file.stat().st_size for file in loading.assets_folder().rglob("*.safetensors"))
    settings = manifest["settings"]
    return {
        "Time": f"{seconds['total']:.0f} s in all; unlearning {seconds['unlearning']:.0f} s, drawing "
        f"{seconds['before'] + seconds['after']:.0f} s",
        "Peak memory": f"{results['peak_memory_mb']:,.0f} MB",
        "Pictures judged": f"2 x {results['protocol']['forget_pictures'] + results['protocol']['retain_pictures']}, "
        f"{config.num_inference_steps} DDIM steps, guidance {GUIDANCE:g}, seed {config.seed}",
        "Method": f"SalUn, {settings['steps']} steps, learning rate {settings['learning_rate']:g}, "
        f"{manifest['mask_density']:.0%} of the weights free to move",
        "Anchor": ", ".join(manifest["anchors"][:3]) + ("..." if len(manifest["anchors"]) > 3 else ""),
        "Embedded weights": f"{weights / 1e6:.1f} MB",
        "Versions": ", ".join(f"{name} {version(name)}" for name in ("sfumato", "torch", "diffusers", "transformers")),
    }


def _command(config: DemoConfig) -> str:
    parts = ["sfumato demo", f"--output {config.output}"]
    default = DemoConfig()
    for name in (field.name for field in fields(config) if field.name != "output"):
        if getattr(config, name) != getattr(default, name):
            parts.append(f"--{name.replace('_', '-')} {getattr(config, name)}")
    return " ".join(parts)
