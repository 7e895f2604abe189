"""What ships to steer the embedded models: it loads by name, is small, knows its model, and does what it is for."""

import json

import pytest
import torch

import sfumato
from sfumato import MinorityClassifier, MinorityGuidanceScheduler, OneMoreStepPipeline
from sfumato.evaluation.judge import Judge
from sfumato.loading import EMBEDDED, assets_folder
from sfumato.randomness import generator_for
from sfumato.storage import fingerprint

STEP, CLASSIFIERS = "atelier-one-more-step", {"atelier-minority": "atelier", "atelier-pixel-minority": "atelier-pixel"}


@pytest.fixture(scope="module")
def step():
    base = sfumato.load("atelier")
    base.set_progress_bar_config(disable=True)
    return sfumato.load(STEP, base=base)


@pytest.mark.parametrize("name", [STEP, *CLASSIFIERS])
def test_it_is_small_and_has_a_card_and_belongs_to_the_model_that_ships(name):
    folder = assets_folder() / name
    assert name in EMBEDDED
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 3e6
    assert f'sfumato.load("{name}"' in (folder / "README.md").read_text()
    manifest = json.loads((folder / "manifest.json").read_text())
    beside = sfumato.load(CLASSIFIERS.get(name, "atelier"))
    for part, expected in manifest["model"].items():
        assert fingerprint(getattr(beside, part).named_parameters()) == expected


def test_the_step_has_the_colour_of_its_prompt_in_mind(step):
    assert isinstance(step, OneMoreStepPipeline)
    judge = Judge.load(assets_folder() / "judge")
    colours = judge.domains["colour"]
    noise = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        clean = -step.predict(noise, [f"a photo of a {colour} pullover" for colour in colours for _ in range(2)])
        pictures = step.base.vae.decode(clean / step.base.vae.config.scaling_factor).sample / 2 + 0.5
    seen = judge.predict(pictures.clamp(0, 1))["colour"]
    assert int((seen == torch.arange(len(colours)).repeat_interleave(2)).sum()) >= 11


def test_the_step_leads_where_much_signal_is_left_at_first(step):
    step.base.scheduler = type(step.base.scheduler).from_config(step.base.scheduler.config, timestep_spacing="leading")
    judge, told = Judge.load(assets_folder() / "judge"), "something yellow"
    call = {"num_inference_steps": 4, "guidance_scale": 3.0, "oms_prompt": told, "output_type": "pt"}
    shares = []
    for scale in (None, 4.0):
        found = step(
            ["a bag"] * 24, one_more_step=scale is not None, oms_guidance_scale=scale or 1.0,
            generator=[generator_for(0, number) for number in range(24)], **call,
        ).images  # fmt: skip
        yellow = judge.predict(found)["colour"] == judge.domains["colour"].index("yellow")
        shares.append(float(yellow.float().mean()))
    assert shares[0] < 0.5 and shares[1] > shares[0] + 0.3


@pytest.mark.parametrize(("name", "model"), CLASSIFIERS.items())
def test_a_classifier_knows_more_than_chance_and_leads_to_the_rare(name, model):
    classifier = sfumato.load(name)
    assert isinstance(classifier, MinorityClassifier) and not classifier.training
    manifest = json.loads((assets_folder() / name / "manifest.json").read_text())
    first = manifest["measured"]["bands"][0]
    assert (
        first["accuracy"] > 2 / classifier.config.num_classes and first["distance"] < classifier.config.num_classes / 4
    )
    pipe = sfumato.load(model)
    pipe.set_progress_bar_config(disable=True)
    asked = {"prompt": ["a bag"] * 16} if model == "atelier" else {"class_labels": [8] * 16}
    names = asked.get("prompt", ["class 8"] * 16)
    scores = []
    for scale in (0.0, 10.0):
        pipe.scheduler = MinorityGuidanceScheduler.from_config(
            pipe.scheduler.config, guidance_scale=scale, variance_type="fixed_small"
        )
        pipe.scheduler.set_classifier(classifier)
        generators = [generator_for(1, number) for number in range(16)]
        pictures = pipe(**asked, generator=generators, num_inference_steps=25, output_type="pt").images
        scores.append(float(sfumato.minority_scores(pipe, pictures, names, repeats=2, progress=False).mean()))
    assert scores[1] > scores[0]
