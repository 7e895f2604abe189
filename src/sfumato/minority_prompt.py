r"""MinorityPrompt: a word that is learnt while a picture is drawn, so that it comes out rare but fits its prompt.

Um, Ye, "Minority-Focused Text-to-Image Generation via Prompt Optimization", CVPR 2025, arXiv 2410.07838. Behind the
prompt stands one more token, of which only the embedding v is known; before some steps of the run it ascends

.. math::
    J(v) = \|\mathrm{sg}[z_0] - \hat z_0\| + \lambda\, \|z_0 - \mathrm{sg}[\hat z_0]\|, \qquad
    z_0 = p(z_t, t, C(v)), \quad
    \hat z_0 = p\big(\sqrt{\bar\alpha_s} z_0 + \sqrt{1 - \bar\alpha_s}\,\epsilon, s, C\big)

by Adam, with fresh noise each time: p is the clean latent that is predicted, C(v) the prompt with the token and C
without it, s a time of much noise. v goes on from step to step, Adam's moments do not. All other weights stay.

Differences from the released program (commit e6df875; written from the equations, not from its code): the levels of
noise are those that diffusers samples with, where theirs are one time off (its table has a 1 in front); any scheduler
samples, where theirs is DDIM; the token is never in the tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from sfumato.families import Conditioning, StableDiffusion, family_of
from sfumato.pipelines.pipeline_minority_guidance import checkpointed
from sfumato.settings import check_ranges, check_types
from sfumato.unlearning.embedding_attack import frozen, insert_embeddings, insert_words, room_for

__all__ = ["MinorityPromptConfig", "draw_minority", "learn_token"]

Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class MinorityPromptConfig:
    """How the token is learnt.

    Attributes:
        perturb_ratio: s as a share of the training times.
        iterations: Steps of Adam before each guided step of the run.
        learning_rate: Adam's.
        learning_rate_decay: Share of it that each step of the run takes off.
        stop_ratio: The token is learnt while the time is above this share of the training times.
        every: At every so many steps of the run.
        weight: lambda.
        dynamic: Take s as far from the noisiest time as the run's next time is from the clean end, in the place of
            `perturb_ratio`; for models of few steps.
        start: ``"gaussian"``, as the vocabulary is spread, or a word.
    """

    perturb_ratio: float = 0.75
    iterations: int = 10
    learning_rate: float = 0.01
    learning_rate_decay: float = 0.0
    stop_ratio: float = 0.9
    every: int = 1
    weight: float = 1.0
    dynamic: bool = False
    start: str = field(default="gaussian")

    def __post_init__(self) -> None:
        """Check the types and ranges."""
        check_types(self)
        check_ranges(self, {"iterations": 1, "every": 1, "weight": 0}, positive=("learning_rate",))
        for name in ("perturb_ratio", "stop_ratio", "learning_rate_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {getattr(self, name)}.")


def draw_minority(
    pipe: DiffusionPipeline,
    prompt: str | Sequence[str],
    config: MinorityPromptConfig | None = None,
    *,
    negative_prompt: str | Sequence[str] | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    generator: Generators = None,
    gradient_checkpointing: bool = False,
    **kwargs: Any,
) -> Any:
    """Draw rare pictures of prompts with Stable Diffusion 1, 2 or XL, at its native size.

    Args:
        pipe: The pipeline; its weights are not changed.
        prompt: One, or ``B`` of them; one picture each.
        config: How the token is learnt.
        negative_prompt: One for all, or one for each prompt.
        num_inference_steps: As the pipeline takes it.
        guidance_scale: Likewise.
        generator: Seeds the initial noise, that of the learning and the sampler's; a list of ``B`` seeds each alone.
        gradient_checkpointing: Recompute the denoiser's activations in the backward pass, to take less memory.
        **kwargs: What else the pipeline takes, but for `TAKEN`.

    Returns:
        What the pipeline returns.

    Raises:
        ValueError: If the model is of another family, there is no prompt, no room behind one, the start is no word, or
            an argument is given that this makes itself.
    """
    config, family = config or MinorityPromptConfig(), family_of(pipe)
    if not isinstance(family, StableDiffusion):
        raise ValueError(f"A token is learnt for Stable Diffusion 1, 2 and XL, not for {family.label}.")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("`prompt` is empty: name at least one.")
    said = negative_prompt or ""
    negatives = [said] if isinstance(said, str) else list(said)
    if len(negatives) not in (1, len(prompts)):
        raise ValueError(f"`negative_prompt` must be one, or one for each of {len(prompts)}, got {len(negatives)}.")
    _refuse_taken(family, kwargs)
    with frozen(*family.parts.values()), checkpointed(family.denoiser, gradient_checkpointing):
        run = _Run(family, pipe.scheduler, prompts, config, generator)
        latents = randn_tensor(
            (len(prompts), *family.latent_shape), generator=generator, device=family.device, dtype=family.dtype
        )
        pipe.scheduler.set_timesteps(num_inference_steps, device=family.device)
        told = run.before(0, latents * pipe.scheduler.init_noise_sigma)
        without = family.encode_prompts(negatives * (len(prompts) if len(negatives) == 1 else 1))
        named = {name: argument for name, argument in ARGUMENTS.items() if name in told}
        embedded = {argument: told[name].to(family.dtype) for name, argument in named.items()}
        embedded |= {f"negative_{argument}": without[name].to(family.dtype) for name, argument in named.items()}
        return pipe(
            **embedded, latents=latents, generator=generator, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, callback_on_step_end=run.callback,
            callback_on_step_end_tensor_inputs=["latents", *(LOOPED[name] for name in named)], **kwargs,
        )  # fmt: skip


TAKEN = (
    "timesteps", "sigmas", "latents", "prompt_2", "negative_prompt_2",
    "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds",
    "callback_on_step_end", "callback_on_step_end_tensor_inputs", "callback", "callback_steps",
)  # fmt: skip
"""Arguments of pipelines that `draw_minority` does not take; nor other sizes, and more than one picture a prompt."""
ARGUMENTS = {"encoder_hidden_states": "prompt_embeds", "text_embeds": "pooled_prompt_embeds"}
LOOPED = {"encoder_hidden_states": "prompt_embeds", "text_embeds": "add_text_embeds"}
"""What the pipelines call a family's conditioning, as arguments and within their loop."""


