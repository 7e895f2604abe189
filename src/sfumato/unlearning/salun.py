r"""SalUn: gradient-saliency unlearning.

Two stages. First one binary mask over the weights, from the gradient of the forgetting loss at the original weights:

.. math::
    m = 1\big[\,|\textstyle\sum \nabla_\theta \ell_f(\theta_0)| \ge \gamma\,\big], \qquad
    \ell_f = -\|\epsilon - [(1+g)\,\epsilon_\theta(x_t, c) - g\,\epsilon_\theta(x_t, \varnothing)]\|^2 ,

gamma chosen so that a share ``mask_ratio`` of the weights is kept. Then fine-tuning of those weights alone, to see the
forget pictures under a substitute caption c' while the retain pictures keep their meaning:

.. math::
    L = E_{x \in D_f}\, \|\epsilon_\theta(x_t, c) - \mathrm{sg}[\epsilon_\theta(x_t, c')]\|^2
        + \alpha\, E_{x \in D_r}\, \|\epsilon - \epsilon_\theta(x_t, c_x)\|^2 , \qquad
    \theta \leftarrow m \odot (\theta + \Delta\theta) + (1 - m) \odot \theta_0 .

The teacher ``sg[.]`` is the model being trained, detached; alpha is ``retain_weight``.

Fan, Liu, Zhang, Wong, Wei, Liu, "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image
Classification and Generation", ICLR 2024, arXiv 2310.12508. Where this differs from the released code, with the
setting that brings its way back: the mask is ranked over the weights that are trained, not over the whole network
(``mask_scope``), by the sum of signed gradients, not of their sizes (``mask_accumulate``, until December 2023), and
keeps the salient weights, not the others (``legacy_inverted_mask``, likewise); the update is masked, not the gradient
alone, so that the mask holds under weight decay (``legacy_gradient_mask``), or not at all (``mask_ratio=1``, until May
2024); student and teacher see one posterior sample, not two (``legacy_two_samples``); every pass shuffles the forget
set (``forget_order``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from math import isfinite
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from sfumato.families import Family
from sfumato.progress import Track
from sfumato.trainer import Shard
from sfumato.unlearning.examples import Examples, PromptTable
from sfumato.unlearning.noising import ORDERS, NoisyBatch, noised, noisy_batch, resampled
from sfumato.unlearning.saliency import load_mask, mask_density, save_mask, top_mask
from sfumato.unlearning.task import History, Task, TrainedConfig

__all__ = ["SalUnConfig", "SalUnObjective", "check", "find_mask", "run", "saliency_mask"]

MASK_FILE = "saliency_mask.safetensors"
MASK_STREAM, FORGET_STREAM, RETAIN_STREAM = 101, 102, 103  # keys that keep the random streams apart


@dataclass
class SalUnConfig(TrainedConfig):
    """SalUn's hyper-parameters; the defaults are those the authors use for a class of Stable Diffusion 1.4.

    Attributes:
        retain_weight: alpha, the weight of the retain term; 0 lets generation collapse.
        mask_ratio: Share of the trained weights that may move; 1 trains all of them, 0 none.
        mask_guidance: g, the guidance of the prediction whose loss makes the mask.
        mask_path: A mask saved by an earlier run, used instead of computing one.
        mask_scope: Rank ``"trained"`` weights, or the whole ``"network"``, so that of the trained another share moves.
        mask_accumulate: Sum ``"signed"`` gradients, or their ``"absolute"`` values, batch by batch.
        forget_order: ``"shuffled"`` anew in every pass, ``"sequential"``, or always the ``"first"`` batch.
        legacy_inverted_mask: Let the least salient weights move.
        legacy_gradient_mask: Mask the gradients alone, so that weight decay moves every weight.
        legacy_two_samples: Show the teacher another posterior sample of each picture than the student; of pictures
            from a folder only, as drawn ones have no posterior.
    """

    retain_weight: float = 0.5
    mask_ratio: float = 0.5
    mask_guidance: float = 7.5
    mask_path: str | None = None
    mask_scope: str = field(default="trained", metadata={"choices": ["trained", "network"]})
    mask_accumulate: str = field(default="signed", metadata={"choices": ["signed", "absolute"]})
    forget_order: str = field(default="shuffled", metadata={"choices": list(ORDERS)})
    legacy_inverted_mask: bool = False
    legacy_gradient_mask: bool = False
    legacy_two_samples: bool = False

    def __post_init__(self) -> None:
        """Check the types and ranges."""
        super().__post_init__()
        if self.adapter_rank and self.mask_ratio < 1:
            raise ValueError(
                "A saliency mask is over weights, and adapters leave these alone: give mask_ratio=1 with adapter_rank."
            )
        if not 0 <= self.mask_ratio <= 1:
            raise ValueError(f"`mask_ratio` must lie in [0, 1], got {self.mask_ratio}.")
        if self.retain_weight < 0:
            raise ValueError(f"`retain_weight` must not be negative, got {self.retain_weight}.")


class SalUnObjective:
    """The relabel and retain terms; see the module's docstring.

    Args:
        family: Noise schedule, prediction type and denoiser call.
        teacher: The bare module being trained.
        forget: Examples of the concept.
        retain: Examples to keep.
        anchors: Forget prompt to substitute caption c'.
        prompts: Embeddings of all of these.
        config: Hyper-parameters.
        seed: Seeds order, noise and times.
    """

    def __init__(
        self, family: Family, teacher: torch.nn.Module, forget: Examples, retain: Examples,
        anchors: Mapping[str, str], prompts: PromptTable, config: SalUnConfig, seed: int,
    ) -> None:  # fmt: skip
        self.family, self.teacher, self.prompts = family, teacher, prompts
        self.forget, self.retain, self.anchors = forget, retain, anchors
        self.batch_size, self.config, self.seed = config.batch_size, config, seed

    def losses(self, model: torch.nn.Module, step: int, shard: Shard) -> Mapping[str, torch.Tensor]:
        """Give the terms ``forget`` and ``retain``; student and retain pictures share one forward pass."""
        config = self.config
        forget = self._batch(self.forget, step, shard, FORGET_STREAM, config.forget_order)
        retain = self._batch(self.retain, step, shard, RETAIN_STREAM, "shuffled")
        student = self.family.ask(
            model, torch.cat([forget.noisy, retain.noisy]), torch.cat([forget.timesteps, retain.timesteps]),
            self.prompts([*forget.captions, *retain.captions]),
        )  # fmt: skip
        student_f, student_r = student.chunk(2)
        seen = resampled(self.family, self.forget, forget) if config.legacy_two_samples else forget.noisy
        with torch.no_grad():
            anchored = self.prompts([self.anchors[caption] for caption in forget.captions])
            teacher = self.family.ask(self.teacher, seen, forget.timesteps, anchored)
        return {
            "forget": F.mse_loss(student_f, teacher),
            "retain": config.retain_weight * F.mse_loss(student_r, retain.target),
        }

    def _batch(self, examples: Examples, step: int, shard: Shard, stream: int, order: str) -> NoisyBatch:
        return noisy_batch(
            self.family, examples, self.batch_size, step, shard, seed=self.seed, stream=stream, order=order
        )


def saliency_mask(
    task: Task, forget: Examples, prompts: PromptTable, config: SalUnConfig
) -> tuple[dict[str, torch.Tensor], float]:
    """Compute the mask in one pass over the forget set, which the processes share.

    Args:
        task: The model at its original weights; parameters that require gradients get a mask.
        forget: Examples of the concept.
        prompts: Embeddings of their prompts and of the empty prompt.
        config: Guidance, ratio and batch size, and how to rank.

    Returns:
        Parameter name to `bool` mask, the same on every process, and the threshold gamma.
    """
    family, denoiser, accelerator = task.family, task.model, task.accelerator
    guidance, trained = config.mask_guidance, task.trained()
    ranked = dict(denoiser.named_parameters()) if config.mask_scope == "network" else trained
    sizes = {name: torch.zeros_like(p) for name, p in ranked.items()} if config.mask_accumulate == "absolute" else {}
    for parameter in ranked.values():
        parameter.requires_grad_(True)
    rank, count = accelerator.process_index, accelerator.num_processes
    size = config.batch_size * (1 if sizes else count)  # sizes are of batches that the processes share
    batches = [list(range(i, min(i + size, len(forget))))[rank::count] for i in range(0, len(forget), size)]
    for index in Track(batches, "saliency", shown=accelerator.is_main_process):
        if index:
            batch = noised(family, forget, np.array(index), [(task.seed, MASK_STREAM, i) for i in index])
            captions = [*batch.captions, *[""] * len(index)]
            with accelerator.autocast():
                both = family.ask(
                    denoiser, batch.noisy.repeat(2, 1, 1, 1), batch.timesteps.repeat(2), prompts(captions)
                )
            conditional, unconditional = both.chunk(2)
            guided = (1 + guidance) * conditional - guidance * unconditional
            per_example = (guided - batch.target).pow(2).flatten(1).mean(1)
            (-per_example.sum()).backward()  # gradients add up in .grad, signed, in float32
        for name, total in sizes.items():
            total += _taken(ranked[name], accelerator).abs()
    saliency = sizes or {name: _taken(parameter, accelerator).abs() for name, parameter in ranked.items()}
    for name, parameter in ranked.items():
        parameter.requires_grad_(name in trained)
    if config.legacy_inverted_mask:
        salient, threshold = top_mask(saliency, 1 - config.mask_ratio)
        masks = {name: ~mask for name, mask in salient.items()}
    else:
        masks, threshold = top_mask(saliency, config.mask_ratio)
    return {name: masks[name] for name in trained}, threshold


def _taken(parameter: torch.nn.Parameter, accelerator: Accelerator) -> torch.Tensor:
    """Take a parameter's gradient from it, summed over the processes, float32."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    parameter.grad = None
    summed: torch.Tensor = accelerator.reduce(gradient.float(), "sum")
    return summed


