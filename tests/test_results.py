"""Every command on the page of results is run here, on few pictures and steps; none may be left out."""

import json
import sys

import pytest
from running import ROOT, blocks_of, lines_of, make_garments, run, run_here

BLOCKS = blocks_of(ROOT / "docs" / "results.md")
COMMANDS = lines_of(BLOCKS)


def test_every_block_is_known_to_this_file():
    assert {language for language, _ in BLOCKS} == {"bash"}
    assert set(COMMANDS) == {*RUNS, "make demo"}  # tests/test_readme.py


def quality(line, folder):
    make_garments(folder)
    words = line.split()
    words[:2] = [sys.executable, str(ROOT / words[1])]
    printed = run_here([*words, "--data_dir", str(folder), "--repeats", "1", "--steps", "2"], folder)
    assert "garment" in printed and "generated" in printed


def step_time(line, folder):
    words = line.split()
    printed = run([sys.executable, str(ROOT / words[1]), *words[2:], "--repeats", "1"], folder)
    assert "x DDIM" in printed


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
    **{line: compare_restoration for line in COMMANDS if "benchmarks/restoration.py" in line},
    "python benchmarks/step_time.py --threads 1": step_time,
    "python benchmarks/inversion.py": compare_inversions,
    "python benchmarks/edits.py --output edits.png": edits,
    "python benchmarks/samplers.py": compare_samplers,
    "python benchmarks/closed_form.py": closed_form,
    "python benchmarks/memory.py": memory,
    "python benchmarks/mask.py": mask,
    "python benchmarks/unlearning.py --output bench-unlearning": compare_methods,
    "python benchmarks/unlearning.py --output bench-several --concepts sneaker+boot --seeds 0,1": compare_several,
    "sfumato benchmark --output leaderboard": leaderboard,
    "sfumato benchmark --output first-look --methods uce,rece --concepts sneaker,sketch,red --quick": leaderboard,
    "python benchmarks/unlearning_cost.py --advunlearn_steps 0 --forget_repeats 8 --retain_repeats 2": costs,
    "python benchmarks/salun_step.py --model sd15 --steps 2 --rounds 2": salun_step,
    "python benchmarks/salun_step.py --steps 10 --rounds 3": salun_step,
    "python benchmarks/atelier_quality.py": quality,
}


SLOW = [
    "python benchmarks/closed_form.py",  # two minutes, at the size of Stable Diffusion
    "python benchmarks/memory.py",  # a minute and a half
    "python benchmarks/samplers.py",  # it tries many settings even on few pictures
    "python benchmarks/salun_step.py --model sd15 --steps 2 --rounds 2",  # it needs 10 GB
    "python benchmarks/salun_step.py --steps 10 --rounds 3",  # the same program
    "sfumato benchmark --output first-look --methods uce,rece --concepts sneaker,sketch,red --quick",  # likewise
]


@pytest.mark.parametrize(
    "line", [pytest.param(line, id=line[:90], marks=[pytest.mark.slow] * (line in SLOW)) for line in RUNS]
)
def test_command_runs(line, tmp_path):
    RUNS[line](line, tmp_path)
