"""What is shipped is what is on disk, it stands on what it declares, and it loads no pickle."""

import ast
import re
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import sfumato

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
SHIPPED_FOLDERS = [ROOT / folder for folder in SETUPTOOLS["package-dir"].values()]
SHIPPED = sorted(path for folder in SHIPPED_FOLDERS for path in folder.rglob("*.py"))
STAND_ALONE = sorted(path for folder in ("schedulers", "pipelines") for path in (ROOT / folder).glob("*.py"))

DISTRIBUTION = {"PIL": "pillow", "yaml": "pyyaml"}  # where the name on PyPI is not the imported one
NOT_IMPORTED = {  # declared, because something we call imports it
    "peft": "diffusers' LoRA adapters",
    "tensorboard": "accelerate's tracker",
    "xformers": "diffusers' attention backends",
}
PICKLES = {"_pickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Give the absolute imports anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


def distributions_imported_by(paths: list[Path], trees: list[ast.AST]) -> dict[str, str]:
    """Map each third-party distribution to a file that imports it."""
    found = {}
    for path, tree in zip(paths, trees, strict=True):
        for module in imported_modules(tree):
            top = module.partition(".")[0]
            if top not in sys.stdlib_module_names | {"sfumato", "__future__"}:
                found[DISTRIBUTION.get(top, top).lower()] = name_of(path)
    return found


def outside_functions(tree: ast.Module) -> ast.Module:
    """Keep what runs when a module is imported: drop bodies of functions and what only type checkers read."""

    class Pruner(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Pruner().visit(tree)


def declared(*extras: str) -> set[str]:
    """Give the names of the distributions that an install with these extras asks for itself."""
    project = PYPROJECT["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return {re.sub(r"[-_.]+", "_", Requirement(line).name).lower() for line in lines} - {"sfumato"}


def test_every_package_on_disk_is_listed_and_no_other():
    on_disk = set()
    for package, folder in SETUPTOOLS["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            on_disk.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    assert set(SETUPTOOLS["packages"]) == on_disk


def test_every_module_lies_in_a_package():
    """A folder without ``__init__.py`` would stay out of the wheel without a word."""
    orphans = [name_of(path) for path in SHIPPED if not (path.parent / "__init__.py").exists()]
    assert orphans == []


def test_types_are_shipped():
    assert "py.typed" in SETUPTOOLS["package-data"]["sfumato"]
    assert (ROOT / "src/sfumato/py.typed").is_file()


@pytest.mark.parametrize("package", ["schedulers", "pipelines", "training"])
def test_top_level_folders_cannot_be_imported_as_a_second_copy(package):
    """From the root, ``import schedulers`` would make a second class of each name, unequal to sfumato's."""
    answer = subprocess.run([sys.executable, "-c", f"import {package}"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode != 0
    assert f"package sfumato.{package}: install sfumato" in answer.stderr


def test_no_training_script_hides_a_dependency():
    """``accelerate launch training/x.py`` puts training/ first on the path: datasets.py there would be `datasets`."""
    taken = set(sys.stdlib_module_names) | set(packages_distributions()) | declared("train", "eval", "attention")
    assert {path.stem for path in (ROOT / "training").glob("*.py")} & taken == set()


@pytest.mark.parametrize("path", STAND_ALONE, ids=name_of)
def test_hub_files_stand_alone(path):
    needed = {"PIL", "huggingface_hub", "safetensors"}  # by diffusers, as transformers is for pipelines with a text
    allowed = sys.stdlib_module_names | {"torch", "numpy", "diffusers", "transformers"} | needed
    tree = parse(path)
    assert {module for module in imported_modules(tree) if module.partition(".")[0] not in allowed} == set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            sibling = path.parent / f"{node.module}.py"
            assert node.level == 1 and sibling.is_file(), f"line {node.lineno}: only a sibling travels with a Hub file"


def siblings(path: Path) -> set[str]:
    nodes = ast.walk(parse(path))
    return {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom) and node.level}


@pytest.mark.parametrize(
    "path", [path for path in STAND_ALONE if path.stem.startswith(("pipeline_", "scheduling_"))], ids=name_of
)
def test_hub_files_name_every_file_that_must_travel_with_them(path):
    """diffusers carries along what a file imports itself, not what that imports."""
    direct = siblings(path)
    assert {further for name in direct for further in siblings(path.with_name(f"{name}.py"))} - direct == set()


def test_nothing_loads_a_pickle():
    offences = []
    for folder in (*SHIPPED_FOLDERS, ROOT / "tests", ROOT / "benchmarks", ROOT / "notebooks"):
        for path in folder.rglob("*.py"):
            tree = parse(path)
            if PICKLES & {module.partition(".")[0] for module in imported_modules(tree)}:
                offences.append(f"{name_of(path)} imports a pickle module")
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                    offences.append(f"{name_of(path)}:{node.lineno} torch.load; use safetensors")
                if isinstance(node, ast.keyword) and (node.arg, ast.unparse(node.value)) in {
                    ("weights_only", "False"),
                    ("allow_pickle", "True"),
                }:
                    offences.append(f"{name_of(path)}:{node.value.lineno} {node.arg}={ast.unparse(node.value)}")
    assert offences == []


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_nothing_needs_torchvision(path):
    assert "torchvision" not in {module.partition(".")[0] for module in imported_modules(parse(path))}


def test_what_is_imported_on_import_is_a_plain_dependency():
    """A bare install imports everything; what an extra brings is imported where it is used."""
    used = distributions_imported_by(SHIPPED, [outside_functions(parse(path)) for path in SHIPPED])
    assert {name: path for name, path in used.items() if name not in declared()} == {}


def test_every_import_is_declared_and_every_declaration_used():
    used = distributions_imported_by(SHIPPED, [parse(path) for path in SHIPPED])
    users = declared("train", "eval", "attention", "completion")
    assert {name: path for name, path in used.items() if name not in users} == {}
    assert users - set(used) - set(NOT_IMPORTED) == set()


def test_help_answers_at_once_and_without_torch(tmp_path):
    script = tmp_path / "help.py"
    script.write_text(
        "import sys\n"
        "from importlib.metadata import entry_points\n"
        "(command,) = entry_points(group='console_scripts', name='sfumato')\n"
        "main = command.load()\n"
        "sys.argv = ['sfumato', '--help']\n"
        "try:\n"
        "    code = main()\n"
        "except SystemExit as leaving:\n"
        "    code = leaving.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'accelerate'} & set(sys.modules)\n"
        "sys.exit(f'--help imports {sorted(heavy)}' if heavy else code)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert answer.returncode == 0, answer.stderr
    assert "usage" in answer.stdout.lower()
    # Seconds of the CPU, not of the clock: the machine may be busy.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_the_citation_and_the_changelog_name_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == sfumato.__version__ and citation["license"] == "Apache-2.0"
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == (sfumato.__version__, str(citation["date-released"]))


@pytest.mark.parametrize("form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.stem)
def test_forms_for_issues_are_what_github_reads(form):
    content = yaml.safe_load(form.read_text())
    if form.stem == "config":
        assert content == {"blank_issues_enabled": True}
        return
    assert content["name"] and content["description"]
    fields = content["body"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["type"] in ("input", "textarea") and field["attributes"]["label"] for field in fields)
