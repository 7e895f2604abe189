r"""A delta: what unlearning changed of a model's weights, as one file that is applied and taken back bit for bit.

Weights are compared as bits. Of every tensor that changed the file holds which entries did (a packed bit mask) and for
these the exclusive or of both bit patterns,

.. math::
    d = \mathrm{bits}(\theta_0) \oplus \mathrm{bits}(\theta_u) , \qquad \theta_0 \oplus d = \theta_u , \qquad
    \theta_u \oplus d = \theta_0 ,

so that nothing is rounded, in any dtype, and applying it twice is as if it had not been. Half of the weights of a
float32 denoiser, as SalUn's mask leaves them, are half of its size; keys and values of cross-attention alone, 2 %.

This file stands alone: beside a delta it is all that is needed to apply it, with torch, safetensors and diffusers,

    python delta.py apply BASE delta.safetensors OUTPUT
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

__all__ = ["apply_delta", "fingerprint", "read_metadata", "revert_delta", "save_delta"]

FORMAT = "sfumato-delta-1"
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash names, shapes, dtypes and values of tensors, whatever their order and device.

    Args:
        tensors: Pairs such as ``module.named_parameters()``.

    Returns:
        The first 16 hexadecimal digits of a SHA-256.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(value.shape)}|{value.dtype}|".encode())
        if value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def save_delta(path: str | Path, base: Any, result: Any, facts: Mapping[str, Any] | None = None) -> dict[str, int]:
    """Write what tells one pipeline from another.

    Args:
        path: The file to write, ``delta.safetensors``.
        base: The original pipeline.
        result: The changed one, with the same components in the same dtypes.
        facts: What else to write down, as JSON.

    Returns:
        Component to how many of its weights changed, those that did not left out.

    Raises:
        ValueError: If the pipelines have different components, parameters or dtypes, or do not differ at all.
    """
    tensors: dict[str, torch.Tensor] = {}
    components: dict[str, dict[str, str]] = {}
    changed: dict[str, int] = {}
    for component, module in _modules(result).items():
        original = _modules(base).get(component)
        if original is module:
            continue
        if original is None:
            raise ValueError(f"The original has no {component}: these pipelines are of different kinds.")
        found = _compare(component, original, module)
        if found:
            tensors |= found
            components[component] = {
                "base": fingerprint(original.named_parameters()), "result": fingerprint(module.named_parameters()),
                "dtype": _dtype(module),
            }  # fmt: skip
            changed[component] = sum(value.numel() for name, value in found.items() if name.startswith("bits/"))
    if not components:
        raise ValueError("The two pipelines have the same weights: there is no delta to write.")
    content = fingerprint(tensors.items())
    metadata = {"format": FORMAT, "components": components, "content": content, "facts": dict(facts or {})}
    partial = Path(f"{path}.partial")
    save_file(tensors, partial, {name: json.dumps(value) for name, value in metadata.items()})
    partial.replace(path)
    return changed


def apply_delta(pipe: Any, path: str | Path) -> None:
    """Change a pipeline's weights, in place, to what they were changed to.

    Args:
        pipe: A pipeline with the weights, and the dtypes, that the delta was made from.
        path: The delta.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no delta, is damaged, or is of other weights than the pipeline's; these are then as
            they were.
    """
    _toggle(pipe, Path(path), "base", "result")


def revert_delta(pipe: Any, path: str | Path) -> None:
    """Take a delta that was applied back, in place: the weights are the original's, bit for bit.

    Args:
        pipe: A pipeline to which the delta was applied.
        path: The delta.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no delta, is damaged, or was not applied to the pipeline.
    """
    _toggle(pipe, Path(path), "result", "base")


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read what a delta says of itself: ``components``, with their fingerprints and dtypes, and ``facts``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no delta.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no delta {path}.")
    try:
        with safe_open(path, "pt") as opened:
            stored = opened.metadata() or {}
        found = {name: json.loads(value) for name, value in stored.items()}
    except Exception as error:  # safetensors has an error of its own for every kind of damage
        raise ValueError(f"{path} is not a delta, or is damaged ({error}); fetch it again.") from error
    if found.get("format") != FORMAT:
        raise ValueError(f"{path} is not a delta of this kind ({FORMAT}).")
    return found


def _modules(pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def _dtype(module: torch.nn.Module) -> str:
    return str(next(module.parameters()).dtype).removeprefix("torch.")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bit patterns as integers, ``(N,)``, on the CPU."""
    return tensor.detach().cpu().contiguous().view(_INTEGERS[tensor.element_size()]).reshape(-1)


