import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)

import sfumato
from sfumato.attacks.audit import _features_of
from sfumato.evaluation.detectors import (
    Finding,
    FunctionDetector,
    NudeNetDetector,
    Rule,
    detector_for,
    find_detector,
)
from sfumato.evaluation.features import find_features
from sfumato.loading import assets_folder

PICTURES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_rule_takes_any_alternative_and_all_of_its_labels():
    rule = Rule((("red", "bag"), ("boot",)))
    assert rule([Finding("bag", 0.1), Finding("red", 0.2)]) and rule([Finding("boot", 0.0)])
    assert not rule([Finding("bag", 1.0)]) and not rule([])


def test_rule_applies_threshold_and_rank_within_a_group():
    findings = [Finding("tench", 0.5, "class"), Finding("church", 0.3, "class"), Finding("red", 0.2, "colour")]
    assert Rule((("church",),))(findings) and not Rule((("church",),), top=1)(findings)
    assert Rule((("church",),), top=2)(findings) and Rule((("red",),), top=1)(findings)
    assert Rule((("church",),), threshold=0.3)(findings) and not Rule((("church",),), threshold=0.31)(findings)


def test_findings_survive_json():
    for finding in (Finding("a", 0.5), Finding("b", 0.1, "class", (0.0, 0.1, 0.5, 1.0))):
        assert Finding.from_dict(finding.as_dict()) == finding


@pytest.mark.parametrize(
    ("wanted", "options"), [((), {}), (((),), {}), ((("a",),), {"threshold": 2}), ((("a",),), {"top": 0})]
)
def test_rules_without_sense_are_refused(wanted, options):
    with pytest.raises(ValueError, match="A rule needs|`threshold` must|`top` must"):
        Rule(wanted, **options)


def test_judge_agrees_with_its_own_verdict():
    pipe = sfumato.load("atelier")
    detector, rule = detector_for(pipe, ["red sneaker", "boot"])
    from PIL import Image

    rows = [f for f in sorted((assets_folder() / "renders").glob("*.png"))[::20]]
    pictures = torch.stack(
        [torch.from_numpy(np.array(Image.open(row).convert("RGB"))).permute(2, 0, 1) / 255 for row in rows]
    )
    for findings, seen in zip(detector(pictures), detector.judge.describe(pictures), strict=True):
        shown = seen["garment"] == "boot" or (seen["garment"], seen["colour"]) == ("sneaker", "red")
        assert rule(findings) == shown
        assert sum(found.score for found in findings) == pytest.approx(len(detector.judge.domains), abs=1e-4)
    with pytest.raises(ValueError, match="wombat"):
        detector_for(pipe, ["wombat"])


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(assets_folder() / "atelier" / "tokenizer")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **small,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 24,
        "eos_token_id": tokenizer.eos_token_id,
    }
    sight = {**small, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=sight, projection_dim=8)).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size), tokenizer).save_pretrained(folder)
    return folder


def test_clip_also_says_what_pictures_are_like(clip):
    """For an attack that chooses by likeness, where CLIP is the detector: the features that are named ``clip:``."""
    detector, pictures = find_detector(f"clip:{clip}", ["a bag"])[0], torch.rand(3, 3, 32, 32)
    assert torch.allclose(detector.features(pictures), find_features(f"clip:{clip}")(pictures), atol=1e-6)
    taken, name = _features_of(detector, None, torch.device("cpu"))
    assert torch.equal(taken(pictures), detector.features(pictures)) and name == f"clip:{clip}"


def test_clip_chooses_between_phrases_and_nothing(clip):
    detector, rule = find_detector(f"clip:{clip}", ["a bag", "a boot"])
    found = detector(PICTURES)
    assert [[one.label for one in some] for some in found] == [["a bag", "a boot", ""]] * 3
    assert all(sum(one.score for one in some) == pytest.approx(1, abs=1e-5) for some in found)
    assert rule.top == 1 and detector.facts["model"] == str(clip)


def test_classifier_knows_its_classes_only(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3, layer_type="basic")
    config.id2label = {0: "church", 1: "tench", 2: "parachute"}
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    detector, rule = find_detector(f"classifier:{tmp_path}", ["tench"])
    assert len(detector(PICTURES)) == 3 and rule == Rule((("tench",),), top=1)
    with pytest.raises(ValueError, match="no class 'wombat'; its classes: church, tench, parachute"):
        find_detector(f"classifier:{tmp_path}", ["wombat"])


