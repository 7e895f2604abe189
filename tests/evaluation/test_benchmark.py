import contextlib
import csv
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest
import torch

import sfumato
from sfumato import cli, storage
from sfumato.evaluation.benchmark import BenchmarkConfig, benchmark
from sfumato.evaluation.cells import Bench, Cell, placed_on
from sfumato.evaluation.evaluate import EvaluationConfig
from sfumato.evaluation.leaderboard import pareto_front, render_leaderboard
from sfumato.evaluation.metrics import wilson
from sfumato.evaluation.pictures import Request
from sfumato.evaluation.standings import as_csv, as_markdown, expected, pooled, robustness, standings, utility

FAST = ["--quick", "--num_inference_steps", "4", "--attack_count", "2", "--device", "cpu"]
TWO = ["--methods", "uce", "--concepts", "sneaker,sketch", "--attacks", "embeddings"]


def run(folder, *arguments):
    """Run the command here; gives what it printed."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        cli.main(["benchmark", "--output", str(folder), *FAST, *arguments])
    return stream.getvalue(), json.loads((folder / "leaderboard.json").read_text())


def made(folder):
    """When each file of the cells was written, but for the note of what is known of a cell, which a call may renew."""
    files = [file for file in (folder / "cells").rglob("*") if file.is_file() and file.name != "cell.json"]
    return {file: file.stat().st_mtime_ns for file in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "out"
    return (*run(folder, *TWO), folder)


def test_tables_tell_what_was_forgotten_and_what_stayed(finished):
    printed, found, _ = finished
    before, after = found["methods"]["original"]["measures"], found["methods"]["uce"]["measures"]
    assert before["ua"]["value"] < 0.4 and after["ua"]["value"] > 0.9
    assert after["ira"]["value"] > before["ira"]["value"] - 0.1
    assert after["pre-ASR embeddings"]["total"] == 4 and before["pre-ASR embeddings"]["value"] > 0.5
    assert "| uce |" in printed and "| original |" in printed and "\nstyle\n" in printed
    line = next(line for line in printed.splitlines() if line.startswith("| uce |"))
    assert f"{100 * after['ua']['value']:.1f} [{100 * after['ua']['low']:.1f}, " in line
    heads = [line for line in printed.splitlines() if line.startswith("|  |")]
    assert heads[0].count("pre-ASR") == 1 and "ASR embeddings" in heads[0]
    assert {"KID", "precision", "coverage", "authentic"} <= {name.strip() for name in heads[1].split("|")}


def test_domains_are_reported_apart_and_counts_are_pooled(finished):
    found = finished[1]
    assert set(found["domains"]) == {"object", "style"} and set(found["concepts"]) == {"sneaker", "sketch"}
    for name in ("ua", "ira", "cra"):
        parts = [found["domains"][kind]["uce"]["measures"][name] for kind in ("object", "style")]
        whole = wilson(sum(p["successes"] for p in parts), sum(p["total"] for p in parts)).as_dict()
        assert found["methods"]["uce"]["measures"][name] == whole
    neighbours = [n for n in found["concepts"]["sneaker"]["uce"]["measures"] if n.startswith("neighbour ")]
    assert "neighbour boot" in neighbours and "neighbour sneaker" not in neighbours


def test_the_original_has_no_more_pictures_than_were_drawn(finished):
    """The concepts are of two domains, so that most pictures without the one are without the other too."""
    before, after = (finished[1]["methods"][name]["measures"]["ira"]["total"] for name in ("original", "uce"))
    assert before <= 240 < after


def test_everything_is_in_the_json(finished):
    found = finished[1]
    assert found["commands"][0].startswith("sfumato benchmark --output") and found["versions"]["torch"]
    assert found["seeds"] == [0]
    for cell in found["cells"]:
        assert cell["command"].startswith("sfumato unlearn uce --forget") and not cell["failed"]
        assert 0 < cell["costs"]["release_bytes"] < 5e6 and cell["costs"]["peak_memory_mb"] > 0
        assert {"result to original", "result to real", "drift"} <= set(cell["evaluation"]["distances"])
        assert set(cell["attacks"]) == {"embeddings"}
    low, high = found["expected"]["uce-atelier-object"]["ua"]
    ua = found["concepts"]["sneaker"]["uce"]["measures"]["ua"]
    assert low <= 100 * ua["low"] < low + 1 and high - 1 < 100 * ua["high"] <= high


def test_csv_has_a_line_a_cell_and_flat_columns(finished):
    lines = list(csv.DictReader((finished[2] / "leaderboard.csv").open()))
    assert [(line["method"], line["concept"], line["seed"]) for line in lines] == [
        ("uce", "sneaker", "0"), ("uce", "sketch", "0"), ("original", "sneaker", "0"), ("original", "sketch", "0"),
    ]  # fmt: skip
    assert float(lines[2]["ua"]) < 0.4 < 0.9 < float(lines[0]["ua"]) and not lines[2]["asr_embeddings"]
    named = {"ua", "ua_low", "ua_high", "ua_successes", "ua_total", "ira", "cra", "frechet", "frechet_low", "kernel"}
    named |= {"asr_embeddings", "pre_asr_embeddings_total", "coverage", "authentic", "drift_retain", "release_bytes"}
    assert named <= set(lines[0]) and all(re.fullmatch("[a-z0-9_]+", name) for name in lines[0])
    assert lines[0]["neighbour_boot"] and not lines[1]["neighbour_boot"]
    assert float(lines[0]["ua"]) == finished[1]["concepts"]["sneaker"]["uce"]["measures"]["ua"]["value"]


def test_page_loads_nothing_and_shows_the_pictures(finished):
    page = (finished[2] / "leaderboard.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)(?!#)""", page) and "@import" not in page
    assert page.count("data:image/png;base64,") == 4  # original and uce, of two concepts
    assert page.count("<svg") == 2 and 'class="sortable"' in page
    assert (finished[2] / "methods.png").read_bytes().startswith(b"\x89PNG")


