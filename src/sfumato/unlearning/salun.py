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
Classification and Generation", ICLR 2024, arXiv 2310.12508. Where this differs from the released code: the mask is
ranked over the weights that are trained, not over the whole network; the update is masked, not only the gradient, so
the mask holds under AdamW; student and teacher see one posterior sample, not two; every pass shuffles the forget set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tqdm.auto import tqdm

from sfumato.concepts import Concept
from sfumato.families import StableDiffusion
from sfumato.randomness import permuted_indices, randint_for, randn_for
from sfumato.settings import check_types
from sfumato.trainer import Shard, TrainingConfig, train
from sfumato.unlearning.examples import Examples, PromptTable
from sfumato.unlearning.saliency import load_mask, mask_density, save_mask, top_mask

__all__ = ["SalUnConfig", "SalUnObjective", "check", "run", "saliency_mask"]

MASK_STREAM, FORGET_STREAM, RETAIN_STREAM = 101, 102, 103  # keys that keep the random streams apart


@dataclass
class SalUnConfig:
    """SalUn's hyper-parameters; the defaults are those the authors use for a class of Stable Diffusion 1.4.

    Attributes:
        retain_weight: alpha, the weight of the retain term; 0 lets generation collapse.
        mask_ratio: Share of the trained weights that may move; 1 trains all of them, 0 none.
        mask_guidance: g, the guidance of the prediction whose loss makes the mask.
        mask_path: A mask saved by an earlier run, used instead of computing one.
        parameters: Which weights to train: ``"full"``, ``"xattn"``, ``"xattn-kv"`` or ``"noxattn"``.
        batch_size: Forget pictures in a step, over all processes; as many retain pictures join them.
    """

    retain_weight: float = 0.5
    mask_ratio: float = 0.5
    mask_guidance: float = 7.5
    mask_path: str | None = None
    parameters: str = field(default="full", metadata={"choices": ["full", "xattn", "xattn-kv", "noxattn"]})
    batch_size: int = 8

    def __post_init__(self) -> None:
        """Check the types and ranges."""
        check_types(self)
        if not 0 <= self.mask_ratio <= 1:
            raise ValueError(f"`mask_ratio` must lie in [0, 1], got {self.mask_ratio}.")
        if self.retain_weight < 0:
            raise ValueError(f"`retain_weight` must not be negative, got {self.retain_weight}.")
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}.")


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
        self, family: StableDiffusion, teacher: torch.nn.Module, forget: Examples, retain: Examples,
        anchors: Mapping[str, str], prompts: PromptTable, config: SalUnConfig, seed: int,
    ) -> None:  # fmt: skip
        self.family, self.teacher, self.prompts = family, teacher, prompts
        self.forget, self.retain, self.anchors = forget, retain, anchors
        self.batch_size, self.retain_weight, self.seed = config.batch_size, config.retain_weight, seed

    def losses(self, model: torch.nn.Module, step: int, shard: Shard) -> Mapping[str, torch.Tensor]:
        """Give the terms ``forget`` and ``retain``; student and retain pictures share one forward pass."""
        noisy_f, times_f, _, captions = self._noised(self.forget, step, shard, FORGET_STREAM)
        noisy_r, times_r, target, kept = self._noised(self.retain, step, shard, RETAIN_STREAM)
        student = self.family.predict(
            model, torch.cat([noisy_f, noisy_r]), torch.cat([times_f, times_r]), self.prompts([*captions, *kept])
        )
        student_f, student_r = student.float().chunk(2)
        with torch.no_grad():
            anchored = self.prompts([self.anchors[caption] for caption in captions])
            teacher = self.family.predict(self.teacher, noisy_f, times_f, anchored).float()
        return {
            "forget": F.mse_loss(student_f, teacher),
            "retain": self.retain_weight * F.mse_loss(student_r, target),
        }

    def _noised(
        self, examples: Examples, step: int, shard: Shard, stream: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
        """Noisy latents, times, targets and captions of this shard's examples at this step."""
        span = shard.of(self.batch_size)
        start = step * self.batch_size + span.start
        index = permuted_indices(self.seed + stream, len(examples), start, len(span))
        keys = [(self.seed, stream, start + k) for k in range(len(span))]
        noisy, timesteps, target = _noise(self.family, examples, index, keys)
        return noisy, timesteps, target, [examples.prompts[i] for i in index]


def _noise(
    family: StableDiffusion, examples: Examples, index: Any, keys: Sequence[tuple[int, ...]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw posterior sample, time and noise by key; returns noisy latents (B, C, H, W), times (B,) and targets."""
    shape = examples.mean.shape[1:]
    latents = examples.latents(index, randn_for([(*key, 0) for key in keys], shape)).to(family.device)
    noise = randn_for([(*key, 1) for key in keys], shape).to(family.device)
    timesteps = randint_for([(*key, 2) for key in keys], family.num_train_timesteps).to(family.device)
    return family.add_noise(latents, noise, timesteps), timesteps, family.target(latents, noise, timesteps)


def saliency_mask(
    family: StableDiffusion,
    denoiser: torch.nn.Module,
    forget: Examples,
    prompts: PromptTable,
    config: SalUnConfig,
    seed: int,
    accelerator: Accelerator,
) -> tuple[dict[str, torch.Tensor], float]:
    """Compute the mask in one pass over the forget set, which the processes share.

    Args:
        family: Noise schedule, prediction type and denoiser call.
        denoiser: The bare module at its original weights; parameters that require gradients are ranked.
        forget: Examples of the concept.
        prompts: Embeddings of their prompts and of the empty prompt.
        config: Guidance, ratio and batch size.
        seed: Seeds noise and times of each example.
        accelerator: The process group.

    Returns:
        Parameter name to `bool` mask, the same on every process, and the threshold gamma.
    """
    parameters = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    guidance = config.mask_guidance
    mine = range(accelerator.process_index, len(forget), accelerator.num_processes)
    batches = [list(mine[i : i + config.batch_size]) for i in range(0, len(mine), config.batch_size)]
    for index in tqdm(batches, desc="saliency", disable=not accelerator.is_main_process):
        noisy, timesteps, target = _noise(family, forget, index, [(seed, MASK_STREAM, i) for i in index])
        captions = [forget.prompts[i] for i in index]
        with accelerator.autocast():
            both = family.predict(
                denoiser, noisy.repeat(2, 1, 1, 1), timesteps.repeat(2), prompts([*captions, *[""] * len(captions)])
            )
        conditional, unconditional = both.float().chunk(2)
        guided = (1 + guidance) * conditional - guidance * unconditional
        per_example = (guided - target).pow(2).flatten(1).mean(1)
        (-per_example.sum()).backward()  # gradients add up in .grad, signed, in float32
    saliency = {}
    for name, parameter in parameters.items():
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        saliency[name] = accelerator.reduce(gradient.float(), "sum").abs()
        parameter.grad = None
    return top_mask(saliency, config.mask_ratio)


def check(config: SalUnConfig, denoiser: torch.nn.Module, identity: Mapping[str, Any]) -> None:
    """Check, before the long work, a mask that the user gave; ValueError if it is of another model."""
    if config.mask_path is not None:
        _, provenance = load_mask(config.mask_path, denoiser)
        if provenance.get("base") != identity["base"]:
            raise ValueError(
                f"{config.mask_path} was computed for another base model; leave out mask_path to make one."
            )


def run(
    family: StableDiffusion,
    denoiser: torch.nn.Module,
    concept: Concept,
    forget: Examples,
    retain: Examples,
    config: SalUnConfig,
    training: TrainingConfig,
    *,
    identity: Mapping[str, Any],
    output_dir: Path | None,
    resume: bool,
    accelerator: Accelerator,
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Unlearn a concept, changing `denoiser` in place.

    Args:
        family: The model.
        denoiser: A float32 copy of its denoiser, whose chosen parameters require gradients.
        concept: What to forget; its anchors are the substitute captions.
        forget: Examples of it.
        retain: Examples to keep.
        config: SalUn's hyper-parameters.
        training: How to train.
        identity: What makes this run this run; goes into the mask's provenance and the checkpoints.
        output_dir: Where mask, checkpoints and logs go; None writes nothing.
        resume: Continue from the newest checkpoint.
        accelerator: The process group.

    Returns:
        The training history, and facts for the manifest.
    """
    anchors = dict(zip(concept.prompts, concept.anchors, strict=True))
    fallback = concept.anchors[0]
    anchors |= {prompt: fallback for prompt in forget.prompts if prompt not in anchors}  # captions of a user's folder
    prompts = PromptTable(family, [*forget.prompts, *retain.prompts, *anchors.values(), ""])
    masks, facts = _find_mask(
        family, denoiser, forget, prompts, config, training.seed, identity, output_dir, accelerator
    )
    objective = SalUnObjective(family, denoiser, forget, retain, anchors, prompts, config, training.seed)
    history = train(
        denoiser, objective, training, output_dir=output_dir, masks=masks, resume=resume,
        identity=identity, accelerator=accelerator, description="salun",
    )  # fmt: skip
    return history, facts


def _find_mask(
    family: StableDiffusion, denoiser: torch.nn.Module, forget: Examples, prompts: PromptTable, config: SalUnConfig,
    seed: int, identity: Mapping[str, Any], output_dir: Path | None, accelerator: Accelerator,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:  # fmt: skip
    """Read the mask the user gave, or compute one and save it beside the result."""
    if config.mask_path is not None:
        masks, _ = load_mask(config.mask_path, denoiser)
        return masks, {"mask_density": mask_density(masks), "mask_path": config.mask_path}
    masks, threshold = saliency_mask(family, denoiser, forget, prompts, config, seed, accelerator)
    facts = {"mask_density": mask_density(masks), "mask_threshold": threshold}
    if output_dir is not None and accelerator.is_main_process:
        provenance = {
            **identity, **facts, "ratio": config.mask_ratio, "guidance": config.mask_guidance, "seed": seed,
            "examples": len(forget), "accumulate": "signed",
            "versions": {name: version(name) for name in ("sfumato", "torch", "diffusers")},
        }  # fmt: skip
        save_mask(output_dir / "saliency_mask.safetensors", masks, provenance)
    return masks, facts
