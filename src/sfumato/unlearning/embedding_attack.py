r"""Adversarial token embeddings: where they go in a prompt, and how they are found.

A prompt of L tokens is ``[start, w_1 ... w_L, end, padding]``. With k embeddings delta it becomes ``[start, delta, w,
end, ...]`` (prefix), ``[start, w, delta, end, ...]`` (suffix) or ``[start, delta, end, ...]`` (replace), the padding
giving way; or they are added to the w (add, with k = L). They descend a loss, from step to step on other states,

.. math::
    \delta \leftarrow \mathrm{Adam}\Big(\delta,\; \textstyle\sum_{s \le n} g_s\Big) \quad\text{(as released)}, \qquad
    \delta \leftarrow \Pi_{\|\delta_i\| \le \rho}\Big[\delta - \lambda\, \frac{g_n}{\|g_n\|}\Big]
    \quad\text{(projected descent)}.

The released code of AdvUnlearn (Zhang et al., arXiv 2405.15234) never clears the gradient, so it steps along the sum
of all so far, and has no bound. The fast variants step along signs: the released one turns the sum into its sign, to
which the next gradient is added; the projected one takes the sign of each gradient for its direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from sfumato.randomness import randint_for

__all__ = ["INSERTIONS", "accumulated_descent", "find_embeddings", "frozen", "insert_embeddings", "insert_words",
           "projected_descent", "random_embeddings", "room_for"]  # fmt: skip

INSERTIONS = ("prefix", "suffix", "replace", "add")
RowLosses = Callable[[torch.Tensor, int], torch.Tensor]
"""Losses ``(B,)`` of embeddings ``(B, k, width)`` at a step of the attack, each of its own row alone."""


def room_for(length: int, count: int, tokens: int, insertion: str) -> bool:
    """Whether `tokens` embeddings fit into a sequence of `length` beside a prompt of `count` tokens and both ends."""
    kept = 0 if insertion == "replace" else count
    return insertion == "add" or kept + tokens + 2 <= length


def insert_embeddings(
    embeddings: torch.Tensor, delta: torch.Tensor, counts: torch.Tensor, insertion: str, *, drop_end: bool = False
) -> torch.Tensor:
    """Put adversarial embeddings into prompts.

    Args:
        embeddings: Token embeddings of the prompts, ``(B, T, width)``.
        delta: ``(B, k, width)``.
        counts: How many tokens each prompt has, without start and end, ``(B,)``.
        insertion: One of `INSERTIONS`.
        drop_end: Let the k tokens behind the prompt's own give way, as the released code does, not those behind its
            end token. That is the same where the padding is the end token and `counts` is right.

    Returns:
        Token embeddings ``(B, T, width)``.
    """
    length, tokens = embeddings.shape[1], delta.shape[1]
    place = torch.arange(length, device=embeddings.device).expand(len(embeddings), length)  # (B, T)
    counts = counts[:, None]
    if insertion == "add":
        padded = torch.nn.functional.pad(delta, (0, 0, 1, length))[:, :length]  # row 0 is the start token
        return embeddings + padded * ((place >= 1) & (place <= counts))[..., None]
    if insertion == "replace":
        moved = (place - tokens + counts).clamp(max=length - 1)
        origin = torch.where(place == 0, place, moved)
        start = torch.ones_like(counts)
    else:
        start = torch.ones_like(counts) if insertion == "prefix" else 1 + counts
        end = 1 + counts + (not drop_end)
        shifted = (place >= start + tokens) & (place < end + tokens)
        origin = torch.where(shifted, place - tokens, place)
    inside = (place >= start) & (place < start + tokens)
    origin = torch.where(inside, length + place - start, origin)  # rows of the embeddings, then of delta
    both = torch.cat([embeddings, delta], 1)  # (B, T + k, width)
    return both.gather(1, origin[..., None].expand(-1, -1, both.shape[2]))


def insert_words(tokens: torch.Tensor, count: int, word: int, counts: torch.Tensor, insertion: str) -> torch.Tensor:
    """Put a word into the token numbers of prompts wherever `insert_embeddings` puts one of `count` embeddings.

    Args:
        tokens: ``(B, T)``, with those of several text encoders behind if there are more.
        count: k.
        word: Its number.
        counts: See `insert_embeddings`.
        insertion: One of `INSERTIONS`.

    Returns:
        Of the shape of `tokens`, with the end token where it then stands.
    """
    if insertion == "add":
        return tokens
    numbers = tokens.reshape(*tokens.shape[:2], -1)
    words = numbers.new_full((len(numbers), count, numbers.shape[2]), word)
    return insert_embeddings(numbers, words, counts, insertion).reshape(tokens.shape)


def accumulated_descent(
    losses: RowLosses, start: torch.Tensor, *, steps: int, learning_rate: float, fast: bool = False
) -> torch.Tensor:
    """Descend as released: Adam along the running sum of the gradients, or along its sign, without a bound.

    Args:
        losses: To descend.
        start: ``(B, k, width)``.
        steps: How many.
        learning_rate: Adam's.
        fast: Replace the sum by its sign after every gradient.

    Returns:
        The embeddings found.
    """
    delta = start.clone().requires_grad_()
    optimizer, total = torch.optim.Adam([delta], lr=learning_rate), torch.zeros_like(start)
    for number in range(steps):
        total = total + _gradient(losses, delta, number)
        total = total.sign() if fast else total
        delta.grad = total.clone()
        optimizer.step()
    return delta.detach()


def projected_descent(
    losses: RowLosses, start: torch.Tensor, *, steps: int, learning_rate: float, radius: float, fast: bool = False
) -> torch.Tensor:
    """Descend by steps of one length, each back into the ball if it leaves it.

    Args:
        losses: To descend.
        start: ``(B, k, width)``; projected too.
        steps: How many.
        learning_rate: The length of a step of a row, or, if fast, of each of its entries.
        radius: The largest norm of an embedding.
        fast: Step along the sign of the gradient, not along the gradient.

    Returns:
        The embeddings found, none longer than `radius`.
    """
    delta = _project(start, radius)
    for number in range(steps):
        gradient = _gradient(losses, delta.requires_grad_(), number)
        norm = gradient.flatten(1).norm(dim=1).clamp(min=1e-20)[:, None, None]
        direction = gradient.sign() if fast else gradient / norm
        delta = _project(delta.detach() - learning_rate * direction, radius)
    return delta


def find_embeddings(
    losses: RowLosses, start: torch.Tensor, table: torch.Tensor, *, attack: str, steps: int, learning_rate: float,
    radius: float | None, fast: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Descend as ``attack`` says, ``"released"`` or ``"projected"``.

    Args:
        losses: To descend.
        start: ``(B, k, width)``.
        table: Embeddings of all tokens, ``(vocabulary, width)``.
        attack: Which.
        steps: How many.
        learning_rate: See `accumulated_descent` and `projected_descent`.
        radius: The largest norm of an embedding in a projected attack; None is that of the table.
        fast: Along signs.

    Returns:
        The embeddings found, ``(B, k, width)``.
    """
    if attack == "released":
        return accumulated_descent(losses, start, steps=steps, learning_rate=learning_rate, fast=fast)
    radius = radius or float(table.norm(dim=1).max())
    return projected_descent(losses, start, steps=steps, learning_rate=learning_rate, radius=radius, fast=fast)


def random_embeddings(table: torch.Tensor, keys: Sequence[tuple[int, ...]], tokens: int) -> torch.Tensor:
    """Give embeddings ``(B, tokens, width)`` of random tokens of a table, one drawn by each of ``B * tokens`` keys."""
    return table[randint_for(keys, len(table)).to(table.device)].view(-1, tokens, table.shape[1])


@contextmanager
def frozen(*modules: torch.nn.Module) -> Iterator[None]:
    """Spare parts that pass a gradient on the computation of their own."""
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _gradient(losses: RowLosses, delta: torch.Tensor, number: int) -> torch.Tensor:
    """The gradient of each row's loss; the sum keeps them apart, whatever the batch."""
    with torch.enable_grad():
        return torch.autograd.grad(losses(delta, number).sum(), delta)[0]


def _project(delta: torch.Tensor, radius: float) -> torch.Tensor:
    norm = delta.norm(dim=2, keepdim=True)
    return delta * (radius / norm.clamp(min=1e-20)).clamp(max=1.0)
