"""What an unlearning method is given: the model, the concept, the pictures, and how to train.

A method is a module with a config dataclass and ``run(task, config)``, which changes `Task.model` in place and returns
the history of its training and facts for the manifest. It may have ``check(task, config)``, for what can be known
before the long work. `sfumato.unlearning.core` does everything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from sfumato import storage
from sfumato.concepts import Concept, Vocabulary, refuse_captions
from sfumato.families import Family
from sfumato.settings import check_types
from sfumato.trainer import Objective, TrainingConfig, train
from sfumato.unlearning.costs import Costs
from sfumato.unlearning.examples import Examples, PromptTable, draw_examples, read_image_folder, refuse_same_pictures

__all__ = ["SUBSETS", "ExampleConfig", "History", "Masks", "Task", "TrainedConfig"]

History = list[dict[str, float]]
Masks = Mapping[str, torch.Tensor]
"""Parameter name to a `bool` tensor of its shape; False entries must not move."""

SUBSETS = ["full", "xattn", "xattn-kv", "selfattn", "noxattn", "notime"]
"""Of a denoiser's parameters; see `StableDiffusion.trainable_parameters`."""

_KINDS = ("forget", "retain", "anchor")


@dataclass
class ExampleConfig:
    """Where forget, retain and anchor pictures come from.

    Attributes:
        forget_images: Folder with pictures of the concept; None lets the model draw them.
        retain_images: Folder with pictures to keep; None lets the model draw them.
        forget_examples: How many forget pictures to draw.
        retain_examples: How many retain pictures to draw.
        anchor_examples: How many pictures of what the concept is replaced by to draw, for methods that want them.
        example_steps: Sampler steps of a drawn picture.
        example_guidance: Guidance scale of a drawn picture.
        example_batch_size: Pictures drawn or encoded at a time.
    """

    forget_images: str | None = None
    retain_images: str | None = None
    forget_examples: int = 800
    retain_examples: int = 800
    anchor_examples: int = 800
    example_steps: int = 50
    example_guidance: float = 7.5
    example_batch_size: int = 8

    def __post_init__(self) -> None:
        """Check what would only fail after the long work has begun."""
        check_types(self)
        for name in ("forget_examples", "retain_examples", "anchor_examples", "example_steps", "example_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        folders = [Path(folder) for folder in (self.forget_images, self.retain_images) if folder is not None]
        for folder in folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"There is no image folder {folder}.")
        if len(folders) == 2 and folders[0].samefile(folders[1]):
            raise ValueError(f"The pictures of {folders[0]} are to be forgotten and retained; give two folders.")
        if len(folders) == 2 and any(a.resolve() in b.resolve().parents for a, b in (folders, folders[::-1])):
            raise ValueError(f"One of the folders {folders[0]} and {folders[1]} lies in the other; give two apart.")


@dataclass
class TrainedConfig:
    """What every method that trains can be told; their configs inherit it.

    Attributes:
        parameters: Which weights to train: ``"full"``, ``"xattn"``, ``"xattn-kv"``, ``"selfattn"``, ``"noxattn"`` or
            ``"notime"``.
        batch_size: Pictures of each kind in a step, over all processes.
        adapter_rank: Train low-rank adapters of this rank in the layers of these weights, in their place; 0 trains the
            weights. See `sfumato.unlearning.adapters`.
        prune_ratio: Share of the linear and convolution weights, those of least magnitude, to set to zero for good
            before unlearning (Unlearn-Sparse, arXiv 2304.04934).
    """

    parameters: str = field(default="full", metadata={"choices": SUBSETS})
    batch_size: int = 8
    adapter_rank: int = 0
    prune_ratio: float = 0.0

    def __post_init__(self) -> None:
        """Check the types and ranges."""
        check_types(self)
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}.")
        if not 0 <= self.prune_ratio < 1:
            raise ValueError(f"`prune_ratio` must lie in [0, 1), got {self.prune_ratio}.")
        if self.adapter_rank < 0:
            raise ValueError(f"`adapter_rank` must not be negative, got {self.adapter_rank}.")
        if self.adapter_rank and self.prune_ratio:
            raise ValueError("Merged adapters would fill in what `prune_ratio` sets to zero: leave out one of both.")

    @property
    def part(self) -> str:
        """The part of the model that changes; see `Family.parts`."""
        return "denoiser"


