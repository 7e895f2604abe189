r"""Low-rank adapters in the place of weights: what is trained of a layer is B A in W + B A, and W stays as it is.

At the start B is zero and A is random (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022,
arXiv 2106.09685), with peft's initialisation and a scale of 1. Every method that trains can train them: a teacher, the
model as it was, costs two small matrices a layer, gradients and moments likewise. At the end they are merged into the
weights, so that the result is a model like any other; `sfumato.lora` gets them back out of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from sfumato.randomness import generator_for

__all__ = ["add_adapters", "merge_adapters"]

INIT_STREAM = 171


def add_adapters(model: torch.nn.Module, names: Sequence[str], rank: int, seed: int) -> None:
    """Put adapters into layers, and let them alone be trained.

    Args:
        model: The network; its layers are replaced in place.
        names: Parameters that would be trained; linear and convolution layers whose weights are among them get
            adapters.
        rank: Of the adapters.
        seed: Seeds A.

    Raises:
        ImportError: If peft is not installed.
        ValueError: If none of the parameters is the weight of such a layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("Adapters need peft: pip install 'sfumato[train]'.") from error
    wanted = set(names)
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and f"{name}.weight" in wanted
    ]
    if not layers:
        raise ValueError(
            "None of the chosen parameters is a weight of a linear or convolution layer: no adapter fits."
        )
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=f"({'|'.join(map(re.escape, layers))})")
    with torch.random.fork_rng():
        torch.manual_seed(generator_for(seed, INIT_STREAM).initial_seed())
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model.eval()


@torch.no_grad()
def merge_adapters(model: torch.nn.Module) -> None:
    """Add the adapters up with the weights, in place, and give every layer its own kind back, in float32."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapted:
        module.get_base_layer().float()  # a sum in half precision would round most of the change away
        module.merge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent) if parent else model, child, module.get_base_layer())
    vars(model).pop("peft_config", None)
