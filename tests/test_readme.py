"""Every command and code block of the README is run here, as a reader would; none may be left out."""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import struct
import subprocess
import sys
import tempfile
from functools import cache
from gzip import compress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato import cli
from sfumato import families as families_of
from sfumato.unlearning.methods import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines() if line.strip()]

ONE_PROCESS = [
    "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
    "--num_cpu_threads_per_process", str(os.cpu_count()),
]  # fmt: skip


def run(command, folder):
    """Run a command in a folder, in a process of its own; gives what it printed."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_here(command, folder):
    """The same for a benchmark or ``sfumato`` in this process, which has imported torch already."""
    words, printed, threads = list(command), io.StringIO(), torch.get_num_threads()
    with (
        pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder), contextlib.redirect_stdout(printed),
        torch.random.fork_rng(),
    ):  # fmt: skip
        patch.setattr(sys, "argv", words[1:] if words[0] == sys.executable else words)
        try:
            if words[0] == "sfumato":
                cli.main(words[1:])
            else:
                assert words[0] == sys.executable
                runpy.run_path(words[1], run_name="__main__")
        except SystemExit as end:
            assert not end.code, end.code
        finally:
            torch.set_num_threads(threads)
    return printed.getvalue()


def launch(line, folder, *extra):
    """Run an ``accelerate launch`` line of the README from `folder`, without asking for this machine's defaults."""
    words = line.split()
    assert words[:2] == ["accelerate", "launch"]
    script = str(ROOT / words[2])
    return run([sys.executable, "-m", "accelerate.commands.launch", *ONE_PROCESS, script, *words[3:], *extra], folder)


def test_every_block_is_known_to_this_file():
    assert {language for language, _ in BLOCKS} == {"bash", "python"}
    assert set(COMMANDS) == set(RUNS)
    assert len(PYTHON) == 4


def test_table_of_families_is_what_the_registries_say():
    rows = dict(re.findall(r"^\| `(\w+)` \|((?: [✓–] \|){7})$", README, re.MULTILINE))
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


def help_of_salun(line, folder):
    printed = run_here(line.split(), folder)
    assert "--mask_ratio" in printed and "Share of the trained weights that may move" in printed


