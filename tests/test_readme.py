"""Every command and code block of the README is run here, as a reader would; none may be left out."""

import json
import re
import runpy
import shlex
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
from PIL import Image
from running import ROOT, blocks_of, launch, lines_of, run, run_here

from sfumato import families as families_of
from sfumato import recipes
from sfumato.unlearning import verdict
from sfumato.unlearning.methods import METHODS

README = (ROOT / "README.md").read_text()
BLOCKS = blocks_of(ROOT / "README.md")
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = lines_of(BLOCKS)


def test_every_block_is_known_to_this_file():
    assert {language for language, _ in BLOCKS} == {"bash", "python"}
    assert set(COMMANDS) == set(RUNS)
    assert len(PYTHON) == 3


def test_table_of_families_is_what_the_registries_say():
    rows = dict(re.findall(r"^\| `(\w+)` \|.*?\|((?: [✓–] \|){7})$", README, re.MULTILINE))
    families = (
        families_of.StableDiffusion, families_of.StableDiffusionXL, families_of.StableDiffusion3, families_of.Flux,
        families_of.PixArt, families_of.DiT, families_of.ClassConditionalDDPM,
    )  # fmt: skip
    assert set(families) == set(families_of.FAMILIES.values()) and set(rows) == set(METHODS)
    for name, method in METHODS.items():
        assert re.findall("[✓–]", rows[name]) == ["✓" if issubclass(one, method.family) else "–" for one in families]


def make_demo(line, folder):
    """What ``make demo`` runs in the environment this test runs in, on fewer pictures."""
    planned = run(["make", "--no-print-directory", "-n", "-o", ".venv/.demo", "demo"], ROOT)
    assert planned.splitlines()[-1].strip() == ".venv/bin/sfumato demo --output demo"
    printed = run(
        ["sfumato", "demo", "--output", "demo", "--forget-repeats", "1", "--retain-repeats", "1",
         "--num-inference-steps", "5", "--training-steps", "3", "--training-examples", "8"],
        folder,
    )  # fmt: skip
    assert "report: demo/report.html" in printed and "UA" in printed
    results = json.loads((folder / "demo" / "report.json").read_text())
    assert results["method"] == "salun" and results["forget"] == "sneaker"
    for when in ("before", "after"):
        for name in ("ua", "ira", "cra"):
            cell = results[when][name]
            assert 0 <= cell["low"] <= cell["value"] <= cell["high"] <= 1
    assert results["seconds"] > 0 and results["peak_memory_mb"] > 0
    page = (folder / "demo" / "report.html").read_text()
    assert "<img" in page and 'src="http' not in page


def make_test(line, folder):
    planned = run(["make", "--no-print-directory", "-n", "-o", ".venv/.test", "test"], ROOT)
    assert planned.splitlines()[-1].strip().startswith('.venv/bin/python -m pytest -m "not slow"')


def salun_job(line, folder):
    few = ["--forget_examples", "8", "--retain_examples", "8", "--example_steps", "2", "--no_verify"]
    launch(line, folder, "--steps", "2", *few)
    assert (folder / "out" / "model_index.json").exists() and (folder / "out" / "saliency_mask.safetensors").exists()


def large_model(line, folder):
    """With a tiny model of random weights in the place of the large one, on one process."""
    words = shlex.split(line)
    kind = {"stabilityai/stable-diffusion-xl-base-1.0": "sdxl", "black-forest-labs/FLUX.1-dev": "flux-guided"}
    name = words[words.index("--model") + 1]
    built = runpy.run_path(str(ROOT / "tests" / "families" / "conftest.py"))["built"]
    built(kind[name]).save_pretrained(folder / "model")
    words[words.index("--model") + 1] = str(folder / "model")
    script = next(word for word in words if word.endswith(".py"))
    own = words[words.index(script) + 1 :]
    few = ["--steps", "2", "--trajectory_steps", "2", "--trajectories_per_prompt", "1", "--lora_rank", "2"]
    few += ["--adapter_rank", "2", "--forget", "sneaker", "--batch_size", "2", "--no_verify"]
    run([sys.executable, str(ROOT / script), *own, *few], folder)
    assert list((folder / "van-gogh" / "lora").glob("*.safetensors"))
    assert json.loads((folder / "van-gogh" / "manifest.json").read_text())["settings"]["mixed_precision"] == "bf16"
    if "--config_file" in words:
        assert (ROOT / words[words.index("--config_file") + 1]).exists()


