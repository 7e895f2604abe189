"""What a reader of the card types to load each format."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sfumato import lora
from sfumato.releasing.base import Base
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
    finished: Finished, formats: Sequence[str], code: CustomCode, base: Base, release: str
) -> list[tuple[str, Code]]:
    """Give for each format what loads it.

    Args:
        finished: The run.
        formats: What is in the release.
        code: What code of ours the pipeline needs.
        base: The original, to which all but the whole pipeline are applied.
        release: The release's Hub id, or its folder's name.

    Returns:
        Heading and code, as they stand in the card.
    """
    dtype = str(finished.manifest.get("dtype", "float32")).removeprefix("torch.")
    options = f", torch_dtype=torch.{dtype}"  # also float32: parts that are stored in another would be loaded in that
    imports = ["import torch", "from diffusers import DiffusionPipeline"]
    named = f"release = {release!r}  # this folder, or its id on the Hub"
    head, names = [*_base_imports(base), *imports], [named, _base_line(base)]
    original = f"pipe = DiffusionPipeline.from_pretrained(base{options})"
    written = []
    for name in formats:
        if name == "full":
            heading, lines = "The whole pipeline", _full(imports, named, code, options)
        elif name == "part":
            heading, lines = "The changed part, in the original pipeline", _part(finished, head, names, options)
        elif name == "delta":
            heading, lines = "The delta, applied to the original bit for bit", _delta(head, names, original)
        else:
            heading, lines = "The LoRA (needs peft), an approximation", _lora(head, names, original)
        written.append((heading, Code.block("python", "\n".join(lines))))
    return written


def _base_imports(base: Base) -> list[str]:
    return ["from importlib.resources import files", ""] if base.embedded else []


def _base_line(base: Base) -> str:
    if base.embedded:
        return f"base = str(files('sfumato') / 'assets' / {base.name!r})  # ships with: pip install sfumato"
    return f"base = {base.name!r}"


def _full(head: list[str], name: str, code: CustomCode, options: str) -> list[str]:
    trust = ", trust_remote_code=True" if code.names else ""
    comment = [f"# runs the files of this release that define {', '.join(code.names)}"] if code.names else []
    return [*head, "", name, *comment, f"pipe = DiffusionPipeline.from_pretrained(release{trust}{options})"]


def _part(finished: Finished, head: list[str], names: list[str], options: str) -> list[str]:
    classes = {part: finished.class_of(part) for part in finished.changed}
    imports = [f"from {library} import {name}" for library, name in dict.fromkeys(classes.values())]
    loads = [
        f"{part} = {name}.from_pretrained(release, subfolder={part!r}{options})" for part, (_, name) in classes.items()
    ]
    given = ", ".join(f"{part}={part}" for part in classes)
    return [*head, *imports, "", *names, *loads, f"pipe = DiffusionPipeline.from_pretrained(base, {given}{options})"]


def _delta(head: list[str], names: list[str], original: str) -> list[str]:
    return [
        "import sys", *head, "from pathlib import Path", "from huggingface_hub import snapshot_download", "", *names,
        "folder = release if Path(release).is_dir() else snapshot_download(release, allow_patterns='delta/*')",
        "sys.path.insert(0, f'{folder}/delta')", "from delta import apply_delta  # a file of this release", "",
        original, "apply_delta(pipe, f'{folder}/delta/delta.safetensors')",
    ]  # fmt: skip


def _lora(head: list[str], names: list[str], original: str) -> list[str]:
    load = f"pipe.load_lora_weights(release, subfolder='lora', weight_name={lora.DIFFUSERS_FILE!r})"
    return [*head, "", *names, original, load]