def make_garments(folder):
    """Random pictures in the files Fashion-MNIST comes in."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 1000), ("t10k", 1000)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in ((f"{split}-images-idx3-ubyte.gz", images), (f"{split}-labels-idx1-ubyte.gz", labels)):
            header = b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / name).write_bytes(compress(header + array.tobytes()))


def quality(line, folder):
    make_garments(folder)
    words = line.split()
    words[:2] = [sys.executable, str(ROOT / words[1])]
    printed = run_here([*words, "--data_dir", str(folder), "--repeats", "1", "--steps", "2"], folder)
    assert "garment" in printed and "generated" in printed


def train_atelier(line, folder):
    """A few steps of every stage on made-up garments; the quality is measured when the models are made."""
    make_garments(folder)
    steps = [f"--{stage}_steps=2" for stage in ("autoencoder", "judge", "denoiser", "pixel")]
    launch(line, folder, "--data_dir", str(folder), *steps, "--measured_repeats", "1", "--measured_steps", "2")
    built = folder / "atelier-run" / "assets"
    assert {path.name for path in built.iterdir()} >= {"atelier", "atelier-pixel", "judge", "renders"}
    assert (built / "atelier" / "training.png").exists() and (built / "atelier" / "README.md").exists()


def step_time(line, folder):
    words = line.split()
    printed = run([sys.executable, str(ROOT / words[1]), *words[2:], "--repeats", "1"], folder)
    assert "x DDIM" in printed


def invert(line, folder):
    words = shlex.split(line)
    words[2] = str(ROOT / words[2])
    printed = run_here([*words, "--num-inference-steps", "4"], folder)
    assert "latents off by 0.0e+00" in printed and (folder / "inverted" / "comparison.png").exists()


def edit(line, folder):
    invert(next(command for command in COMMANDS if command.startswith("sfumato invert")), folder)
    run_here(shlex.split(line), folder)
    assert (folder / "edited" / "edited.png").exists()


def compare_inversions(line, folder):
    words = line.split()
    few = ["--pictures", "2", "--steps", "3", "--guidance_scales", "1"]
    assert "fixed-point" in run_here([sys.executable, str(ROOT / words[1]), *words[2:], *few], folder)


def compare_samplers(line, folder):
    make_garments(folder)
    words = line.split()
    few = ["--pictures", "10", "--steps", "5", "--seeds", "0", "--data_dir", str(folder)]
    printed = run_here([sys.executable, str(ROOT / words[1]), *words[2:], *few], folder)
    assert "time shift, F-PNDM" in printed and "atelier    5 O-BELM" in printed


def closed_form(line, folder):
    words = line.split()
    printed = run_here([sys.executable, str(ROOT / words[1]), *words[2:], "--keep", "1", "--epochs", "1"], folder)
    assert "UCE" in printed and "RECE" in printed


def compare_methods(line, folder):
    words = line.split()
    few = ["--methods", "uce", "--concepts", "sneaker", "--seeds", "0", "--pictures", "24", "--attacked", "2",
           "--num_inference_steps", "4"]  # fmt: skip
    printed = run_here([sys.executable, str(ROOT / words[1]), *words[2:], *few], folder)
    assert "| uce |" in printed and "| uce, sneaker |" in printed
    assert (folder / "bench-unlearning" / "methods.png").exists()
    table = json.loads((folder / "bench-unlearning" / "table.json").read_text())
    assert table["expected"]["uce-atelier-object"]["ua"][0] >= 70
    again = run_here([sys.executable, str(ROOT / words[1]), *words[2:], *few], folder)
    assert again == printed  # from the cells that the first run left


def leaderboard(line, folder):
    words = [*line.split(), "--methods", "uce", "--concepts", "red", "--attacks", "none", "--quick"]  # the last counts
    printed = run_here([*words, "--num_inference_steps", "2"], folder)
    assert "| uce |" in printed and (folder / words[3] / "leaderboard.html").exists()


def compare_several(line, folder):
    few = ["--methods", "uce", "--pictures", "24", "--attacked", "0", "--seeds", "0", "--num_inference_steps", "4"]
    words = line.split()
    printed = run_here([sys.executable, str(ROOT / words[1]), *words[2:], *few], folder)
    assert "| uce, sneaker+boot |" in printed


def costs(line, folder):
    words = line.split()
    few = ["--methods", "esd", "--steps", "2", "--esd_steps", "1", "--retain_repeats", "0"]  # AdvUnlearn is not short
    printed = run_here([sys.executable, str(ROOT / words[1]), *words[2:], *few], folder)
    assert printed.count("x fewer evaluations") == 1


def salun_step(line, folder):
    words = line.split()
    printed = run([sys.executable, str(ROOT / words[1]), *words[2:], "--steps", "1", "--rounds", "1"], folder)
    assert "throughput" in printed


def edits(line, folder):
    words = line.split()
    few = ["--pictures", "2", "--num_inference_steps", "4"]
    printed = run_here([sys.executable, str(ROOT / words[1]), *words[2:], *few], folder)
    assert "infedit" in printed and (folder / "edits.png").exists()


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
        if words[0] == "sfumato" and words[1] in MADE and words[-1] != "--help":
            run_here([*words, *QUICKER[words[1]].split()], kept.name)
    return kept


def released(line, folder):
    made = Path(whole_way().name) / MADE[line.split()[1]]
    assert made.exists() and (made.suffix != ".json" or json.loads(made.read_text()))
    if made.name == "README.md":
        card = made.read_text()
        assert "## Evaluation" in card and "### unlearndiffatk" in card and "Not evaluated" not in card


def memory(line, folder):
    words = line.split()
    assert "at the end" in run([sys.executable, str(ROOT / words[1]), *words[2:], "--no_check"], folder)


def mask(line, folder):
    words = line.split()
    printed = run([sys.executable, str(ROOT / words[1]), *words[2:], "--weights", "2"], folder)  # measures memory
    assert "extra_mb: 1/" in printed


def training_speed(line, folder):
    words = line.split()
    printed = run([sys.executable, str(ROOT / words[1]), "--batch_size", "2", "--steps", "1", "--rounds", "1"], folder)
    assert "a plain loop" in printed and "checkpointing" in printed


def evaluation_speed(line, folder):
    words = line.split()
    few = ["--pictures", "4", "--num_inference_steps", "2", "--rounds", "1"]
    assert "by batching" in run_here([sys.executable, str(ROOT / words[1]), *few], folder)


def attack_speed(line, folder):
    words = line.split()
    few = ["--prompts", "2", "--times", "1", "--iterations", "1", "--num_inference_steps", "2", "--rounds", "1"]
    assert "prompts/s" in run_here([sys.executable, str(ROOT / words[1]), *few], folder)


def enlarger(line, folder):
    """A few steps on some of the shipped pictures, in the place of one's own."""
    (folder / "photos").mkdir()
    for path in sorted((ROOT / "src" / "sfumato" / "assets" / "renders").glob("*.png"))[:12]:
        (folder / "photos" / path.name).write_bytes(path.read_bytes())
    few = ["--size", "32", "--steps", "2", "--warmup_steps", "0", "--batch_size", "2", "--held_out_pictures", "2"]
    launch(line, folder, *few)
    assert (folder / "enlarger" / "model_index.json").exists()


