"""The judge: one small network that tells the garment, the style and the colour of a picture.

It stands in for the detectors that evaluations of large models use (an ImageNet classifier, a style classifier), is
trained on renders of training pictures only, and never sees a generated one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from sfumato import storage

__all__ = ["Judge"]


class Judge(nn.Module):
    """A convolutional classifier with one linear head for each domain of concepts.

    Args:
        domains: Domain name to its words, for instance ``{"garment": ("t-shirt", ...), "style": (...)}``.
        width: Channels of the first stage; doubled at each of three halvings of the resolution.
    """

    def __init__(self, domains: Mapping[str, Sequence[str]], width: int = 24) -> None:
        super().__init__()
        self.domains = {name: tuple(words) for name, words in domains.items()}
        self.width = width
        stages: list[nn.Module] = []
        channels = 3
        for stage in range(4):
            out = width * 2 ** min(stage, 2)
            stages += [
                nn.Conv2d(channels, out, 3, padding=1, stride=1 if stage == 0 else 2),
                nn.GroupNorm(8, out),
                nn.SiLU(),
                nn.Conv2d(out, out, 3, padding=1),
                nn.GroupNorm(8, out),
                nn.SiLU(),
            ]
            channels = out
        self.body = nn.Sequential(*stages)
        self.heads = nn.ModuleDict({name: nn.Linear(channels * 4, len(words)) for name, words in self.domains.items()})

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """Embed pictures ``(B, 3, 32, 32)`` in [0, 1] as ``(B, F)``, in which distances between sets are measured."""
        return F.adaptive_avg_pool2d(self.body(2 * pictures - 1), 2).flatten(1)

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Classify pictures.

        Args:
            pictures: RGB ``(B, 3, 32, 32)`` in [0, 1].

        Returns:
            Domain name to logits ``(B, words of the domain)``.
        """
        features = self.features(pictures)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def predict(self, pictures: torch.Tensor, batch_size: int = 256) -> dict[str, torch.Tensor]:
        """Name what each picture shows.

        Args:
            pictures: RGB ``(N, 3, 32, 32)`` in [0, 1].
            batch_size: Pictures at a time.

        Returns:
            Domain name to indices into ``self.domains[name]``, ``(N,)``, on the CPU.
        """
        device = next(self.parameters()).device
        parts = [self(batch.to(device)) for batch in pictures.split(batch_size)]
        return {name: torch.cat([part[name].argmax(1) for part in parts]).cpu() for name in self.domains}

    def describe(self, pictures: torch.Tensor) -> list[dict[str, str]]:
        """Say what each of the pictures ``(N, 3, 32, 32)`` shows: ``N`` mappings of domain to word."""
        seen = self.predict(pictures)
        return [
            {domain: words[int(seen[domain][k])] for domain, words in self.domains.items()}
            for k in range(len(pictures))
        ]

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` (float16) into a folder."""
        storage.write_text(
            Path(folder) / "config.json", json.dumps({"domains": self.domains, "width": self.width}, indent=1)
        )
        storage.save_tensors(Path(folder) / "model.safetensors", {n: t.half() for n, t in self.state_dict().items()})

    @classmethod
    def load(cls, folder: str | Path) -> Judge:
        """Read what `save` wrote, as float32, in evaluation mode."""
        judge = cls(**json.loads((Path(folder) / "config.json").read_text()))
        judge.load_state_dict(
            {n: t.float() for n, t in storage.load_tensors(Path(folder) / "model.safetensors").items()}
        )
        return judge.eval()
