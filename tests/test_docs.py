"""Every code block of every page of the documentation is run here, as a reader would; none may be left out.

A page's ```python and ```bash blocks run in its order, in a temporary folder of its own where `training/`,
`benchmarks/` and `src/` are those of the repository. Its front matter says how the test shrinks it:

    test:
      replace:              # text in the blocks: what stands there in the test; {sdxl}, ... are folders of tiny models
        "num_inference_steps=50": "num_inference_steps=2"
      slow: true            # runs only among the slow tests
"""

import contextlib
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import traceback
import types
from functools import cache
from importlib import util
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from PIL import Image

import sfumato
from sfumato import cli
from sfumato.attacks.methods import ATTACKS
from sfumato.cli.parser import make_parser
from sfumato.loading import assets_folder
from sfumato.unlearning.job import make_job_parser
from sfumato.unlearning.methods import METHODS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
ELSEWHERE = {"results.md"}  # its commands are the README's, which test_readme.py runs
LINKED = ("training", "benchmarks", "src")
TIMEOUT = 600  # seconds of a page
SHOWN = {"csv", "json", "text", "toml", "yaml"}  # languages of what is not run
DIRECTIVES = {"eval-rst", "figure", "image", "include", "literalinclude", "note", "tip", "toctree", "warning"}
KINDS = {"sd15": "sd", "sd2": "sd-v", **{kind: kind for kind in ("sdxl", "sd3", "flux", "pixart", "dit", "ddpm")}}


class Block(NamedTuple):
    language: str
    line: int
    code: str


def name_of(page: Path) -> str:
    return str(page.relative_to(DOCS))


def fences(text: str) -> list[Block]:
    """Give what stands in fences of backticks, with what each is labelled."""
    found, opened, lines = [], None, text.splitlines()
    for number, line in enumerate(lines, 1):
        if mark := re.match(r"\s*(`{3,})\s*([^`]*)$", line):
            ticks, label = mark.groups()
            if opened is None:
                opened = (ticks, label.strip(), number)
            elif not label.strip() and len(ticks) >= len(opened[0]):
                code = textwrap.dedent("\n".join(lines[opened[2] : number - 1])) + "\n"
                found.append(Block(opened[1], opened[2] + 1, code))
                opened = None
    assert opened is None, f"the fence in line {opened[2]} is not closed"
    return found


def settings_of(text: str) -> dict:
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    return (yaml.safe_load(front[1]) or {}).get("test", {}) if front else {}


def prose_of(text: str) -> str:
    return re.sub(r"^ *(`{3,})(?!\{).*?^ *\1`*$", "", text, flags=re.MULTILINE | re.DOTALL)


def pictures_in(text: str) -> list[str]:
    prose = prose_of(text)
    return re.findall(r"!\[[^\]]*\]\(([^)\s]+)", prose) + re.findall(r"\{(?:figure|image)\} (\S+)", prose)


def runnable(text: str) -> list[Block]:
    return [block for block in fences(text) if block.language in ("python", "bash")]


def cases():
    for page in PAGES:
        text = page.read_text()
        if name_of(page) not in ELSEWHERE and runnable(text):
            slow = settings_of(text).get("slow", False)
            yield pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] if slow else [])


@cache
def tiny_models():
    """The tiny pipelines that tests of families are run on."""
    path = ROOT / "tests" / "families" / "conftest.py"
    spec = util.spec_from_file_location("tiny_families", path)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.built


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What stands for a placeholder: a folder, made when it is first asked for."""

    @cache
    def folder_of(name):
        folder = tmp_path_factory.mktemp(name)
        if name == "pictures":
            for k, file in enumerate(sorted((assets_folder() / "renders").glob("*.png"))[:12]):
                Image.open(file).convert("RGB").save(folder / f"{k:02}.png")
        else:
            tiny_models()(KINDS[name]).save_pretrained(folder)
        return str(folder)

    return folder_of


def shrunk(text, place):
    """Give a page's blocks as its front matter would have them run."""
    blocks = runnable(text)
    for old, new in settings_of(text).get("replace", {}).items():
        assert any(old in block.code for block in blocks), f"no block has {old!r}, which is to be replaced"
        for name in re.findall(r"\{(\w+)\}", str(new)):
            if name in KINDS or name == "pictures":
                new = str(new).replace(f"{{{name}}}", place(name))
        blocks = [block._replace(code=block.code.replace(old, str(new))) for block in blocks]
    return blocks


def run_block(block, page, module):
    if block.language == "python":
        code = compile("\n" * (block.line - 1) + block.code, page, "exec")
        exec(code, module.__dict__)
        return
    for line in block.code.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            run_line(line)


def run_line(line):
    """Run a command in a process of its own, which need not import torch again if it is Python that it starts."""
    print(f"$ {line}", flush=True)
    words = shlex.split(line, comments=True)
    launched = words[:2] == ["accelerate", "launch"] and words[2].endswith(".py")
    ours = words[0] == "sfumato" or (words[0] == "python" and words[1].endswith(".py")) or launched
    if not ours or set(words) & set("|<>;&") or re.search(r"[|;&<>]|\$\(", line):
        subprocess.run(["bash", "-ec", line], check=True)
        return

    def command():
        if words[0] == "sfumato":
            sys.exit(cli.main(words[1:]))
        sys.argv = words[2:] if launched else words[1:]
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
        runpy.run_path(sys.argv[0], run_name="__main__")

    if status := os.waitstatus_to_exitcode(os.waitpid(forked(command), 0)[1]):
        raise RuntimeError(f"{line!r} ended with {status}")