def test_functions_may_say_yes_or_score_or_find(monkeypatch):
    assert FunctionDetector(lambda pictures: [True, False, 0.25])(PICTURES) == [
        [Finding("concept", 1.0)], [Finding("concept", 0.0)], [Finding("concept", 0.25)],
    ]  # fmt: skip
    assert FunctionDetector(lambda pictures: [[Finding("a", 0.5)], [], []])(PICTURES)[0] == [Finding("a", 0.5)]
    with pytest.raises(ValueError, match="gave 1 answers for 3 pictures"):
        FunctionDetector(lambda pictures: [True], "mine")(PICTURES)
    with pytest.raises(ValueError, match="a score of 7"):
        FunctionDetector(lambda pictures: [7, 0, 0])(PICTURES)
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(bright=lambda pictures: pictures.mean((1, 2, 3)) > 0.5))
    detector, rule = find_detector("mine:bright", ["bag"])
    assert detector.facts == {"detector": "mine:bright"}
    assert [rule(found) for found in detector(torch.stack([torch.ones(3, 8, 8), torch.zeros(3, 8, 8)]))] == [
        True,
        False,
    ]


def test_a_function_may_lie_in_the_folder_that_the_command_is_run_in(tmp_path):
    """An installed command, unlike ``python -m``, does not look there by itself."""
    (tmp_path / "my_own_eye.py").write_text("def yes(pictures):\n    return [0.9] * len(pictures)\n")
    code = (
        "import sys; sys.path[:] = [entry for entry in sys.path if entry]\n"
        "from sfumato.evaluation.detectors import find_detector\n"
        "from sfumato.evaluation.features import find_features\n"
        "import torch; x = torch.zeros(1, 3, 8, 8)\n"
        "print(find_detector('my_own_eye:yes', ['bag'])[0](x)[0][0].score, find_features('my_own_eye:yes')(x))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0.9", "[0.9]"], done.stderr[-2000:]


def test_findings_are_plain_numbers_in_range():
    found = Finding("bag", np.float32(0.25), None, tuple(np.linspace(0, 1, 4, dtype=np.float32)))
    assert type(found.score) is float and {type(end) for end in found.box} == {float}
    assert json.loads(json.dumps(found.as_dict()))["score"] == 0.25
    for score in (float("nan"), 1.5, -0.1):
        with pytest.raises(ValueError, match=f"'bag' a score of {score}"):
            Finding("bag", score)


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        ("def look(:", ImportError, "can't be imported: SyntaxError"),
        ("1 / 0", ImportError, "can't be imported: ZeroDivisionError"),
        ("def look(): pass", ValueError, "can't look at a grey picture .TypeError"),
        ("def look(pictures): return [float('nan')] * len(pictures)", ValueError, "a score of nan"),
        ("def look(pictures): return []", ValueError, "0 answers for 1 pictures"),
    ],
    ids=["syntax", "import", "arguments", "nan", "count"],
)
def test_a_function_that_can_not_look_is_found_out_at_once(code, error, said, tmp_path, monkeypatch):
    module = f"eye_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error, match=said):
        find_detector(f"{module}:look", ["bag"])


def test_detectors_that_are_not_there_are_named():
    with pytest.raises(ValueError, match="There is no detector 'eyes'"):
        find_detector("eyes", ["bag"])
    with pytest.raises(ImportError, match="mine_not_there:look can't be imported"):
        find_detector("mine_not_there:look", ["bag"])
    with pytest.raises(OSError, match="CLIP .* can't be loaded: name a detector"):
        find_detector("clip:/nowhere", ["bag"])


def test_nudenet_is_a_plug_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(ImportError, match="AGPL-3.0"):
        NudeNetDetector()

    class NudeDetector:
        def detect(self, picture):
            assert picture.dtype == np.uint8 and picture.shape == (32, 32, 3)
            return [{"class": "FEET_EXPOSED", "score": float(picture[0, 0, 0]) / 255, "box": [8, 0, 16, 32]}]

    monkeypatch.setitem(sys.modules, "nudenet", SimpleNamespace(NudeDetector=NudeDetector))
    found = NudeNetDetector()(PICTURES)
    assert found[1][0].box == (0.25, 0.0, 0.75, 1.0)
    assert found[1][0].score == pytest.approx(PICTURES[1, 2, 0, 0].item(), abs=0.01)  # blue comes first


def test_the_classes_of_nudenet_can_be_chosen_and_else_are_said(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "nudenet", SimpleNamespace(NudeDetector=object))
    _, rule = find_detector("nudenet:feet_exposed, BELLY_EXPOSED", ["violence"])
    assert rule == Rule((("FEET_EXPOSED",), ("BELLY_EXPOSED",)), threshold=0.45) and not caplog.records
    find_detector("nudenet", ["violence"])
    assert "knows nudity alone" in caplog.text and "'violence'" in caplog.text
    with pytest.raises(ValueError, match="no class 'BLOOD'"):
        find_detector("nudenet:blood", ["violence"])
