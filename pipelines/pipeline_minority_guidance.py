r"""Self-guided minority sampling: a pipeline of diffusers, steered through its own denoiser towards rare samples.

Um, Ye, "Self-Guided Generation of Minority Samples Using Diffusion Models", ECCV 2024, arXiv 2407.11555. A sample is
rare if the clean sample that the denoiser sees in it is not what it sees after that was noised again: with p(x, t) the
clean sample that is predicted at x_t, not clipped, and s a time of much noise,

.. math::
    x_s = \sqrt{\bar\alpha_s}\, p(x_t, t) + \sqrt{1 - \bar\alpha_s}\, \epsilon', \qquad
    g = \nabla_{x_t}\, d\big(p(x_t, t),\, \mathrm{sg}[p(x_s, s)]\big),

divided by the largest entry of each sample's. `MinorityGuidanceScheduler`, of which this is the guide, moves x_t'
along it. That takes two more calls of the denoiser and one backward pass at a guided step.

Differences from the released program (commit f239b66; written from the equations, not from its code): it works through
the denoiser of pipelines with at most plain classifier-free guidance, of which it takes the conditional branch, and of
InstructPix2Pix; others (PAG, several edits at once) are refused. A ControlNet's residuals are held fixed. The distance
is the L2 norm unless another is given, where theirs is LPIPS by AlexNet. The golden runs are met to 1e-9 with the
smallest `alphas_cumprod` as stored there, which differs from the exact one by 6e-10.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

__all__ = ["MinorityGuidancePipeline", "self_guidance"]

SAMPLES = ("sample", "hidden_states")
"""What denoisers call their samples."""
Distance = Callable[[Tensor, Tensor], Tensor]


class MinorityGuidancePipeline(DiffusionPipeline):
    """Draw rare samples with a pipeline of diffusers, guided through its denoiser.

        scheduler = MinorityGuidanceScheduler.from_config(pipe.scheduler.config, guidance_scale=0.4)
        rare = MinorityGuidancePipeline(base=pipe, scheduler=scheduler)
        rare("a photo of a bag", num_inference_steps=250).images

    Args:
        base: A pipeline with a denoiser (``unet`` or ``transformer``) of noise, clean samples or v.
        scheduler: A `MinorityGuidanceScheduler` for it; its `guidance_scale` is how far each guided step is moved.

    Raises:
        ValueError: If the pipeline has no denoiser or perturbs its attention (PAG), or the scheduler takes no guide.
    """

    def __init__(self, base: DiffusionPipeline, scheduler: Any) -> None:
        super().__init__()
        if not isinstance(_denoiser(base), torch.nn.Module):
            raise ValueError(f"{type(base).__name__} has neither a `unet` nor a `transformer` to be guided through.")
        if "PAG" in type(base).__name__:
            raise ValueError(
                f"{type(base).__name__} perturbs the attention of a part of its batch, and its denoiser takes no other"
                " batch: use the pipeline without PAG."
            )
        if not hasattr(scheduler, "set_guide"):
            raise ValueError(
                f"{type(scheduler).__name__} takes no guide: make one by"
                " MinorityGuidanceScheduler.from_config(pipe.scheduler.config)."
            )
        self.register_modules(base=base, scheduler=scheduler)

    def to(self, *args: Any, **kwargs: Any) -> MinorityGuidancePipeline:
        """Move the pipeline that draws, or change its dtype; see `DiffusionPipeline.to`."""
        self.base.to(*args, **kwargs)
        return self

    def __call__(
        self,
        *args: Any,
        perturb_ratio: float = 0.8,
        stop_ratio: float | None = None,
        guide_every: int = 5,
        noise_samples: int = 1,
        normalize: bool = True,
        distance: Distance | None = None,
        gradient_checkpointing: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Draw.

        Args:
            *args: Of the pipeline that draws.
            perturb_ratio: Where s lies: the share of the run's steps below it.
            stop_ratio: Guide only while more than this share of the steps is left; None guides to the end.
            guide_every: Guide at every so many steps, counted back from the last, which always is one of them.
            noise_samples: Draws of the noise eps' that a gradient is the mean of.
            normalize: Divide each sample's gradient by its largest entry.
            distance: Takes two batches of predicted clean samples ``(B, C, H, W)``, gives ``(B,)``; None is the L2
                norm of the difference. In pixel space for instance LPIPS.
            gradient_checkpointing: Recompute activations in the backward pass, which then takes less memory.
            generator: Seeds initial noise, the sampler's and eps'; a list of ``B`` seeds each sample alone.
            **kwargs: Of the pipeline that draws.

        Returns:
            What the pipeline that draws returns.

        Raises:
            ValueError: If a setting is out of its range; and from the first step, if the pipeline asks its denoiser
                for more than a sample with and without its prompt.
        """
        for name, value, fits in (
            ("perturb_ratio", perturb_ratio, 0 <= perturb_ratio <= 1),
            ("stop_ratio", stop_ratio, stop_ratio is None or 0 <= stop_ratio <= 1),
            ("guide_every", guide_every, guide_every >= 1),
            ("noise_samples", noise_samples, noise_samples >= 1),
        ):
            if not fits:
                raise ValueError(
                    f"`{name}` must lie {'in [0, 1]' if 'ratio' in name else 'at 1 or above'}, got {value}."
                )
        own, network = self.base.scheduler, _denoiser(self.base)
        guided_before = self.scheduler.guide
        with _recorded(network) as call, checkpointed(network, gradient_checkpointing):

            def guide(sample: Tensor, time: int) -> Tensor | None:
                first = _conditional(self.base, call, len(sample))
                left = len(self.scheduler.timesteps) - self.scheduler.step_index
                if left % guide_every or (
                    stop_ratio is not None and left <= stop_ratio * len(self.scheduler.timesteps)
                ):
                    return None
                predict = _prediction(self.scheduler, network, call, sample, first)
                noises = [
                    randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
                    for _ in range(noise_samples)
                ]
                return self_guidance(
                    predict, self.scheduler, sample, time, self.scheduler.earlier_time(perturb_ratio), noises,
                    distance=distance, normalize=normalize,
                )  # fmt: skip

            self.scheduler.set_guide(guide)
            self.base.scheduler = self.scheduler
            try:
                return self.base(*args, generator=generator, **kwargs)
            finally:
                self.base.scheduler = own
                self.scheduler.set_guide(guided_before)


