"""What a run would train, and the memory and time that it would take."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sfumato.progress import Phase

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """What a rehearsal found; see `sfumato.unlearning.core.rehearse`.

    Attributes:
        method: Its name.
        concept: What would be forgotten.
        model: Where it comes from.
        part: The part that would change.
        trained: Weights that would be trained, those of adapters if there are any.
        weights: Weights of the part.
        processes: How many would share the work.
        device: Of the first of them.
        memory_mb: The most memory that the rehearsal took, of the accelerator, or of the process.
        disk_mb: Room that the result and the checkpoints need.
        phases: What would take long.
    """

    method: str
    concept: str
    model: str
    part: str
    trained: int
    weights: int
    processes: int
    device: str
    memory_mb: float
    disk_mb: float
    phases: tuple[Phase, ...]

    @property
    def seconds(self) -> float:
        """All of the phases."""
        return sum(phase.seconds for phase in self.phases)

    def as_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        phases = [phase._asdict() for phase in self.phases]
        return {**asdict(self), "phases": phases, "seconds": self.seconds}

    def __str__(self) -> str:
        """A few lines."""
        share = f"{self.trained:,} weights ({100 * self.trained / self.weights:.3g} % of the {self.part}'s)"
        many = f" on each of {self.processes} processes" if self.processes > 1 else ""
        lines = [
            f"{self.method} would forget {self.concept!r} in {self.model} and train {share}.",
            f"Memory: {self.memory_mb:,.0f} MB of {self.device}{many}. Disk: {self.disk_mb:,.0f} MB.",
            f"Time: {_duration(self.seconds)}, of which",
            *(f"  {_duration(phase.seconds):>9}  {phase.name} ({phase.passes})" for phase in self.phases),
        ]
        return "\n".join(lines)


def _duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