def check(task: Task, config: SalUnConfig) -> None:
    """Check, before the long work, a mask that the user gave; ValueError if it is of another model."""
    if config.mask_path is not None:
        masks, provenance = load_mask(config.mask_path, task.model)
        if any(provenance.get(name) != task.identity[name] for name in ("base", "beside")):
            raise ValueError(
                f"{config.mask_path} was computed for another base model; leave out mask_path to make one."
            )
        missing, surplus = sorted(set(task.trained()) - set(masks)), sorted(set(masks) - set(task.trained()))
        if missing or surplus:
            odd = (
                f"it has none for {missing[0]}, which is" if missing else f"it has one for {surplus[0]}, which is not"
            )
            raise ValueError(
                f"{config.mask_path} is a mask of other parameters: {odd} trained."
                " Choose the same `parameters` as the run that made it, or leave out mask_path."
            )


def run(task: Task, config: SalUnConfig) -> tuple[History, dict[str, Any]]:
    """Make or read the mask, then relabel; see `sfumato.unlearning.task`."""
    forget, retain = task.examples("forget"), task.examples("retain")
    anchors = task.anchors(forget.prompts)
    prompts = task.prompts(forget.prompts, retain.prompts, list(anchors.values()), [""])
    masks, facts = find_mask(task, forget, prompts, config)
    objective = SalUnObjective(task.family, task.model, forget, retain, anchors, prompts, config, task.seed)
    return task.train(objective, "salun", masks, restore=not config.legacy_gradient_mask), facts


