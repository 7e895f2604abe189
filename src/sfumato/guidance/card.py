"""The card of what was trained beside a model: what it is for, how to use it, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData

from sfumato.loading import EMBEDDED

__all__ = ["CLASSIFIER", "ONE_MORE_STEP", "make_card"]

ONE_MORE_STEP, CLASSIFIER = "one-more-step", "minority-classifier"


class _Kind(NamedTuple):
    """What the card says of a kind of network."""

    title: str
    tag: str
    script: str
    about: str
    code: str


_KINDS = {
    ONE_MORE_STEP: _Kind(
        "One More Step", "text-to-image", "one_more_step",
        "A step before the first one of sampling, from pure noise to a start that has the brightness and the colours"
        " of the prompt (Hu et al., CVPR 2024, arXiv 2311.15744).",
        """import sfumato

pipe = sfumato.load({model})
pipe = sfumato.OneMoreStepPipeline.from_pretrained({place}, base=pipe)
pipe("a photo of a bag", num_inference_steps=20).images""",
    ),
    CLASSIFIER: _Kind(
        "A classifier for minority guidance", "image-classification", "minority_classifier",
        "It says of noisy samples to which class of the minority score they belong, the last class being that of the"
        " rarest, so that its gradient leads sampling there (Um et al., ICLR 2024, arXiv 2301.12334).",
        """import sfumato

pipe = sfumato.load({model})
scheduler = sfumato.MinorityGuidanceScheduler.from_config(pipe.scheduler.config, guidance_scale=3.5)
scheduler.set_classifier(sfumato.MinorityClassifier.from_pretrained({place}))
pipe.scheduler = scheduler""",
    ),
}  # fmt: skip


def make_card(manifest: Mapping[str, Any], *, name: str | None = None, licence: str | None = None) -> str:
    """Write the card.

    Args:
        manifest: What was done, as ``manifest.json`` says it.
        name: Of a release; None writes the card of a run's result.
        licence: Of a release, an identifier.

    Returns:
        Markdown, with the metadata of the Hub before it. Local paths are left out.
    """
    kind, settings, beside = _KINDS[manifest["method"]], manifest["settings"], manifest["beside"]
    on_hub = beside is not None and "/" in beside
    shown = beside if on_hub or beside in EMBEDDED else "MODEL"
    data = ModelCardData(
        license=licence, library_name="diffusers", pipeline_tag=kind.tag,
        tags=["diffusers", "sfumato", manifest["method"]], base_model=beside if on_hub else None,
    )  # fmt: skip
    code = kind.code.format(model=json.dumps(shown), place=json.dumps(name or "FOLDER"))
    lines = [
        "---", data.to_yaml(), "---", "", f"# {kind.title} for {shown}", "", kind.about, "",
        f"Trained by [sfumato](https://pypi.org/project/sfumato/), {settings['training']['steps']} steps of "
        f"{settings['job']['batch_size']} of {manifest['pictures']['pictures']} pictures; "
        f"{manifest['parameters'] / 1e6:.2f} million weights. It is of use with this model alone, whose latents it "
        "knows.", "", "```python", code, "```", "", *_measured(manifest), *_repeating(kind, licence),
        "All settings, the seed, versions and fingerprints are in `manifest.json`.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _measured(manifest: Mapping[str, Any]) -> list[str]:
    """The figures of the end."""
    found = manifest["measured"]
    if manifest["method"] == ONE_MORE_STEP:
        return [
            f"Mean squared error of the predicted latents: {found['error']:.4g}, where their mean square is "
            f"{found['mean_square']:.4g}; the rest is what a caption does not tell.", "",
        ]  # fmt: skip
    rows = [
        f"| {band['from']} to {band['to']} | {100 * band['accuracy']:.1f} % | {band['distance']:.2f} |"
        for band in found["bands"]
    ]
    classes = manifest["settings"]["method"]["classes"]
    return [
        f"On {found['held_out']} pictures that were held out, in {classes} classes. Whoever always says the middle "
        f"one is right in {100 / classes:.1f} %, and {classes / 4:.4g} classes off:", "",
        "| times | accuracy | mean distance of the class |", "|---|---|---|", *rows, "",
    ]  # fmt: skip


def _repeating(kind: _Kind, licence: str | None) -> list[str]:
    """Licence, and how to train it once more."""
    if licence is None:
        return []
    command = f"accelerate launch -m sfumato.training.{kind.script} --config recipe.yaml --output again"
    return [f"Licence: {licence}.", "", "To repeat the training in this folder:", "", "```bash", command, "```", ""]
