"""The model card of a restoration model: what it restores, how to use it, what validation measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from sfumato.restoration.degradations import TASKS
from sfumato.restoration.validation import LABELS, Validation

__all__ = ["make_card"]


def make_card(title: str, manifest: Mapping[str, Any], validation: Validation) -> str:
    """Write the card.

    Args:
        title: Of the method.
        manifest: What was done, as ``manifest.json`` says it.
        validation: What it saw; its last picture is shown.

    Returns:
        Markdown, with the metadata of the Hub before it. Local paths are left out.
    """
    settings = manifest["settings"]
    degradation = settings["degradation"]
    task = "generation" if degradation is None else TASKS[degradation["task"]]
    scaled = f"x{manifest['scale']} " if manifest["scale"] > 1 else ""
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation" if degradation is None else "image-to-image",
        tags=["diffusers", "sfumato", "image-restoration", manifest["method"]],
    )
    size = settings["job"]["size"]
    lines = [
        "---", data.to_yaml(), "---", "", f"# {scaled + task if scaled else task.capitalize()} with {title}", "",
        f"Trained by sfumato on pictures of {size}x{size}, {settings['training']['steps']} steps of "
        f"{settings['job']['batch_size']}; {manifest['parameters'] / 1e6:.2f} million weights.", "",
        *_usage(title, None if degradation is None else degradation["task"]), *_table(validation),
        *_picture(validation), "## Degradation", "",
        "None: the model generates." if degradation is None else f"```json\n{json.dumps(degradation, indent=1)}\n```",
        "", "All settings, the seed, versions and fingerprints are in `manifest.json`.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _usage(title: str, task: str | None) -> list[str]:
    """How to load it; the regression of benchmarks has no pipeline."""
    name = f"{title.partition(' ')[0]}Pipeline"
    if name not in ("ResShiftPipeline", "RDDMPipeline"):
        return []
    mask = ', Image.open("holes.png")' if task == "inpaint" else ""
    call = "pipe(batch_size=4).images" if task is None else f'pipe(Image.open("degraded.png"){mask}).images[0]'
    lines = [*([] if task is None else ["from PIL import Image"]), f"from sfumato import {name}", ""]
    return ["```python", *lines, f'pipe = {name}.from_pretrained("FOLDER")', call, "```", ""]


def _table(validation: Validation) -> list[str]:
    """Scores of the last row beside those of what restoration starts from."""
    if not validation.rows:
        return []
    last = validation.rows[-1]
    names = [name for name in LABELS if name in last]
    columns = {"degraded, resized": validation.baseline, "restored": last}
    rows = [
        f"| {label} | " + " | ".join(_figure(found[name]) for name in names) + " |"
        for label, found in columns.items()
        if found
    ]
    head = ["| |" + "".join(f" {LABELS[name]} |" for name in names), "|---|" + "---|" * len(names)]
    said = f"On {len(validation.held_out)} pictures that were held out, with 95 % intervals:"
    return [said, "", *head, *rows, ""] if names else []


def _figure(score: Mapping[str, float]) -> str:
    ends = f" ({score['low']:.3g} to {score['high']:.3g})" if "low" in score else ""
    return f"{score['value']:.4g}{ends}"


def _picture(validation: Validation) -> list[str]:
    if not validation.rows:
        return []
    order = "generated, real" if validation.held_out.degraded is None else "degraded, restored, original"
    return [
        f"![{order}](validation/step-{validation.rows[-1]['step']:08d}.png)",
        "",
        f"From left to right: {order}.",
        "",
    ]
