"""What the tests of the README and of the results share: blocks of a page, and commands as a reader would run them."""

import contextlib
import io
import os
import re
import runpy
import struct
import subprocess
import sys
from gzip import compress
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato import cli

ROOT = Path(__file__).parents[1]
ONE_PROCESS = [
    "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
    "--num_cpu_threads_per_process", "1",  # as CI gives each worker one
]  # fmt: skip


def blocks_of(page):
    """The language and the code of each fenced block of a page of Markdown."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def lines_of(blocks):
    """The commands in blocks of the shell."""
    return [line for language, code in blocks if language == "bash" for line in code.splitlines() if line.strip()]


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


def make_garments(folder):
    """Random pictures in the files Fashion-MNIST comes in."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 1000), ("t10k", 1000)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in ((f"{split}-images-idx3-ubyte.gz", images), (f"{split}-labels-idx1-ubyte.gz", labels)):
            header = b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / name).write_bytes(compress(header + array.tobytes()))
