r"""A LoRA of what unlearning changed: the best low-rank approximation of the change of every layer.

.. math::
    \theta_u - \theta_0 \approx B A , \qquad B A = U_r \Sigma_r V_r^T ,

with the r largest singular values of each linear or convolution layer's change, halves of each singular value in A and
in B. What rank r leaves out, and what no LoRA can hold (biases, normalisations, embeddings), is measured, as the share
of the change's norm that is missing. A model that was changed by a LoRA of rank r comes out as it is.

The file is diffusers' own, for ``pipe.load_lora_weights``; several, each under a name of its own, add up by
``pipe.set_adapters``. Models with a UNet also get one under kohya's names, which A1111 and ComfyUI read; ComfyUI reads
the diffusers file of the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya

from sfumato import storage

__all__ = ["Lora", "extract_lora", "require_loader", "save_lora"]

DIFFUSERS_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "kohya_lora.safetensors"
_OVERSAMPLING, _ITERATIONS = 8, 8
_EXACT = 1024  # smaller layers are decomposed whole


@dataclass(frozen=True)
class Lora:
    """A change of a pipeline, approximately.

    Attributes:
        layers: Component to its tensors, ``<layer>.lora_A.weight`` of shape ``(r, in)`` (a convolution's
            ``(r, in, h, w)``) and ``<layer>.lora_B.weight`` of shape ``(out, r)`` (``(out, r, 1, 1)``).
        rank: r.
        missing: Share of the change's norm, over all components, that is not in it.
    """

    layers: Mapping[str, Mapping[str, torch.Tensor]]
    rank: int
    missing: float


def extract_lora(base: DiffusionPipeline, result: DiffusionPipeline, rank: int = 32) -> Lora:
    """Approximate what changed between two pipelines.

    Args:
        base: The original.
        result: The changed one, with the same components.
        rank: r, the same in every layer.

    Returns:
        The LoRA, in float32, on the CPU.

    Raises:
        ValueError: If the pipelines do not differ in any linear or convolution layer, stock diffusers has no LoRA for
            a component that does, or `rank` is not positive.
    """
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, got {rank}.")
    layers: dict[str, dict[str, torch.Tensor]] = {}
    whole = left = 0.0
    for component, module in result.components.items():
        original = base.components.get(component)
        if not isinstance(module, torch.nn.Module) or original is module:
            continue
        if not isinstance(original, torch.nn.Module):
            raise ValueError(f"The original has no {component}: these pipelines are of different kinds.")
        found, squared, missing = _approximate(original, module, rank)
        whole, left = whole + squared, left + missing
        if squared:
            require_loader(result, component)
        if found:
            layers[component] = found
    if not layers:
        raise ValueError("The two pipelines differ in no linear or convolution layer: there is no LoRA of it.")
    return Lora(layers, rank, (left / whole) ** 0.5)


def save_lora(pipe: DiffusionPipeline, lora: Lora, folder: str | Path) -> list[Path]:
    """Write a LoRA under diffusers' names and, for a model with a UNet, under kohya's.

    Args:
        pipe: A pipeline of the kind that it is for.
        lora: The LoRA.
        folder: Where to.

    Returns:
        The files.
    """
    folder = Path(folder)
    with storage.atomic_directory(folder) as partial:
        pipe.save_lora_weights(
            partial, **{f"{name}_lora_layers": dict(tensors) for name, tensors in lora.layers.items()}
        )
        if "unet" in pipe.components:
            named = {f"{c}.{name}": value for c, tensors in lora.layers.items() for name, value in tensors.items()}
            single = "text_encoder_2" not in pipe.components
            kohya = {
                _kohya_name(name, single): value.contiguous()
                for name, value in convert_state_dict_to_kohya(named).items()
            }
            storage.save_tensors(partial / KOHYA_FILE, kohya if single else kohya | _misread(kohya))
    return sorted(folder.iterdir())


def _kohya_name(name: str, single: bool) -> str:
    """Name a layer as readers of kohya's names expect it, where diffusers' conversion does not."""
    for number, place in (1, 0), (2, 2):  # SDXL's sizes, which readers know under their first name alone
        name = name.replace(f"lora_unet_add_embedding_linear_{number}", f"lora_unet_label_emb_0_{place}")
    encoder, separator, layer = name.partition("_encoder_layers_")
    if separator and not encoder.endswith("_text_model"):
        name = f"{encoder}_text_model{separator}{layer}"
    return name.replace("lora_te1_", "lora_te_") if single else name


def _misread(kohya: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The layer of SDXL that A1111 looks for in a place where Stable Diffusion 1 has it, once more by its place.

    It leaves out names that lead nowhere, as the first then does; diffusers leaves out names by place among others,
    and ComfyUI finds the same layer by both, and takes it once.
    """
    first, place = "lora_unet_up_blocks_0_upsamplers_0_conv.", "lora_unet_output_blocks_2_2_conv."
    return {name.replace(first, place): value.clone() for name, value in kohya.items() if name.startswith(first)}


def require_loader(pipe: DiffusionPipeline, component: str) -> None:
    """Refuse a component that stock diffusers can't load a LoRA into."""
    taken = inspect.signature(pipe.save_lora_weights).parameters if hasattr(pipe, "save_lora_weights") else {}
    if f"{component}_lora_layers" not in taken:
        raise ValueError(
            f"Stock diffusers has no LoRA for {component} of {type(pipe).__name__}: save the weights, or a delta."
        )


@torch.no_grad()
def _approximate(
    base: torch.nn.Module, result: torch.nn.Module, rank: int
) -> tuple[dict[str, torch.Tensor], float, float]:
    """A component's LoRA, the squared norm of its change, and that of what is missing."""
    before = dict(base.named_parameters())
    kinds = {
        f"{name}.weight": module
        for name, module in result.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    layers: dict[str, torch.Tensor] = {}
    whole = missing = 0.0
    for name, weight in result.named_parameters():
        if name not in before or before[name].shape != weight.shape:
            raise ValueError(f"{name} is not of one shape in both pipelines: they are of different kinds.")
        change = (weight.float() - before[name].float().to(weight.device)).cpu()
        squared = float(change.double().square().sum())
        if squared == 0:
            continue
        whole += squared
        if name not in kinds:
            missing += squared
            continue
        down, up = _factors(change.flatten(1), rank)
        missing += float((change.flatten(1) - up @ down).double().square().sum())
        layer = name.removesuffix(".weight")
        if weight.ndim == 4:
            down, up = down.view(rank, *weight.shape[1:]), up[:, :, None, None]
        layers[f"{layer}.lora_A.weight"], layers[f"{layer}.lora_B.weight"] = down.contiguous(), up.contiguous()
    return layers, whole, missing


def _factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A ``(rank, in)`` and B ``(out, rank)`` of the best approximation of a matrix ``(out, in)``.

    All layers get one rank, since diffusers scales a layer of another by the ratio of both: where a matrix is smaller
    than that, the rest is zero.
    """
    most = min(rank, *matrix.shape)
    if min(matrix.shape) <= max(_EXACT, 2 * most):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, most + _OVERSAMPLING, niter=_ITERATIONS)
        right = right.T
    root = values[:most].sqrt()
    down, up = matrix.new_zeros(rank, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], rank)
    down[:most], up[:, :most] = root[:, None] * right[:most], left[:, :most] * root
    return down, up
