"""What training jobs share beside the loop: settings from a file and the command line, and what a manifest says."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import nn

from sfumato import storage, terminal
from sfumato.arguments import make_parser
from sfumato.terminal import is_first
from sfumato.trainer import checkpoints

__all__ = ["DTYPES", "check_same_settings", "is_finished", "is_first", "main", "manifest_of", "untrained"]

DTYPES = ("float32", "bfloat16", "float16")
"""Precisions that weights may be saved in."""

_OF_THE_CALL = {"output", "config", "resume"}
"""What a file of settings does not hold, nor the manifest."""
_PACKAGES = ("sfumato", "torch", "diffusers", "accelerate", "safetensors")

Network = TypeVar("Network", bound=nn.Module)


def main(
    configs: Sequence[type[Any]], defaults: Mapping[str, Any], job: Callable[..., Any], description: str,
    arguments: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """Run a job from a command line.

    Values come from, in rising order: the configs' defaults, the YAML file, the command line.

    Args:
        configs: The dataclasses of its settings; one has `output`, `config` and `resume`.
        defaults: Settings in the place of the configs' own defaults.
        job: Takes an object of each.
        description: Of the command.
        arguments: The command line; None takes the process's own.
    """
    program = terminal.script()
    parser = make_parser(*configs, description=description, program=program or None)
    parser.set_defaults(**defaults)

    def run(words: Sequence[str]) -> terminal.Answer:
        file = parser.parse_known_args(words)[0].config
        if file is not None:
            parser.set_defaults(**_read_settings(file, configs))
        settings = parser.parse_args_into_dataclasses(words)
        asked = next(config for config in settings if hasattr(config, "output"))
        folder = Path(asked.output)
        with terminal.resumable(
            folder, program, words, resume=asked.resume, kept=lambda: checkpoints.newest(folder)
        ):  # fmt: skip
            job(*settings)
        manifest = folder / "manifest.json"
        facts = storage.read_json(manifest) if terminal.is_first() and manifest.is_file() else {}
        return terminal.Answer({"output": str(folder), **facts}, f"result {folder}")

    terminal.run(run, arguments)


def _read_settings(file: str, configs: Sequence[Any]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid YAML: {' '.join(str(error).split())}.") from error
    known = {entry.name for config in configs for entry in fields(config)} - _OF_THE_CALL
    if not isinstance(content, Mapping) or not set(content) <= known:
        wrong = sorted(set(map(str, content)) - known)[0] if isinstance(content, Mapping) else content
        raise ValueError(f"{file} must map settings to values, and {wrong!r} is none; --help lists them.")
    return dict(content)


def untrained(make: Callable[[], Network], seed: int) -> Network:
    """Make a network, the same whatever else the process drew, ready to be trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().train()


def manifest_of(model: nn.Module, configs: Mapping[str, Any], accelerator: Any, seconds: float) -> dict[str, Any]:
    """Say what was trained, how, how long, and by what.

    Args:
        model: The network, as it is saved.
        configs: Name to the dataclass of settings, or None.
        accelerator: The process group.
        seconds: That it took.
    """
    settings = {
        name: None if config is None else {k: v for k, v in asdict(config).items() if k not in _OF_THE_CALL}
        for name, config in configs.items()
    }
    return {
        "settings": settings,
        "seed": configs["training"].seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "fingerprint": storage.fingerprint(model.named_parameters()),
        "seconds": round(seconds, 1),
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    }


def is_finished(folder: Path) -> bool:
    """Whether a job has left its whole result in a folder."""
    return (folder / "manifest.json").exists() and not (folder / "result").exists()


def _lasting(config: Any) -> dict[str, Any]:
    """Settings without those of the call, and without where data lies."""
    return {name: value for name, value in asdict(config).items() if name not in _OF_THE_CALL | {"data_dir"}}


def check_same_settings(folder: Path, asked: Mapping[str, Any]) -> None:
    """Raise a ValueError unless a finished job had these settings.

    Args:
        folder: Of its result.
        asked: Name of a config, as in the manifest, to the dataclass.
    """
    wanted = json.loads(json.dumps({name: _lasting(config) for name, config in asked.items()}))
    found = storage.read_json(folder / "manifest.json")["settings"]
    if any({**found[name], **settings} != found[name] for name, settings in wanted.items()):
        raise ValueError(f"{folder} was trained by other settings: use the same, or another folder.")