def forked(work):
    """Do some work in a copy of this process."""
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)  # makes its pool anew, which a fork leaves broken, before threads ask for it at once
        work()
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def run_page(page, blocks, folder, log):
    """Run a page in a copy of this process: what it registers, seeds or sets is gone with that."""

    def work():
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        os.chdir(folder)
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
        torch.set_num_threads(1)
        torch.manual_seed(0)
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        for block in blocks:
            print(f"--- {name_of(page)}, line {block.line}, {block.language}", flush=True)
            run_block(block, str(page), module)

    child, end = forked(work), time.monotonic() + TIMEOUT
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"took longer than {TIMEOUT} s"
        time.sleep(0.05)
    status = os.waitstatus_to_exitcode(ended[1])
    return f"ended with {status}" if status else None


@pytest.mark.parametrize("page", list(cases()))
def test_every_block_of_the_page_runs(page, place, tmp_path):
    blocks = shrunk(page.read_text(), place)
    folder = tmp_path / "reader"
    folder.mkdir()
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    wrong = run_page(page, blocks, folder, tmp_path / "log")
    assert wrong is None, f"{name_of(page)} {wrong}:\n{(tmp_path / 'log').read_text()[-6000:]}"


@cache
def command_line():
    return make_parser(whole=True)


def read(line):
    """Read a command of ours as its parser does; whether it is one."""
    words = [word for word in shlex.split(line, comments=True) if word != "--json"]
    words = words[: words.index(">")] if ">" in words else words
    script = next((k for k, word in enumerate(words) if re.fullmatch(r"training/\w+\.py|sfumato(\.\w+)*", word)), None)
    if script is None:
        return False
    method = re.split(r"[/.]", words[script].removesuffix(".py"))[-1]
    if method in METHODS:
        found = make_job_parser(method).parse_args(words[script + 1 :])
    elif words[script] in ("sfumato", "sfumato.cli"):
        found = command_line().parse_args(words[script + 1 :])
    else:
        return False  # another training, whose parser the run itself meets with all that stands in the line
    recipe = getattr(found, "recipe", None)
    assert recipe is None or (ROOT / "training" / "configs" / f"{recipe}.yaml").exists()
    return True


def test_commands_are_read_by_their_parsers_as_they_are_written():
    """Not only as the tests shrink them."""
    count = 0
    for page in [ROOT / "README.md", *PAGES]:
        for block in fences(page.read_text()):
            shown = block.language == "text" and block.code.startswith(("sfumato ", "accelerate "))
            for line in block.code.replace("\\\n", " ").splitlines() if shown or block.language == "bash" else ():
                try:
                    count += read(line)
                except SystemExit as refused:
                    raise AssertionError(f"{page.relative_to(ROOT)}: {line}") from refused
    assert count >= 70


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_fence_says_what_it_holds(page):
    for language, line, _ in fences(page.read_text()):
        directive = re.match(r"\{([\w-]+)\}", language)
        known = directive[1] in DIRECTIVES if directive else language in SHOWN | {"python", "bash"}
        assert known, f"{name_of(page)}, line {line}: {language or 'no language'}"
    settings = settings_of(page.read_text())
    assert set(settings) <= {"replace", "slow"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_pictures_lead_somewhere(page):
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)", prose_of(text)) + pictures_in(text)
    for target in targets:
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{name_of(page)}: {target}"


def pages_of(kind):
    """The page of each public scheduler or pipeline, named as its file is."""
    homes = {name: home for name, home in sfumato._HOMES.items() if name.endswith(kind.capitalize())}
    prefix = {"scheduler": "scheduling_", "pipeline": "pipeline_"}[kind]
    return {name: f"{kind}s/{home.rpartition(prefix)[2]}.md" for name, home in homes.items()}


REFERENCE = {
    **pages_of("scheduler"),
    **pages_of("pipeline"),
    **{name: f"methods/{name}.md" for name in METHODS},
    **{name: f"attacks/{name}.md" for name in ATTACKS},
}
NO_PROGRAM = {"ClassConditionalPipeline"}  # no paper's, so that there is nothing to deviate from


@pytest.mark.parametrize("name", REFERENCE)
def test_every_scheduler_pipeline_method_and_attack_has_a_page_with_all_that_one_needs(name):
    page = DOCS / REFERENCE[name]
    text = page.read_text()
    assert "$$" in text, "an equation"
    assert pictures_in(text), "a picture"
    assert re.search(r"^(#+ |\*\*)Papers?\b", text, re.MULTILINE) or "https://arxiv.org/abs/" in text
    for section in ("When to use it", *(("Deviations",) if name not in NO_PROGRAM else ())):
        assert re.search(rf"^(#+ |\*\*){section}\b", text, re.MULTILINE), section
    if name[0].isupper():
        assert f"`sfumato.{name}`" in text, "a link to its API"
    assert runnable(text), "an example"
    index = (page.parent / "index.md").read_text()
    assert page.stem in index or ":glob:" in index