def restore(line, folder):
    enlarger(next(command for command in COMMANDS if "training/resshift.py" in command), folder)
    (folder / "small.png").write_bytes(next((folder / "photos").iterdir()).read_bytes())
    run_here(line.split(), folder)
    assert (folder / "restored" / "small.png").exists() and (folder / "restored" / "comparisons").is_dir()


def enlarge(line, folder):
    """One of the shipped pictures, eight pixels wide."""
    picture = next((ROOT / "src" / "sfumato" / "assets" / "renders").glob("*.png"))
    Image.open(picture).resize((8, 8), Image.Resampling.BICUBIC).save(folder / "tiny.png")
    run_here(line.split(), folder)
    assert Image.open(folder / "enlarged" / "tiny.png").size == (32, 32)


def compare_restoration(line, folder):
    """A few steps of training on made-up garments, and few of their pictures."""
    make_garments(folder)
    words = line.split()
    few = ["--steps", "4", "--pictures", "8", "--timed", "1", "--candidates", "2", "--pairs", "8"]
    printed = run_here([sys.executable, str(ROOT / words[1]), *words[2:], *few, "--data_dir", str(folder)], folder)
    assert "| resshift-4 |" in printed and "searched noise" in printed


def compare_minority(line, folder):
    make_garments(folder)
    words = line.split()
    few = ["--pictures", "10", "--real", "100", "--steps", "6", "--data_dir", str(folder)]
    printed = run_here([sys.executable, str(ROOT / words[1]), *words[2:], *few], folder)
    assert "| self-guidance |" in printed and list((folder / "bench-minority").glob("minority-atelier*.png"))


def compare_steps(line, folder):
    make_garments(folder)
    words = line.split()
    few = ["--pictures", "10", "--captions", "1", "--schedules", "leading:2", "--colour_scales", "2"]
    printed = run_here([sys.executable, str(ROOT / words[1]), *words[2:], *few, "--data_dir", str(folder)], folder)
    assert "| leading, 2 steps, one more |" in printed and "| leading, 2 steps, guidance 2 |" in printed


def made_up(line, folder):
    words = line.split()
    few = ["--steps", "30", "--samples", "50", "--shape_steps", "1", "--shape_samples", "2", "--shape_batch_size", "2"]
    printed = run_here([sys.executable, str(ROOT / words[1]), *words[2:], *few], folder)
    assert "| grid | 50 |" in printed and (folder / "bench-hallucination" / "hallucination.png").exists()


