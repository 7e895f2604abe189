"""One unlearning run: all that is known before the long work, the work, and its result."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from sfumato import concepts, recipes, storage
from sfumato.concepts import Concept
from sfumato.families import Family, family_of
from sfumato.lora import Lora, extract_lora
from sfumato.memory import explained
from sfumato.recipes import Recipe
from sfumato.trainer import TrainingConfig, checkpoint_space, preflight
from sfumato.unlearning.costs import Costs
from sfumato.unlearning.methods import Method, configure, method_named
from sfumato.unlearning.result import OutputConfig, check_output, differ
from sfumato.unlearning.task import ExampleConfig, History, Task
from sfumato.unlearning.verdict import pronounce, require_known
from sfumato.unlearning.working_copy import working_copy

__all__ = ["Run"]

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What is to be done, checked as far as can be without doing it.

    Attributes:
        pipe: The model.
        name: Of the method.
        method: Where it is, and what it needs.
        concept: What to forget.
        recipe: Where settings come from that were not given.
        configs: All settings, by the class of their config.
        asked: The anchor and what to retain, as they were given, which is None for the default.
        trained: How many weights are trained; known once the work has begun.
        checkpoint_space: Bytes that checkpoints need at the most; likewise.
    """

    pipe: DiffusionPipeline
    name: str
    method: Method
    concept: Concept
    recipe: Recipe
    configs: Mapping[Any, Any]
    asked: Mapping[str, Any] = field(default_factory=dict)
    trained: int = 0
    checkpoint_space: int = 0

    @classmethod
    def prepare(
        cls, pipe: DiffusionPipeline, forget: str | Sequence[str], method: str, *, anchor: str | None,
        retain: Sequence[str] | None, recipe: str | Path | None, settings: Mapping[str, Any],
    ) -> Run:  # fmt: skip
        """Resolve the concept and the settings; see `sfumato.unlearning.core.unlearn`, also for the errors."""
        family = family_of(pipe)
        family.check_dtypes()
        chosen = method_named(method)
        if not isinstance(family, chosen.family):
            raise ValueError(f"{method} is not defined for {family.label}: {chosen.wants}. Choose another method.")
        concept = concepts.resolve(pipe, forget, anchor=anchor, retain=retain)
        for name, given, used in (("anchor", anchor, chosen.anchors), ("retain", retain, chosen.retains)):
            if given is not None and not used:
                logger.warning(
                    f"{method} has no use for `{name}`: it only tells the check at the end what to compare with."
                )
        found = recipes.find_recipe(method, pipe, forget, recipe)
        configs = {type(config): config for config in configure(chosen.configs, {**found.settings, **settings})}
        kept = [retain] if isinstance(retain, str) else retain
        asked = {"anchor": anchor, "retain": None if kept is None else list(kept)}
        run = cls(pipe, method, chosen, concept, found, configs, asked)
        run._say_what_has_no_use(retain)
        check_output(pipe, run.part, run.output)
        family.trainable_parameters(run.config.parameters, run.config.part)  # says what is wrong with them
        return run

    def _say_what_has_no_use(self, retain: Sequence[str] | None) -> None:
        """Warn of pictures and prompts that the method, as it is set, never looks at."""
        sources, prior = self.configs.get(ExampleConfig, ExampleConfig()), getattr(self.config, "prior", "retain")
        if sources.forget_images is not None and not self.method.forgets:
            logger.warning(f"{self.name} has no use for `forget_images`: it learns from pictures of the anchor.")
        if prior != "retain" and (retain is not None or sources.retain_images is not None):
            logger.warning(f"{self.name} has no use for what is to be retained with prior={prior!r}: set 'retain'.")

    @property
    def config(self) -> Any:
        """The method's own settings."""
        return self.configs[self.method.config_class]

    @property
    def training(self) -> TrainingConfig:
        """How to train."""
        found: TrainingConfig = self.configs.get(TrainingConfig, TrainingConfig())
        return found

    @property
    def output(self) -> OutputConfig:
        """What to save."""
        found: OutputConfig = self.configs[OutputConfig]
        return found

    @property
    def family(self) -> Family:
        """The model's family."""
        return family_of(self.pipe)

    @property
    def part(self) -> torch.nn.Module:
        """The part of the model that changes."""
        return self.family.parts[self.config.part]

    def disk_space(self) -> int:
        """Bytes that the result, while it is put in its place, and what is known of checkpoints need at the most."""
        modules = (part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module))
        size = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
        return 2 * size + self.checkpoint_space

    def origin(self) -> dict[str, Any]:
        """Say for the manifest where the settings come from that were not given, and what the model was loaded in."""
        origin = {"asked": dict(self.asked), "recipe": self.recipe.name or None}
        return {**origin, "dtype": str(self.family.dtype), "seed": self.training.seed}

    def settings(self) -> dict[str, Any]:
        """All settings by their names."""
        return {name: value for config in self.configs.values() for name, value in asdict(config).items()}

    def work(
        self, accelerator: Accelerator, folder: Path | None, costs: Costs | None, *, resume: bool,
        intended: Path | None = None,
    ) -> tuple[Task, History, dict[str, Any]]:  # fmt: skip
        """Do the long work.

        Args:
            accelerator: The process group.
            folder: Where checkpoints, logs and extra files go; None writes nothing.
            costs: What the run has cost so far; None keeps no count.
            resume: Continue from the newest checkpoint.
            intended: Where a rehearsal would write, had it a `folder`; it must have room for all.

        Returns:
            The task, whose model is the result, the losses, and facts for the manifest.
        """
        family, config, training = self.family, self.config, self.training
        sources = self.configs.get(ExampleConfig, ExampleConfig())
        identity = {
            "method": self.name, "forget": self.concept.name, "concept": asdict(self.concept),
            "settings": asdict(config), "base": storage.fingerprint(self.part.named_parameters()),
            "beside": self._fingerprint_beside(), "examples": asdict(sources),
        }  # fmt: skip
        implementation: Any = importlib.import_module(self.method.module)
        names = family.trainable_parameters(config.parameters, config.part)
        changes = {name: getattr(config, name) for name in ("adapter_rank", "prune_ratio") if self.method.trains}
        mixed = training.mixed_precision != "no"
        with (
            explained(accelerator.device, folder, self.settings()),
            working_copy(self.part, names, seed=training.seed, mixed=mixed, **changes) as (model, kept),
        ):
            task = Task(
                family, self.concept, model, sources, training, identity, accelerator, folder, resume, kept=kept,
                costs=costs,
            )  # fmt: skip
            self.trained = sum(parameter.numel() for parameter in task.trained().values())
            if hasattr(implementation, "check"):
                implementation.check(task, config)
            if self.method.trains:
                place = folder or intended
                preflight(
                    model, config.batch_size, training, accelerator=accelerator, output_dir=place, identity=identity,
                    resume=resume,
                )  # fmt: skip
                self.checkpoint_space = checkpoint_space(model, training)
                if place is not None and not resume:  # else some of it is there already
                    storage.check_disk_space(place, self.disk_space())
            watched = [family.denoiser, *([model] if config.part == "denoiser" else [])] if costs is not None else []
            counted = costs.counted if costs is not None else torch.zeros((), dtype=torch.int64)
            self.pipe.to(accelerator.device)
            model.to(accelerator.device)
            require_known(family, self.concept)
            task.read_folders(concepts.vocabulary_of(self.pipe))
            with _counting(counted, *watched):
                history, facts = implementation.run(task, config)
        return task, history, facts

    def _fingerprint_beside(self) -> str:
        """What tells the rest of the model, which draws the pictures and encodes the prompts, from another."""
        changed = {id(module) for module in self.part.modules()}
        return storage.fingerprint(
            (f"{component}.{name}", parameter)
            for component, module in self.pipe.components.items()
            if isinstance(module, torch.nn.Module) and id(module) not in changed
            for name, parameter in module.named_parameters()
        )

    def result(self, task: Task) -> tuple[DiffusionPipeline, Lora | None]:
        """Give the pipeline with the part that was changed, and its LoRA, if that is to be saved."""
        result = self.family.with_parts({self.config.part: task.model.requires_grad_(False)})
        lora = None
        if "lora" in self.output.save and differ(self.pipe, result):  # before the change is rounded
            lora = extract_lora(self.pipe, result, self.output.lora_rank)
        _cast(task.model, next(self.part.parameters()).dtype)
        return result, lora

    def check(self, result: DiffusionPipeline) -> dict[str, Any]:
        """Say whether the concept is gone; gives the same for the manifest. Never costs the result."""
        try:
            verdict = pronounce(self.pipe, result, self.concept, self.training.seed)
        except Exception as error:  # whatever stops the check, the work that is done is kept
            said = f"The result could not be checked ({type(error).__name__}: {error}); it is kept as it is."
            facts = {}
        else:
            said = verdict.sentence(self.concept.name, self.recipe.expected.get("ua"))
            facts = {"verdict": verdict.as_dict()}
        tqdm.write(said, file=sys.stderr)
        return {"expected": dict(self.recipe.expected), **facts}


@contextmanager
def _counting(count: torch.Tensor, *denoisers: torch.nn.Module) -> Iterator[None]:
    """Add the samples that pass through denoisers to `count`; a guided prediction is two."""

    def see(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        count.add_(len(args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))))

    hooks = [denoiser.register_forward_pre_hook(see, with_kwargs=True) for denoiser in denoisers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give the model the dtype that the pipeline came in, unless a weight would become infinite in it."""
    limit = torch.finfo(dtype).max
    for name, parameter in model.named_parameters():
        if parameter.abs().max() > limit:
            raise ValueError(
                f"{name} has a weight of {parameter.abs().max():.3g}, beyond what {dtype} can hold: load the pipeline"
                " in float32 or bfloat16, or use a smaller learning rate."
            )
    if any(parameter.dtype != dtype for parameter in model.parameters()):
        model.to(dtype)