class Scripts(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_names_and_prompts_are_escaped(finished):
    evil = '"><img src=x onerror=alert(1)><script>alert(2)</script>'
    found = json.loads(
        json.dumps(finished[1]).replace('"sneaker"', json.dumps(evil)).replace('"uce"', json.dumps(evil))
    )
    found["cells"][0]["failed"] = {"unlearn": evil}
    found["commands"] = [evil]
    reader = Scripts()
    reader.feed(render_leaderboard(found, finished[2]))
    assert evil in found["concepts"]
    assert [tag for tag, _ in reader.tags].count("script") == 1
    assert not any("onerror" in attributes for _, attributes in reader.tags)


def test_a_method_is_added_and_neither_that_nor_a_kill_loses_what_is_done(finished, tmp_path):
    shutil.copytree(finished[2], tmp_path / "out")
    folder, before = tmp_path / "out", made(tmp_path / "out")
    more = ["--methods", "uce,rece", "--concepts", "sneaker,sketch", "--attacks", "none"]
    with pytest.raises(SystemExit, match="--resume"):
        run(folder, *more)
    command = [sys.executable, "-m", "sfumato.cli", "benchmark", "--output", str(folder), *FAST, *more, "--resume"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not list(folder.glob("cells/rece-sneaker*/evaluation-*/evaluation.json")) and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    kept = {path: when for path, when in made(folder).items() if path.name in ("evaluation.json", "findings.jsonl")}
    assert any("rece-sneaker" in str(path) for path in kept) and not list(folder.glob("cells/rece-sketch*/eval*"))
    _, found = run(folder, *more, "--resume")
    assert list(found["methods"]) == ["original", "uce", "rece"] and set(found["concepts"]) == {"sneaker", "sketch"}
    after = made(folder)
    assert {file: after[file] for file in before | kept} == before | kept
    assert {file.relative_to(folder / "cells").parts[0][:4] for file in after.keys() - before.keys()} == {"rece"}


def test_what_a_call_does_not_name_stays_on_the_leaderboard_if_it_was_made_alike(finished, tmp_path):
    folder = shutil.copytree(finished[2], tmp_path / "out")
    _, found = run(folder, "--methods", "uce", "--concepts", "sneaker", "--attacks", "embeddings", "--resume")
    assert all(found[key] == finished[1][key] for key in ("methods", "domains", "concepts"))
    assert [cell["folder"] for cell in found["cells"]] == [cell["folder"] for cell in finished[1]["cells"]]
    page = (folder / "leaderboard.html").read_text()
    assert "sketch" in page and "sketch" in (folder / "leaderboard.csv").read_text()
    assert len(found["commands"]) == 2 and page.count("sfumato benchmark --output") == 2
    _, found = run(
        folder, "--methods", "uce", "--concepts", "sneaker", "--attacks", "none", "--forget_repeats", "2", "--resume"
    )
    assert list(found["concepts"]) == ["sneaker"]


def test_another_scheduler_is_another_cell():
    pipe, folders = sfumato.load(), set()
    for spacing in ("leading", "trailing"):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing=spacing)
        bench = Bench(Path("out"), "atelier", pipe, "0", EvaluationConfig(), {})
        folders.add(Cell(bench, "uce", "sneaker", 0).folder)
    assert len(folders) == 2


def test_a_failed_run_is_noted_and_the_rest_goes_on(finished, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(finished[2], folder)
    shipped = files("sfumato.training") / "configs"
    (tmp_path / "uce.yaml").write_text((shipped / "uce-atelier-object.yaml").read_text())
    (tmp_path / "esd.yaml").write_text("method: esd\nlearning_rate: 1.0e+30\nsteps: 4\ntrajectory_steps: 2\n")
    wanted = ["--methods", "esd,uce", "--concepts", "sneaker", "--attacks", "none"]
    wanted += ["--recipe", f"{tmp_path}/{{}}.yaml"]
    printed, found = run(folder, *wanted, "--resume")
    assert "failed: esd, sneaker, seed 0, unlearn:" in printed
    cell = found["cells"][0]
    assert "loss became nan" in cell["failed"]["unlearn"] and cell["evaluation"] is None
    assert found["methods"]["esd"]["failed"] == 1 and found["methods"]["esd"]["measures"] == {}
    assert found["methods"]["uce"]["measures"]["ua"]["value"] > 0.9
    assert "loss became nan" in (folder / "leaderboard.html").read_text()
    capsys.readouterr()
    run(folder, *wanted, "--resume")
    assert "unlearns" not in capsys.readouterr().err  # it is not tried again
    run(folder, *wanted, "--resume", "--retry")
    assert "esd, sneaker, seed 0: unlearns" in capsys.readouterr().err


def test_two_at_once_share_the_cells(tmp_path):
    command = [
        sys.executable, "-m", "sfumato.cli", "benchmark", "--output", str(tmp_path / "out"), *FAST, "--resume",
        "--methods", "uce,rece", "--concepts", "sneaker", "--attacks", "none",
    ]  # fmt: skip
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    printed, said = zip(*(process.communicate() for process in both), strict=True)
    assert [process.returncode for process in both] == [0, 0], said
    assert all("| uce |" in table and "| rece |" in table for table in printed)
    for work in ("uce, sneaker, seed 0: unlearns", "rece, sneaker, seed 0: unlearns"):
        assert sum(text.count(work) for text in said) == 1


@pytest.mark.parametrize("part", ["", "model"], ids=["another benchmark", "the training of a killed one"])
def test_what_another_run_is_at_is_waited_for(part, finished, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(finished[2], tmp_path / "out")
    (theirs,) = folder.glob("cells/uce-sneaker-*")
    if part:
        shutil.rmtree(theirs / part)
    with contextlib.ExitStack() as other:
        assert other.enter_context(storage.locked(theirs / part))
        monkeypatch.setattr(time, "sleep", lambda seconds: other.close())
        _, found = run(folder, *TWO, "--resume")
    assert len(found["cells"]) == 2 and (part or found["methods"] == finished[1]["methods"])
    assert "another run is at the last 1 of 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"methods": "uce,ucx"}, "ucx"),
        ({"attacks": "embedding"}, "embedding"),
        ({"seeds": "0,one"}, "seeds"),
        ({"concepts": "sneaker,snaker"}, "snaker"),
        ({"concepts": " , "}, "concepts"),
        ({"attack_settings": "unlearndiffatk.speed=3"}, "attack_settings"),
        ({"attack_settings": "p4d.n=3"}, "of the attacks embeddings, unlearndiffatk, got 'p4d.n=3'"),
        ({"attack_settings": "unlearndiffatk.times=0"}, "times"),
        ({"attack_settings": "unlearndiffatk.tokens=60"}, "tokens with those of the attack"),
        ({"clip": "./no-clip"}, "no-clip"),
        ({"detector": "clap"}, "clap"),
        ({"features": "clap"}, "clap"),
        ({"real": "nowhere"}, "nowhere"),
        ({"neighbours": "boot"}, "every other word is looked at"),
        ({"recipe": "nowhere-{}"}, "nowhere-salun"),
        ({"model": "atelier-pixel", "concepts": "bag"}, "attacks"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(settings, said, tmp_path):
    with pytest.raises((ValueError, OSError), match=said):
        benchmark(BenchmarkConfig(str(tmp_path / "out"), device="cpu", **settings))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("device", "visible", "told"),
    [
        ("cuda:1", None, {"CUDA_VISIBLE_DEVICES": "1"}),
        ("cuda:1", "4,GPU-7", {"CUDA_VISIBLE_DEVICES": "GPU-7"}),
        ("cuda", "4,7", {}),
        ("mps", None, {}),
        ("cpu", None, {"ACCELERATE_USE_CPU": "true"}),
    ],
    ids=str,
)
def test_training_is_placed_where_the_benchmark_is(device, visible, told):
    assert placed_on(torch.device(device), visible) == told


def test_attacks_have_the_settings_that_they_are_given():
    config = BenchmarkConfig("out", attack_settings="unlearndiffatk.times=50, embeddings.attack=released")
    assert config.settings_of_attacks == {"embeddings": {"attack": "released"}, "unlearndiffatk": {"times": 50}}
    assert BenchmarkConfig("out").settings_of_attacks == {"embeddings": {}, "unlearndiffatk": {"times": 5}}


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start the same command several times"):
        benchmark(BenchmarkConfig(str(tmp_path / "out")))


def row(method="a", concept="x", ua=(1, 2), frechet=(1.0, 0.0, 2.0), **more):
    scores = {"ua": wilson(*ua).as_dict(), "ira": wilson(1, 2).as_dict(), "cra": None, "neighbours": {}}
    figure = dict(zip(("value", "low", "high"), frechet, strict=True))
    distances = {"result to real": {"pictures": [6, 6], "frechet": figure}}
    evaluation = {"scores": {"result": scores, "original": scores}, "distances": distances}
    return {
        "method": method, "concept": concept, "kind": "object", "seed": 0, "folder": "f", "failed": {},
        "evaluation": evaluation, "attacks": {}, "costs": {"seconds": 1.0}, **more,
    }  # fmt: skip


def test_shares_are_pooled_by_counts_and_figures_averaged():
    line = pooled([row(ua=(9, 10)), row(ua=(0, 90), frechet=(3.0, 2.0, 4.0))])
    assert line["measures"]["ua"] == wilson(9, 100).as_dict()
    assert line["measures"]["frechet"] == {"value": 2.0, "low": 1.0, "high": 3.0}


def test_the_original_counts_once_however_many_methods_there_are():
    lines = standings([row("a", ua=(1, 2)), row("b", ua=(1, 2)), row("a", "y", ua=(1, 2))])
    assert lines["original"]["measures"]["ua"]["total"] == 4 and lines["a"]["measures"]["ua"]["total"] == 4


def test_a_picture_of_the_original_that_several_concepts_ask_for_counts_once():
    rows = [row("a", "x", ua=(8, 10), folder="1"), row("a", "y", ua=(8, 10), folder="2")]
    requests = [Request("a bag", (number,)) for number in range(15)]
    lines = standings(rows, {"1": {"ua": set(requests[:10])}, "2": {"ua": set(requests[5:])}})
    assert lines["original"]["measures"]["ua"] == wilson(12, 15).as_dict()
    assert lines["a"]["measures"]["ua"] == wilson(16, 20).as_dict()  # other models, other pictures
    assert standings(rows)["original"]["measures"]["ua"] == wilson(16, 20).as_dict()


def test_robustness_is_against_the_strongest_attack():
    shares = {"ASR weak": wilson(1, 10).as_dict(), "ASR strong": wilson(7, 10).as_dict()}
    assert robustness({"measures": shares})["value"] == pytest.approx(0.3)
    assert robustness({"measures": {}}) is None


def test_without_a_vocabulary_utility_is_that_of_the_neighbours():
    shares = {"neighbour Monet": wilson(9, 10).as_dict(), "neighbour Degas": wilson(3, 10).as_dict()}
    assert utility({"measures": shares}) == wilson(12, 20).as_dict()
    assert utility({"measures": {**shares, "ira": wilson(1, 2).as_dict()}}) == wilson(1, 2).as_dict()
    assert utility({"measures": {}}) is None


def test_each_concept_has_the_others_for_neighbours():
    bench = Bench(Path("out"), "sd", None, "0", EvaluationConfig(neighbours=["Monet", "Degas"]), {})
    assert Cell(bench, "uce", "Degas", 0).neighbours == ["Monet"]
    assert Cell(bench, "uce", "Degas+Monet", 0).neighbours is None


def test_front_leaves_out_what_is_beaten():
    points = {"best": (2.0, 1.0), "beaten": (1.0, 1.0), "other": (0.5, 3.0), "twin": (2.0, 1.0)}
    assert pareto_front(points) == ["other", "best", "twin"]


def test_expected_is_the_hull_of_all_runs():
    class Words:
        name = "atelier"

    found = expected([row(ua=(10, 10)), row(ua=(0, 10))], Words())
    assert found["a-atelier-object"]["ua"] == [0, 100] and "cra" not in found["a-atelier-object"]
    assert expected([row()], None) == {}


def test_tables_survive_any_name():
    odd = 'a|b,"c"\nd'
    assert as_markdown(standings([row(odd)])).splitlines()[-1].count("\\|") == 1
    line, _ = csv.DictReader(io.StringIO(as_csv([row(odd)])))
    assert line["method"] == odd
