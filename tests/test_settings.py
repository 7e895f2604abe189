from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from sfumato.cli import main
from sfumato.settings import check_device, check_types


@dataclass
class Config:
    count: int = 1
    rate: float = 0.5
    limit: float | None = None
    flag: bool = False
    path: str | None = None
    words: list[str] | None = None

    def __post_init__(self):
        check_types(self)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("count", "3", "`count` must be a whole number, got '3'; write it without quotes"),
        ("count", 3.0, "`count` must be a whole number, got 3.0."),
        ("count", True, "`count` must be a whole number, got True."),
        ("count", None, "`count` must be a whole number, got None."),
        ("rate", "1e-5", "`rate` must be a finite number, got '1e-5'; .* as in 1.0e-5."),
        ("rate", float("inf"), "`rate` must be a finite number, got inf."),
        ("limit", [1], r"`limit` must be a finite number, got \[1\]."),
        ("flag", "false", "`flag` must be True or False, got 'false'"),
        ("flag", 1, "`flag` must be True or False, got 1."),
        ("path", 7, "`path` must be text, got 7."),
    ],
)
def test_value_of_another_type_is_refused_with_its_name(field, value, message):
    with pytest.raises(ValueError, match=message):
        Config(**{field: value})


def test_numbers_of_numpy_and_paths_become_what_json_can_hold():
    config = Config(count=np.int64(3), rate=np.float32(0.5), limit=2, path=Path("a") / "b", words=["x"])
    assert config == Config(3, 0.5, 2.0, False, "a/b", ["x"])
    assert [type(value) for value in vars(config).values()] == [int, float, float, bool, str, list]


@pytest.mark.parametrize("device", ["cuda:99", "gpu", ""])
def test_a_device_that_is_not_there_is_refused_in_one_sentence(device):
    with pytest.raises(ValueError, match=rf"^`device` '{device}' can't be used here \([^\n]+\): leave it out"):
        check_device(device)
    for known in (None, "cpu"):
        check_device(known)


@pytest.mark.parametrize(
    "command",
    [
        "evaluate --model no/model --forget x", "attack embeddings --model no/model --forget x",
        "benchmark --methods uce", "invert no.png --model no/model", "edit no.png --target-prompt x --model no/model",
        "restore {image} --model no/model",
    ],
    ids=lambda command: command.split()[0],
)  # fmt: skip
def test_a_device_that_is_not_there_is_refused_before_any_model_is_loaded(tmp_path, command):
    image, output = tmp_path / "a.png", tmp_path / "out"
    image.touch()
    given = command.format(image=image).split()
    with pytest.raises(SystemExit) as stop:
        main([*given, "--output", str(output), "--device", "cuda:99"])
    assert str(stop.value.code).startswith("error: `device` 'cuda:99' can't be used here (")
    assert not output.exists()