RUNS = {
    **{line: compare_minority for line in COMMANDS if "benchmarks/minority.py" in line},
    "python benchmarks/one_more_step.py --output bench-one-more-step": compare_steps,
    "python benchmarks/hallucination.py --output bench-hallucination": made_up,
    "python benchmarks/training_speed.py": training_speed,
    "python benchmarks/evaluation_speed.py": evaluation_speed,
    "python benchmarks/attack_speed.py": attack_speed,
    "accelerate launch training/resshift.py --data photos --task sr --scale 4 --output enlarger": enlarger,
    "sfumato restore small.png --task sr --scale 4 --model enlarger --output restored": restore,
    "sfumato restore tiny.png --model atelier-sr --output enlarged": enlarge,
    **{line: compare_restoration for line in COMMANDS if "benchmarks/restoration.py" in line},
    "python benchmarks/step_time.py --threads 1": step_time,
    'sfumato invert src/sfumato/assets/renders/120-sandal-photo-red.png --prompt "a photo of a red sandal" --exact '
    "--output inverted": invert,
    'sfumato edit inverted --target-prompt "a photo of a green sandal" --output edited': edit,
    "python benchmarks/inversion.py": compare_inversions,
    "python benchmarks/edits.py --output edits.png": edits,
    "python benchmarks/samplers.py": compare_samplers,
    "python benchmarks/closed_form.py": closed_form,
    "python benchmarks/memory.py": memory,
    "python benchmarks/mask.py": mask,
    **{line: large_model for line in COMMANDS if "van-gogh" in line},
    "python benchmarks/unlearning.py --output bench-unlearning": compare_methods,
    "python benchmarks/unlearning.py --output bench-several --concepts sneaker+boot --seeds 0,1": compare_several,
    "sfumato benchmark --output leaderboard": leaderboard,
    "sfumato benchmark --output first-look --methods uce,rece --concepts sneaker,sketch,red --quick": leaderboard,
    "python benchmarks/unlearning_cost.py --advunlearn_steps 0 --forget_repeats 8 --retain_repeats 2": costs,
    "python benchmarks/salun_step.py --model sd15 --steps 2 --rounds 2": salun_step,
    "python benchmarks/salun_step.py --steps 10 --rounds 3": salun_step,
    **{line: released for line in COMMANDS if line.split()[1] in MADE and "--help" not in line},
    "make demo": make_demo,
    "make test": make_test,
    "accelerate launch training/salun.py --model atelier --forget sneaker --output out/": salun_job,
    "sfumato unlearn salun --help": help_of_salun,
    "python benchmarks/atelier_quality.py": quality,
    "accelerate launch training/train_atelier.py --output atelier-run": train_atelier,
}


SLOW = [
    "python benchmarks/closed_form.py",  # two minutes, at the size of Stable Diffusion
    "python benchmarks/memory.py",  # a minute and a half
    "python benchmarks/samplers.py",  # it tries many settings even on few pictures
    "python benchmarks/salun_step.py --model sd15 --steps 2 --rounds 2",  # it needs 10 GB
    "python benchmarks/salun_step.py --steps 10 --rounds 3",  # the same program
    "sfumato benchmark --output first-look --methods uce,rece --concepts sneaker,sketch,red --quick",  # likewise
    "accelerate launch training/train_atelier.py --output atelier-run",  # see tests/training/test_train_atelier.py
]


@pytest.mark.parametrize(
    "line", [pytest.param(line, id=line[:90], marks=[pytest.mark.slow] * (line in SLOW)) for line in RUNS]
)
def test_command_runs(line, tmp_path):
    RUNS[line](line, tmp_path)


FEWER = """
from sfumato import recipes
find_recipe = recipes.find_recipe
few = {"steps": 2, "forget_examples": 8, "retain_examples": 8, "example_steps": 2}
recipes.find_recipe = lambda *arguments: recipes.Recipe({**find_recipe(*arguments).settings, **few})
from sfumato.unlearning import verdict
verdict.PICTURES = verdict.STEPS = 2
"""


@pytest.mark.parametrize("prelude", [FEWER, pytest.param("", marks=pytest.mark.slow)], ids=["few steps", "whole"])
@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_block_runs(number, prelude, tmp_path):
    printed = run([sys.executable, "-c", prelude + PYTHON[number]], tmp_path)
    if "no-sneaker.png" in PYTHON[number]:
        assert Image.open(tmp_path / "no-sneaker.png").size == (32, 32)
    else:
        assert "tensor" in printed or "NoiseStatistics" in printed


def test_files_the_readme_points_to_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for folder in re.findall(r"`([a-z./]+/)`", README):
        assert folder in ("demo/", "out/") or (ROOT / folder).exists(), folder