def _refuse_taken(family: StableDiffusion, given: Mapping[str, Any]) -> None:
    height, width = family.image_size
    usual = {"num_images_per_prompt": 1, "height": height, "width": width}
    taken = [name for name in TAKEN if given.get(name) is not None]
    taken += [name for name, value in usual.items() if given.get(name) not in (None, value)]
    if taken:
        raise ValueError(
            f"`{taken[0]}` is no argument here: one picture of each prompt is drawn, of the native size, at the"
            " scheduler's own times, from latents and embeddings that are made here."
        )


class _Run:
    """A token for each prompt, which goes on through the steps of a run."""

    def __init__(
        self,
        family: StableDiffusion,
        scheduler: SchedulerMixin,
        prompts: list[str],
        config: MinorityPromptConfig,
        generator: Generators,
    ) -> None:
        self.family, self.scheduler, self.config, self.generator = family, scheduler, config, generator
        tokens, counts = family.tokenize(prompts)
        if not room_for(tokens.shape[1], int(counts.max()), 1, "suffix"):
            longest = prompts[int(counts.argmax())]
            raise ValueError(f"There is no room for one more token behind {longest!r}: shorten the prompt.")
        self.numbers = insert_words(tokens, 1, family.plain_token, counts, "suffix")
        self.plain, self.counts, self.encoder = family.embed_tokens(tokens), counts, family.parts["text_encoder"]
        self.base = family.encode_prompts(prompts)
        self.token = _start(family, config.start, len(prompts), generator)

    def encode(self, token: torch.Tensor) -> Conditioning:
        """C(v)."""
        embeddings = insert_embeddings(self.plain, token, self.counts, "suffix")
        return self.family.encode_embeddings(self.encoder, self.numbers, embeddings)

    def before(self, index: int, latents: torch.Tensor) -> Conditioning:
        """Learn before a step of the run, if it is one of those; gives what that step is told."""
        config, family, times = self.config, self.family, self.scheduler.timesteps
        time, last = int(times[index]), family.num_train_timesteps
        if time > config.stop_ratio * last and index % config.every == 0:
            following = int(times[index + 1]) if index + 1 < len(times) else 0
            perturbed = last - 1 - following if config.dynamic else int(config.perturb_ratio * last)
            state = self.scheduler.scale_model_input(latents.detach(), times[index]).float()
            noises = (
                randn_tensor(state.shape, generator=self.generator, device=state.device, dtype=state.dtype)
                for _ in range(config.iterations)
            )
            self.token = learn_token(
                self.token, self.encode, lambda told: self._clean(state, time, told),
                lambda clean, noise: self._again(clean, noise, perturbed), noises,
                learning_rate=config.learning_rate * (1 - index * config.learning_rate_decay), weight=config.weight,
            )  # fmt: skip
        with torch.no_grad():
            return self.encode(self.token)

    def _clean(self, state: torch.Tensor, time: int, told: Conditioning) -> torch.Tensor:
        times = torch.full((len(state),), time, device=state.device)
        said = self.family.ask(self.family.denoiser, state, times, told)
        return self.family.split(said, state, times)[0]

    def _again(self, clean: torch.Tensor, noise: torch.Tensor, time: int) -> torch.Tensor:
        times = torch.full((len(clean),), time, device=clean.device)
        return self._clean(self.family.add_noise(clean, noise, times), time, self.base)

    def callback(self, pipe: Any, index: int, timestep: Any, told: dict[str, Any]) -> dict[str, Any]:
        """Be called by the pipeline at the end of each step."""
        if index + 1 < len(pipe.scheduler.timesteps):
            for name, values in self.before(index + 1, told["latents"]).items():
                if name in LOOPED:
                    held = told[LOOPED[name]]
                    held = torch.cat([held[: len(held) - len(values)], values.to(held)])
                    told[LOOPED[name]] = held
        return told


