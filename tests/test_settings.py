from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from sfumato.settings import check_types


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
