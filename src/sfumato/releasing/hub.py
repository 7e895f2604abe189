"""Uploading a release: private unless told otherwise, resumable, never over what another run or person made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from sfumato import storage
from sfumato.releasing.base import HUB_ID

__all__ = ["Standing", "check_push", "push"]

Standing = Literal["absent", "empty", "ours"]
"""What is at a Hub id: nothing, a repository without files, or an earlier upload of the same run."""

_ANSWERS: dict[str, type[Exception]] = {"look for": RepositoryNotFoundError, "read": RemoteEntryNotFoundError}
"""What is no failure, but an answer to be told apart."""


def check_push(repo_id: str, run: Mapping[str, Any], *, public: bool, api: Any = None) -> Standing:
    """Find out, before anything is made, whether a release may be uploaded.

    Args:
        repo_id: Where to.
        run: The entries of the release's manifest that tell the run from others.
        public: Whether all may see it.
        api: A `huggingface_hub.HfApi`; None makes one, with the token of the user's login.

    Returns:
        What is there. A repository of the user's own in which nothing lies, as a first upload leaves it that broke
        off at once, is there to be filled.

    Raises:
        ValueError: If the id is none.
        ConnectionError: If the Hub can't be reached.
        PermissionError: If the user is not logged in.
        FileExistsError: If the repository holds something else, or can be seen by all and is not to be.
    """
    if not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"`push` takes a Hub id such as name/model, got {repo_id!r}.")
    api = api or HfApi()
    user = _call("release to", repo_id, api.whoami)
    try:
        found = _call("look for", repo_id, api.repo_info, repo_id)
    except RepositoryNotFoundError:
        return "absent"
    if not _owns(user, repo_id):
        raise FileExistsError(
            f"{repo_id} exists on the Hub and is neither yours nor of an organisation of yours: it is left as it is. "
            "Choose another name."
        )
    stated = _manifest_there(api, repo_id)
    ours = all(stated.get(name) == value for name, value in run.items())
    if not ours and not _is_empty(api, repo_id):
        raise FileExistsError(
            f"{repo_id} exists on the Hub and does not hold this run's result, so it is left as it is. Choose another "
            "name, or delete that repository first."
        )
    if not public and not getattr(found, "private", True):
        raise FileExistsError(f"{repo_id} is public: add --public to update it, or choose another name.")
    return "ours" if ours else "empty"


def _owns(user: Any, repo_id: str) -> bool:
    """Whether a repository is in the name of the user, or of an organisation that the user is of."""
    names = [user.get("name"), *(organisation.get("name") for organisation in user.get("orgs") or ())]
    return repo_id.partition("/")[0] in names


def _is_empty(api: Any, repo_id: str) -> bool:
    """Whether there is nothing but what the Hub itself puts into a new repository."""
    return set(_call("look into", repo_id, api.list_repo_files, repo_id)) <= {".gitattributes"}


def _manifest_there(api: Any, repo_id: str) -> dict[str, Any]:
    try:
        return storage.read_json(_call("read", repo_id, api.hf_hub_download, repo_id, "manifest.json"))
    except (RemoteEntryNotFoundError, ValueError):
        return {}


def push(folder: Path, repo_id: str, *, standing: Standing, public: bool, api: Any = None) -> str:
    """Upload a release.

    The manifest goes first, so that an upload that breaks off can be told from another's repository; files that are
    there already are not sent again.

    Args:
        folder: The release.
        repo_id: Where to.
        standing: What `check_push` said.
        public: Whether all may see it.
        api: As for `check_push`.

    Returns:
        The address.

    Raises:
        ConnectionError: If the upload breaks off.
        PermissionError: If the user may not write there.
    """
    api = api or HfApi()
    if standing == "absent":
        _call("create", repo_id, api.create_repo, repo_id, private=not public, exist_ok=False)
    if standing != "ours":
        _call(
            "write to", repo_id, api.upload_file, repo_id=repo_id, path_or_fileobj=str(folder / "manifest.json"),
            path_in_repo="manifest.json", commit_message="Claim the repository for this run",
        )  # fmt: skip
    _call(
        "write to", repo_id, api.upload_folder, repo_id=repo_id, folder_path=str(folder),
        commit_message="Release by sfumato",
    )  # fmt: skip
    return f"https://huggingface.co/{repo_id}"


def _call(doing: str, repo_id: str, function: Any, /, *arguments: Any, **options: Any) -> Any:
    """Call the Hub; errors become one sentence, without what the library says, which may quote the request."""
    try:
        return function(*arguments, **options)
    except Exception as error:  # httpx, requests and xet each have their own
        if isinstance(error, _ANSWERS.get(doing, ())):
            raise
        kind, reason = _explained(error)
    raise kind(f"Can't {doing} {repo_id}: {reason}.")


def _explained(error: Exception) -> tuple[type[OSError], str]:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError):
        return PermissionError, "you are not logged in; run `hf auth login` first"
    if isinstance(error, OfflineModeIsEnabled):
        return ConnectionError, "HF_HUB_OFFLINE is set; unset it"
    if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
        return (
            PermissionError,
            f"the Hub refuses your login ({status}); run `hf auth login` with a token that may write",
        )
    if status == 409:
        return FileExistsError, "it exists on the Hub by now; run the same again, or choose another name"
    told = f"{type(error).__name__}{f', status {status}' if status else ''}"
    return ConnectionError, f"the Hub can't be reached or broke off ({told}); run the same again later"
