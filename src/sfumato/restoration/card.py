"""The model card of a restoration model: what it restores, how to use it, what validation measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData

from sfumato.loading import EMBEDDED
from sfumato.restoration.degradations import TASKS
from sfumato.restoration.validation import CURVES_FILE, LABELS, picture_of

__all__ = ["SAMPLES_FILE", "Published", "make_card"]

SAMPLES_FILE = "samples.png"
"""Where a release has its pictures."""

_LIMITS = (
    " For pictures of the kind it was trained on, degraded as above: what else is wrong with a picture it leaves, or "
    "takes for something to restore. It draws what is likely, not what was there, so that faces, texts and numbers "
    "that it restores are no evidence of what a picture showed."
)


class Published(NamedTuple):
    """What the card of a release says beside.

    Attributes:
        name: The release's Hub id, or its folder's name.
        licence: Of the weights, an identifier.
        code: Whether the pipeline's code lies in it, so that it loads where sfumato is not installed.
        curves: Whether there is a drawing of the scores over the steps.
        brought: Settings whose files a reader has to bring to repeat the training.
    """

    name: str
    licence: str
    code: bool
    curves: bool
    brought: tuple[str, ...] = ()


def make_card(manifest: Mapping[str, Any], validation: Mapping[str, Any], published: Published | None = None) -> str:
    """Write the card.

    Args:
        manifest: What was done, as ``manifest.json`` says it.
        validation: What was seen, as ``validation.json`` says it.
        published: Of a release; None writes the card of a run's result.

    Returns:
        Markdown, with the metadata of the Hub before it. Local paths are left out.
    """
    settings = manifest["settings"]
    degradation = settings["degradation"]
    task = "generation" if degradation is None else TASKS[degradation["task"]]
    scaled = f"x{manifest['scale']} " if manifest["scale"] > 1 else ""
    size, rows = settings["job"]["size"], validation["rows"]
    lines = [
        "---", _metadata(manifest, validation, task, published).to_yaml(), "---", "",
        f"# {scaled + task if scaled else task.capitalize()} with {manifest['title']}", "",
        f"Trained by [sfumato](https://pypi.org/project/sfumato/) on pictures of {size}x{size}, "
        f"{settings['training']['steps']} steps of {settings['job']['batch_size']}; "
        f"{manifest['parameters'] / 1e6:.2f} million weights.", "",
        *_usage(manifest["pipeline"], None if degradation is None else degradation["task"], published),
        *_table(validation), *_picture(rows, degradation is None, published is not None), "## Degradation", "",
        "None: the model generates." if degradation is None else f"```json\n{json.dumps(degradation, indent=1)}\n```",
        "", *([] if published is None else _repeating(manifest["method"], degradation is None, published)),
        "All settings, the seed, versions and fingerprints are in `manifest.json`.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _metadata(
    manifest: Mapping[str, Any], validation: Mapping[str, Any], task: str, published: Published | None
) -> ModelCardData:
    """For the Hub; the scores only of a release, which has a name that they can be of."""
    pipeline = "unconditional-image-generation" if manifest["settings"]["degradation"] is None else "image-to-image"
    tags = ["diffusers", "sfumato", "image-restoration", manifest["method"]]
    if published is None:
        return ModelCardData(library_name="diffusers", pipeline_tag=pipeline, tags=tags)
    last = validation["rows"][-1] if validation["rows"] else {}
    scores = [
        EvalResult(
            task_type=pipeline, task_name=task, dataset_type="sfumato-validation",
            dataset_name=f"{validation['of']['held_out']} held-out pictures", metric_type=name, metric_name=label,
            metric_value=last[name]["value"],
        )
        for name, label in LABELS.items()
        if name in last
    ]  # fmt: skip
    return ModelCardData(
        license=published.licence, library_name="diffusers", pipeline_tag=pipeline, tags=tags,
        model_name=published.name, eval_results=scores or None,
    )  # fmt: skip


def _usage(pipeline: str | None, task: str | None, published: Published | None) -> list[str]:
    """How to load it; the regression of benchmarks has no pipeline."""
    if pipeline is None:
        return []
    mask = ', Image.open("holes.png")' if task == "inpaint" else ""
    call = "pipe(batch_size=4).images" if task is None else f'pipe(Image.open("degraded.png"){mask}).images[0]'
    name = "FOLDER" if published is None else published.name
    quoted = json.dumps(name)
    lines = [*([] if task is None else ["from PIL import Image"])]
    if name in EMBEDDED:
        lines = ["import sfumato", *lines, "", f"pipe = sfumato.load({quoted})"]
    elif published is None or not published.code:
        lines += [f"from sfumato import {pipeline}", "", f"pipe = {pipeline}.from_pretrained({quoted})"]
    else:
        lines += [
            "from diffusers import DiffusionPipeline", "",
            f"release = {quoted}  # this folder, or its id on the Hub", "# runs the files of this release: read them",
            "pipe = DiffusionPipeline.from_pretrained(release, trust_remote_code=True)",
        ]  # fmt: skip
    return ["```python", *lines, call, "```", "", *_command(name, task, published)]


def _command(name: str, task: str | None, published: Published | None) -> list[str]:
    """How to restore files, where sfumato is installed."""
    if published is None or task is None:
        return []
    mask, folder = " --mask holes.png" if task == "inpaint" else "", name if name in EMBEDDED else "FOLDER"
    return ["```bash", f"sfumato restore degraded.png{mask} --model {folder} --output restored", "```", ""]


def _table(validation: Mapping[str, Any]) -> list[str]:
    """Scores of the last row beside those of what restoration starts from."""
    if not validation["rows"]:
        return []
    last = validation["rows"][-1]
    names = [name for name in LABELS if name in last]
    columns = {"degraded, resized": validation["baseline"], "restored": last}
    rows = [
        f"| {label} | " + " | ".join(_figure(found[name]) for name in names) + " |"
        for label, found in columns.items()
        if found
    ]
    head = ["| |" + "".join(f" {LABELS[name]} |" for name in names), "|---|" + "---|" * len(names)]
    said = f"On {validation['of']['held_out']} pictures that were held out, with 95 % intervals:"
    return [said, "", *head, *rows, ""] if names else []


def _figure(score: Mapping[str, float]) -> str:
    ends = f" ({score['low']:.3g} to {score['high']:.3g})" if "low" in score else ""
    return f"{score['value']:.4g}{ends}"


def _picture(rows: list[Mapping[str, Any]], generated: bool, released: bool) -> list[str]:
    if not rows:
        return []
    order = "generated, real" if generated else "degraded, restored, original"
    file = SAMPLES_FILE if released else picture_of(rows[-1])
    return [f"![{order}]({file})", "", f"From left to right: {order}.", ""]


def _repeating(method: str, generated: bool, published: Published) -> list[str]:
    """Licence, limits, and how to train it once more."""
    brought = f" Bring your own for {', '.join(published.brought)}." if published.brought else ""
    command = f"accelerate launch -m sfumato.training.{method} --config recipe.yaml --output again"
    return [
        "## Use and limits", "", f"Licence: {published.licence}.{'' if generated else _LIMITS}", "", "## Training", "",
        f"To repeat it in this folder:{brought}", "", "```bash", command, "```", "",
        *([f"![scores over the steps]({CURVES_FILE})", ""] if published.curves else []),
    ]  # fmt: skip
