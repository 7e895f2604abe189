"""Jobs that are cut short by a signal, and gone on with by the line that they print."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sfumato import cli

ROOT = Path(__file__).parents[2]
SMALL = [
    "--forget", "sneaker", "--output", "no-sneaker", "--no_verify", "--forget_examples", "4", "--retain_examples", "4",
    "--example_steps", "2", "--example_batch_size", "4", "--batch_size", "4", "--checkpoint_every", "2",
]  # fmt: skip


def cut_short(command, folder, number, begun):
    """Start a command, and send it a signal when it has begun; gives its code, and what it printed and said."""
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 300
        while not list(folder.glob(begun)) and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        process.send_signal(number)
        printed, said = process.communicate(timeout=60)
    return process.returncode, printed, said


def test_a_training_that_sigterm_ended_goes_on_by_its_own_words(tmp_path, monkeypatch, capsys):
    command = [sys.executable, "-m", "sfumato", "unlearn", "salun", *SMALL, "--steps", "4000", "--json"]
    code, printed, said = cut_short(command, tmp_path, signal.SIGTERM, "no-sneaker/checkpoints/step-*")
    assert code == 143 and "Traceback" not in said and "%|" not in said
    found = json.loads(printed)
    assert found["error"] == "interrupted"
    newest = max((tmp_path / "no-sneaker" / "checkpoints").iterdir())
    assert found["kept"] == f"the checkpoint no-sneaker/checkpoints/{newest.name} is kept"
    assert said.splitlines()[-1] == f"interrupted; {found['kept']}; go on with: {found['resume']}"
    assert f"writes no-sneaker; if cut short: {found['resume']}\n" in said
    assert not (tmp_path / "no-sneaker" / ".running").exists()
    monkeypatch.chdir(tmp_path)
    words = shlex.split(found["resume"])
    done = int(newest.name.removeprefix("step-"))
    refused = [str(done + 2) if word == "4000" else word for word in words[1:]]
    with pytest.raises(SystemExit, match="steps"):  # another run than the checkpoint's
        cli.main(refused)
    assert words[0] == "sfumato" and words[-1] == "--resume"


def test_the_printed_line_finishes_a_run(ctrl_c, tmp_path):
    """Of a script, by Ctrl-C."""
    command = ["training/salun.py", *SMALL, "--steps", "24"]
    (tmp_path / "training").symlink_to(ROOT / "training")
    code, printed, said = cut_short(
        [sys.executable, *command], tmp_path, signal.SIGINT, "no-sneaker/checkpoints/step-*"
    )  # fmt: skip
    assert code == 130 and printed == "" and "Traceback" not in said
    kept, line = re.search(r"interrupted; the checkpoint (\S+) is kept; go on with: (.*)\n", said).groups()
    assert (tmp_path / kept).is_dir() and shlex.split(line) == ["python", *command, "--resume"]
    words = [sys.executable, *shlex.split(line)[1:]]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "result no-sneaker, which forgot sneaker; its manifest.json says how\n"
    history = json.loads((tmp_path / "no-sneaker" / "history.json").read_text())
    assert len(history) == 24
    assert "next: sfumato evaluate --model no-sneaker " in done.stderr


def test_a_launched_job_is_resumed_by_the_same_command(launch, tmp_path):
    done = launch("training/salun.py", *SMALL[:2], "--output", tmp_path / "out", *SMALL[4:], "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert f"writes {tmp_path / 'out'}; if cut short: the same command with --resume\n" in done.stderr
    assert f"result {tmp_path / 'out'}" in done.stdout