@dataclass
class Task:
    """One unlearning run.

    Attributes:
        family: The original model, which stays as it is.
        concept: What to forget.
        model: A float32 copy of the part that the method changes, in place; the parameters that it may train require
            gradients.
        sources: Where pictures come from.
        training: How to train.
        identity: What makes this run this run; goes into checkpoints and masks.
        accelerator: The process group.
        output_dir: Where checkpoints, logs and extra files go; None writes nothing.
        resume: Continue from the newest checkpoint.
        kept: False where pruning has set a weight to zero; empty without pruning.
        costs: What the run has cost so far; None keeps no count.
    """

    family: Family
    concept: Concept
    model: torch.nn.Module
    sources: ExampleConfig
    training: TrainingConfig
    identity: Mapping[str, Any]
    accelerator: Accelerator
    output_dir: Path | None = None
    resume: bool = False
    kept: Masks = field(default_factory=dict)
    costs: Costs | None = None
    _examples: dict[str, Examples] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Seeds everything random."""
        return self.training.seed

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """Name the parameters that may move."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def prompts(self, *lists: Sequence[str]) -> PromptTable:
        """Encode prompts with the original text encoder."""
        return PromptTable(self.family, [prompt for prompts in lists for prompt in prompts])

    def anchors(self, captions: Sequence[str]) -> dict[str, str]:
        """Map the concept's prompts and other captions, of a user's folder, to what is shown instead."""
        return {caption: self.concept.anchor_of(caption) for caption in (*self.concept.prompts, *captions)}

    def examples(self, kind: str) -> Examples:
        """Provide a set of pictures: from a folder, from an earlier start of this run, or drawn by the model.

        Args:
            kind: ``"forget"``, ``"retain"`` or ``"anchor"``. Picture k of the last shows the anchor of the concept's
                prompt k, counted round.
        """
        if kind not in self._examples:
            self._examples[kind] = self._provide(kind)
        return self._examples[kind]

    def _provide(self, kind: str) -> Examples:
        sources, concept = self.sources, self.concept
        prompts = {"forget": concept.prompts, "retain": concept.retain, "anchor": concept.anchors}[kind]
        images = getattr(sources, f"{kind}_images", None)
        if images is not None:
            return read_image_folder(self.family, images, prompts, batch_size=sources.example_batch_size)
        path = self.output_dir / "examples" / f"{kind}.safetensors" if self.output_dir else None
        key = {
            "base": self.identity["base"], "beside": self.identity.get("beside"),
            "source": self.identity["examples"], "prompts": list(prompts), "seed": self.seed,
        }  # fmt: skip
        count = getattr(sources, f"{kind}_examples")
        stored = storage.load_tensors_of(path, key)
        if stored is not None:
            latents = stored["latents"]
            return Examples(latents, torch.zeros_like(latents), tuple(prompts[k % len(prompts)] for k in range(count)))
        drawn = draw_examples(
            self.family, prompts, count, key=(self.seed, 7, _KINDS.index(kind)),
            num_inference_steps=sources.example_steps, guidance_scale=sources.example_guidance,
            batch_size=sources.example_batch_size, accelerator=self.accelerator, description=f"draw {kind} set",
        )  # fmt: skip
        if path is not None and self.accelerator.is_main_process:
            storage.save_tensors(path, {"latents": drawn.mean}, {"key": key})
        self.note_costs()
        return drawn

    def read_folders(self, vocabulary: Vocabulary | None = None) -> None:
        """Read the user's pictures, if there are any: what is wrong with them is then known before the long work.

        Args:
            vocabulary: The model's, if it has one.
        """
        folders = {kind: getattr(self.sources, f"{kind}_images") for kind in ("forget", "retain")}
        if all(folders.values()):
            refuse_same_pictures(folders["forget"], folders["retain"])  # before they are encoded
        given = {kind: sorted(set(self.examples(kind).prompts)) for kind, folder in folders.items() if folder}
        if "retain" in given:
            refuse_captions(vocabulary, self.concept.phrases, given["retain"])
        kept = {*given.get("retain", ()), *self.concept.retain}
        for caption in given.get("forget", ()):
            if caption in kept:
                raise ValueError(f"{caption!r}, a caption of {folders['forget']}, is to be forgotten and retained.")
            if self.concept.anchor_of(caption) == caption:
                raise ValueError(f"{caption!r}, a caption of {folders['forget']}, is what the concept is to become.")

    def train(
        self, objective: Objective, description: str, masks: Masks | None = None, *, restore: bool = True
    ) -> History:
        """Train the model.

        Args:
            objective: What to minimise.
            description: The progress bar's label.
            masks: Weights that must not move, besides those pruned.
            restore: Hold them through whatever the optimiser does; see `MaskedUpdate`.
        """
        both = dict(masks or {})
        names = self.trained()
        for name, kept in self.kept.items():
            if name in names:
                both[name] = kept & both[name].to(kept.device) if name in both else kept
        return train(
            self.model, objective, self.training, output_dir=self.output_dir, masks=both, resume=self.resume,
            identity=self.identity, accelerator=self.accelerator, description=description,
            on_checkpoint=self.note_costs, restore_masked=restore,
        )  # fmt: skip

    def note_costs(self) -> None:
        """Write down what the run has cost, at a point that a resumed run goes on from; all processes must call it."""
        if self.costs is not None:
            self.costs.note()
        self.accelerator.wait_for_everyone()
