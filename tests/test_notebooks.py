"""The notebooks: kept as they ran, small and of no machine; and each still runs from top to bottom."""

import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SIZE = 500_000  # bytes of a notebook with its pictures
SECONDS = 300
# Folders of people, temporary ones, others of a machine; drives; addresses of objects, which differ in every run.
FOLDERS = r"/(home|root|Users|tmp|var|opt|work|mnt|private|usr|builds?)/|[A-Z]:\\"
OF_A_MACHINE = re.compile(rf"{FOLDERS}|<[^<>]* at 0x[0-9a-f]+>|localhost|127\.0\.0\.1")


def named(path):
    return path.stem


every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=named)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def texts(output):
    """All that a reader reads of an output: what was printed, and its forms as text."""
    if output.output_type == "stream":
        return [output.text]
    return [form for kind, form in output.get("data", {}).items() if kind.startswith("text/")]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 6


@every_notebook
def test_a_notebook_is_valid_and_of_no_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert notebook.metadata.language_info == {"name": "python"}
    assert [cell.metadata for cell in notebook.cells if cell.metadata] == []


@every_notebook
def test_a_notebook_was_run_from_top_to_bottom_without_a_fault(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert [o for o in outputs(notebook) if o.output_type == "error" or o.get("name") == "stderr"] == []


@every_notebook
def test_a_notebook_keeps_its_pictures_and_stays_small(path):
    notebook = nbformat.read(path, as_version=4)
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert path.stat().st_size < SIZE


@every_notebook
def test_a_notebook_names_no_place_of_the_machine_it_ran_on(path):
    notebook = nbformat.read(path, as_version=4)
    found = [OF_A_MACHINE.search(text) for output in outputs(notebook) for text in texts(output)]
    assert [match.group() for match in found if match] == []


@every_notebook
def test_a_notebook_tells_what_it_does_and_begins_with_a_title(path):
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")


def test_the_guide_names_every_notebook():
    page = (ROOT / "docs" / "guides" / "notebooks.md").read_text()
    assert set(re.findall(r"notebooks/(\w+)\.ipynb", page)) == {named(path) for path in NOTEBOOKS}


def this_interpreter():
    """Start no kernel but this interpreter's own, whatever kernels the machine knows by that name."""
    manager = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    assert manager.kernel_spec.argv[0] == sys.executable
    return manager


@pytest.mark.slow
@pytest.mark.timeout(SECONDS)
@every_notebook
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(path, as_version=4)
    kept = json.loads(json.dumps(notebook))
    client = NotebookClient(
        notebook, km=this_interpreter(), timeout=SECONDS, startup_timeout=120, coalesce_streams=True,
        resources={"metadata": {"path": str(tmp_path)}},
    )  # fmt: skip
    client.execute()
    for before, cell in zip(kept["cells"], notebook.cells, strict=True):
        if cell.cell_type == "code":
            kinds = [[output["output_type"] for output in run["outputs"]] for run in (before, cell)]
            assert kinds[0] == kinds[1], f"cell {cell.id!r} shows something else than what is kept of it"
    assert list(tmp_path.iterdir()) == [], "a notebook writes into a temporary folder of its own"
