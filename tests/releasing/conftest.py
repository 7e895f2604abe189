"""A small run that saved every format, of a model in a folder of its own; and folders in place of the Hub."""

import json
import shutil
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError

import sfumato
from sfumato.loading import assets_folder

FORMATS = ["full", "part", "delta", "lora"]
COMMAND = "--model /home/someone/out --forget sneaker --output /home/someone/found"
EVALUATION = {
    "concept": {"name": "sneaker", "phrases": ["sneaker"], "groups": ["garment"]},
    "models": {"result": {"name": "/home/someone/out", "fingerprint": "1"}, "original": {"name": "/home/someone"}},
    "settings": {"cache": "/home/someone/cache", "real": "/home/someone/photos", "device": "cuda:3", "seed": 0},
    "detector": {"detector": "clip", "model": "/home/someone/clip", "rule": {"wanted": [["sneaker"]], "top": 1}},
    "scores": {
        "result": {
            "ua": {"value": 0.9, "low": 0.8, "high": 0.95, "successes": 90, "total": 100}, "ira": None,
            "cra": {"value": float("nan"), "low": 0.0, "high": 1.0},
            "neighbours": {"boot": {"value": 0.5, "low": 0.4, "high": 0.6, "successes": 5, "total": 10}},
        },
        "original": {
            "ua": {"value": 0.1, "low": 0.05, "high": 0.2, "successes": 10, "total": 100}, "ira": None, "cra": None,
            "neighbours": {},
        },
    },
    "distances": {
        "features": "clip:/home/someone/clip",
        "result to original": {"pictures": [9, 9], "frechet": {"value": 12.5, "low": 10.0, "high": 14.0}},
        "original to real": {"pictures": [9, 9], "frechet": {"value": 1.5, "low": 1.0, "high": 2.0}},
        "result to real": {"pictures": [9, 9], "frechet": {"value": 2.5, "low": 2.0, "high": 3.0}},
        "drift": {"retain": {"value": 0.25, "low": 0.2, "high": 0.3}},
    },
    "costs": {"seconds": 3}, "versions": {"torch": "2"},
    "command": f"sfumato evaluate {COMMAND} --cache=/home/someone/cache --real /home/someone/photos --device cuda:3 "
    "--detector clip:/home/someone/clip --features mine:embed --seed 3 --quick --resume",
}  # fmt: skip
ATTACK = {
    "attack": "embeddings", "concept": {"name": "sneaker", "phrases": ["sneaker"]}, "seed": 7,
    "settings": {"steps": 3, "seed": 7}, "detector": {"detector": "judge", "domains": {"garment": ["boot"]}},
    "rule": {"wanted": [["sneaker"]], "threshold": 0.0}, "fingerprints": {"unlearned": "1", "original": "2"},
    "original": {"value": 1.0, "low": 0.9, "high": 1.0, "successes": 30, "total": 30},
    "pre_asr": {"value": 0.0, "low": 0.0, "high": 0.1, "successes": 0, "total": 30},
    "asr": {"value": 0.8, "low": 0.7, "high": 0.9, "successes": 24, "total": 30}, "prompts": 30, "seconds": 1.5,
    "command": f"sfumato attack embeddings {COMMAND} --prompts '/home/someone/my list.csv' --seed 7 --steps 3",
}  # fmt: skip


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The run's folder, the original's, and both pipelines; not to be changed."""
    root = tmp_path_factory.mktemp("run")
    shutil.copytree(assets_folder() / "atelier", root / "original")
    base = sfumato.load(root / "original")
    result = sfumato.unlearn(base, "sneaker", "uce", output_dir=root / "out", save=FORMATS, verify=False)
    return SimpleNamespace(root=root, folder=root / "out", original=root / "original", base=base, result=result)


@pytest.fixture
def copied(run, tmp_path):
    """The run's folder, to be tampered with."""
    return shutil.copytree(run.folder, tmp_path / "tampered")


@pytest.fixture
def edit_manifest(copied):
    """Change entries of the copied manifest."""

    def edit(**entries):
        path = copied / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))
        return copied

    return edit


@pytest.fixture
def findings(run, tmp_path):
    """An evaluation and an attack of the run, as files in the form that the commands write."""
    stated = json.loads((run.folder / "manifest.json").read_text())["result_fingerprint"]
    for name, content in (("evaluation", EVALUATION), ("attack", ATTACK)):
        (tmp_path / f"{name}.json").write_text(json.dumps({**content, "result_fingerprint": stated}))
    return {"evaluation": tmp_path / "evaluation.json", "attacks": [tmp_path / "attack.json"]}


def missing(kind):
    """An error as the library raises it for an answer 404."""
    return kind("not there", response=SimpleNamespace(headers={}, request=None, status_code=404))


class Hub:
    """Repositories as folders, in place of the Hub."""

    def __init__(self, root):
        self.root, self.private, self.calls, self.fails = root, {}, [], None

    def _call(self, name):
        self.calls.append(name)
        if self.fails and self.fails[0] == name:
            raise self.fails[1]

    def whoami(self):
        self._call("whoami")
        return {"name": "me", "orgs": [{"name": "lab"}]}

    def repo_info(self, repo_id):
        self._call("repo_info")
        if repo_id not in self.private:
            raise missing(RepositoryNotFoundError)
        return SimpleNamespace(private=self.private[repo_id])

    def list_repo_files(self, repo_id):
        self._call("list_repo_files")
        return [path.name for path in (self.root / repo_id).rglob("*") if path.is_file()]

    def hf_hub_download(self, repo_id, filename):
        self._call("hf_hub_download")
        if not (self.root / repo_id / filename).is_file():
            raise missing(RemoteEntryNotFoundError)
        return str(self.root / repo_id / filename)

    def create_repo(self, repo_id, *, private, exist_ok):
        self._call("create_repo")
        assert not exist_ok and repo_id not in self.private
        self.private[repo_id] = private
        (self.root / repo_id).mkdir(parents=True)
        (self.root / repo_id / ".gitattributes").write_text("*.safetensors filter=lfs")

    def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo, commit_message):
        self._call("upload_file")
        shutil.copyfile(path_or_fileobj, self.root / repo_id / path_in_repo)

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self._call("upload_folder")
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)


@pytest.fixture
def hub(tmp_path):
    return Hub(tmp_path / "hub")
