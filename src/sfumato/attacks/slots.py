"""Where an attack's tokens go in a prompt, be they embeddings or numbers.

A prompt of L tokens is ``[start, w_1 ... w_L, end, padding]``. Slots are put among the w, and the padding gives way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sfumato.families import Conditioning, StableDiffusion

__all__ = ["PLACES", "Slots", "text_of"]

PLACES = ("prefix", "suffix", "middle", "insert", "per_words", "replace")
WORDS_BETWEEN = 3
"""Tokens of the prompt between two slots of ``per_words``."""


@dataclass(frozen=True)
class Slots:
    """Prompts with slots among their tokens.

    Attributes:
        origin: For each place of a prompt the token that stands there, or `length` plus a slot's number, ``(B, T)``.
        length: T.
        sizes: Each prompt's tokens, slots included, without start and end.
    """

    origin: torch.Tensor
    length: int
    sizes: tuple[int, ...]

    @classmethod
    def placed(cls, tokens: torch.Tensor, counts: torch.Tensor, slots: int, place: str) -> Slots:
        """Put a number of slots together.

        Args:
            tokens: Numbers as a family's `tokenize` gives them, ``(B, T, ...)``.
            counts: How many tokens each prompt has itself, ``(B,)``.
            slots: How many.
            place: ``"prefix"``, ``"suffix"``, ``"middle"``; ``"insert"``: one by one, at equal intervals;
                ``"per_words"``: one before each three tokens of the prompt, the last before all that are left; or
                ``"replace"``: in place of the prompt.

        Raises:
            ValueError: If there is no room.
        """
        rows = []
        for count in counts.tolist():
            own, new = list(range(1, 1 + count)), [tokens.shape[1] + k for k in range(slots)]
            if place == "replace":
                rows.append(new)
                continue
            cuts = _cuts(count, slots, place)  # how many of its tokens stand before each slot
            pieces = [own[start:stop] for start, stop in zip([0, *cuts], [*cuts, count], strict=True)]
            rows.append(pieces[0] + [one for k, slot in enumerate(new) for one in (slot, *pieces[k + 1])])
        return cls._of(tokens, counts, rows)

    @classmethod
    def spread(cls, tokens: torch.Tensor, counts: torch.Tensor, every: int) -> Slots:
        """Put a slot behind every so many tokens of each prompt, and one behind a shorter one; arguments as above."""
        rows = []
        for count in counts.tolist():
            row: list[int] = []
            for place in range(count):
                row.append(1 + place)
                if (place + 1) % every == 0:
                    row.append(tokens.shape[1] + (place + 1) // every - 1)
            rows.append(row if count >= every else [*row, tokens.shape[1]])
        return cls._of(tokens, counts, rows)

    @classmethod
    def instead(cls, tokens: torch.Tensor, counts: torch.Tensor, phrases: Sequence[Sequence[int]]) -> Slots:
        """Put one slot in place of a phrase in each prompt, or behind a prompt that does not have it.

        Args:
            tokens: As for `placed`.
            counts: As for `placed`.
            phrases: The tokens of each of the phrases; the first that a prompt has is replaced.
        """
        rows = []
        numbers = tokens if tokens.ndim == 2 else tokens[..., 0]
        for row, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            slot, own = tokens.shape[1], list(range(1, 1 + count))
            found = [
                (at, len(phrase))
                for phrase in phrases
                for at in range(1, 2 + count - len(phrase))
                if row[at : at + len(phrase)] == list(phrase)
            ]
            at, size = found[0] if found else (1 + count, 0)
            rows.append(own[: at - 1] + [slot] + own[at - 1 + size :])
        return cls._of(tokens, counts, rows)

    @classmethod
    def _of(cls, tokens: torch.Tensor, counts: torch.Tensor, rows: Sequence[Sequence[int]]) -> Slots:
        length = tokens.shape[1]
        longest = max(range(len(rows)), key=lambda k: len(rows[k]))
        wide = [str(number) for number, row in enumerate(rows, 1) if len(row) + 2 > length]
        if wide:
            others = f" (as others too: {', '.join(wide)})" if len(wide) > 1 else ""
            raise ValueError(
                f"Prompt {longest + 1} has {len(rows[longest])} tokens with those of the attack{others}, and the text "
                f"encoder takes {length - 2}: attack with fewer, or shorten the prompt."
            )
        origin = []
        for row, count in zip(rows, counts.tolist(), strict=True):
            whole = [0, *row, *range(1 + count, length)]  # then the end and padding, as far as there is room
            origin.append((whole + [length - 1] * (length - len(whole)))[:length])
        return cls(torch.tensor(origin, device=tokens.device), length, tuple(len(row) for row in rows))

    @property
    def count(self) -> int:
        """The largest number of slots of a prompt."""
        return max(0, int(self.origin.max()) + 1 - self.length)

    def rows(self, some: Sequence[int]) -> Slots:
        """Give those of some prompts."""
        return Slots(self.origin[list(some)], self.length, tuple(self.sizes[k] for k in some))

    def fill(self, own: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """Fill the slots.

        Args:
            own: What stands at the prompts' places: numbers ``(B, T)``, with those of several encoders behind if there
                are more, or embeddings ``(B, T, width)``.
            new: What goes into the slots, ``(B, slots)`` or ``(B, slots, width)``.

        Returns:
            Of the shape of `own`.
        """
        both, origin = torch.cat([own, new], 1), self.origin
        if own.ndim == 3:
            origin = origin[..., None].expand(-1, -1, own.shape[2])
        return both.gather(1, origin)

    def encode(self, family: StableDiffusion, tokens: torch.Tensor, new: torch.Tensor) -> Conditioning:
        """Encode prompts with embeddings in the slots.

        Args:
            family: Has the text encoder.
            tokens: The prompts' numbers, as `StableDiffusion.tokenize` gives them, ``(B, T, ...)``.
            new: The embeddings, ``(B, slots, width)``; a gradient reaches them.

        Returns:
            As `StableDiffusion.encode_embeddings`.
        """
        word = tokens.new_full((*new.shape[:2], *tokens.shape[2:]), family.plain_token)
        embeddings = self.fill(family.embed_tokens(tokens), new)
        return family.encode_embeddings(family.parts["text_encoder"], self.fill(tokens, word), embeddings)


def _cuts(count: int, slots: int, place: str) -> list[int]:
    """How many of a prompt's `count` tokens stand before each slot."""
    if place == "insert":
        return [(k + 1) * (count // (slots + 1)) for k in range(slots)]
    if place == "per_words":
        return [min(k * WORDS_BETWEEN, count) for k in range(slots)]
    return [{"prefix": 0, "suffix": count, "middle": count // 2}[place]] * slots


def text_of(family: StableDiffusion, slots: Slots, tokens: torch.Tensor, new: torch.Tensor) -> list[str]:
    """Spell prompts out, as somebody would have to type them; cut into tokens again, they may be others.

    Args:
        family: Has the tokenizer.
        slots: Where the new tokens go.
        tokens: As `tokenize` gives them, ``(B, T)``, or with the same numbers for each of several encoders behind.
        new: Token numbers ``(B, slots)``.

    Returns:
        ``B`` prompts.
    """
    numbers = slots.fill(tokens if tokens.ndim == 2 else tokens[..., 0], new)
    return [family.spell(row[1 : 1 + size]) for row, size in zip(numbers.tolist(), slots.sizes, strict=True)]
