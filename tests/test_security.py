"""Files from strangers: no code in them runs, they reach no other files, and their texts are mere text."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sfumato
from sfumato import delta, loading, storage
from sfumato.evaluation.judge import Judge
from sfumato.evaluation.report import GridSection, Report, Table, render_report
from sfumato.families import family_of
from sfumato.releasing.contents import read_finished
from sfumato.unlearning.examples import read_image_folder
from sfumato.unlearning.saliency import load_mask

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path for folder in ("src", "schedulers", "pipelines", "training") for path in (ROOT / folder).rglob("*.py")
)
SCRIPT = "<script>alert(1)</script>"

# ---------------------------------------------------------------- no way to run what a file holds


def offences(tree):
    """What in a syntax tree would run, or help to run, code that comes as data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            found = modules & {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
            yield from found
            if isinstance(node, ast.ImportFrom) and (node.module, "load") in {
                (node.module, alias.name) for alias in node.names if node.module in ("torch", "yaml")
            }:
                yield f"{node.module}.load"
        if isinstance(node, ast.keyword):
            value = ast.unparse(node.value)
            trusts = node.arg in ("trust_remote_code", "allow_pickle") and value != "False"
            if trusts or (node.arg, value) == ("weights_only", "False"):
                yield f"{node.arg}={value}"
        if isinstance(node, ast.Dict) and any(
            isinstance(key, ast.Constant) and key.value == "trust_remote_code" for key in node.keys
        ):
            yield "trust_remote_code"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("eval", "exec", "compile", "__import__", "torch.load", "os.system", "yaml.unsafe_load"):
                yield called
            if called in ("yaml.load", "yaml.load_all", "yaml.full_load"):
                yield called
            if any(word.arg == "shell" and ast.unparse(word.value) != "False" for word in node.keywords):
                yield "shell=True"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_file_runs_what_it_reads(path):
    assert list(offences(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "torch.load('x')", "numpy.load('x', allow_pickle=True)",
        "eval('1')", "exec('1')", "yaml.load(text)", "yaml.load(text, Loader=yaml.Loader)", "from yaml import load",
        "f(trust_remote_code=True)", "f(trust_remote_code=chosen)", "f(**{'trust_remote_code': True})",
        "subprocess.run('x', shell=True)", "torch.load('x', weights_only=False)",
    ],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(code):
    assert list(offences(ast.parse(code)))
    assert not list(offences(ast.parse("model.eval(); yaml.safe_load(text); numpy.load(path); json.load(file)")))


# ---------------------------------------------------------------- a pickle in the place of weights


@pytest.fixture
def pickle(tmp_path):
    """A pickle, in its oldest form, which makes a file when it is loaded; gives a way to put it, and the file."""
    marker = tmp_path / "marker"
    content = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()

    def put(path):
        path.write_bytes(content)
        return path

    yield put
    assert not marker.exists()


def test_the_pickle_is_a_pickle(tmp_path):
    """Else the tests below would prove nothing."""
    marker = tmp_path / "marker"
    (tmp_path / "file").write_bytes(f"cos\nsystem\n(S'touch {marker}'\ntR.".encode())
    load = "import sys; module = __import__('pickle'); module.load(open(sys.argv[1], 'rb'))"
    subprocess.run([sys.executable, "-c", load, tmp_path / "file"], check=True)
    assert marker.exists()


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(loading.assets_folder() / "atelier", tmp_path / "model")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_model_with_a_pickle_for_weights_is_refused_by_the_files_name(model, pickle, part):
    file = next((model / part).glob("*.safetensors"))
    pickle(file)
    with pytest.raises(ValueError, match=f"{part}/{file.name} is corrupt"):
        sfumato.load(model)


def test_old_weights_of_a_model_are_not_unpickled(model, pickle):
    """A folder without safetensors would make diffusers look for ``.bin``."""
    next((model / "unet").glob("*.safetensors")).unlink()
    pickle(model / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="unet/diffusion_pytorch_model.bin is a pickle"):
        sfumato.load(model)


def test_a_pickle_for_a_delta_a_mask_a_checkpoint_or_a_judge_is_refused(pickle, tmp_path):
    file = pickle(tmp_path / "x.safetensors")
    pipe = sfumato.load("atelier")
    with pytest.raises(ValueError, match="x.safetensors is not a delta, or is damaged"):
        delta.apply_delta(pipe, file)
    for read in (storage.load_tensors, storage.read_metadata, storage.tensor_names):
        with pytest.raises(ValueError, match="x.safetensors is corrupt"):
            read(file)
    with pytest.raises(ValueError, match="x.safetensors is corrupt"):
        load_mask(file, pipe.unet)
    judge = shutil.copytree(loading.assets_folder() / "judge", tmp_path / "judge")
    pickle(judge / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors is corrupt"):
        Judge.load(judge)


def test_a_run_does_not_go_on_from_a_pickle(pickle, tmp_path):
    settings = {
        "forget_examples": 2, "retain_examples": 2, "example_steps": 1, "batch_size": 2, "learning_rate": 1e-3,
        "checkpoint_every": 1, "verify": False,
    }  # fmt: skip
    pipe, out = sfumato.load("atelier"), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="the power is gone"):

        def fail(*_, **__):
            raise OSError("the power is gone")

        patch.setattr("sfumato.unlearning.core.write_result", fail)
        sfumato.unlearn(pipe, "sneaker", output_dir=out, steps=2, **settings)
    weights = sorted((out / "checkpoints").glob("*/*.safetensors"))
    assert weights
    for file in weights:
        pickle(file)
    with pytest.raises(ValueError, match="is corrupt or cut short"):
        sfumato.unlearn(pipe, "sneaker", output_dir=out, resume=True, steps=2, **settings)


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "delta/delta.safetensors"])
def test_a_result_with_a_pickle_is_not_released(pickle, tmp_path, name):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / "manifest.json").write_text("{}")
    pickle(tmp_path / "out" / name)
    with pytest.raises(ValueError, match="is corrupt or cut short"):
        read_finished(tmp_path / "out")


