import json

import pytest

from sfumato.demo import DemoConfig, run_demo


def test_folder_that_is_not_a_demo_s_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not an earlier demo"):
        run_demo(DemoConfig(output=str(tmp_path)))
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_file_beside_an_earlier_demo_is_not_lost(tmp_path):
    (tmp_path / "report.json").write_text('{"made_by": "sfumato demo"}')
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not an earlier demo"):
        run_demo(DemoConfig(output=str(tmp_path)))
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize("name", ["forget_repeats", "retain_repeats", "num_inference_steps", "training_steps"])
def test_numbers_below_one_are_refused_at_once(name):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        DemoConfig(**{name: 0})


def test_unknown_concept_is_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'sneaker'"):
        run_demo(DemoConfig(output=str(tmp_path / "demo"), forget="sneeker"))
    assert not (tmp_path / "demo").exists()


def test_file_in_the_way_is_named(tmp_path):
    (tmp_path / "demo").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        run_demo(DemoConfig(output=str(tmp_path / "demo")))


@pytest.mark.slow
def test_demo_reaches_its_targets(tmp_path):
    results = run_demo(DemoConfig(output=str(tmp_path / "demo")))
    assert results["targets"] == {"ua": True, "ira": True, "cra": True}
    assert json.loads((tmp_path / "demo" / "report.json").read_text()) == results
