"""A step of One More Step and minority classifiers as releases: they load anywhere, and their cards' code runs."""

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import sfumato
from sfumato import cli, storage
from sfumato.guidance.card import Published, make_card
from sfumato.guidance.job import JobConfig, main, train_guidance
from sfumato.guidance.networks import NetworkConfig
from sfumato.loading import assets_folder
from sfumato.releasing.guidance import release_guidance
from sfumato.trainer import TrainingConfig
from sfumato.training.minority_classifier import Minority, MinorityConfig
from sfumato.training.one_more_step import TRAINING, OneMoreStep, OneMoreStepConfig

KINDS = ("step", "classifier")
EMBEDDED = {"step": "atelier-one-more-step", "classifier": "atelier-pixel-minority"}


def train(kind, folder, data_dir, **job):
    method, model = OneMoreStep(OneMoreStepConfig()), "atelier"
    if kind == "classifier":
        method, model = Minority(MinorityConfig(classes=6, repeats=1)), "atelier-pixel"
    train_guidance(
        method, JobConfig(str(folder), **{"model": model, "data_dir": data_dir, "batch_size": 8, **job}),
        NetworkConfig(channels=[8, 16], norm_num_groups=4, attention_head_dim=8),
        TrainingConfig(steps=2, learning_rate=1e-3),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, fashion_mnist):
    root = tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        train(kind, root / kind, fashion_mnist, pictures=24)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(scope="module")
def released(trained, tmp_path_factory):
    root = tmp_path_factory.mktemp("out")
    for kind, run in trained.items():
        cli.main(["release", str(run), "--output", str(root / kind), "--license", "mit"])
    return {kind: root / kind for kind in KINDS}


def load(kind, place):
    """The network, by `sfumato.load`."""
    if kind == "classifier":
        return sfumato.load(place)
    return sfumato.load(place, base=sfumato.load("atelier")).unet


def same(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(one[0] == two[0] and torch.equal(one[1], two[1]) for one, two in pairs)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_they_load_with_the_same_weights_and_name_nothing_of_whoever_trained_them(
    kind, trained, released, fashion_mnist
):
    folder = released[kind]
    found = load(kind, folder)
    assert same(found, load(kind, trained[kind])) and not found.training
    assert type(found).__module__.partition(".")[0] in ("sfumato", "diffusers")  # and not the code of the release
    code = {"step": "pipeline_one_more_step.py", "classifier": "minority_classifier.py"}[kind]
    assert {code, "README.md", "manifest.json", "recipe.yaml"} <= set(files(folder))
    assert not {"history.json", "scores.safetensors"} & set(files(folder))
    stated, run = (storage.read_json(place / "manifest.json") for place in (folder, trained[kind]))
    assert stated["result_fingerprint"] == run["fingerprint"]
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and "Licence: mit." in card.text
    assert "Bring your own for data_dir." in card.text
    for name, content in files(folder).items():
        assert name.endswith(".safetensors") or fashion_mnist.encode() not in content, name


def test_the_recipe_repeats_the_training(trained, released, fashion_mnist, tmp_path):
    recipe = released["step"] / "recipe.yaml"
    words = ["--config", recipe, "--data_dir", fashion_mnist, "--output", tmp_path / "again"]
    main(OneMoreStep, OneMoreStepConfig, TRAINING, "", [str(word) for word in words])
    found = [storage.read_json(run / "manifest.json")["fingerprint"] for run in (trained["step"], tmp_path / "again")]
    assert found[0] == found[1]


def snippets(card):
    """Python of a card."""
    return re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)


def run_here(code, **given):
    """Run a card's code; gives its names."""
    names = dict(given)
    exec(code, names)
    return names


