import json

import pytest

from sfumato import cli
from sfumato.evaluation.detectors import Finding
from sfumato.evaluation.evaluate import Evaluation
from sfumato.evaluation.pictures import Request
from sfumato.evaluation.scores import Sighting, write_sightings


@pytest.fixture
def evaluated(tmp_path):
    """The folder of an evaluation of ten pictures, in which the concept has scores from 0 to 0.9."""
    folder = tmp_path / "evaluated"
    folder.mkdir()
    seen = [
        Sighting("result", "forget", Request("a sneaker", (k,)), {}, (Finding("sneaker", k / 10),)) for k in range(10)
    ]
    write_sightings(folder, seen)
    rule = {"wanted": [["sneaker"]], "threshold": 0.5, "top": None}
    found = Evaluation(
        {"name": "sneaker", "phrases": ["sneaker"], "groups": []}, {}, {}, {"detector": "eye", "rule": rule}, {}, {},
        {}, {}, "1234", "sfumato evaluate --model out",
    )  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(found.as_dict()))
    return folder


def test_an_evaluation_is_counted_again_by_another_rule(evaluated, tmp_path, capsys):
    shares = []
    for threshold in ("0.5", "0.85"):
        file = tmp_path / f"{threshold}.json"
        cli.main(["rescore", str(evaluated), "--threshold", threshold, "--output", str(file)])
        assert "UA" in capsys.readouterr().out
        stored = json.loads(file.read_text())
        assert stored["detector"]["rule"]["threshold"] == float(threshold) and stored["result_fingerprint"] == "1234"
        assert stored["command"] is None and stored["rescored"]["commands"] == ["sfumato evaluate --model out"]
        assert stored["rescored"]["by"] == {"labels": None, "threshold": float(threshold), "top": None}
        shares.append(stored["scores"]["result"]["ua"]["value"])
    assert shares == [0.5, 0.9]


def test_what_is_neither_or_is_damaged_is_one_sentence(evaluated, tmp_path):
    with pytest.raises(SystemExit, match=r"error: .* holds no attack.json"):
        cli.main(["rescore", str(tmp_path)])
    stored = json.loads((evaluated / "evaluation.json").read_text())
    (evaluated / "evaluation.json").write_text(json.dumps({k: v for k, v in stored.items() if k != "costs"}))
    with pytest.raises(SystemExit, match=r"error: .* is damaged: it has no 'costs'"):
        cli.main(["rescore", str(evaluated)])
    (evaluated / "evaluation.json").write_text(json.dumps({**stored, "detector": {"rule": {"top": 1}}}))
    with pytest.raises(SystemExit, match=r"error: The rule in .* is damaged"):
        cli.main(["rescore", str(evaluated)])


def test_a_count_of_a_count_is_one_too(evaluated, tmp_path, capsys):
    cli.main(["rescore", str(evaluated), "--threshold", "0.85", "--output", str(tmp_path / "once.json")])
    (evaluated / "evaluation.json").write_text((tmp_path / "once.json").read_text())
    cli.main(["rescore", str(evaluated), "--threshold", "0.5"])
    assert "UA" in capsys.readouterr().out
