"""What commands and training scripts share at a terminal: answers as text or JSON, exit codes, and how to resume.

Standard output is for the answer alone; what is said on the way, and progress bars, go to standard error. Of several
processes only the first one speaks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from sfumato import progress

__all__ = [
    "EXIT_CODES", "JSON_HELP", "Answer", "Help", "Parser", "Stopped", "WrongUsage", "examples_of", "is_first",
    "resumable", "run", "say", "script", "within",
]  # fmt: skip

EXIT_CODES: Mapping[int, str] = {
    0: "done",
    1: "failed; the last line of standard error says why, in a sentence",
    2: "the command line is wrong",
    130: "interrupted by Ctrl-C (SIGINT)",
    141: "whoever read the output has closed it (SIGPIPE)",
    143: "ended by SIGTERM, as by a cluster",
}
JSON_HELP = "print the result as one JSON document, and nothing else, on standard output"
FAULTS = (ValueError, OSError, ImportError, MemoryError, RuntimeError)
"""What a user can mend, or at least is told in a sentence."""
WITHIN = "SFUMATO_WITHIN"
"""Environment variable that a command sets for one that it starts: ``bars`` or ``no bars``."""
PATIENCE = 5.0
"""Seconds that one of several processes has to end by itself when it gets SIGTERM; it may be waiting for another."""


class Answer(NamedTuple):
    """What a command has found or made.

    Attributes:
        data: For ``--json``.
        text: For people.
        following: A command that may come next.
        failure: Why it failed all the same.
    """

    data: Mapping[str, Any]
    text: str = ""
    following: str = ""
    failure: str = ""


class WrongUsage(SystemExit):
    """The command line is wrong; it has been said on standard error.

    Args:
        said: How, in a sentence.
    """

    def __init__(self, said: str) -> None:
        super().__init__(2)
        self.said = said


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with the defaults of options, and with examples as they were written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or action.default in (argparse.SUPPRESS, ())
        plain = silent or not action.option_strings
        return action.help if plain else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser that says in one sentence what is wrong with a command line."""

    def error(self, message: str) -> NoReturn:
        """Say it, and end with code 2."""
        if is_first():
            see = f" See {self.prog} --help." if message.endswith((".", "?")) else f"; see {self.prog} --help"
            print(f"error: {message}{see}", file=sys.stderr)
        raise WrongUsage(message)


def examples_of(lines: Sequence[str]) -> str | None:
    """Lay example commands out for the end of a help; None if there are none."""
    return "\n".join(["examples:", *(f"  {line}" for line in lines)]) if lines else None


class Stopped(KeyboardInterrupt):
    """The process was asked to end.

    Args:
        status: The exit code.
        kept: What is kept of its work.
        resume: The command that goes on with it.
    """

    def __init__(self, status: int = 130, kept: str = "", resume: str = "") -> None:
        super().__init__(kept)
        self.status, self.kept, self.resume = status, kept, resume


def is_first() -> bool:
    """Whether this is the first process of a job, before its group is made."""
    return int(os.environ.get("RANK", 0)) == 0


def say(text: str) -> None:
    """Say something on the way, on standard error; the first process does, unless another command has started it."""
    if is_first() and WITHIN not in os.environ:
        print(text, file=sys.stderr, flush=True)


def within() -> dict[str, str]:
    """Give the environment of a command that is part of this one: it shows bars if this one does, and no notes."""
    return {WITHIN: "no bars" if progress.are_hidden() else "bars"}


