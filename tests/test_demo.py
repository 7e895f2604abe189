import json
import sys
import time

import pytest

from sfumato.demo import DemoConfig, _launch, _run_job, run_demo


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


@pytest.mark.parametrize(
    "name", ["forget_repeats", "retain_repeats", "num_inference_steps", "training_steps", "training_examples"]
)
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


def test_error_of_a_job_is_given_back_and_not_shown(capfd):
    script = "import sys; print('so far', file=sys.stderr); sys.exit('error: no such thing')"
    assert _run_job([sys.executable, "-c", script]) == (1, "no such thing")
    assert capfd.readouterr().err == "so far\n"


@pytest.mark.slow
def test_error_of_the_launched_job_is_said_once(tmp_path, capfd):
    with pytest.raises(RuntimeError, match="^atelier does not know the concept 'snaeker'. Did you mean 'sneaker'"):
        _launch(DemoConfig(forget="snaeker"), tmp_path / "out")
    assert "error:" not in capfd.readouterr().err


def test_job_s_own_output_is_shown_as_it_comes(capfd):
    script = "import sys; print('\\rdraw 1', end='\\rdraw 2', file=sys.stderr); sys.exit(3)"
    assert _run_job([sys.executable, "-c", script]) == (3, "")
    assert capfd.readouterr().err == "\rdraw 1\rdraw 2"


def test_an_interrupted_job_takes_its_children_along(tmp_path, monkeypatch):
    """The launcher starts processes of its own, which would go on alone."""
    alive = tmp_path / "alive"
    child = f"import time\nwhile True: open({str(alive)!r}, 'a').write('.'); time.sleep(0.02)"
    script = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"

    def interrupted(*_, **__):
        while not alive.exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr("sfumato.demo.io.TextIOWrapper", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _run_job([sys.executable, "-c", script])
    time.sleep(0.2)
    size = alive.stat().st_size
    time.sleep(0.3)
    assert alive.stat().st_size == size


def test_folder_below_a_file_and_seeds_that_torch_can_not_take_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        run_demo(DemoConfig(output=str(tmp_path / "file" / "demo")))
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match="`seed` must be a whole number from 0"):
            DemoConfig(seed=seed)


def test_job_that_dies_without_a_word_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr("sfumato.demo.sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match="The unlearning job failed with status 1"):
        _launch(DemoConfig(), tmp_path / "out")


@pytest.mark.slow
def test_demo_reaches_its_targets(tmp_path):
    results = run_demo(DemoConfig(output=str(tmp_path / "demo")))
    assert results["targets"] == {"ua": True, "ira": True, "cra": True}
    assert json.loads((tmp_path / "demo" / "report.json").read_text()) == results
