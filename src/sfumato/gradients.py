"""Gradients through a whole sampling run in memory that does not grow with the number of steps.

An invertible sampler can recompute its states backwards, so none of them need be kept: the backward pass walks from
the result to the noise, calls the network once a step with a graph of that step alone, and adds up. The idea is that
of DOODL: Wallace, Gokul, Ermon, Naik, "End-to-End Diffusion Latent Optimization Improves Classifier Guidance", ICCV
2023, arXiv 2303.13703 (with EDICT); here it serves BDIA, O-BELM and EDICT, for noise, flow and EDM models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from torch import Tensor

from sfumato.families import StableDiffusion, family_of
from sfumato.schedulers.noise_schedule import state_dtype

__all__ = ["guided_predictor", "sample_with_gradients"]

Predictor = Callable[..., Tensor]

logger = logging.get_logger(__name__)
_TOLERATED = 1e-4


def sample_with_gradients(
    scheduler: Any, predict: Predictor, latents: Tensor, *inputs: Tensor, parameters: Any = ()
) -> Tensor:
    """Sample like a pipeline's loop would, as one differentiable operation of constant memory.

    Args:
        scheduler: A `BDIAScheduler` (gamma > 0), `BELMScheduler` or `EDICTScheduler` whose `set_timesteps` was called;
            with ``inverse=True`` it is the inversion that is differentiated.
        predict: ``predict(x, t, *inputs)`` gives the model's output, guidance included, for ``x`` of the shape and
            dtype of `latents` and a scalar tensor ``t``. It must give the same for the same, so no dropout.
        latents: Where to start, ``(B, ...)``.
        *inputs: What else the output depends on and may need a gradient: prompt embeddings, for instance.
        parameters: Parameters of the network that are to receive a gradient too.

    Returns:
        The last latents, shape and dtype of `latents`. Gradients flow to `latents`, `inputs` and `parameters`.

    Raises:
        ValueError: If the scheduler can't be walked back, or has no times yet. Where walking back amplifies rounding
            beyond 1e-4, a warning is logged: BDIA with gamma < 1 and EDICT, in long runs.
    """
    if not hasattr(scheduler, "calls"):
        raise ValueError(f"{type(scheduler).__name__} can't be walked back; use BDIA, BELM or EDICT.")
    if scheduler.num_inference_steps is None:
        raise ValueError("Call `set_timesteps` first: the times of the run are not known yet.")
    run = scheduler.calls()
    if any(call.keep == 0 for call in run[1:]):
        raise ValueError("gamma=0 is DDIM, which can't be walked back: take gamma > 0.")
    error = scheduler.condition_number * torch.finfo(state_dtype(latents.device)).eps
    if error > _TOLERATED:
        logger.warning(
            f"Walking this run back amplifies rounding {scheduler.condition_number:.0e} times, so its gradients may be"
            f" off by {error:.0e} of their size: take fewer steps, or gamma or mixing_coeff nearer to 1."
        )
    return _Run.apply(scheduler, run, predict, len(inputs), latents, *inputs, *parameters)


def guided_predictor(pipe: DiffusionPipeline, guidance_scale: float = 1.0) -> Predictor:
    """Make ``predict(x, t, prompt_embeds, negative_prompt_embeds)`` of a pipeline, with classifier-free guidance.

    Args:
        pipe: A pipeline of a supported family.
        guidance_scale: At 1 there is no guidance and the second embedding is not needed.

    Returns:
        A predictor for `sample_with_gradients`.
    """
    family = family_of(pipe)
    if type(family) is not StableDiffusion:
        raise ValueError(
            f"`guided_predictor` is for Stable Diffusion 1 and 2; of {family.label}, write a predict(x, t, *inputs)."
        )

    def predict(x: Tensor, t: Tensor, prompt_embeds: Tensor, negative_prompt_embeds: Tensor | None = None) -> Tensor:
        times = t.expand(len(x))
        wanted = family.predict(family.denoiser, x, times, {"encoder_hidden_states": prompt_embeds})
        if guidance_scale == 1:
            return wanted
        if negative_prompt_embeds is None:
            raise ValueError("Guidance needs `negative_prompt_embeds`, the embeddings of the unconditional prompt.")
        free = family.predict(family.denoiser, x, times, {"encoder_hidden_states": negative_prompt_embeds})
        return free + guidance_scale * (wanted - free)

    return predict


class _Run(torch.autograd.Function):
    """A run of `Call`s: `s[moved] <- keep s[moved] + add s[seen] + output network(s[seen])`, then some moves."""

    @staticmethod
    def forward(
        ctx: Any, scheduler: Any, run: Any, predict: Predictor, count: int, latents: Tensor, *rest: Tensor
    ) -> Any:
        state = [latents.to(state_dtype(latents.device), copy=True) for _ in range(2)]
        for call, t in zip(run, scheduler.timesteps, strict=True):
            out = predict(scheduler.scale_model_input(state[call.seen].to(latents.dtype), t), t, *rest[:count])
            moved = 1 - call.seen
            state[moved] = call.keep * state[moved] + call.add * state[call.seen] + call.output * out.to(state[moved])
            for index, keep, add in call.then:
                state[index] = keep * state[index] + add * state[1 - index]
        ctx.scheduler, ctx.run, ctx.predict, ctx.count, ctx.dtype = scheduler, run, predict, count, latents.dtype
        ctx.result = scheduler.result_of(run)
        ctx.save_for_backward(*state, *rest)
        return state[ctx.result].to(latents.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        state, rest = [part.clone() for part in ctx.saved_tensors[:2]], ctx.saved_tensors[2:]
        flowing = [torch.zeros_like(state[0]) for _ in range(2)]  # gradients with respect to the state
        flowing[ctx.result] += gradients[0]
        wanted = [tensor for tensor, needed in zip(rest, ctx.needs_input_grad[5:], strict=True) if needed]
        sums = [torch.zeros_like(tensor) for tensor in wanted]
        for call, t in zip(reversed(ctx.run), ctx.scheduler.timesteps.flip(0), strict=True):
            for index, keep, add in reversed(call.then):
                state[index] = (state[index] - add * state[1 - index]) / keep
                flowing[1 - index] += add * flowing[index]
                flowing[index] *= keep
            seen, moved = call.seen, 1 - call.seen
            with torch.enable_grad():
                x = state[seen].to(ctx.dtype, copy=True).requires_grad_()
                out = ctx.predict(ctx.scheduler.scale_model_input(x, t), t, *rest[: ctx.count])
            into = (call.output * flowing[moved]).to(out)
            back = torch.autograd.grad(out, [x, *wanted], into, allow_unused=True)
            for total, part in zip(sums, back[1:], strict=True):
                if part is not None:
                    total += part
            if call.keep:
                made = call.add * state[seen] + call.output * out.detach().to(state[seen])
                state[moved] = (state[moved] - made) / call.keep
            flowing[seen] += call.add * flowing[moved] + back[0]
            flowing[moved] *= call.keep
        given = iter(sums)
        rest_gradients = [next(given) if needed else None for needed in ctx.needs_input_grad[5:]]
        return None, None, None, None, (flowing[0] + flowing[1]).to(ctx.dtype), *rest_gradients
