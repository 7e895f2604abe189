"""How commands answer and end; with jobs that are functions of a line, none of which imports torch."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from sfumato import progress, terminal
from sfumato.terminal import Answer, Parser, Stopped, resumable, run


def ended(job, *arguments):
    with pytest.raises(SystemExit) as end:
        run(job, list(arguments))
    return end.value.code


def failing(error):
    def job(words):
        print("on the way")
        raise error

    return job


def test_an_answer_is_text_or_one_json_document(capsys):
    def job(words):
        print("on the way")
        return Answer(
            {"words": words, "path": progress, "share": float("nan"), "pair": (1, 2.5)}, "two words", "next one"
        )

    run(job, ["a", "b"])
    printed = capsys.readouterr()
    assert printed.out == "on the way\ntwo words\n" and printed.err == "next: next one\n"
    run(job, ["a", "--json", "b"])
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"words": ["a", "b"], "path": str(progress), "share": None, "pair": [1, 2.5]}
    assert printed.err == "on the way\n"


def test_processes_that_are_started_print_nothing_into_the_document():
    script = (
        "import subprocess, sys\nfrom sfumato.terminal import Answer, run\n"
        "run(lambda words: subprocess.run(['echo', 'aside']) and Answer({'a': 1}), ['--json'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert json.loads(done.stdout) == {"a": 1} and done.stderr == "aside\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("not so"), "error: not so", {"error": "not so", "type": "ValueError"}),
        (MemoryError("too large"), "error: too large", {"error": "too large", "type": "MemoryError"}),
        (KeyboardInterrupt(), 130, {"error": "interrupted", "type": "KeyboardInterrupt"}),
        (Stopped(143), 143, {"error": "interrupted", "type": "KeyboardInterrupt"}),
        (SystemExit("error: no"), "error: no", {"error": "no", "type": "SystemExit"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failure_has_its_code_and_is_said_as_json_too(error, code, said, capsys):
    assert ended(failing(error)) == code
    assert capsys.readouterr().out == "on the way\n"
    assert ended(failing(error), "--json") == code
    assert json.loads(capsys.readouterr().out) == said


def test_a_mistake_of_ours_keeps_its_traceback(capsys):
    with pytest.raises(TypeError):
        run(failing(TypeError("of ours")), ["--json"])
    assert json.loads(capsys.readouterr().out) == {"error": "of ours", "type": "TypeError"}


def test_an_answer_may_have_failed_in_part(capsys):
    job = lambda words: Answer({"done": 1}, "1 done", failure="1 of 2 could not be done")  # noqa: E731
    assert ended(job) == "error: 1 of 2 could not be done" and capsys.readouterr().out == "1 done\n"
    ended(job, "--json")
    assert json.loads(capsys.readouterr().out) == {
        "done": 1, "error": "1 of 2 could not be done", "type": "RuntimeError"
    }  # fmt: skip


def test_a_wrong_command_line_is_said_in_a_sentence(capsys):
    parser = Parser(prog="sfumato x")
    parser.add_argument("--count", type=int)
    assert ended(lambda words: parser.parse_args(words), "--count", "many") == 2
    said = "argument --count: invalid int value: 'many'"
    assert capsys.readouterr().err == f"error: {said}; see sfumato x --help\n"
    assert ended(lambda words: parser.parse_args(words), "--count", "many", "--json") == 2
    assert json.loads(capsys.readouterr().out) == {"error": said, "type": "WrongUsage"}


def test_sigterm_ends_a_job_as_ctrl_c_does_and_both_say_how_to_resume(ctrl_c, capsys, tmp_path):
    cleaned, before = [], signal.getsignal(signal.SIGTERM)

    def job(words):
        with resumable(tmp_path, "sfumato x", words, resume=False, kept=lambda: "step-2"):
            try:
                os.kill(os.getpid(), signal.SIGINT if words[-1] == "int" else signal.SIGTERM)
                time.sleep(10)
            finally:
                cleaned.append(words)

    command = "sfumato x 'Van Gogh' {} --resume"
    for name, code in (("int", 130), ("term", 143)):
        assert ended(job, "Van Gogh", name) == code
        said = capsys.readouterr().err.splitlines()
        assert said == [
            f"writes {tmp_path}; if cut short: {command.format(name)}",
            f"interrupted; the checkpoint step-2 is kept; go on with: {command.format(name)}",
        ]
    assert ended(job, "Van Gogh", "term", "--json") == 143
    told = json.loads(capsys.readouterr().out)
    assert told["kept"] == "the checkpoint step-2 is kept" and told["resume"] == command.format("term")
    assert len(cleaned) == 3 and signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_resumes_already_is_resumed_by_the_same_command(capsys, monkeypatch):
    with resumable("out", "sfumato x", ["--resume"], resume=True):
        pass
    assert capsys.readouterr().err == "writes out; if cut short: sfumato x --resume\n"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as its launcher does
    with resumable("out", "sfumato x", [], resume=False):
        pass
    assert capsys.readouterr().err == "writes out; if cut short: the same command with --resume\n"


def test_only_the_first_process_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for more in ([], ["--json"]):
        run(lambda words: Answer({"a": 1}, "text", "next one"), more)
    assert ended(failing(ValueError("not so")), "--json") == "error: not so"
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "on the way\n")


def test_a_command_within_another_leaves_the_notes_to_that(capsys, monkeypatch):
    monkeypatch.setenv("SFUMATO_WITHIN", "no bars")
    run(lambda words: Answer({"a": 1}, "text", "next one"), [])
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "within", "arguments", "shown"),
    [
        (Terminal, None, [], True), (io.StringIO, None, [], False), (Terminal, None, ["--json"], False),
        (io.StringIO, "bars", [], True), (Terminal, "no bars", [], False),
    ],
)  # fmt: skip
def test_bars_are_for_terminals(stream, within, arguments, shown, monkeypatch):
    if within is not None:
        monkeypatch.setenv("SFUMATO_WITHIN", within)
    screen = stream()
    monkeypatch.setattr(sys, "stderr", screen)

    def job(words):
        assert list(progress.Track(range(3), "long work")) == [0, 1, 2]
        return Answer({"inner": terminal.within()["SFUMATO_WITHIN"]})

    run(job, arguments)
    assert ("long work" in screen.getvalue()) == shown
    assert not progress.are_hidden()  # a library's bars are its user's


def test_bars_of_other_libraries_are_hidden_too():
    script = (
        "import sys\nfrom sfumato.terminal import run\n"
        "def job(words):\n    from tqdm.auto import tqdm\n    list(tqdm([1]))\nrun(job, [])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("job", ["Answer({'a': 1}, 'text')", "Parser(prog='x').parse_args(['--help'])"])
def test_a_closed_pipe_ends_it_without_a_traceback(job):
    reader, writer = os.pipe()
    os.close(reader)
    script = f"from sfumato.terminal import Answer, Parser, run\nrun(lambda words: {job}, [])"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_one_of_several_processes_ends_though_it_waits_for_another_outside_of_python():
    """A lock that is taken twice, which no signal ends, is what a collective of a dead process looks like."""
    script = (
        "import ctypes\nfrom sfumato import terminal\nterminal.PATIENCE = 0.2\n"
        "def job(words):\n"
        "    lock, c = ctypes.create_string_buffer(128), ctypes.CDLL(None)\n"
        "    c.pthread_mutex_lock(lock)\n    print('waits', flush=True)\n    c.pthread_mutex_lock(lock)\n"
        "terminal.run(job, [])"
    )
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"waits\n"
            process.terminate()
            assert process.wait(timeout=30) == 143
        finally:
            process.kill()
