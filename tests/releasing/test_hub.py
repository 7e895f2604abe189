"""Uploads: private, resumable, never over another's work, and an error is one sentence without a token."""

import http.server
import json
import threading
import traceback

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

import sfumato

SECRET = "hf_ThisIsMyToken"


class NoConnectionError(Exception):
    """As an HTTP library raises it: no OSError."""


@pytest.fixture
def release(run, tmp_path, hub):
    def start(name="release", **options):
        settings = {"formats": ["lora"], "base": "atelier", "push": "me/model", "api": hub}
        return sfumato.release(run.folder, tmp_path / name, **{**settings, **options})

    return start


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("public", [False, True])
def test_all_of_it_is_uploaded_privately_unless_told_otherwise(release, hub, public):
    folder = release(public=public)
    assert uploaded(hub) == files(folder)
    assert hub.private == {"me/model": not public}
    assert "release = 'me/model'" in (folder / "README.md").read_text()


def uploaded(hub, repo_id="me/model"):
    """What is in a repository besides the file that every new one has."""
    return {name: content for name, content in files(hub.root / repo_id).items() if name != ".gitattributes"}


@pytest.mark.parametrize("at", ["upload_file", "upload_folder"])
def test_an_upload_that_broke_off_goes_on(release, hub, at, tmp_path):
    hub.fails = (at, ConnectionResetError(SECRET))
    with pytest.raises(
        ConnectionError, match=r"^Can't write to me/model: the Hub can't be reached or broke off"
    ) as told:
        release()
    assert SECRET not in str(told.value)
    folder = tmp_path / "release"
    before = files(folder)
    hub.fails = None
    release()
    assert files(folder) == before == uploaded(hub)
    assert hub.calls.count("create_repo") == 1
    claims = hub.calls.index("upload_file"), len(hub.calls) - hub.calls[::-1].index("upload_folder")
    assert claims[0] < claims[1] and hub.calls.count("upload_file") == (2 if at == "upload_file" else 1)


@pytest.mark.parametrize(("owner", "taken"), [("me", True), ("lab", True), ("stranger", False)])
def test_an_empty_repository_is_filled_if_it_is_the_users_own(release, hub, owner, taken):
    hub.create_repo(f"{owner}/model", private=True, exist_ok=False)
    if taken:
        assert files(release(push=f"{owner}/model")) == uploaded(hub, f"{owner}/model")
    else:
        with pytest.raises(FileExistsError, match="it is left as it is"):
            release(push=f"{owner}/model")
        assert uploaded(hub, f"{owner}/model") == {}


def test_an_empty_repository_that_all_can_see_is_not_filled_unasked(release, hub):
    hub.create_repo("me/model", private=False, exist_ok=False)
    with pytest.raises(FileExistsError, match="me/model is public: add --public"):
        release()
    assert uploaded(hub) == {}


def test_only_the_very_same_release_goes_on(release, hub):
    release()
    with pytest.raises(FileExistsError, match="already holds something"):
        release(license="mit")
    with pytest.raises(FileExistsError, match="already holds something"):
        release(push=None)


def test_the_same_run_may_be_updated_from_a_new_folder(release, hub):
    release()
    release("second", license="mit")
    assert b"license: mit" in files(hub.root / "me/model")["README.md"]


@pytest.mark.parametrize("content", [None, "{}", "not json", json.dumps({"result_fingerprint": "0123456789abcdef"})])
def test_a_foreign_repository_is_left_as_it_is(release, hub, tmp_path, content):
    theirs = hub.root / "me/model"
    theirs.mkdir(parents=True)
    (theirs / "README.md").write_text("theirs")
    if content is not None:
        (theirs / "manifest.json").write_text(content)
    hub.private["me/model"] = True
    before = files(theirs)
    with pytest.raises(FileExistsError, match="does not hold this run's result, so it is left as it is"):
        release()
    assert files(theirs) == before and not (tmp_path / "release").exists()
    assert not {"create_repo", "upload_file", "upload_folder"} & set(hub.calls)


@pytest.mark.parametrize("change", ["owner", "run"])
def test_the_same_weights_by_another_run_or_person_are_foreign(release, hub, tmp_path, change):
    """Methods in closed form give everyone the same weights."""
    release()
    if change == "owner":
        (hub.root / "me").rename(hub.root / "stranger")
        hub.private = {"stranger/model": True}
        before, options, said = files(hub.root), {"push": "stranger/model"}, "is neither yours"
    else:
        path = hub.root / "me/model" / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"run": "0123456789abcdef"}))
        before, options, said = files(hub.root), {}, "does not hold this run's result"
    with pytest.raises(FileExistsError, match=f"{said}.*it is left as it is"):
        release("second", **options)
    assert files(hub.root) == before and not (tmp_path / "second").exists()


def test_nothing_private_goes_into_a_public_repository_unasked(release, hub):
    release(public=True)
    with pytest.raises(FileExistsError, match="me/model is public: add --public"):
        release("second")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OfflineModeIsEnabled("x"), ConnectionError, "HF_HUB_OFFLINE is set"),
        (
            NoConnectionError(f"Bearer {SECRET}"),
            ConnectionError,
            r"can't be reached or broke off \(NoConnectionError\)",
        ),
    ],
)
def test_offline_is_one_sentence_before_anything_is_made(release, hub, tmp_path, error, kind, message):
    hub.fails = ("whoami", error)
    with pytest.raises(kind, match=message) as told:
        release()
    assert SECRET not in str(told.value) and told.value.__cause__ is None
    assert not (tmp_path / "release").exists() and hub.calls == ["whoami"]


def test_the_real_library_says_that_nobody_is_logged_in(run, tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PermissionError, match="you are not logged in; run `hf auth login` first"):
        sfumato.release(run.folder, tmp_path / "release", base="atelier", push="me/model", api=HfApi())
    assert not (tmp_path / "release").exists()


class Talkative(http.server.BaseHTTPRequestHandler):
    """A Hub that lets one in, then answers with an error that quotes the request, token and all."""

    def answer(self):
        said = f"{self.path} {self.headers['Authorization']}"
        known = self.path.endswith("/whoami-v2") and self.server.lets_in
        body = json.dumps({"name": "me", "orgs": []} if known else {"error": said}).encode()
        self.send_response(200 if known else self.server.status)
        self.send_header("Content-Length", str(len(body)))
        if not known:
            self.send_header("X-Error-Message", said)
        self.end_headers()
        self.wfile.write(body)
        self.server.heard.append(self.headers["Authorization"])

    do_GET = do_POST = do_HEAD = do_PUT = answer

    def log_message(self, *_):
        """Keep quiet."""


@pytest.mark.parametrize("lets_in", [False, True])
@pytest.mark.parametrize("status", [401, 404, 418])
def test_no_token_is_in_any_message_or_log_whatever_the_hub_says(run, tmp_path, caplog, capfd, status, lets_in):
    from huggingface_hub import HfApi

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Talkative) as server:
        server.status, server.lets_in, server.heard = status, lets_in, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        api = HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token=SECRET)
        caplog.set_level("INFO")
        with pytest.raises(OSError, match="^Can't") as told:
            sfumato.release(
                run.folder, tmp_path / "release", formats=["lora"], base="atelier", push="me/model", api=api
            )
        server.shutdown()
    assert f"Bearer {SECRET}" in server.heard
    shown = "".join(traceback.format_exception(told.value)) + caplog.text + "".join(capfd.readouterr())
    assert SECRET not in shown and told.value.__context__ is None
