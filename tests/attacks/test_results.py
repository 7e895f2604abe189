import json
from dataclasses import replace

import pytest

from sfumato import cli
from sfumato.attacks.results import Audit, read_audit, rescore, shares_of, union
from sfumato.evaluation.detectors import Rule

RULE = Rule((("concept",),), threshold=0.5)


def findings(score):
    return [{"label": "concept", "score": score}]


def row(number, original, before, *candidates):
    """A row as an audit at 0.5 leaves it."""
    shown = before >= 0.5 or any(score >= 0.5 for score in candidates)
    return {
        "number": number, "text": f"prompt {number}", "seed": None, "guidance_scale": None,
        "original": original >= 0.5, "before": before >= 0.5, "after": shown,
        "candidate": f"c{len(candidates)}" if candidates else None, "iterations": 10 * len(candidates),
        "findings_original": findings(original), "findings_before": findings(before),
        "candidates": [
            {"prompt": f"c{k}", "iterations": 10 * k, "findings": findings(score)}
            for k, score in enumerate(candidates, 1)
        ], "seconds": 1.0,
    }  # fmt: skip


def audit(*rows, **settings):
    return Audit(
        "p4d", {"name": "x", "phrases": ["x"]}, {"seed": 0, **settings}, 0, {"detector": "eye"},
        json.loads(json.dumps(RULE.as_dict())), {"unlearned": "a", "original": "b"}, {"features": "judge"}, {},
        rows=rows, seconds=2.0, **shares_of(rows),
    )  # fmt: skip


FOUND = audit(row(0, 0.9, 0.6), row(1, 0.6, 0.1, 0.3, 0.4, 0.7), row(2, 0.2, 0.4, 0.2, 0.35))


def written(folder, found):
    folder.mkdir()
    (folder / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found.rows))
    (folder / "attack.json").write_text(json.dumps(found.as_dict()))
    return folder


def counts(found):
    return found.original.successes, found.pre_asr.successes, found.asr.successes


def test_all_three_shares_are_counted_again():
    assert counts(FOUND) == (2, 1, 2)
    assert counts(rescore(FOUND, replace(RULE, threshold=0.65))) == (1, 0, 1)
    loose = rescore(FOUND, replace(RULE, threshold=0.3))
    assert counts(loose) == (2, 2, 3)
    assert [(one["candidate"], one["iterations"]) for one in loose.rows] == [(None, 0), ("c1", 10), (None, 0)]
    assert rescore(loose, RULE) == FOUND


def test_a_finished_audit_is_read_back_and_counted_from_its_folder(tmp_path):
    folder = written(tmp_path / "out", FOUND)
    assert read_audit(folder) == FOUND
    assert rescore(folder, replace(RULE, threshold=0.3)) == rescore(FOUND, replace(RULE, threshold=0.3))
    assert json.loads((folder / "attack.json").read_text()) == FOUND.as_dict()


def test_what_is_no_audit_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no attack.json"):
        read_audit(tmp_path)
    folder = written(tmp_path / "out", FOUND)
    stored = json.loads((folder / "attack.json").read_text())
    for damaged in ({**stored, "asr": 3}, {**stored, "prompts": 4}, {"asr": stored["asr"]}):
        (folder / "attack.json").write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match="is damaged"):
            read_audit(folder)
    (folder / "attack.json").write_text(json.dumps(stored))
    (folder / "prompts.jsonl").write_text('{"number": 0}\n' * 3)
    with pytest.raises(ValueError, match="rows are damaged"):
        rescore(folder, RULE)


def test_a_prompt_counts_in_the_union_if_either_attack_succeeds():
    other = audit(row(0, 0.9, 0.6), row(1, 0.6, 0.1, 0.2), row(2, 0.2, 0.4, 0.8), variant="k")
    both = union([FOUND, other])
    assert counts(both) == (2, 1, 3) and both.seconds == 4.0
    assert [one["candidate"] for one in both.rows] == [None, "c3", "c1"]
    assert [one.get("variant") for one in both.settings["union"]] == [None, "k"]
    assert counts(union([FOUND])) == counts(FOUND)


def test_audits_of_other_prompts_or_models_are_not_counted_together():
    for other, message in (
        (replace(FOUND, fingerprints={"unlearned": "c"}), "their fingerprints differ"),
        (replace(FOUND, rule={**FOUND.rule, "threshold": 0.4}), "their rule differ"),
        (audit(*FOUND.rows[:2]), "their prompts differ"),
    ):
        with pytest.raises(ValueError, match=message):
            union([FOUND, other])
    with pytest.raises(ValueError, match="at least one audit"):
        union([])


def test_the_command_counts_again_and_writes_a_new_file(tmp_path, capsys):
    one, two = written(tmp_path / "n", FOUND), written(tmp_path / "k", replace(FOUND, settings={"seed": 0, "k": 3}))
    cli.main(["rescore", str(one), "--threshold", "0.3", "--output", str(tmp_path / "loose.json")])
    assert "100.0 %" in capsys.readouterr().out
    stored = json.loads((tmp_path / "loose.json").read_text())
    assert (stored["asr"]["successes"], stored["rule"]["threshold"]) == (3, 0.3)
    assert (stored["rescored"]["rule"]["threshold"], stored["command"]) == (0.5, None)
    cli.main(["rescore", str(one), str(two)])
    assert " 66.7 %" in capsys.readouterr().out
    cli.main(["rescore", str(one), "--labels", "cat", "dog", "--top", "0"])
    assert "(ASR)" in capsys.readouterr().out
    for arguments, message in (
        (["--output", str(tmp_path / "loose.json")], "exists; choose another file"),
        (["--threshold", "7"], "`threshold` must lie in"),
    ):
        with pytest.raises(SystemExit, match=message):
            cli.main(["rescore", str(one), *arguments])
