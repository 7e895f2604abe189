"""Run notebooks in temporary folders and keep their outputs, without what tells one machine from another.

.venv/bin/python .ci/keep_notebooks.py notebooks/edit_a_picture.ipynb
"""

import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def keep(path: Path) -> None:
    """Run a notebook by this interpreter, and write it back."""
    notebook = nbformat.read(path, as_version=4)
    manager = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook, km=manager, timeout=600, coalesce_streams=True, record_timing=False,
            resources={"metadata": {"path": folder}},
        ).execute()  # fmt: skip
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/jpeg", None)  # beside the same as PNG
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        keep(Path(name))
        print(f"{name}: run and kept")
