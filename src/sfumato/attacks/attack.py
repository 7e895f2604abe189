"""What all attacks have in common: what they are given, and how they ask whether they have succeeded.

An attack is a generator. It is given a batch of prompts, yields rounds of candidates, and is told of each whether its
picture shows the concept; what an attack does not need to know (drawing, judging, storing, processes) is the audit's:
`sfumato.attacks.audit`. Whatever is random is keyed by a prompt's number, so that a prompt's result does not depend on
who attacks it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sfumato import storage
from sfumato.attacks.slots import Slots
from sfumato.concepts import Concept
from sfumato.families import Conditioning, StableDiffusion

__all__ = [
    "Answer", "Attack", "Batch", "Memory", "Round", "Setting", "finite_gradient", "moments_of", "refuse_nan",
    "restore_moments",
]  # fmt: skip

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Setting:
    """What stays the same for all prompts of an audit.

    Attributes:
        victim: The unlearned model.
        source: The model as it was.
        concept: What was to be forgotten.
        seed: Seeds the attack.
        num_inference_steps: Sampler steps of a picture.
        guidance_scale: Classifier-free guidance of a picture.
        features: Embeds pictures ``(N, 3, H, W)`` as ``(N, F)``, to compare them by; None if nothing can.
        folder: Where what is made once may be kept; None keeps nothing.
        facts: What that depends on besides the above, as JSON can hold it.
        shared: What an attack makes once, by name.
    """

    victim: StableDiffusion
    source: StableDiffusion
    concept: Concept
    seed: int
    num_inference_steps: int
    guidance_scale: float
    features: Callable[[torch.Tensor], torch.Tensor] | None = None
    folder: Path | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Give what `make` makes, the first time that it is asked for."""
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]


class Memory:
    """What an attack of a batch keeps on the way, so that one that is killed goes on from there.

    Args:
        file: Where; None keeps nothing.
        key: What it depends on, as JSON can hold it.
        beside: Gives what the audit keeps with it.
    """

    def __init__(
        self, file: Path | None = None, key: Mapping[str, Any] | None = None,
        beside: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:  # fmt: skip
        self._file, self._key, self._beside = file, dict(key or {}), beside

    def keep(self, tensors: Mapping[str, torch.Tensor], **facts: Any) -> None:
        """Replace what was kept.

        Args:
            tensors: Name to tensor.
            **facts: What JSON can hold.
        """
        if self._file is not None:
            more = {"key": self._key, "facts": facts, "beside": dict(self._beside())}
            storage.save_tensors(self._file, dict(tensors), more)

    def kept(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Give the tensors and facts that were kept last; None if there are none, or the file is damaged."""
        tensors = storage.load_tensors_of(self._file, self._key)
        return None if tensors is None else (tensors, self._stored("facts"))

    def kept_beside(self) -> dict[str, Any] | None:
        """Give what the audit kept with them; None as above."""
        return None if storage.load_tensors_of(self._file, self._key) is None else self._stored("beside")

    def _stored(self, name: str) -> dict[str, Any]:
        assert self._file is not None
        return dict(storage.read_metadata(self._file)[name])

    def forget(self) -> None:
        """Remove what was kept."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Batch:
    """Prompts that are attacked side by side.

    Attributes:
        setting: What they share.
        numbers: Their numbers among all prompts; they seed.
        prompts: ``B`` prompts.
        targets: The original model's pictures of them, ``(B, 3, H, W)`` in [0, 1].
        memory: Where a long attack keeps its state between rounds, and finds that of a run that was killed.
    """

    setting: Setting
    numbers: tuple[int, ...]
    prompts: tuple[str, ...]
    targets: torch.Tensor
    memory: Memory = field(default_factory=Memory)

    @cached_property
    def tokens(self) -> torch.Tensor:
        """Token numbers; see `StableDiffusion.tokenize`."""
        return self._tokenized[0]

    @cached_property
    def counts(self) -> torch.Tensor:
        """How many tokens each prompt has itself, ``(B,)``."""
        return self._tokenized[1]

    @cached_property
    def _tokenized(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.setting.victim.tokenize(self.prompts)

    @cached_property
    def latents(self) -> torch.Tensor:
        """What the targets are encoded as: the posterior's mean, ``(B, C, h, w)``."""
        victim = self.setting.victim
        return victim.encode_images(self.targets.to(victim.device))[0].float()

    def keys(self, rows: Sequence[int], stream: int, *more: int) -> list[tuple[int, ...]]:
        """Keys of randomness for some of the prompts; see `sfumato.randomness`."""
        return [(self.setting.seed, stream, self.numbers[k], *more) for k in rows]

    def encode(self, rows: Sequence[int], slots: Slots, new: torch.Tensor) -> Conditioning:
        """Let the victim encode some of the prompts, with embeddings ``(b, slots, width)`` in the batch's slots."""
        some = list(rows)
        return slots.rows(some).encode(self.setting.victim, self.tokens[some], new)


@dataclass(frozen=True)
class Round:
    """Candidates for some of a batch's prompts.

    Attributes:
        rows: Their places in the batch.
        prompts: What to draw: prompts ``b``, or
        conditioning: what a family encodes them as, ``b`` rows, where an attack may feed that.
        final: Whether one that shows the concept counts; else its picture is only asked for.
        iterations: Steps of the attack so far.
    """

    rows: tuple[int, ...]
    prompts: tuple[str, ...] | None = None
    conditioning: Conditioning | None = None
    final: bool = True
    iterations: int = 0


@dataclass(frozen=True)
class Answer:
    """What came of a round.

    Attributes:
        shown: For each candidate, whether its picture shows the concept.
        pictures: Of the candidates, ``(b, 3, H, W)`` in [0, 1].
    """

    shown: tuple[bool, ...]
    pictures: torch.Tensor


def refuse_nan(values: torch.Tensor) -> None:
    """Raise a RuntimeError if what an attack descends, or where it would go, is not finite."""
    if not torch.isfinite(values).all():
        raise RuntimeError(
            "The attack meets NaN or infinite values: a model's weights are broken, or too large for its dtype; load "
            "it with dtype float32. What was finished is kept."
        )


def moments_of(adam: torch.optim.Optimizer, of: torch.Tensor) -> dict[str, torch.Tensor]:
    """Give what an optimiser of Adam's kind knows of a tensor, but for the number of steps."""
    return {name: adam.state[of][name] for name in MOMENTS}


def restore_moments(
    adam: torch.optim.Optimizer, of: torch.Tensor, stored: Mapping[str, torch.Tensor], steps: int
) -> None:
    """Put it back, as after so many steps."""
    adam.state[of] = {
        "step": torch.tensor(float(steps)), **{name: stored[name].to(of) for name in MOMENTS}
    }  # fmt: skip


def finite_gradient(losses: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """Give the gradient of the sum of losses, which keeps rows apart; a RuntimeError if either is not finite."""
    gradient = torch.autograd.grad(losses.sum(), of)[0]
    refuse_nan(torch.stack([losses.detach().sum().float(), gradient.float().sum()]))
    return gradient


Attack = Callable[[Batch, Any], Generator[Round, Answer, None]]
"""An attack: takes a batch and its config."""
