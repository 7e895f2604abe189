"""Loops show how far they are: a bar on a terminal, a line now and then in a log, nothing with --json."""

import re

import pytest

from sfumato import progress
from sfumato.progress import Track


def looped(track):
    for number in track:
        track.say(loss=f"{number}.5")


def test_where_there_is_no_terminal_lines_say_how_far_a_loop_is(capsys, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    with progress.hidden(lines=True):
        looped(Track(range(2, 5), "salun", start=2))
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"\d:\d\d:\d\d", "T", line) for line in lines] == [
        "salun: 3 of 5, loss 2.5, T left", "salun: 4 of 5, loss 3.5, T left", "salun: 5 of 5, loss 4.5, T left",
    ]  # fmt: skip


def test_lines_come_at_intervals(capsys):
    with progress.hidden(lines=True):
        looped(Track(range(100), "salun"))  # which takes no minute
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("hide", "lines", "shown"), [(True, False, True), (True, True, False), (False, True, True)])
def test_there_are_no_lines_beside_a_bar_or_where_nothing_is_to_be_shown(hide, lines, shown, capsys, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    with progress.hidden(hide, lines=lines):
        looped(Track(range(2), "salun", shown=shown))
    assert "of 2," not in capsys.readouterr().err


def test_a_rehearsal_is_not_told_of(capsys, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    with progress.hidden(lines=True), progress.rehearsing() as phases:
        looped(Track(range(9), "salun"))
    assert [phase.passes for phase in phases] == [9] and capsys.readouterr().err == ""