def self_guidance(
    predict: Callable[[Tensor, int], Tensor], scheduler: Any, sample: Tensor, time: int, perturbed: int,
    noises: list[Tensor], *, distance: Distance | None = None, normalize: bool = True,
) -> Tensor:  # fmt: skip
    """Give the gradient g of the equation above.

    Args:
        predict: Takes samples and their time, gives the denoiser's output there.
        scheduler: A `MinorityGuidanceScheduler`, which knows what that stands for.
        sample: x_t, ``(B, C, H, W)``.
        time: t.
        perturbed: s.
        noises: Draws of eps', each of the sample's shape.
        distance: See `MinorityGuidancePipeline`.
        normalize: Divide each sample's gradient by its largest entry.

    Returns:
        Of the sample's shape.
    """
    apart = distance or _euclidean
    with torch.inference_mode(False), torch.enable_grad():
        x = sample.detach().clone().requires_grad_()
        clean = scheduler.predict_original(predict(x, time), time, x)
        total = torch.zeros((), device=x.device, dtype=x.dtype)
        for noise in noises:
            with torch.no_grad():
                noisy = scheduler.add_noise(clean.detach(), noise, torch.tensor([perturbed]))
                again = scheduler.predict_original(predict(noisy, perturbed), perturbed, noisy)
            total = total + apart(clean, again).sum() / len(noises)
        gradient = torch.autograd.grad(total, x)[0]
    if normalize:
        largest = gradient.abs().flatten(1).amax(1).reshape(-1, *[1] * (gradient.ndim - 1))
        gradient = gradient / largest.clamp(min=torch.finfo(gradient.dtype).tiny)
    return gradient


def _euclidean(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vector_norm((a - b).flatten(1), dim=1)


def _denoiser(pipe: Any) -> Any:
    """What predicts in a pipeline."""
    return getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)


@contextmanager
def _recorded(network: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """Keep what the network was last called with, for as long as the context lasts."""
    call: dict[str, Any] = {"muted": False}

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not call["muted"]:
            call.update(args=args, kwargs=kwargs)

    handle = network.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield call
    finally:
        handle.remove()


@contextmanager
def checkpointed(network: Any, wanted: bool) -> Iterator[None]:
    """Recompute activations in the backward pass if that is wanted, for as long as the context lasts."""
    had = not wanted or network.is_gradient_checkpointing
    if not had:
        network.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if not had:
            network.disable_gradient_checkpointing()


def _conditional(pipe: Any, call: dict[str, Any], batch: int) -> int:
    """Where in the denoiser's last batch the samples stand that are told the prompt."""
    whole, network = len(_given(call)), type(_denoiser(pipe)).__name__
    if whole == batch:
        return 0
    if "InstructPix2Pix" in type(pipe).__name__:  # prompt and picture, picture alone, neither
        return 0
    if whole == 2 * batch:
        return 0 if network.startswith("DiT") else batch
    raise ValueError(
        f"{type(pipe).__name__} asks its denoiser for {whole} predictions of {batch} samples, and which of them to"
        " guide by is known only where there is one with the prompt and at most one without."
    )


def _given(call: dict[str, Any]) -> Tensor:
    """What the denoiser was last given."""
    args, kwargs = call["args"], call["kwargs"]
    found: Tensor = args[0] if args else next(kwargs[name] for name in SAMPLES if name in kwargs)
    return found


def _prediction(
    scheduler: Any, network: Any, call: dict[str, Any], sample: Tensor, first: int
) -> Callable[[Tensor, int], Tensor]:
    """Call the network on other samples, as the pipeline called it last for those that begin at a place."""
    args, kwargs, given = call["args"], call["kwargs"], _given(call)
    batch, whole = len(sample), len(given)

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            some = value[first : first + batch] if value.ndim > 0 and len(value) == whole else value
            return some.clone() if some.is_inference() else some  # made where autograd can't keep it
        if isinstance(value, Mapping):
            return {name: part(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(part(one) for one in value)
        return value

    with torch.inference_mode(False):
        more, told = [part(one) for one in args[1:]], {name: part(one) for name, one in kwargs.items()}
        beside = part(given)[:, sample.shape[1] :]  # a mask and the masked picture, of networks that fill holes

    def predict(x: Tensor, t: int) -> Tensor:
        seen = torch.cat([x.to(given.dtype), beside], dim=1)
        moved = {name: seen if value is not None and name in SAMPLES else value for name, value in told.items()}
        rest = list(more)
        if "timestep" in moved:
            moved["timestep"] = _at(moved["timestep"], t)
        else:
            rest[0] = _at(rest[0], t)
        call["muted"] = True
        try:
            found = network(*([seen] if args else []), *rest, **moved)
        finally:
            call["muted"] = False
        output = found[0] if isinstance(found, tuple) else found.sample
        return output if scheduler.config.variance_type == "learned_range" else output[:, : sample.shape[1]]

    return predict


def _at(like: Any, time: int) -> Any:
    """A time, in the form that the network was given one."""
    return torch.full_like(like, time) if isinstance(like, Tensor) else time
