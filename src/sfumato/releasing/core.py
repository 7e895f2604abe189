"""A release as one call: the output folder of an unlearning run in, a folder for the Hub out; uploaded if asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sfumato import storage
from sfumato.releasing.base import BASE_FOLDER, Base, find_base, licence_of
from sfumato.releasing.card import Contents, make_card, require_jinja
from sfumato.releasing.commands import recipe_of
from sfumato.releasing.contents import (
    Finished,
    check_weights,
    choose_formats,
    copy_base,
    copy_format,
    read_finished,
)
from sfumato.releasing.custom_code import CustomCode, add_custom_code, find_custom_code
from sfumato.releasing.guidance import is_guidance, release_guidance
from sfumato.releasing.publishing import publish
from sfumato.releasing.restorer import is_restorer, release_restorer
from sfumato.releasing.results import Finding, published, read_attack, read_evaluation

__all__ = ["release"]

_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")


def release(
    result: str | Path,
    output: str | Path,
    *,
    formats: Sequence[str] | None = None,
    evaluation: str | Path | None = None,
    attacks: Sequence[str | Path] = (),
    base: str | Path | None = None,
    license: str | None = None,
    scheduler: str | None = None,
    push: str | None = None,
    public: bool = False,
    api: Any = None,
) -> Path:
    """Make of an unlearning result a folder that any user of diffusers can load, with a model card.

    What ``training/resshift.py``, ``rddm.py``, ``one_more_step.py`` and ``minority_classifier.py`` have trained is
    released too; of the options it takes `license`, which it needs, `push` and `public`.

    Args:
        result: The output folder of an unlearning run, or of one of these trainings.
        output: The release, a new or empty folder; with `push` also one that this call has made before, the upload of
            which is then continued.
        formats: Which of what the run saved, as in `sfumato.unlearning.result`; None takes all.
        evaluation: The ``evaluation.json`` of the result.
        attacks: The ``attack.json`` of each attack on it.
        base: The model that was unlearned: embedded, a folder or a Hub id; None takes what the manifest says.
        license: Of the result; None takes that of the base's card.
        scheduler: One of sfumato's schedulers for the pipeline, such as ``"bdia"``; None leaves it its own.
        push: The Hub id to upload to.
        public: Whether all may see the upload.
        api: The `huggingface_hub.HfApi` to upload with; None makes one.

    Returns:
        The release.

    Raises:
        FileNotFoundError: If there is no result, or a file of it or of the findings is gone.
        FileExistsError: If `output` holds something, or the repository something else.
        ValueError: If the result holds pickles, links that lead out or weights other than the manifest's, a finding is
            of another result, the licence can't be found, or an argument is wrong.
        ImportError: If jinja2 is missing.
        ConnectionError: If the Hub can't be reached.
        PermissionError: If the user is not logged in.
    """
    training = release_restorer if is_restorer(result) else release_guidance if is_guidance(result) else None
    if training is not None:
        named = {"formats": formats, "evaluation": evaluation, "base": base, "scheduler": scheduler}
        given = [*(name for name, value in named.items() if value is not None), *(["attacks"] if attacks else [])]
        if given:
            raise ValueError(f"`{given[0]}` is for unlearning results, and {result} is of another training.")
        return training(result, output, license=license, push=push, public=public, api=api)
    require_jinja()
    finished, output = read_finished(result), Path(output)
    chosen = choose_formats(finished, formats)
    code = find_custom_code(finished.index if "full" in chosen else {}, scheduler)
    origin = find_base(finished.manifest.get("model"), base)
    base_code = _base_code(origin, chosen)
    licence = licence_of(origin, license)
    name = push or output.resolve().name
    audited = _audited(finished, chosen, code)
    audit, attacked = _findings(finished, evaluation, attacks, audited, origin, name)
    contents = Contents(finished, chosen, origin, licence, code, base_code, audit, attacked, audited, name)

    def fill(folder: Path, told: Mapping[str, str]) -> None:
        check_weights(finished, chosen)
        _fill(folder, contents, told)

    return publish(
        result, output, fill, fingerprint=finished.manifest["result_fingerprint"], asked=_asked(contents), push=push,
        public=public, api=api,
    )  # fmt: skip


def _audited(finished: Finished, formats: Sequence[str], code: CustomCode) -> str:
    """What the card's commands audit: the release itself, if it draws what the run's result drew, else a repeated run.

    Of several formats the evaluation loads the first of full, delta, part and lora, and the last is an approximation.
    """
    if "full" in formats:
        return "again" if code.names else "."
    saved = {name for name, facts in finished.manifest["saved"].items() if facts is not None}
    exact = {"full", "delta", "part"} & saved
    return "." if not exact or exact & set(formats) else "again"


def _base_code(base: Base, formats: Sequence[str]) -> CustomCode:
    """What code of ours the original needs, if it goes into the release."""
    if base.folder is None or not base.carried_by(formats):
        return CustomCode()
    return find_custom_code(storage.read_json(base.folder / "model_index.json"), None)


def _findings(
    finished: Finished, evaluation: str | Path | None, attacks: Sequence[str | Path], model: str, base: Base, name: str
) -> tuple[Finding | None, list[Finding]]:
    """What the evaluation and the attacks found."""
    places = {"model": model, "original": base.name, "release": name}
    audit = None
    if evaluation is not None:
        audit = published(read_evaluation(evaluation, finished.manifest), "evaluation.json", **places)
    attacked = [
        published(read_attack(path, finished.manifest), f"attack-{number}.json", **places)
        for number, path in enumerate(attacks, 1)
    ]
    return audit, attacked


def _asked(contents: Contents) -> list[Any]:
    """What tells this release from any other of the same run."""
    found = [finding.content for finding in contents.findings]
    return [contents.formats, contents.base.name, dict(contents.licence), contents.code.names, found, contents.name]


def _fill(folder: Path, contents: Contents, told: Mapping[str, str]) -> None:
    for name in contents.formats:
        copy_format(contents.finished, name, folder)
    if contents.code.names:
        add_custom_code(contents.code, folder)
    if contents.base.folder is not None and contents.base.carried_by(contents.formats):
        copy_base(contents.base.folder, folder / BASE_FOLDER)
        if contents.base_code.names:
            add_custom_code(contents.base_code, folder / BASE_FOLDER)
    _copy_licence(contents, folder)
    storage.write_text(folder / "recipe.yaml", recipe_of(contents.finished.manifest)[0])
    storage.write_text(folder / "manifest.json", json.dumps({**_manifest(contents), **told}, indent=1))
    for finding in contents.findings:
        storage.write_text(folder / finding.file, json.dumps(finding.content, indent=1))
    make_card(contents).save(folder / "README.md")


def _manifest(contents: Contents) -> dict[str, Any]:
    """The run's own, without paths, and of the formats that are here."""
    manifest = dict(contents.finished.manifest)
    settings = yaml.safe_load(recipe_of(manifest)[0])
    settings.pop("method")
    saved = {name: manifest["saved"][name] for name in contents.formats}
    return {**manifest, "settings": settings, "model": contents.base.name, "saved": saved}


def _copy_licence(contents: Contents, folder: Path) -> None:
    """Pass on the texts that the original's licence may ask to be passed on."""
    source = contents.base.folder
    if source is None:
        return
    for pattern in _LICENCES:
        for file in source.glob(pattern):
            if file.is_file() and not file.is_symlink():
                shutil.copyfile(file, folder / file.name)
