"""Completion, asked for as bash asks for it."""

import json
import subprocess
import sys

import pytest

from sfumato import cli
from sfumato.attacks.methods import ATTACKS
from sfumato.cli.help import SUMMARIES
from sfumato.loading import EMBEDDED
from sfumato.unlearning.methods import METHODS

PRESS_TAB = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
[[ $(complete -p sfumato) =~ -F\\ ([^ ]+) ]] && ${BASH_REMATCH[1]}
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def offered(tmp_path_factory):
    """Gives what bash offers for the last of some words, in a folder that holds a model's."""
    pytest.importorskip("shtab")
    folder = tmp_path_factory.mktemp("completion")
    (folder / "my-model").mkdir()
    (folder / "picture.png").touch()
    done = subprocess.run([sys.executable, "-m", "sfumato", "completion", "bash"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "script").write_text(done.stdout)

    def press_tab(*words):
        command = ["bash", "--norc", "-c", PRESS_TAB, "bash", "./script", "sfumato", *words]
        answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
        assert answer.returncode == 0, answer.stderr
        return set(answer.stdout.split())

    return press_tab


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["re"], {"rescore", "restore", "release"}),
        (["unlearn", ""], set(METHODS)),
        (["attack", ""], set(ATTACKS)),
        (["unlearn", "salun", "--mask_r"], {"--mask_ratio"}),
        (["unlearn", "salun", "--forget", "sneaker", "--dry"], {"--dry_run"}),
        (["unlearn", "uce", "--dtype", "b"], {"bfloat16"}),
        (["evaluate", "--model", ""], {*EMBEDDED, "my-model"}),
        (["unlearn", "uce", "--model", "atelier-s"], {"atelier-sr"}),
        (["benchmark", "--methods", "u"], {"uce"}),
        (["release", "--evaluation", "p"], {"picture.png"}),
        (["release", "--attacks", "p"], {"picture.png"}),
        (["restore", "p"], {"picture.png"}),
        (["restore", "picture.png", "--compare", ""], {"row", "none"}),
        (["completion", ""], {"bash", "zsh", "tcsh"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bash_offers_commands_options_and_names(words, expected, offered):
    assert offered(*words) == expected


def test_bash_offers_every_command(offered):
    assert offered("") == set(SUMMARIES)


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_the_other_shells_get_the_same_names(shell, capsys):
    pytest.importorskip("shtab")
    cli.main(["completion", shell, "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["shell"] == shell
    assert all(name in answer["script"] for name in (*SUMMARIES, *METHODS, *ATTACKS, *EMBEDDED, "mask_ratio"))


def test_without_shtab_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(
        SystemExit, match=r"^error: Completion needs shtab: run pip install 'sfumato\[completion\]'\.$"
    ):
        cli.main(["completion", "bash"])