def _compare(component: str, base: torch.nn.Module, result: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What changed of a component: ``bits/...``, and ``mask/...`` where not all of a tensor did."""
    before, after = dict(base.named_parameters()), dict(result.named_parameters())
    odd = sorted(before.keys() ^ after.keys()) or [
        name for name in after if (before[name].shape, before[name].dtype) != (after[name].shape, after[name].dtype)
    ]
    if odd:
        raise ValueError(f"{component}.{odd[0]} is not of one name, shape and dtype in both pipelines.")
    found = {}
    for name, value in after.items():
        difference = _bits(before[name]) ^ _bits(value)
        where = difference != 0
        if where.any():
            found[f"bits/{component}/{name}"] = difference[where]
            if not where.all():
                found[f"mask/{component}/{name}"] = torch.from_numpy(np.packbits(where.numpy()))
    return found


def _toggle(pipe: Any, path: Path, before: str, after: str) -> None:
    """Take all components of a delta from one state to the other, or none of them."""
    metadata, modules = read_metadata(path), _modules(pipe)
    components = metadata["components"]
    for component, stated in components.items():
        if component not in modules:
            raise ValueError(f"{path} changes {component}, which this pipeline does not have.")
        own = fingerprint(modules[component].named_parameters())
        if own == stated[after]:
            state = "already applied" if before == "base" else "not applied"
            raise ValueError(f"{path} is {state}: {component} has the weights that it would lead to.")
        if own != stated[before]:
            raise ValueError(
                f"{path} is for other weights of {component} ({stated['dtype']}, fingerprint {stated[before]}) than "
                f"these ({_dtype(modules[component])}, {own}): load the model that it was made from, in that dtype, "
                "and take back other deltas first."
            )
    tensors = load_file(path)
    if fingerprint(tensors.items()) != metadata["content"]:
        raise ValueError(f"{path} is damaged; fetch it again.")
    _exclusive_or(tensors, modules)


@torch.no_grad()
def _exclusive_or(tensors: Mapping[str, torch.Tensor], modules: Mapping[str, torch.nn.Module]) -> None:
    for name, difference in tensors.items():
        kind, component, parameter = name.split("/", 2)
        if kind != "bits":
            continue
        weight, mask = modules[component].get_parameter(parameter), tensors.get(f"mask/{component}/{parameter}")
        bits = _bits(weight).clone()
        if mask is None:
            bits ^= difference
        else:
            bits[torch.from_numpy(np.unpackbits(mask.numpy(), count=bits.numel()).astype(bool))] ^= difference
        weight.copy_(bits.view(weight.dtype).view(weight.shape))


def main(arguments: list[str] | None = None) -> None:
    """Apply a delta to a saved pipeline, or take it back."""
    parser = argparse.ArgumentParser(description="Apply a delta to a saved pipeline, or take it back.")
    parser.add_argument("direction", choices=["apply", "revert"])
    parser.add_argument("base", help="folder or Hub id of the pipeline")
    parser.add_argument("delta", help="delta.safetensors")
    parser.add_argument("output", help="folder for the result; it must not exist")
    given = parser.parse_args(arguments)
    from diffusers import DiffusionPipeline

    try:
        if Path(given.output).exists():
            raise FileExistsError(f"{given.output} exists; name a folder that does not.")
        stated = read_metadata(given.delta)["components"]
        dtypes = {name: getattr(torch, component["dtype"]) for name, component in stated.items()}
        pipe = DiffusionPipeline.from_pretrained(
            given.base, torch_dtype={**dtypes, "default": next(iter(dtypes.values()))}, use_safetensors=True
        )
        (apply_delta if given.direction == "apply" else revert_delta)(pipe, given.delta)
        pipe.save_pretrained(given.output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
