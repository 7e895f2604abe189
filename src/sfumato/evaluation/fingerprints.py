"""What a picture depends on beside prompt, seed and settings, as one hash: the model, all of it, and the scheduler.

Weights and configs are not all of a model: adapters have scales, FreeU changes features, attention processors change
attention, and a tokenizer is more than its words. What only changes how a picture is rounded, as the kernels of
attention do, is left out.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline

from sfumato import storage

__all__ = ["digest", "model_fingerprint", "scheduler_facts"]

DRAWS_NOTHING = ("safety_checker", "image_encoder")  # components with weights that no picture depends on
FREEU = ("s1", "s2", "b1", "b2")

_KERNEL = re.compile("Sliced|XFormers|XLAFlash|NPU|Fused|2_0")
"""What the names of diffusers' attention processors have more where they compute the same in another way."""
_OF_KERNELS = ("slice_size", "attention_op", "partition_spec")
_LAST_CALL = ("padding", "truncation")
"""What the state of a tokenizer says of the last call."""


def model_fingerprint(pipe: DiffusionPipeline) -> str:
    """Hash all of a model that its pictures depend on but the scheduler.

    That is weights and configs, tokenizers with their merges and special tokens, adapters with their scales, FreeU,
    attention processors, and the pipeline. Attention kernels of diffusers that differ by rounding alone are the same.

    Args:
        pipe: The model.

    Returns:
        16 hexadecimal digits, the same on every device.
    """
    facts: dict[str, Any] = {"": [type(pipe).__name__, _plain(pipe.config)]}
    for name, part in pipe.components.items():
        if name in DRAWS_NOTHING or part is None:
            continue
        if isinstance(part, torch.nn.Module):
            facts[name] = _network(part)
        elif hasattr(part, "get_vocab"):
            facts[name] = _tokenizer(part)
    return digest(facts)[:16]


def scheduler_facts(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Give the class and the config of a model's scheduler, as JSON can hold them."""
    return {"scheduler": type(pipe.scheduler).__name__, "config": _plain(pipe.scheduler.config)}


def digest(facts: Any) -> str:
    """Hash plain values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what says where it came from and who wrote it."""
    return {
        name: value for name, value in config.items() if not name.startswith("_") and name != "transformers_version"
    }


def _network(part: torch.nn.Module) -> list[Any]:
    """Weights, config, and what was switched on since the network was loaded."""
    config = getattr(part, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else config
    facts = [type(part).__name__, storage.fingerprint(part.state_dict().items()), _plain(config)]
    switched = {name: found for name, module in part.named_modules() if (found := _switched(module))}
    cache = getattr(part, "_cache_config", None)  # of diffusers' caching between timesteps
    return [*facts, switched, None if cache is None else _told(cache)]


def _switched(module: torch.nn.Module) -> dict[str, Any]:
    """FreeU, adapters and the attention processor of one module."""
    found = {name: value for name in FREEU if (value := getattr(module, name, None)) is not None}
    if isinstance(getattr(module, "scaling", None), Mapping):  # a layer of peft
        said = {name: getattr(module, name, None) for name in ("scaling", "active_adapters", "disable_adapters")}
        found["adapters"] = {**said, "merged": list(getattr(module, "merged_adapters", ()))}
    processor = getattr(module, "processor", None)
    if callable(processor):
        found["processor"] = _told(processor)
    return found


def _tokenizer(part: Any) -> list[Any]:
    """All that says which numbers a prompt becomes: a fast tokenizer's whole state, else words and merges."""
    told = {
        name: getattr(part, name, None)
        for name in ("special_tokens_map", "model_max_length", "padding_side", "truncation_side")
    }
    if hasattr(part, "backend_tokenizer"):
        state = json.loads(part.backend_tokenizer.to_str())
        return [type(part).__name__, told, {name: state[name] for name in state if name not in _LAST_CALL}]
    merges = sorted((rank, pair) for pair, rank in getattr(part, "bpe_ranks", {}).items())
    return [type(part).__name__, told, sorted(part.get_vocab().items()), merges]


def _told(value: Any, within: tuple[int, ...] = ()) -> Any:
    """Plain values of an object: its class, that class's source unless it is diffusers', and its state.

    Args:
        value: The object.
        within: The identities of those that it is part of, which are not told again.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if id(value) in within:
        return "itself"
    within = (*within, id(value))
    if isinstance(value, torch.Tensor):
        return storage.fingerprint([("", value)])
    if isinstance(value, Mapping):
        return {str(key): _told(each, within) for key, each in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_told(each, within) for each in value]
    if inspect.isroutine(value) or isinstance(value, type):
        return [value.__qualname__, _source(value)]
    stock = type(value).__module__.partition(".")[0] == "diffusers"
    name = _KERNEL.sub("", type(value).__name__) if stock else type(value).__qualname__
    state = {key: _told(each, within) for key, each in getattr(value, "__dict__", {}).items() if _counts(key)}
    return [name, None if stock else _source(type(value)), state]


def _counts(name: str) -> bool:
    """Whether an attribute of an attention processor is more than how it is computed, or torch's own."""
    return not name.startswith("_") and name not in ("training", *_OF_KERNELS)


def _source(definition: Any) -> str | None:
    """The source of a class or function of the user's own, which may be changed under the same name."""
    try:
        return inspect.getsource(definition)
    except (OSError, TypeError):  # typed in, or not written in Python
        return None
