"""What a reader of the card types to load each format."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sfumato import lora
from sfumato.releasing.base import BASE_FOLDER, Base
from sfumato.releasing.contents import Finished
from sfumato.releasing.custom_code import CustomCode

__all__ = ["Code", "loading_snippets"]


class Code(str):
    """A fenced block, which nothing in it can end."""

    __slots__ = ()

    @classmethod
    def block(cls, language: str, text: str) -> Code:
        """Fence a text with more backticks than it has in a row."""
        longest = max((len(run) for run in re.findall("`+", text)), default=0)
        fence = "`" * max(3, longest + 1)
        return cls(f"{fence}{language}\n{text}\n{fence}")


def loading_snippets(
    finished: Finished, formats: Sequence[str], code: CustomCode, base_code: CustomCode, base: Base, release: str
) -> list[tuple[str, Code]]:
    """Give for each format what loads it.

    Args:
        finished: The run.
        formats: What is in the release.
        code: What code of ours the pipeline needs.
        base_code: What code of ours the original needs, if it is in the release.
        base: The original, to which all but the whole pipeline are applied.
        release: The release's Hub id, or its folder's name.

    Returns:
        Heading and code, as they stand in the card.
    """
    dtype = str(finished.manifest.get("dtype", "float32")).removeprefix("torch.")
    options = f", torch_dtype=torch.{dtype}"  # also float32: parts that are stored in another would be loaded in that
    imports = ["import torch", "from diffusers import DiffusionPipeline"]
    named = f"release = {release!r}  # this folder, or its id on the Hub"
    written = []
    for name in formats:
        if name == "full":
            heading, lines = "The whole pipeline", _full(imports, named, code, options)
        elif name == "part":
            heading = "The changed part, in the original pipeline"
            lines = _part(finished, imports, [named, *_base(base)], base_code, options)
        elif name == "delta":
            heading = "The delta, applied to the original bit for bit"
            lines = _delta(imports, [named, *_base(base, "delta/*")], _original(base_code, options))
        else:
            heading = "The LoRA (needs peft), an approximation"
            lines = _lora(imports, [named, *_base(base)], _original(base_code, options))
        if any("snapshot_download" in line for line in lines):
            lines = ["from pathlib import Path", "from huggingface_hub import snapshot_download", *lines]
        written.append((heading, Code.block("python", "\n".join(lines))))
    return written


def _base(base: Base, *also: str) -> list[str]:
    """Where the original is, and what else of the release, by patterns, has to lie in a folder."""
    wanted = [f"{BASE_FOLDER}/*", *also] if base.embedded else list(also)
    lines = [
        "folder = release if Path(release).is_dir() else "
        f"snapshot_download(release, allow_patterns={wanted!r})"
    ]  # fmt: skip
    if base.embedded:
        return [*lines, f"base = f'{{folder}}/{BASE_FOLDER}'  # {base.name}, as it ships with sfumato"]
    return [*(lines if wanted else []), f"base = {base.name!r}"]


def _original(code: CustomCode, options: str) -> list[str]:
    return [*_comment(code), f"pipe = DiffusionPipeline.from_pretrained(base{_trust(code)}{options})"]


def _trust(code: CustomCode) -> str:
    return ", trust_remote_code=True" if code.names else ""


def _comment(code: CustomCode) -> list[str]:
    return [f"# runs the files of this release that define {', '.join(code.names)}"] if code.names else []


def _full(head: list[str], name: str, code: CustomCode, options: str) -> list[str]:
    return [
        *head,
        "",
        name,
        *_comment(code),
        f"pipe = DiffusionPipeline.from_pretrained(release{_trust(code)}{options})",
    ]


def _part(finished: Finished, head: list[str], names: list[str], code: CustomCode, options: str) -> list[str]:
    classes = {part: finished.class_of(part) for part in finished.changed}
    imports = [f"from {library} import {name}" for library, name in dict.fromkeys(classes.values())]
    loads = [
        f"{part} = {name}.from_pretrained(release, subfolder={part!r}{options})" for part, (_, name) in classes.items()
    ]
    given = ", ".join(f"{part}={part}" for part in classes)
    last = f"pipe = DiffusionPipeline.from_pretrained(base, {given}{_trust(code)}{options})"
    return [*head, *imports, "", *names, *loads, *_comment(code), last]


def _delta(head: list[str], names: list[str], original: list[str]) -> list[str]:
    return [
        "import sys", *head, "", *names,
        "sys.path.insert(0, f'{folder}/delta')", "from delta import apply_delta  # a file of this release", "",
        *original, "apply_delta(pipe, f'{folder}/delta/delta.safetensors')",
    ]  # fmt: skip


def _lora(head: list[str], names: list[str], original: list[str]) -> list[str]:
    load = f"pipe.load_lora_weights(release, subfolder='lora', weight_name={lora.DIFFUSERS_FILE!r})"
    return [*head, "", *names, *original, load]