def script() -> str:
    """Give how the script that runs was called; nothing if a launcher did, which was called otherwise."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "WORLD_SIZE" in os.environ:
        return ""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec is not None else shlex.join(["python", sys.argv[0]])


@contextmanager
def resumable(
    folder: str | Path, program: str, arguments: Sequence[str], *, resume: bool, kept: Callable[[], Any] = lambda: None
) -> Iterator[None]:
    """Say where a long job writes and how it is resumed, when it begins and when it is interrupted.

    Args:
        folder: Where it writes.
        program: The words before its arguments; none if they are not known.
        arguments: Of the command line.
        resume: Whether they resume it already.
        kept: Gives the newest checkpoint, if there is one.
    """
    launched = not program or "ACCELERATE_MIXED_PRECISION" in os.environ
    words = [*arguments, *([] if resume else ["--resume"])]
    command = "the same command with --resume" if launched else f"{program} {shlex.join(words)}"
    say(f"writes {folder}; if cut short: {command}")
    try:
        yield
    except KeyboardInterrupt as stop:
        newest = kept()
        what = f"the checkpoint {newest} is kept" if newest else f"what is done is kept in {folder}"
        raise Stopped(getattr(stop, "status", 130), what, command) from stop


def run(job: Callable[[list[str]], Answer | None], arguments: Sequence[str] | None = None) -> None:
    """Run a command, print its answer, and end the process if it failed.

    Args:
        job: Takes the command line without ``--json``.
        arguments: The command line; None takes the process's own.

    Raises:
        SystemExit: With a code of `EXIT_CODES`, or the sentence that goes with 1.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in given if word != "--json"]
    logging.getLogger("transformers.utils.import_utils").addFilter(_matters)
    as_json = len(words) < len(given) and not {"-h", "--help"} & set(words)
    try:
        with _stopped_by_sigterm(), _bars(as_json):
            answer = _answered(job, words, as_json)
            if answer is not None and is_first():
                _give(answer, as_json)
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # else Python complains when it flushes what is left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except FAULTS as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        known = [stop.kept, f"go on with: {stop.resume}"] if isinstance(stop, Stopped) and stop.resume else []
        say("; ".join(["interrupted", *known]))
        sys.exit(getattr(stop, "status", 130))
    if answer is not None and answer.failure:
        sys.exit(f"error: {answer.failure}")


def _matters(record: logging.LogRecord) -> bool:
    """Whether a message of transformers does: that torchvision, which nothing here needs, is missing, does not."""
    return "requires torchvision" not in record.getMessage()


def _answered(job: Callable[[list[str]], Answer | None], words: list[str], as_json: bool) -> Answer | None:
    """Let the job work; what ends it is said as JSON, if that was asked for, and raised."""
    try:
        with _nothing_printed() if as_json else contextlib.nullcontext():
            return job(words)
    except SystemExit as end:
        sys.stdout.flush()  # of --help; here a closed pipe is noticed
        if as_json and end.code and is_first():
            _print_json(_failure(end))
        raise
    except BaseException as error:
        if as_json and is_first():
            _print_json(_failure(error))
        raise


def _failure(error: BaseException) -> dict[str, Any]:
    """What JSON says of a failure."""
    if isinstance(error, KeyboardInterrupt):
        kept = {"kept": error.kept, "resume": error.resume} if isinstance(error, Stopped) and error.resume else {}
        return {"error": "interrupted", "type": "KeyboardInterrupt", **kept}
    said = error.said if isinstance(error, WrongUsage) else str(error).removeprefix("error: ")
    return {"error": said, "type": type(error).__name__}


def _give(answer: Answer, as_json: bool) -> None:
    failed = {"error": answer.failure, "type": "RuntimeError"} if answer.failure else {}
    if as_json:
        _print_json({**answer.data, **failed})
        return
    if answer.text and WITHIN not in os.environ:
        print(answer.text, flush=True)
    if answer.following:
        say(f"next: {answer.following}")


def _print_json(data: Mapping[str, Any]) -> None:
    print(json.dumps(_plain(data), indent=1, ensure_ascii=False), flush=True)


def _plain(value: Any) -> Any:
    """The value as JSON can hold it, which knows no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


@contextmanager
def _nothing_printed() -> Iterator[None]:
    """Send what is printed on the way to standard error, also by processes that are started."""
    own = sys.stdout is sys.__stdout__ and sys.stdout is not None
    sys.stdout.flush()
    saved = os.dup(1) if own else None
    try:
        if saved is not None:
            os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)


@contextmanager
def _bars(as_json: bool) -> Iterator[None]:
    """Show progress bars on a terminal, and lines elsewhere; a command that another has started follows that one."""
    there = sys.stderr is not None and sys.stderr.isatty()
    shown = os.environ[WITHIN] == "bars" if WITHIN in os.environ else there and not as_json
    if not shown and "tqdm" not in sys.modules:
        os.environ.setdefault("TQDM_DISABLE", "1")  # read once: those of diffusers and transformers
    with progress.hidden(not shown, lines=not as_json):
        yield


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that what is open is closed and the user is told how to resume."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> NoReturn:
        raise Stopped(143)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with _in_time() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else contextlib.nullcontext():
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _in_time() -> Iterator[None]:
    """End this process some time after SIGTERM even where Python never runs again, as when it waits for another."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGTERM:
                time.sleep(PATIENCE)
                os._exit(143)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