def own_model(line, folder):
    """With a tiny model of random weights in the place of Stable Diffusion 1.5."""
    words = shlex.split(line)
    built = runpy.run_path(str(ROOT / "tests" / "families" / "conftest.py"))["built"]
    built("sd").save_pretrained(folder / "model")
    words[words.index("--model") + 1] = str(folder / "model")
    printed = run_here(words, folder)
    assert "no-van-gogh, which forgot Van Gogh" in printed
    assert "painting" in json.loads((folder / "no-van-gogh" / "manifest.json").read_text())["anchors"]


QUICKER = {
    "unlearn": "--verify False",
    "evaluate": "--forget_repeats 1 --num_inference_steps 1 --resamples 2",
    "attack": "--iterations 1 --times 2 --count 2 --num_inference_steps 2",
    "release": "",
}
MADE = {
    "unlearn": "no-sneaker/model_index.json",
    "evaluate": "evaluated/evaluation.json",
    "attack": "attacked/attack.json",
    "release": "released/README.md",
}


@cache
def whole_way():
    """Where the commands from unlearning to release were run, one after the other; each needs what came before."""
    kept = tempfile.TemporaryDirectory()
    for line in COMMANDS:
        words = shlex.split(line)
        if words[0] == "sfumato" and words[1] in MADE and "van-gogh" not in line:
            run_here([*words, *QUICKER[words[1]].split()], kept.name)
    return kept


def released(line, folder):
    made = Path(whole_way().name) / MADE[line.split()[1]]
    assert made.exists() and (made.suffix != ".json" or json.loads(made.read_text()))
    if made.name == "README.md":
        card = made.read_text()
        assert "## Evaluation" in card and "### unlearndiffatk" in card and "Not evaluated" not in card


RUNS = {
    **{line: large_model for line in COMMANDS if "--output van-gogh" in line},
    **{line: own_model for line in COMMANDS if "--output no-van-gogh" in line},
    **{line: released for line in COMMANDS if line.split()[1] in MADE and "van-gogh" not in line},
    "make demo": make_demo,
    "make test": make_test,
    "accelerate launch training/salun.py --model atelier --forget sneaker --output out/": salun_job,
}


@pytest.mark.parametrize("line", [pytest.param(line, id=line[:90]) for line in RUNS])
def test_command_runs(line, tmp_path):
    RUNS[line](line, tmp_path)


@pytest.fixture
def few_steps(monkeypatch):
    """Recipes and verdicts of a few steps."""
    few = {"steps": 2, "forget_examples": 8, "retain_examples": 8, "example_steps": 2}
    find_recipe = recipes.find_recipe
    shorter = lambda *arguments: recipes.Recipe({**find_recipe(*arguments).settings, **few})  # noqa: E731
    monkeypatch.setattr(recipes, "find_recipe", shorter)
    monkeypatch.setattr(verdict, "PICTURES", 2)
    monkeypatch.setattr(verdict, "STEPS", 2)


def run_block(number, folder):
    (folder / "block.py").write_text(PYTHON[number])
    printed = run_here([sys.executable, "block.py"], folder)
    for name in re.findall(r'save\("(.*?)"\)', PYTHON[number]):
        assert Image.open(folder / name).size == (32, 32)
    assert "print(" not in PYTHON[number] or re.search(r"\d\.\d", printed)


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_block_runs(number, few_steps, tmp_path):
    run_block(number, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_block_runs_whole(number, tmp_path):
    run_block(number, tmp_path)


def test_files_the_readme_points_to_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for folder in re.findall(r"`([a-z./]+/)`", README):
        assert folder in ("demo/", "out/") or (ROOT / folder).exists(), folder