def check_use(kind, code):
    """What a card shows first leaves a pipeline that draws."""
    assert code.startswith("import sfumato\n")
    names = run_here(code)
    pipe = names["pipe"]
    if kind == "step":
        assert isinstance(pipe, sfumato.OneMoreStepPipeline) and pipe.base is not None
    else:
        assert isinstance(pipe.scheduler, sfumato.MinorityGuidanceScheduler)
        pipe.set_progress_bar_config(disable=True)
        assert pipe(class_labels=[3], num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 1)
    return names


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_of_every_card_runs(kind, trained, released, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").symlink_to(trained[kind])
    (tmp_path / kind).symlink_to(released[kind])
    own = snippets((trained[kind] / "README.md").read_text())
    bare = snippets((release_guidance(trained[kind], "bare", license="mit", code=False) / "README.md").read_text())
    whole = snippets((released[kind] / "README.md").read_text())
    assert [len(found) for found in (own, bare, whole)] == [1, 1, 2]
    assert '"FOLDER"' in own[0] and '"bare"' in bare[0] and f'"{kind}"' in whole[0]
    for found in (own, bare, whole):
        check_use(kind, found[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_of_an_embedded_one_says_load_and_its_code_runs(kind, trained, tmp_path, monkeypatch):
    name = EMBEDDED[kind]
    folder = release_guidance(trained[kind], tmp_path / name, license="apache-2.0", code=False)
    assert not list(folder.rglob("*.py"))
    for model in ("atelier", "atelier-pixel"):
        (tmp_path / model).symlink_to(assets_folder() / model)
    monkeypatch.setattr("sfumato.loading.assets_folder", lambda: tmp_path)
    (code,) = snippets((folder / "README.md").read_text())
    wanted = f'sfumato.load("{name}", base=pipe)' if kind == "step" else f'sfumato.load("{name}")'
    assert wanted in code and "from_pretrained" not in code
    check_use(kind, code)


ALONE = """
import sys
sys.modules["sfumato"] = None  # importing it fails
import re
import torch
from pathlib import Path
from safetensors.torch import save_file
torch.set_num_threads(1)
found = {}
for place in ("", "hub/me/"):
    for kind in ("step", "classifier"):
        torch.manual_seed(0)
        card = Path(place + kind, "README.md").read_text()
        code = re.findall("```python\\n(.*?)\\n```", card, re.DOTALL)[1]
        assert "sfumato" not in code and "trust_remote_code=True" in code
        names = {}
        exec(code, names)
        assert names["release"] == (f"me/{kind}" if place else kind)
        network = names["pipe" if kind == "step" else "classifier"]
        assert type(network).__module__.startswith("diffusers_modules.")
        if kind == "step":
            found[place + "velocity"] = network.predict(torch.ones(1, 4, 8, 8), ["a photo of a bag"])
        else:
            found |= {place + "noisy": names["noisy"], place + "logits": names["logits"].detach()}
save_file(found, "found.safetensors")
"""
SHA = "0" * 40


class Answers(http.server.BaseHTTPRequestHandler):
    """The Hub's answers to those who download from the repositories in a folder."""

    def do_GET(self):
        path = self.path.partition("?")[0].strip("/")
        parts = path.removeprefix("api/models/").split("/")
        root = self.server.root.joinpath(*parts[:2])
        told = {"ETag": f'"{hashlib.sha256(path.encode()).hexdigest()}"', "X-Repo-Commit": SHA}
        names = sorted(files(root))
        if not path.startswith("api/"):  # OWNER/NAME/resolve/REVISION/FILE
            name = "/".join(parts[4:])
            body = files(root).get(name)
        elif "tree" in parts:
            listed = [{"type": "file", "path": name, "size": 1, "oid": SHA} for name in names]
            body = json.dumps(listed).encode()
        else:
            told_of = {"id": "/".join(parts[:2]), "sha": SHA, "siblings": [{"rfilename": name} for name in names]}
            body = json.dumps(told_of | {"private": False, "tags": [], "downloads": 0}).encode()
        if body is None:
            told |= {"X-Error-Code": "EntryNotFound"}
        self.send_response(404 if body is None else 200)
        for name, value in {**told, "Content-Length": str(len(body or b""))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET" and body:
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        """Keep quiet."""


@pytest.fixture
def endpoint(hub):
    """Where the repositories of `hub` can be downloaded from."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.root = hub.root
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_code_for_diffusers_alone_runs_where_this_package_is_not_installed(
    trained, released, hub, endpoint, tmp_path
):
    for kind in KINDS:
        shutil.copytree(released[kind], tmp_path / kind)
        sfumato.release(trained[kind], tmp_path / "pushed" / kind, license="mit", push=f"me/{kind}", api=hub)
    text = (released["step"] / "README.md").read_text()
    assert "With diffusers alone, MODEL being atelier, a folder that `save_pretrained` has written:" in text
    sfumato.load("atelier").save_pretrained(tmp_path / "MODEL")
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")},
        "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "found.safetensors")
    step = sfumato.load(released["step"], base=sfumato.load("atelier"))
    velocity = step.predict(torch.ones(1, 4, 8, 8), ["a photo of a bag"])
    for place in ("", "hub/me/"):
        assert torch.allclose(found[f"{place}velocity"], velocity, atol=1e-5)
        logits = sfumato.load(released["classifier"])(found[f"{place}noisy"], 500)
        assert torch.allclose(found[f"{place}logits"], logits, atol=1e-5)


def test_a_model_of_the_hub_is_named_in_the_card(trained):
    manifest = storage.read_json(trained["step"] / "manifest.json") | {"beside": "someone/model"}
    card = make_card(manifest, Published("me/step", "mit", True))
    assert "base_model: someone/model" in card and "With diffusers alone:" in card and "MODEL" not in card
    assert card.count('from_pretrained("someone/model"') == 1 and 'release = "me/step"' in card


@pytest.mark.parametrize("code", [False, True])
def test_a_step_on_the_hub_is_read_without_running_its_code(code, trained, released, tmp_path):
    folder = released["step"]
    if not code:
        folder = release_guidance(trained["step"], tmp_path / "bare", license="mit", code=False)
    there = tmp_path / "cache" / "models--me--step"  # as it lies there after a download
    (there / "refs").mkdir(parents=True)
    (there / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, there / "snapshots" / ("0" * 40))
    for file in there.rglob("*.py"):
        file.write_text("raise AssertionError('this was run')")
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    step = sfumato.OneMoreStepPipeline.from_pretrained("me/step", base=sfumato.load("atelier"), **options)
    assert type(step) is sfumato.OneMoreStepPipeline and step.base is not None
    assert same(step.unet, load("step", trained["step"]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "state one with `license`"),
        ({"license": "my own"}, "must be an identifier"),
        ({"license": "mit", "base": "atelier"}, "`base` is for unlearning results"),
        ({"license": "mit", "formats": ["full"]}, "`formats` is for unlearning results"),
        ({"license": "mit", "evaluation": "evaluation.json"}, "`evaluation` is for unlearning results"),
        ({"license": "mit", "attacks": ["attack.json"]}, "`attacks` is for unlearning results"),
        ({"license": "mit", "scheduler": "bdia"}, "`scheduler` is for unlearning results"),
        ({"license": "mit", "push": "no id"}, "`push` takes a Hub id"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(kind, trained, options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        sfumato.release(trained[kind], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fingerprint": "0" * 16}, "were changed after the run"),
        ({"settings": None}, "'settings' is missing or wrong"),
        ({"beside": ["atelier"]}, "'beside' is missing or wrong"),
    ],
)
def test_a_manifest_that_is_not_the_runs_is_refused(trained, tmp_path, change, said):
    folder = shutil.copytree(trained["classifier"], tmp_path / "run")
    stated = storage.read_json(folder / "manifest.json") | change
    (folder / "manifest.json").write_text(json.dumps(stated))
    with pytest.raises(ValueError, match=said):
        sfumato.release(folder, tmp_path / "out", license="mit")
    assert not (tmp_path / "out").exists()


def test_pickles_and_folders_that_hold_something_are_refused(trained, released, tmp_path):
    with pytest.raises(FileExistsError, match="already holds something"):
        sfumato.release(trained["step"], released["step"], license="mit")
    folder = shutil.copytree(trained["step"], tmp_path / "run")
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="may run code when it is loaded"):
        sfumato.release(folder, tmp_path / "out", license="mit")


@pytest.mark.parametrize("kind", KINDS)
def test_an_upload_that_broke_off_goes_on(kind, trained, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("sfumato.releasing.hub.HfApi", lambda: hub)
    command = ["release", str(trained[kind]), "--output", str(tmp_path / "out"), "--license", "mit"]
    hub.fails = ("upload_folder", ConnectionResetError("x"))
    with pytest.raises(SystemExit, match="^error: Can't write to me/model: the Hub can't be reached or broke off"):
        cli.main([*command, "--push", "me/model"])
    made = files(tmp_path / "out")
    hub.fails = None
    cli.main([*command, "--push", "me/model"])
    there = files(hub.root / "me/model")
    del there[".gitattributes"]
    assert there == made == files(tmp_path / "out") and hub.private == {"me/model": True}
    assert hub.calls.count("create_repo") == 1 and b'"me/model"' in made["README.md"]
    with pytest.raises(SystemExit, match="^error: .* already holds something"):
        cli.main([*command, "--push", "me/other"])  # the card would say another name


def test_a_foreign_repository_is_left_as_it_is(trained, hub, tmp_path):
    sfumato.release(trained["step"], tmp_path / "step", license="mit", push="me/model", api=hub)
    before = files(hub.root)
    with pytest.raises(FileExistsError, match="does not hold this run's result, so it is left as it is"):
        sfumato.release(trained["classifier"], tmp_path / "other", license="mit", push="me/model", api=hub)
    (hub.root / "me").rename(hub.root / "stranger")
    hub.private = {"stranger/model": True}
    with pytest.raises(FileExistsError, match="is neither yours"):
        sfumato.release(trained["step"], tmp_path / "third", license="mit", push="stranger/model", api=hub)
    assert not (tmp_path / "other").exists() and not (tmp_path / "third").exists()
    assert sorted(files(hub.root).values()) == sorted(before.values())


def test_the_help_says_what_may_be_released(capsys):
    with pytest.raises(SystemExit):
        cli.main(["release", "--help"])
    said = capsys.readouterr().out
    assert "one_more_step.py" in said and "minority_classifier.py" in said
    assert "--push" not in said.partition("of unlearning results alone")[2].partition("examples:")[0]
