import json
import subprocess
import sys

import pytest
import torch

import sfumato
from sfumato import storage
from sfumato.memory import peak_memory_mb
from sfumato.progress import Track, rehearsing

SMALL = {
    "forget_examples": 16, "retain_examples": 24, "example_steps": 2, "example_batch_size": 4, "batch_size": 2,
    "steps": 40, "learning_rate": 1e-3,
}  # fmt: skip


def test_a_rehearsal_makes_the_last_passes_and_counts_all():
    seen = []
    with rehearsing() as phases:
        for item in Track(range(10), "work", shown=False, rehearsed=slice(-3, -1)):
            seen.append(item)
        assert list(Track(range(2), "one", shown=False, rehearsed=slice(-3, -2))) == [1]
        for _ in Track([], "nothing", shown=False):
            raise AssertionError
    assert seen == [7, 8]
    assert [(phase.name, phase.passes) for phase in phases] == [("work", 10), ("one", 2), ("nothing", 0)]
    assert phases[2].seconds == 0
    assert list(Track(range(3), "work", shown=False)) == [0, 1, 2]


def test_a_plan_says_what_is_trained_and_writes_nothing(tiny_pipe, tmp_path):
    before = storage.fingerprint(tiny_pipe.unet.named_parameters())
    plan = sfumato.rehearse(
        tiny_pipe, "a sneaker", "salun", output_dir=tmp_path / "out", parameters="xattn-kv", **SMALL
    )
    names = [name for name, _ in tiny_pipe.unet.named_parameters() if "attn2.to_k" in name or "attn2.to_v" in name]
    assert plan.trained == sum(tiny_pipe.unet.get_parameter(name).numel() for name in names)
    assert plan.weights == sum(parameter.numel() for parameter in tiny_pipe.unet.parameters())
    passes = {phase.name: phase.passes for phase in plan.phases}
    assert passes == {"draw forget set": 4, "draw retain set": 6, "saliency": 8, "salun": 40}
    assert plan.seconds == pytest.approx(sum(phase.seconds for phase in plan.phases)) and plan.seconds > 0
    assert not (tmp_path / "out").exists()
    assert storage.fingerprint(tiny_pipe.unet.named_parameters()) == before
    said = str(plan)
    assert f"train {plan.trained:,} weights" in said and "Memory: " in said and "draw retain set (6)" in said


def test_a_rehearsal_sees_the_attack_that_begins_later(tiny_pipe):
    settings = {"trajectory_steps": 4, "trajectories_per_prompt": 1, "retain_trajectories": 4, "batch_size": 1}
    plans = [
        sfumato.rehearse(
            tiny_pipe, "a sneaker", "advunlearn", steps=200, warmup_rounds=warm, attack_steps=20, **settings
        )
        for warm in (150, 200)
    ]
    attacked, spared = (next(phase.seconds for phase in plan.phases if phase.name == "advunlearn") for plan in plans)
    assert attacked > 3 * spared


def test_a_rehearsal_refuses_what_the_run_would(tiny_pipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").touch()
    with pytest.raises(FileExistsError, match="holds files that are not this job's"):
        sfumato.rehearse(tiny_pipe, "a sneaker", output_dir=tmp_path / "out", **SMALL)
    with pytest.raises(ValueError, match="retain set is empty"):
        sfumato.rehearse(tiny_pipe, "a sneaker", retain=[], **SMALL)


def test_a_rehearsal_refuses_a_tracker_that_the_run_would_not_find(tiny_pipe, tmp_path):
    for call in (sfumato.rehearse, sfumato.unlearn):
        with pytest.raises(ImportError, match="log_with='clipboard' needs a package that is not installed"):
            call(tiny_pipe, "a sneaker", output_dir=tmp_path / "out", log_with="clipboard", **SMALL)
        with pytest.raises(ValueError, match="log_with='tensorboard' needs an output folder"):
            call(tiny_pipe, "a sneaker", log_with="tensorboard", **SMALL)


def test_checkpoints_are_counted_and_must_fit(tiny_pipe, tmp_path):
    settings = {"parameters": "xattn-kv", "ema_decay": 0.9, **SMALL}
    plans = [
        sfumato.rehearse(tiny_pipe, "a sneaker", output_dir=tmp_path / "out", keep_checkpoints=kept, **settings)
        for kept in (1, 11)
    ]
    weights, copies = plans[0].trained, 4  # with two moments and an average
    assert plans[1].disk_mb - plans[0].disk_mb == pytest.approx(10 * copies * 4 * weights / 1e6)
    for call in (sfumato.rehearse, sfumato.unlearn):
        with pytest.raises(OSError, match="Not enough disk space"):
            call(tiny_pipe, "a sneaker", output_dir=tmp_path / "out", keep_checkpoints=10**12, **settings)


def test_adapters_are_counted_not_the_weights_behind_them(tiny_pipe):
    plan = sfumato.rehearse(tiny_pipe, "a sneaker", parameters="xattn-kv", adapter_rank=2, mask_ratio=1.0, **SMALL)
    shapes = [p.shape for name, p in tiny_pipe.unet.named_parameters() if "attn2.to_k" in name or "attn2.to_v" in name]
    assert plan.trained == sum(2 * (rows + columns) for rows, columns in shapes)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep the peak of the whole process")
def test_memory_that_the_process_used_before_is_not_the_runs(tiny_pipe, tmp_path):
    def used_before():
        held = torch.ones(800_000_000, dtype=torch.uint8)
        return peak_memory_mb(torch.device("cpu")) if held[-1] else 0.0

    before = used_before()
    plan = sfumato.rehearse(tiny_pipe, "a sneaker", "uce", verify=False)
    assert plan.memory_mb < before - 500
    used_before()
    sfumato.unlearn(tiny_pipe, "a sneaker", "uce", verify=False, output_dir=tmp_path / "out")
    found = json.loads((tmp_path / "out" / "manifest.json").read_text())["peak_memory_mb"]
    assert found < before - 500


def test_expected_memory_is_that_of_the_run(tmp_path):
    """In processes of their own, as a user has it: memory within a fifth."""
    command = [
        sys.executable, "-m", "sfumato.training.esd", "--forget", "sneaker", "--output", str(tmp_path / "out"),
        "--no_verify", "--steps", "60",
    ]  # fmt: skip
    planned = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, timeout=300)
    assert planned.returncode == 0, planned.stderr
    assert not (tmp_path / "out").exists()
    expected = float(planned.stdout.split("Memory: ")[1].split(" MB")[0].replace(",", ""))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "manifest.json").read_text())["peak_memory_mb"]
    assert expected == pytest.approx(found, rel=0.2)
    assert "esd would forget 'sneaker' in atelier" in planned.stdout
