"""The commands from a model to its release, each by --json: one document, and what it says is what was written."""

import contextlib
import io
import json
import re
import shlex
import shutil

import pytest

from sfumato import cli
from sfumato.loading import assets_folder

FOREIGN = ("Loading ", "Writing ", " ", "100%")
"""Bars of diffusers and transformers, which are hidden only where these are not imported yet."""
CHAIN = {
    "unlearn": "unlearn uce --forget sneaker --output no-sneaker --no_verify",
    "plan": "unlearn salun --forget sneaker --output planned --dry-run --no_verify --forget_examples 2 "
    "--retain_examples 2 --example_steps 2 --batch_size 2",
    "evaluate": "evaluate --model no-sneaker --forget sneaker --output evaluated --forget_repeats 1 --resamples 2 "
    "--num_inference_steps 1",
    "attack": "attack unlearndiffatk --model no-sneaker --forget sneaker --output attacked --iterations 1 --times 2 "
    "--count 2 --num_inference_steps 2",
    "rescore": "rescore attacked --threshold 0.9 --output again.json",
    "release": "release no-sneaker --output release --evaluation evaluated/evaluation.json "
    "--attacks attacked/attack.json",
    "invert": 'invert picture.png --prompt "a photo of a red sandal" --exact --output inverted '
    "--num-inference-steps 2",
    "edit": 'edit inverted --target-prompt "a photo of a green sandal" --output edited',
    "restore": "restore picture.png broken.png --model atelier-inpaint --mask picture.png --output restored",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Gives the folder, and of each command what it printed, what it said, and its exit code."""
    folder, found = tmp_path_factory.mktemp("chain"), {}
    shutil.copy(next((assets_folder() / "renders").glob("*red.png")), folder / "picture.png")
    (folder / "broken.png").write_bytes(b"no picture")
    for name, line in CHAIN.items():
        printed, said, code = io.StringIO(), io.StringIO(), 0
        with contextlib.chdir(folder), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            try:
                cli.main([*shlex.split(line), "--json"])
            except SystemExit as end:
                code = end.code
        found[name] = (printed.getvalue(), said.getvalue(), code)
    return folder, found


@pytest.mark.parametrize("name", CHAIN)
def test_a_command_prints_one_document_and_nothing_else(name, answers):
    printed, said, code = answers[1][name]
    assert isinstance(json.loads(printed), dict), said
    assert (code == 0) == (name != "restore"), code
    bars = [bar for bar in re.split(r"[\r\n]", said) if "%|" in bar]
    assert all(bar.startswith(FOREIGN) for bar in bars), bars


def documents(answers):
    return answers[0], {name: json.loads(printed) for name, (printed, _, _) in answers[1].items()}


def test_the_documents_say_what_was_written(answers):
    folder, found = documents(answers)
    manifest = json.loads((folder / "no-sneaker" / "manifest.json").read_text())
    assert found["unlearn"] == {"output": "no-sneaker", **{k: v for k, v in manifest.items() if k != "concept"}}
    assert found["evaluate"]["scores"] == json.loads((folder / "evaluated" / "evaluation.json").read_text())["scores"]
    attacked = json.loads((folder / "attacked" / "attack.json").read_text())
    assert found["attack"]["asr"] == attacked["asr"] and found["attack"]["output"] == "attacked"
    again = json.loads((folder / "again.json").read_text())
    assert found["rescore"]["asr"] == again["asr"] and found["rescore"]["rescored"]["by"]["threshold"] == 0.9
    assert found["release"] == {"output": "release", "card": "release/README.md", "hub": None}
    assert (folder / "release" / "README.md").exists()
    for name, place in (("invert", "inverted"), ("edit", "edited")):
        figures = json.loads((folder / place / "figures.json").read_text())
        assert found[name] == {"output": place, **figures}


def test_a_dry_run_is_a_document_and_writes_nothing(answers):
    folder, found = documents(answers)
    assert found["plan"]["method"] == "salun" and found["plan"]["memory_mb"] > 100
    assert found["plan"]["seconds"] == sum(phase["seconds"] for phase in found["plan"]["phases"])
    assert not (folder / "planned").exists()


def test_what_failed_in_part_says_so_in_the_document_and_by_its_code(answers):
    folder, found = documents(answers)
    report = json.loads((folder / "restored" / "restored.json").read_text())
    assert found["restore"]["pictures"] == report["pictures"] and len(report["pictures"]) == 1
    assert found["restore"]["type"] == "RuntimeError"
    assert answers[1]["restore"][2] == f"error: {found['restore']['error']}"
    assert found["restore"]["error"].startswith("1 of 2 could not be restored:")


@pytest.mark.parametrize("name", ["unlearn", "evaluate", "attack", "restore"])
def test_a_long_job_says_where_it_writes_and_how_it_is_resumed(name, answers):
    place = {"unlearn": "no-sneaker", "evaluate": "evaluated", "attack": "attacked", "restore": "restored"}[name]
    line = shlex.join(shlex.split(CHAIN[name]))
    assert f"writes {place}; if cut short: sfumato {line} --resume\n" in answers[1][name][1]


def test_a_finished_job_says_what_may_come_next_and_that_works(answers, capsys, monkeypatch):
    folder, _ = answers
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match="already holds a finished model"):
        cli.main(shlex.split(CHAIN["unlearn"]))
    cli.main([*shlex.split(CHAIN["unlearn"].replace("no-sneaker", "another"))])
    printed = capsys.readouterr()
    assert printed.out == "result another, which forgot sneaker; its manifest.json says how\n"
    following = printed.err.rpartition("next: ")[2].strip()
    assert following == "sfumato evaluate --model another --forget sneaker --output another-evaluated"
    cli.main([*shlex.split(following)[1:], *shlex.split(CHAIN["evaluate"])[7:]])
    printed = capsys.readouterr()
    assert "UA" in printed.out and printed.out.endswith("another-evaluated/evaluation.json\n")
    following = printed.err.rpartition("next: ")[2].strip()
    cli.main([*shlex.split(following)[1:], *shlex.split(CHAIN["attack"])[8:]])
    printed = capsys.readouterr()
    following = printed.err.rpartition("next: ")[2].strip()
    assert following.startswith("sfumato release another --output another-release --attacks ")
    cli.main(shlex.split(following)[1:])
    assert (folder / "another-release" / "README.md").exists()


def test_a_document_says_what_was_wrong(capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        cli.main(["unlearn", "uce", "--forget", "snaeker", "--output", str(tmp_path / "out"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["type"] == "ValueError" and "Did you mean 'sneaker'" in found["error"]
    assert end.value.code == f"error: {found['error']}" and not (tmp_path / "out").exists()
