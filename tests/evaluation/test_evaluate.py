import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

import sfumato
from sfumato import storage
from sfumato.concepts import vocabulary_of
from sfumato.evaluation.detectors import Finding, Rule, judge_of
from sfumato.evaluation.evaluate import EvaluationConfig, evaluate, release_bytes, rescore
from sfumato.evaluation.pictures import Request, draw_pictures
from sfumato.evaluation.scores import Sighting, read_sightings, tally
from sfumato.evaluation.sheet import vocabulary_sheet
from sfumato.evaluation.unlearning import Protocol, score
from sfumato.memory import peak_memory_mb

FAST = {"forget_repeats": 1, "num_inference_steps": 3, "resamples": 5, "device": "cpu"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model that forgot sneakers, saved in every format, and where evaluations share pictures."""
    folder = tmp_path_factory.mktemp("made")
    pipe = sfumato.load("atelier")
    for name, formats in (("full", ["full"]), ("delta", ["delta"]), ("part", ["part"]), ("lora", ["lora"])):
        sfumato.unlearn(pipe, "sneaker", "uce", output_dir=folder / name, save=formats, verify=False)
    return folder


@pytest.fixture(scope="module")
def finished(made):
    evaluation = evaluate(
        made / "full", "atelier", forget="sneaker", output_dir=made / "out", cache=made / "cache", **FAST
    )
    return evaluation, made / "out"


def test_a_forgotten_concept_is_told_from_what_is_kept(finished):
    scores = finished[0].scores
    assert scores["original"]["ua"]["value"] < 0.3 and scores["result"]["ua"]["value"] > 0.9
    assert scores["result"]["ira"]["value"] > scores["original"]["ira"]["value"] - 0.1
    assert set(scores["result"]["neighbours"]) == set(vocabulary_of(sfumato.load()).domains["garment"]) - {"sneaker"}
    drift = finished[0].distances["drift"]
    assert 0 < drift["retain"]["value"] < 0.3 < drift["forget"]["low"]


def test_scores_are_those_of_the_protocol(finished):
    pipe, evaluation = sfumato.load("atelier"), finished[0]
    vocabulary = vocabulary_of(pipe)
    sheet = vocabulary_sheet(vocabulary, ["sneaker"], seed=0, forget_repeats=1, retain_repeats=1)
    requests = [seen.request for seen in sheet]
    pictures = draw_pictures(
        pipe, requests, num_inference_steps=3, cache=finished[1].parent / "cache", description=None
    )
    protocol = Protocol.for_concept(vocabulary, "sneaker", forget_repeats=1, retain_repeats=1)
    expected = score(protocol, judge_of(vocabulary), pictures).as_dict()
    assert {name: evaluation.scores["original"][name] for name in expected} == expected


def test_every_figure_has_its_interval(finished):
    def check(values):
        if isinstance(values, dict):
            if "value" in values:
                assert values["low"] <= values["value"] <= values["high"], values
            for inner in values.values():
                check(inner)

    check(finished[0].scores)
    check(finished[0].distances)
    for pair in ("result to real", "original to real"):
        assert {"frechet", "kernel", "precision", "recall", "density", "coverage", "authentic"} <= set(
            finished[0].distances[pair]
        )
    assert "authentic" not in finished[0].distances["result to original"]  # from the same noise, it has no meaning


def test_what_is_written_is_what_is_given(finished):
    evaluation, folder = finished
    assert json.loads((folder / "evaluation.json").read_text()) == json.loads(json.dumps(evaluation.as_dict()))
    sightings = read_sightings(folder)
    assert len(sightings) == 2 * 240
    assert evaluation.models["result"]["release_bytes"] > 1e6 and evaluation.costs["peak_memory_mb"] > 100
    assert evaluation.detector["detector"] == "judge" and evaluation.settings["seed"] == 0
    assert set(evaluation.versions) >= {"sfumato", "torch", "diffusers"}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep the peak of the whole process")
def test_memory_is_that_of_the_evaluation_and_not_of_what_ran_before(finished, made):
    held = torch.ones(2_000_000_000, dtype=torch.uint8)
    before = peak_memory_mb(held.device)
    del held
    again = evaluate(made / "full", "atelier", forget="sneaker", cache=made / "cache", **FAST)
    assert again.costs["peak_memory_mb"] < before - 500


def test_a_rule_can_be_moved_without_drawing(finished):
    evaluation, folder = finished
    same = rescore(folder, Rule((("sneaker",),), top=1))
    assert same.scores == evaluation.scores
    strict = rescore(folder, Rule((("sneaker",),), threshold=1.0))
    assert strict.scores["original"]["ua"]["value"] == 1.0 and strict.detector["rule"]["threshold"] == 1.0
    assert rescore(folder, Rule((("bag",),), top=1)).scores["original"]["ua"]["value"] > 0.9
    with pytest.raises(FileNotFoundError, match=r"evaluation\.json"):
        rescore(folder.parent, Rule((("bag",),)))


def test_another_evaluation_is_never_overwritten(finished):
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="already holds an evaluation"):
            evaluate("atelier", forget="sneaker", output_dir=finished[1], resume=resume, **FAST)


def test_a_killed_evaluation_is_resumed(finished, tmp_path):
    evaluation, folder = finished
    (tmp_path / "pictures").mkdir()
    (tmp_path / "findings.jsonl").write_text("half a li")
    with pytest.raises(FileExistsError, match="--resume"):
        evaluate("atelier", forget="sneaker", output_dir=tmp_path, **FAST)
    again = evaluate(
        folder.parent / "full", "atelier", forget="sneaker", output_dir=tmp_path, resume=True,
        cache=folder.parent / "cache", **FAST,
    )  # fmt: skip
    assert again.scores == evaluation.scores and again.distances == evaluation.distances
    assert len(read_sightings(tmp_path)) == 2 * 240


@pytest.mark.parametrize("kind", ["delta", "part", "lora"])
def test_every_format_is_loaded_on_top_of_the_original(made, kind):
    expected = sfumato.load(made / "full").unet.state_dict()
    for original in ("atelier", None):
        found = sfumato.loading.load_result(made / kind, original).unet.state_dict()
        apart = max(float((found[name] - values).abs().max()) for name, values in expected.items())
        assert apart < (0.02 if kind == "lora" else 1e-9)
    stock = sfumato.load().unet.state_dict()
    assert max(float((stock[name] - values).abs().max()) for name, values in found.items()) > 0.02


@pytest.mark.parametrize("kind", ["delta", "part", "lora"])
def test_another_original_is_refused(made, kind, tmp_path):
    other = sfumato.load()
    with torch.no_grad():
        other.unet.conv_out.weight += 0.1
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"unet|another"):
        sfumato.loading.load_result(made / kind, tmp_path)


def test_a_folder_that_is_no_result_is_refused(made, tmp_path):
    storage.write_text(tmp_path / "manifest.json", json.dumps({"model": "atelier"}))
    with pytest.raises(ValueError, match="is no result"):
        sfumato.loading.load_result(tmp_path)
    storage.write_text(tmp_path / "manifest.json", json.dumps({"saved": {"delta": {}}}))
    with pytest.raises(ValueError, match="name the original"):
        sfumato.loading.load_result(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model folder"):
        sfumato.loading.load_result("/nowhere/at/all")


def brightness(pictures):
    """A detector: how bright a picture is."""
    return pictures.mean((1, 2, 3)).tolist()


def thumbnails(pictures):
    """Features: a picture in 4 x 4 pixels."""
    return torch.nn.functional.adaptive_avg_pool2d(pictures, 4).flatten(1)


@pytest.fixture
def plain(monkeypatch, tmp_path):
    """Atelier without its vocabulary, as any other model; functions of this file by name."""
    module = sys.modules[__name__]
    monkeypatch.setitem(sys.modules, "my_functions", module)
    pipe = sfumato.load("atelier")
    pipe.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def test_a_model_without_vocabulary_is_judged_by_the_users_own(plain, tmp_path):
    for k in range(7):
        Image.new("RGB", (40, 30), (30 * k, 90, 200 - 20 * k)).save(tmp_path / f"{k}.png")
    options = {**FAST, "num_inference_steps": 1, "batch_size": 32, "retain_repeats": 1}
    found = evaluate(
        plain, plain, forget="sneaker", detector="my_functions:brightness", features="my_functions:thumbnails",
        real=str(tmp_path), neighbours=["boot"], **options,
    )  # fmt: skip
    assert found.scores["result"] == found.scores["original"]
    assert found.scores["result"]["ira"] is None and found.scores["result"]["neighbours"] == {}
    assert found.scores["result"]["ua"]["total"] == 6
    assert found.distances["drift"]["retain"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert set(found.distances["drift"]) == {"forget", "retain", "neighbour: boot"}
    assert found.distances["result to original"]["frechet"]["value"] == pytest.approx(0, abs=1e-9)
    assert found.distances["result to real"]["pictures"] == [20, 7]


def test_what_is_wrong_is_said_before_anything_is_drawn(plain, tmp_path):
    pipe = sfumato.load("atelier")
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("it drew"))
    for wrong, said in (
        ({"forget": "wombat"}, "wombat"),
        ({"neighbours": ["boot"]}, "every other word"),
        ({"retain": ["a red bag"]}, "`retain` is for other models"),
        ({"real": ".", "features": "none"}, "`real` is what distances are measured to"),
        ({"features": "vgg"}, "no features 'vgg'"),
        ({"real": str(tmp_path / "empty")}, "no pictures"),
        ({"clip": str(tmp_path / "empty")}, "The CLIP"),
        ({"detector": "oracle"}, "no detector 'oracle'"),
        ({"resamples": 1}, "`resamples` must be at least 2, got 1"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises((ValueError, OSError), match=said):
            evaluate(pipe, **{"forget": "sneaker", **wrong})
    with pytest.raises(ValueError, match="2 retained pictures are too few"):
        evaluate(
            plain, forget="sneaker", retain=["a bag", "a coat"], retain_repeats=1, detector="my_functions:brightness",
            features="my_functions:thumbnails",
        )  # fmt: skip


def test_quick_is_less_of_everything():
    whole, quick = (EvaluationConfig(quick=q).completed(vocabulary=True) for q in (False, True))
    for name in ("forget_repeats", "num_inference_steps", "resamples"):
        assert getattr(quick, name) < getattr(whole, name)
    assert EvaluationConfig(batch_size=3).completed(vocabulary=False).batch_size == 3


def test_seeds_depend_on_prompt_and_repeat_alone():
    vocabulary = vocabulary_of(sfumato.load())
    sheets = [
        {seen.request for seen in vocabulary_sheet(vocabulary, [word], seed=0, forget_repeats=2, retain_repeats=1)}
        for word in ("sneaker", "bag")
    ]
    assert len(sheets[0] & sheets[1]) == 240
    assert len({request.seed for request in sheets[0]}) == len(sheets[0])


def test_tally_counts_what_a_hand_count_does():
    def seen(kind, shape, shade, **words):
        findings = [Finding(shape, 0.6, "garment"), Finding("other", 0.4, "garment"), Finding(shade, 1.0, "colour")]
        return Sighting("result", kind, Request("", (0,)), words, findings)

    sightings = [
        seen("forget", "sneaker", "red", garment="sneaker", colour="red"),
        seen("forget", "boot", "red", garment="sneaker", colour="red"),
        seen("retain", "boot", "red", garment="boot", colour="blue"),
        seen("retain", "bag", "blue", garment="boot", colour="blue"),
        seen("retain", "bag", "blue", garment="bag", colour="blue"),
    ]
    found = tally(sightings, Rule((("sneaker",),), top=1), ["garment"])
    counts = {name: (found[name]["successes"], found[name]["total"]) for name in ("ua", "ira", "cra")}
    assert counts == {"ua": (1, 2), "ira": (2, 3), "cra": (2, 3)}
    assert {w: (s["successes"], s["total"]) for w, s in found["neighbours"].items()} == {"boot": (1, 2), "bag": (1, 1)}
    unknown = [replace(one, findings=[Finding("concept", 1.0)]) for one in sightings]
    assert tally(unknown, Rule((("concept",),)), ["garment"])["ira"] is None


def test_the_command_prints_its_figures_and_where_they_are(finished, tmp_path):
    command = [
        sys.executable, "-m", "sfumato.cli", "evaluate", "--model", str(finished[1].parent / "full"), "--forget",
        "sneaker", "--output", str(tmp_path / "out"), "--cache", str(finished[1].parent / "cache"),
        "--forget_repeats", "1", "--num_inference_steps", "3", "--resamples", "5", "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ua = finished[0].scores["result"]["ua"]
    assert f"{100 * ua['value']:.1f} %" in done.stdout and str(tmp_path / "out" / "evaluation.json") in done.stdout
    stored = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert stored["scores"] == json.loads(json.dumps(finished[0].scores))  # the manifest named the original
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and again.stderr.strip().splitlines()[-1].startswith("error: ")


def test_what_a_release_does_not_hand_on_is_not_of_its_size(tmp_path):
    for name in ("delta/delta.safetensors", "logs/events", "checkpoints/1/x", "history.json", "manifest.json"):
        storage.write_text(tmp_path / name, "12345")
    assert release_bytes(tmp_path) == 5 and release_bytes(tmp_path / "nowhere") == 0
