"""What the help tells, which is read here by the parsers that it is the help of."""

import json
import shlex
import subprocess
import sys

import pytest

from sfumato import cli
from sfumato.attacks.methods import ATTACKS
from sfumato.cli import catalogue
from sfumato.cli.commands import COMMANDS
from sfumato.cli.help import EXAMPLES, GROUPS, STORY, SUMMARIES, examples
from sfumato.cli.parser import OWN_OPTIONS, make_parser
from sfumato.loading import EMBEDDED
from sfumato.terminal import EXIT_CODES
from sfumato.unlearning.methods import METHODS

EVERY = [
    *(line for name in EXAMPLES if name not in ("unlearn", "attack") for line in examples(name)),
    *(line for name in METHODS for line in examples("unlearn", method=name)),
    *(line for name in ATTACKS for line in examples("attack", attack=name)),
    *STORY,
]


@pytest.fixture(scope="module")
def whole():
    return make_parser(whole=True)


def help_of(capsys, *words):
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_the_story_names_every_command_once_in_a_group(capsys):
    said = help_of(capsys)
    listed = [line.split()[0] for line in said.splitlines() if line.startswith("  ") and line.split()[0] in SUMMARIES]
    assert listed == [name for commands in GROUPS.values() for name in commands]
    assert set(listed) == {*COMMANDS, *OWN_OPTIONS} == set(EXAMPLES)
    assert all(f"  {code} " in said and meaning in said for code, meaning in EXIT_CODES.items())
    assert all(line in said for line in STORY)
    assert max(map(len, said.splitlines())) <= 119


@pytest.mark.parametrize("command", SUMMARIES)
def test_the_help_of_a_command_ends_with_its_examples(command, capsys):
    names = {"unlearn": {"method": "salun"}, "attack": {"attack": "unlearndiffatk"}}.get(command, {})
    end = "\n".join(f"  {line}" for line in examples(command, **names))
    assert help_of(capsys, command).endswith(f"examples:\n{end}\n")


@pytest.mark.parametrize("words", [("unlearn", "uce"), ("attack", "p4d")], ids=" ".join)
def test_the_help_of_a_method_and_an_attack_has_its_own(words, capsys):
    said = help_of(capsys, *words)
    kind = {"unlearn": "method", "attack": "attack"}[words[0]]
    assert said.startswith(f"usage: sfumato {' '.join(words)} [-h] ") and "--json" in said
    assert said.endswith("".join(f"  {line}\n" for line in examples(words[0], **{kind: words[1]})))
    assert "(default: None)" not in said


@pytest.mark.parametrize("line", EVERY)
def test_an_example_is_read_by_its_parser(line, whole):
    words = shlex.split(line)
    assert words[0] == "sfumato" and words[1] in SUMMARIES
    found = whole.parse_args([word for word in words[1:] if word != "--json"])  # taken off before
    assert found.command == words[1]


def test_names_and_summaries_are_those_of_the_registries():
    assert catalogue.method_names() == list(METHODS)
    assert catalogue.methods() == {name: method.summary for name, method in METHODS.items()}
    assert catalogue.attacks() == {name: attack.summary for name, attack in ATTACKS.items()}
    assert catalogue.models() == list(EMBEDDED)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["unlaern"], "there is no command 'unlaern'. Did you mean 'unlearn'? See sfumato --help"),
        (["unlearn", "salum", "--forget", "x"], "there is no method 'salum'; choose from salun, .* mean 'salun'?"),
        (["attack", "ring-a-bell"], "there is no attack 'ring-a-bell'; choose from .* mean 'ring_a_bell'?"),
        ([], "the following arguments are required: COMMAND"),
        (["unlearn"], "the following arguments are required: method"),
        (["unlearn", "--", "salun"], "name what to unlearn by first"),
        (["completion", "fish"], "argument shell: invalid choice: 'fish'"),
        (["restore", "a.png"], "the following arguments are required: --model, --output"),
        (["evaluate", "--model", "x"], "the following arguments are required: --forget, --output"),
        (["evaluate", "--js"], "write --json in full"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_gets_one_sentence_and_code_2(words, said, capsys):
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as end:
            cli.main([*words, *more])
        assert end.value.code == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
        whole, _, rest = said.partition(" .* ")
        assert whole in printed.err and rest in printed.err
        assert bool(printed.out) == bool(more)
        if more:
            assert json.loads(printed.out)["error"] in printed.err


def test_what_needs_no_model_answers_without_torch():
    """All of it in one process, which has imported nothing."""
    lines = ["--help", "--version", "methods", "attacks --json", "unlearn --help", "attack --help", "unlearn salum",
             "attack p5d", "benchmrk", "release --help", "restore"]  # fmt: skip
    script = (
        "import sys\nfrom sfumato import cli\n"
        f"for line in {lines!r}:\n"
        "    try:\n        cli.main(line.split())\n"
        "    except SystemExit as end:\n        assert end.code in (0, 2), line\n"
        "sys.exit(str({'torch', 'diffusers', 'transformers', 'numpy', 'tqdm'} & set(sys.modules) or '') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "SalUn" in done.stdout and "UnlearnDiffAtk" in done.stdout


@pytest.mark.parametrize("module", ["sfumato", "sfumato.cli"])
def test_the_command_is_a_module_too(module):
    done = subprocess.run([sys.executable, "-m", module, "attacks"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines()[0].startswith("unlearndiffatk ")
