"""Two processes that share a batch learn what one does."""

import json
import runpy
from pathlib import Path

import pytest

from sfumato import storage

JOBS = str(Path(__file__).with_name("process_jobs.py"))


def weights(folder, name):
    files = sorted((folder / name).glob("*unet/*.safetensors"))
    return {f"{file.parent.name}.{key}": value for file in files for key, value in storage.load_tensors(file).items()}


def norm(tensors):
    return sum(float(values.double().square().sum()) for values in tensors) ** 0.5


@pytest.fixture(scope="module")
def folders(launch, renders, tmp_path_factory):
    made = {count: tmp_path_factory.mktemp(f"on-{count}") for count in (1, 2)}
    runpy.run_path(JOBS)["main"](renders, made[1])
    done = launch(JOBS, renders, made[2], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return made


@pytest.mark.parametrize("name", ["resshift", "rddm"])
def test_weights_and_scores_do_not_depend_on_the_processes(folders, name):
    manifests = [json.loads((folders[count] / name / "manifest.json").read_text()) for count in (1, 2)]
    assert [manifest["processes"] for manifest in manifests] == [1, 2]
    one, two = (weights(folders[count], name) for count in (1, 2))
    assert set(one) == set(two) and len({key.partition(".")[0] for key in one}) == (2 if name == "rddm" else 1)
    assert norm(one[key] - two[key] for key in one) <= 1e-5 * norm(one.values())
    losses = [[row["loss"] for row in json.loads((folders[k] / name / "history.json").read_text())] for k in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    rows = [json.loads((folders[count] / name / "validation.json").read_text())["rows"] for count in (1, 2)]
    assert [row["step"] for row in rows[1]] == [3, 6]
    assert abs(rows[0][0]["psnr"]["value"] - rows[0][1]["psnr"]["value"]) > 0.01  # something was learnt
    for a, b in zip(*rows, strict=True):
        assert a["psnr"]["value"] == pytest.approx(b["psnr"]["value"], rel=1e-3)