def find_mask(
    task: Task, forget: Examples, prompts: PromptTable, config: SalUnConfig
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read the mask the user gave, or compute one and save it beside the result; also facts for the manifest."""
    if config.mask_path is not None:
        masks, _ = load_mask(config.mask_path, task.model)
        return masks, {"mask_density": mask_density(masks), "mask_path": config.mask_path}
    earlier = _earlier_mask(task)
    if earlier is not None:
        return earlier
    masks, threshold = saliency_mask(task, forget, prompts, config)
    facts = {"mask_density": mask_density(masks), "mask_threshold": threshold if isfinite(threshold) else None}
    if task.output_dir is not None and task.accelerator.is_main_process:
        provenance = {
            **task.identity, **facts, "ratio": config.mask_ratio, "guidance": config.mask_guidance, "seed": task.seed,
            "forget_pictures": len(forget), "accumulate": config.mask_accumulate, "scope": config.mask_scope,
            "inverted": config.legacy_inverted_mask,
            "versions": {name: version(name) for name in ("sfumato", "torch", "diffusers")},
        }  # fmt: skip
        save_mask(task.output_dir / MASK_FILE, masks, provenance)
    return masks, facts


def _earlier_mask(task: Task) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The mask that an earlier start of this run left, if all processes see it: weights have moved under it."""
    path = task.output_dir / MASK_FILE if task.output_dir is not None and task.resume else None
    found = None
    if path is not None and path.is_file():
        masks, stated = load_mask(path, task.model)
        own = json.loads(json.dumps(task.identity))
        if all(stated.get(name) == value for name, value in own.items()):
            found = masks, {name: stated[name] for name in ("mask_density", "mask_threshold")}
    seen = torch.tensor(float(found is not None), device=task.accelerator.device)
    return found if float(task.accelerator.reduce(seen, "mean")) == 1 else None
