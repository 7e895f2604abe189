from dataclasses import dataclass, field

import pytest

from sfumato.arguments import make_parser


@dataclass
class Config:
    """Some settings.

    Attributes:
        bound: A number or None.
        count: Likewise.
        name: Text or None.
        words: Texts or None.
        plain: A number.
    """

    bound: float | None = 5.0
    count: int | None = 3
    name: str | None = "x"
    words: list[str] | None = field(default=None, metadata={"nargs": "+"})
    plain: float = 1.0


def parse(*arguments):
    return make_parser(Config).parse_args_into_dataclasses(list(arguments))[0]


def test_a_number_that_may_be_none_can_be_set_to_none():
    assert parse() == Config()
    assert parse("--bound", "none", "--count", "None") == Config(bound=None, count=None)
    assert parse("--bound", "2", "--count", "7") == Config(bound=2.0, count=7)
    assert parse("--name", "none", "--words", "none").name == "none"  # a word like any other


@pytest.mark.parametrize(
    ("argument", "message"), [("--bound", "invalid float value"), ("--count", "invalid int value")]
)
def test_what_is_no_number_is_refused_in_words(capsys, argument, message):
    with pytest.raises(SystemExit):
        parse(argument, "many")
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--plain", "none")


def test_help_is_the_docstring(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    assert "A number or None." in capsys.readouterr().out