# ---------------------------------------------------------------- names that climb out


@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "/etc/passwd"])
def test_a_name_that_climbs_out_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="which leads out of it"):
        storage.inside(tmp_path / "folder", name)


def test_plain_names_and_the_owners_own_links_are_fine(model, tmp_path):
    """As in the Hub's cache, which consists of links."""
    assert storage.inside(model, "a/b..c") == model / "a" / "b..c"
    (model / "unet").rename(tmp_path / "elsewhere")
    (model / "unet").symlink_to(tmp_path / "elsewhere")
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    file.rename(tmp_path / "blob")
    file.symlink_to(tmp_path / "blob")
    index = {"metadata": {}, "weight_map": {"x": file.name}}
    (model / "vae" / "other.safetensors.index.json").write_text(json.dumps(index))
    assert sfumato.load(model).unet is not None


def test_a_component_of_a_model_that_lies_elsewhere_is_refused(model):
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"../other": ["diffusers", "X"]}))
    with pytest.raises(ValueError, match=r"names '\.\./other', which leads out of it"):
        sfumato.load(model)


@pytest.mark.parametrize("kind", ["diffusion_pytorch_model", "model"])
def test_shards_of_a_model_that_lie_elsewhere_are_refused(model, tmp_path, kind):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    part = model / ("unet" if kind.startswith("diff") else "text_encoder")
    index = {"metadata": {}, "weight_map": {"x": "../../other.safetensors"}}
    (part / f"{kind}.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names '\.\./\.\./other.safetensors', which leads out of it"):
        sfumato.load(model)


def test_captions_read_no_picture_outside_their_folder(tmp_path):
    """``metadata.jsonl`` gives captions to the pictures that are there; it brings in none."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    source = sorted((loading.assets_folder() / "renders").glob("*.png"))[0]
    shutil.copy(source, tmp_path / "secret.png")
    shutil.copy(source, pictures / "a.png")
    rows = [{"file_name": "../secret.png", "text": "secret"}, {"file_name": str(tmp_path / "secret.png"), "text": "s"}]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    examples = read_image_folder(family_of(sfumato.load("atelier")), pictures, ["a t-shirt"])
    assert examples.prompts == ("a t-shirt",)


# ---------------------------------------------------------------- texts


def test_the_report_shows_a_concept_as_text():
    section = GridSection(
        SCRIPT, SCRIPT, [SCRIPT], [SCRIPT], [(SCRIPT, torch.zeros(1, 1, 3, 4, 4))], Table([SCRIPT], [[SCRIPT]])
    )
    history = [{"step": 1.0, SCRIPT: 1.0}, {"step": 2.0, SCRIPT: 0.5}]
    report = Report(
        title=SCRIPT, summary=SCRIPT, metrics=[], sections=[section], history=history, facts={SCRIPT: SCRIPT},
        command=f"sfumato demo --forget '{SCRIPT}'",
    )  # fmt: skip
    page = render_report(report)
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page and not re.search(r"\bon\w+=", page)