def learn_token(
    token: torch.Tensor,
    encode: Callable[[torch.Tensor], Any],
    clean: Callable[[Any], torch.Tensor],
    again: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noises: Any,
    *,
    learning_rate: float,
    weight: float = 1.0,
) -> torch.Tensor:
    """Let tokens ascend J, as above.

    Args:
        token: v, ``(B, 1, width)``.
        encode: Gives C(v).
        clean: Gives z_0 of what `encode` gave, ``(B, ...)``.
        again: Gives what is predicted of z_0 that is noised with given noise.
        noises: The noise of each iteration, of the shape of z_0.
        learning_rate: Adam's.
        weight: lambda.

    Returns:
        v afterwards.
    """
    with torch.inference_mode(False), torch.enable_grad():
        learnt = token.detach().clone().requires_grad_()
        adam = torch.optim.Adam([learnt], lr=learning_rate)
        for noise in noises:
            first = clean(encode(learnt))
            second = again(first, noise)
            gain = _norms(first.detach() - second) + weight * _norms(first - second.detach())
            adam.zero_grad()
            (-gain.sum()).backward()
            adam.step()
    return learnt.detach()


def _norms(values: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(values.flatten(1), dim=1)


def _start(family: StableDiffusion, start: str, count: int, generator: Generators) -> torch.Tensor:
    """The tokens that learning begins with, ``(B, 1, width)``."""
    table = family.token_table
    if start == "gaussian":
        drawn = randn_tensor((count, 1, table.shape[1]), generator=generator, device=table.device, dtype=table.dtype)
        return table.mean(0) + table.std(0) * drawn
    numbers, counts = family.tokenize([start])
    if int(counts[0]) != 1:
        raise ValueError(f"`start` must be 'gaussian' or a word that is one token, got {start!r} ({int(counts[0])}).")
    return family.embed_tokens(numbers)[:, 1:2].expand(count, -1, -1).clone()
