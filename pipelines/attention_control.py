"""Unified attention control of InfEdit: three branches of one batch that look at each other's attention.

Xu et al., "Inversion-Free Image Editing with Natural Language", CVPR 2024, arXiv 2312.04965. The network's batch is
`halves * 3 * B`: unconditional and conditional half (or the conditional alone), in each the source, target and mutual
branch, in each B samples. With q, k, v of a branch's own hidden states, attention becomes

    self, layout phase    source (q_s, k_s, v_s)    target (q_s, k_s, v_t)    mutual (q_s, k_s, v_s)
    self, after it        source (q_s, k_s, v_s)    target (q_t, k_t, v_t)    mutual (q_t, k_s, v_s)
    cross, while replaced target's map M_t <- M_s at the tokens that both prompts have, in the conditional half

so the mutual branch ends as the source's content in the target's layout. Where blend words are given, the maps also
tell which pixels of the target may differ from the others.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SOURCE, _TARGET, _MUTUAL = 0, 1, 2
_LAYOUT_PHASE = ((_SOURCE,) * 3, (_SOURCE,) * 3, (_SOURCE, _TARGET, _SOURCE))  # whose q, k, v a branch takes
_DETAIL_PHASE = ((_SOURCE, _TARGET, _TARGET), (_SOURCE, _TARGET, _SOURCE), (_SOURCE, _TARGET, _SOURCE))
_LARGEST_STORED_MAP = 32**2  # queries
_REPLACEABLE = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor")


def align_tokens(source: Sequence[int], target: Sequence[int], length: int) -> list[int]:
    """For each token of the target prompt the one of the source prompt that it is, -1 where it is new.

    Args:
        source: Token ids with their first and last special ones, without padding.
        target: Likewise.
        length: Tokens that the text encoder gives; what follows a prompt is padding, aligned in its order.

    Returns:
        `length` positions in the source prompt.
    """
    positions = [-1] * length
    # autojunk would drop frequent tokens from long prompts.
    for block in SequenceMatcher(None, source, target, autojunk=False).get_matching_blocks():
        for k in range(block.size):
            positions[block.b + k] = block.a + k
    for k in range(length - max(len(source), len(target))):
        positions[len(target) + k] = len(source) + k
    return positions


def find_word(prompt: Sequence[int], word: Sequence[int]) -> list[int]:
    """Give the positions of the tokens of a word wherever it occurs in a prompt, from the token ids of both."""
    starts = [k for k in range(len(prompt)) if list(prompt[k : k + len(word)]) == list(word)]
    return [start + k for start in starts for k in range(len(word))]


@dataclass
class BlendWords:
    """Which words decide what may change, and how much a pixel has to look at them, relative to the most, in [0, 1].

    Args:
        source (`torch.Tensor` of shape `(batch, tokens)`): Marks tokens of the source prompt; their pixels stay.
        target (`torch.Tensor` of the same shape): Marks tokens of the target prompt; other pixels are kept.
        source_threshold (`float`): For words of the source alone.
        target_threshold (`float`): For words of the target, and for those that both have.
    """

    source: Tensor
    target: Tensor
    source_threshold: float
    target_threshold: float


class AttentionControl:
    """What the processors of one call share: the phase it is in, the alignment, and the maps kept for the blend.

    Args:
        alignment (`torch.Tensor` of shape `(batch, tokens)`): From `align_tokens`, a row a sample.
        self_replace_steps (`float`): Progress, in [0, 1], up to which self-attention is in its layout phase.
        cross_replace_steps (`float`): Progress up to which cross-attention maps are replaced.
        latent_size (`tuple[int, int]`): Height and width of the latents, and of the masks.
        blend (`BlendWords`, *optional*): None: no maps are kept.
    """

    def __init__(
        self,
        alignment: Tensor,
        self_replace_steps: float,
        cross_replace_steps: float,
        latent_size: tuple[int, int],
        blend: BlendWords | None = None,
    ) -> None:
        self.shared = alignment >= 0  # (B, T)
        self.position = alignment.clamp(min=0)
        self.self_replace_steps, self.cross_replace_steps = self_replace_steps, cross_replace_steps
        self.latent_size = latent_size
        self.progress = 0.0
        self.blend_words = blend
        self.heat: Tensor | None = None  # (3, B, h, w): how much each pixel has looked at the words, up to a factor
        if blend is not None:
            both = blend.target & self.shared & blend.source.gather(1, self.position)
            twice = torch.zeros_like(self.position).scatter_add(1, self.position, both.long())  # in the source
            # (3, B, T): tokens of words of the source alone, of the target, of both
            self.words = torch.stack([blend.source & (twice == 0), blend.target, both])

    @property
    def batch(self) -> int:
        """Samples in a branch."""
        return len(self.position)

    @property
    def roles(self) -> tuple[tuple[int, ...], ...]:
        """Whose queries, keys and values each branch takes in self-attention, at this progress."""
        return _LAYOUT_PHASE if self.progress < self.self_replace_steps else _DETAIL_PHASE

    def wants_maps(self, queries: int) -> bool:
        """Whether the maps of a cross-attention layer have to be computed, for replacing or for keeping."""
        return self.progress <= self.cross_replace_steps or self._keeps(queries)

    def _keeps(self, queries: int) -> bool:
        return self.blend_words is not None and queries <= _LARGEST_STORED_MAP

    def aligned(self, maps: Tensor, new: Tensor) -> Tensor:
        """Maps `(B, heads, queries, T)`, tokens put where the target prompt has them; its new ones from `new`."""
        position = self.position[:, None, None].expand_as(maps)
        return torch.where(self.shared[:, None, None], maps.gather(-1, position), new)

    def replaced(self, maps: Tensor) -> Tensor:
        """Keep what the blend needs of the maps `(3, B, heads, queries, T)`, and give those to attend with."""
        source, target, mutual = maps
        if self._keeps(source.shape[-2]):
            self._keep(source, self.aligned(mutual, target))
        if self.progress > self.cross_replace_steps:
            return maps
        return torch.stack([source, self.aligned(source, target), mutual])

    def _keep(self, source: Tensor, mutual: Tensor) -> None:
        """Add a layer's maps to the heat: the source's of source words, the aligned mutual ones of the others."""
        looks = torch.stack([source.mean(1), mutual.mean(1), mutual.mean(1)]).float()  # (3, B, queries, T)
        heat = (looks * self.words[:, :, None]).sum(-1)  # (3, B, queries)
        size = _size_of(heat.shape[-1], self.latent_size)
        heat = F.interpolate(heat.unflatten(-1, size), size=self.latent_size, mode="bilinear")
        self.heat = heat if self.heat is None else self.heat + heat

    def masks(self, least: float = 0.0) -> Tensor:
        """Where pixels look at words of the source alone, of the target, of both: bool `(3, B, 1, h, w)`.

        Args:
            least: The smallest threshold for words of the target; above 1 no pixel passes.
        """
        if self.heat is None or self.blend_words is None:
            raise RuntimeError("Nothing to blend by: no words were given, or no layer has at most 32 x 32 queries.")
        source, target = self.blend_words.source_threshold, max(self.blend_words.target_threshold, least)
        relative = self.heat / self.heat.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(self.heat.dtype).tiny)
        return (relative > relative.new_tensor([source, target, target])[:, None, None, None]).unsqueeze(2)

    def blend(self, latents: Tensor, alpha: float, last: bool) -> Tensor:
        """Put source and mutual branch into the target where the words say so.

        Args:
            latents: `(3 * B, C, h, w)`, the branches one after the other.
            alpha: A at the time of the step: early, when maps tell little, the threshold 0.15 / sqrt(A) lets less
                of the target pass.
            last: Whether this is the last step, where words of both prompts get the source's look.
        """
        source, target, mutual = latents.chunk(3)
        of_source, of_target, of_both = self.masks(0.15 / max(alpha, 1e-12) ** 0.5)
        free = ~self.words[1].any(1).reshape(-1, 1, 1, 1)  # without target words all of it may change
        target = torch.where(of_target | free, target, mutual)
        target = torch.where(of_source, source, target)
        if last:
            target = torch.where(of_both, mutual, target)
        return torch.cat([source, target, mutual])


def _size_of(queries: int, latent_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a layer with so many queries: the latents' halved, as often as it takes."""
    height, width = latent_size
    while height * width > queries:
        height, width = -(-height // 2), -(-width // 2)
    return height, width


class ThreeBranchAttnProcessor:
    """Attention processor with the interface of diffusers' `AttnProcessor2_0`, for the layers of a transformer block.

    Args:
        control ([`AttentionControl`]): What this call's processors share.
    """

    def __init__(self, control: AttentionControl) -> None:
        self.control = control

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend; `hidden_states` is `(halves * 3 * B, queries, channels)`. Masks are not heeded: InfEdit has none."""
        cross = encoder_hidden_states is not None
        context = encoder_hidden_states if cross else hidden_states
        if cross and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        projected = (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)  # (halves * 3 * B, heads, tokens, channels)
        if not cross:
            query, key, value = (
                x.unflatten(0, (-1, 3, self.control.batch))[:, list(role)].flatten(0, 2)
                for x, role in zip((query, key, value), self.control.roles, strict=True)
            )
        out = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        if cross and self.control.wants_maps(query.shape[-2]):
            count = 3 * self.control.batch
            out = torch.cat([out[:-count], self._attend_by_maps(attn, *(x[-count:] for x in (query, key, value)))])
        out = out.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        return attn.to_out[1](attn.to_out[0](out))

    def _attend_by_maps(self, attn: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Cross-attention of the conditional half with maps at hand, all of it: branches that agree stay bit-equal."""
        scores = attn.get_attention_scores(query.flatten(0, 1), key.flatten(0, 1))
        maps = scores.unflatten(0, (3, self.control.batch, -1))  # (3, B, heads, queries, T)
        return self.control.replaced(maps).flatten(0, 1) @ value


@contextmanager
def controlled(unet: Any, control: AttentionControl) -> Iterator[None]:
    """Put the control into the transformer blocks of a UNet, and what was there back afterwards, whatever happens."""
    before = dict(unet.attn_processors)
    processor = ThreeBranchAttnProcessor(control)
    mine = {name: processor if _is_ours(name) else other for name, other in before.items()}
    try:
        unet.set_attn_processor(mine)
        yield
    finally:
        unet.set_attn_processor(before)


def _is_ours(name: str) -> bool:
    return name.endswith(("attn1.processor", "attn2.processor"))


def check_processors(unet: Any) -> None:
    """Raise a ValueError if a UNet attends in a way that the control would silently undo (IP adapters, say)."""
    known = {type(other).__name__ for name, other in unet.attn_processors.items() if _is_ours(name)}
    if not known or known - set(_REPLACEABLE):
        found = ", ".join(sorted(known - set(_REPLACEABLE))) or "no transformer blocks"
        raise ValueError(
            f"Attention control replaces the plain attention of a UNet, this one has {found}: unload adapters first,"
            " or pass `attention_control=False`."
        )
