"""What the shipped files make of ``accelerate launch``, as it says itself."""

import os
import stat
import subprocess
from pathlib import Path

import pytest
from accelerate.commands import launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env

ROOT = Path(__file__).parents[2]
NODES = {
    "SLURM_JOB_NODELIST": "a[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_NODEID": "1",
}  # fmt: skip
COMMANDS = {
    "scontrol": "printf 'a1\\na2\\n'",
    "srun": 'shift; exec "$@"',  # its one option, then the command that every node is to run
    "accelerate": "shift; printf '%s\\n' \"$@\"",
}


@pytest.fixture
def on_slurm(tmp_path):
    """Run the batch script as SLURM's second node would; gives the arguments of ``accelerate launch``."""
    for name, body in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)

    def start(config, *arguments, **variables):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LAUNCH": f"training/launch/{config}.yaml", **NODES}
        script = ["bash", "training/launch/slurm.sbatch", *arguments]
        done = subprocess.run(script, env=environment | variables, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return start


def test_deepspeed_starts_on_several_nodes_without_a_launcher_of_its_own(on_slurm, monkeypatch):
    """Its own would want a list of hosts and pdsh; SLURM has started one launcher on each node already."""
    monkeypatch.chdir(ROOT)
    given = on_slurm("deepspeed", "training/salun.py", "--forget", "Van Gogh", "--output", "out")
    parsed, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(given))
    parsed.deepspeed_fields_from_accelerate_config = ""
    command, _ = prepare_deepspeed_cmd_env(parsed)
    assert parsed.use_deepspeed and command is None  # torchrun's own launcher is called
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.node_rank) == ("2", "8", 1)
    assert (parsed.rdzv_endpoint, parsed.rdzv_backend) == ("a1:29500", "c10d")
    assert parsed.training_script_args == ["--forget", "Van Gogh", "--output", "out"]


def test_a_job_that_was_requeued_goes_on(on_slurm):
    given = on_slurm("ddp", "training/salun.py", "--output", "out", SLURM_RESTART_COUNT="1")
    assert given[-4:] == ["--output", "out", "--resume", "True"]


def test_processes_wait_for_hours_while_the_first_validates(launch, tmp_path):
    """By default NCCL would end the run after ten minutes."""
    (tmp_path / "waits.py").write_text(
        "import sys, torch.distributed as dist\n"
        "from sfumato.trainer import TrainingConfig, make_accelerator\n"
        "device = make_accelerator(TrainingConfig()).device\n"
        "options = dist.distributed_c10d._get_default_group()._get_backend(device).options\n"
        "open(f'{sys.argv[1]}/{dist.get_rank()}.txt', 'w').write(str(options._timeout.total_seconds()))\n"
    )
    done = launch(tmp_path / "waits.py", tmp_path, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    waits = [float(file.read_text()) for file in tmp_path.glob("?.txt")]
    assert len(waits) == 2 and min(waits) >= 3600
