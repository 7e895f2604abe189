"""The card of what was trained beside a model: what it is for, how to use it, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData

from sfumato.loading import EMBEDDED

__all__ = ["CLASSIFIER", "ONE_MORE_STEP", "Published", "make_card"]

ONE_MORE_STEP, CLASSIFIER = "one-more-step", "minority-classifier"


class Published(NamedTuple):
    """What the card of a release says beside.

    Attributes:
        name: The release's Hub id, or its folder's name.
        licence: Of the weights, an identifier.
        code: Whether the code lies in it, so that it loads where sfumato is not installed.
        brought: Settings whose files a reader has to bring to repeat the training.
    """

    name: str
    licence: str
    code: bool
    brought: tuple[str, ...] = ()


class _Kind(NamedTuple):
    """What the card says of a kind of network.

    Attributes:
        title: Its name.
        tag: The Hub's name of the task.
        script: That trains it.
        about: What it is for.
        load: Gives it, from a folder or the Hub.
        load_embedded: Gives it, if it ships with this package.
        use: Of it.
        alone: Where sfumato is not installed; what can be done with it there.
        code: That does it.
    """

    title: str
    tag: str
    script: str
    about: str
    load: str
    load_embedded: str
    use: str
    alone: str
    code: str


_KINDS = {
    ONE_MORE_STEP: _Kind(
        "One More Step", "text-to-image", "one_more_step",
        "A step before the first one of sampling, from pure noise to a start that has the brightness and the colours"
        " of the prompt (Hu et al., CVPR 2024, arXiv 2311.15744).",
        "sfumato.OneMoreStepPipeline.from_pretrained({place}, base=pipe)",
        "sfumato.load({place}, base=pipe)",
        """pipe = {loaded}
pipe("a photo of a bag", num_inference_steps=20).images""",
        "With diffusers alone{model_is}:",
        """import torch
from diffusers import DiffusionPipeline

release = {place}  # this folder, or its id on the Hub
pipe = DiffusionPipeline.from_pretrained({model}, torch_dtype=torch.float32)
# runs the files of this release: read them
pipe = DiffusionPipeline.from_pretrained(release, base=pipe, trust_remote_code=True)
pipe("a photo of a bag", num_inference_steps=20).images""",
    ),
    CLASSIFIER: _Kind(
        "A classifier for minority guidance", "image-classification", "minority_classifier",
        "It says of noisy samples to which class of the minority score they belong, the last class being that of the"
        " rarest, so that its gradient leads sampling there (Um et al., ICLR 2024, arXiv 2301.12334).",
        "sfumato.MinorityClassifier.from_pretrained({place})",
        "sfumato.load({place})",
        """scheduler = sfumato.MinorityGuidanceScheduler.from_config(pipe.scheduler.config, guidance_scale=3.5)
scheduler.set_classifier({loaded})
pipe.scheduler = scheduler""",
        "With diffusers alone it classifies; the scheduler that it guides is sfumato's:",
        """import torch
from diffusers import AutoModel

release = {place}  # this folder, or its id on the Hub
# runs the files of this release: read them
classifier = AutoModel.from_pretrained(release, trust_remote_code=True)
noisy = torch.randn(1, classifier.config.in_channels, *classifier.size)
logits = classifier(noisy, 500)  # at the time 500""",
    ),
}  # fmt: skip


def make_card(manifest: Mapping[str, Any], published: Published | None = None) -> str:
    """Write the card.

    Args:
        manifest: What was done, as ``manifest.json`` says it.
        published: Of a release; None writes the card of a run's result.

    Returns:
        Markdown, with the metadata of the Hub before it. Local paths are left out.
    """
    kind, settings, beside = _KINDS[manifest["method"]], manifest["settings"], manifest.get("beside")
    on_hub = beside is not None and "/" in beside
    shown = str(beside) if on_hub or beside in EMBEDDED else "MODEL"
    data = ModelCardData(
        license=None if published is None else published.licence, library_name="diffusers", pipeline_tag=kind.tag,
        tags=["diffusers", "sfumato", manifest["method"]], base_model=beside if on_hub else None,
    )  # fmt: skip
    lines = [
        "---", data.to_yaml(), "---", "", f"# {kind.title} for {shown}", "", kind.about, "",
        f"Trained by [sfumato](https://pypi.org/project/sfumato/), {settings['training']['steps']} steps of "
        f"{settings['job']['batch_size']} of {manifest['pictures']['pictures']} pictures; "
        f"{manifest['parameters'] / 1e6:.2f} million weights. It is of use with this model alone, whose latents it "
        "knows.", "", *_usage(kind, shown, published), *_measured(manifest), *_repeating(kind, published),
        "All settings, the seed, versions and fingerprints are in `manifest.json`.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _usage(kind: _Kind, model: str, published: Published | None) -> list[str]:
    """How to load and use it."""
    name = "FOLDER" if published is None else published.name
    load = kind.load_embedded if name in EMBEDDED else kind.load
    use = kind.use.format(loaded=load.format(place=json.dumps(name)))
    lines = ["```python", "import sfumato", "", f"pipe = sfumato.load({json.dumps(model)})", use, "```", ""]
    return lines if published is None or not published.code else [*lines, *_alone(kind, model, name)]


def _alone(kind: _Kind, model: str, name: str) -> list[str]:
    """How to load it where sfumato is not installed, and so an embedded model is a folder, too."""
    told = "" if model == "MODEL" else f"{model}, "
    model_is = "" if "/" in model else f", MODEL being {told}a folder that `save_pretrained` has written"
    code = kind.code.format(place=json.dumps(name), model=json.dumps(model if "/" in model else "MODEL"))
    return [kind.alone.format(model_is=model_is), "", "```python", code, "```", ""]


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


def _repeating(kind: _Kind, published: Published | None) -> list[str]:
    """Licence, and how to train it once more."""
    if published is None:
        return []
    brought = f" Bring your own for {', '.join(published.brought)}." if published.brought else ""
    command = f"accelerate launch -m sfumato.training.{kind.script} --config recipe.yaml --output again"
    return [
        f"Licence: {published.licence}.", "", f"To repeat the training in this folder:{brought}", "", "```bash",
        command, "```", "",
    ]  # fmt: skip
