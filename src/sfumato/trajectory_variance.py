r"""Which samples a model has made up: those whose predicted clean sample keeps changing late in a run.

Aithal, Maini, Lipton, Kolter, "Understanding Hallucinations in Diffusion Models through Mode Interpolation", NeurIPS
2024, arXiv 2406.09358. Samples between the modes of the data, where there are none, are drawn where the denoiser's
prediction is steep, so that it swings to and fro there. Over the times t from `t_min` to `t_max` of a run,

.. math::
    \mathrm{Hal}(x) = \frac1d \sum_i \mathrm{Var}_t\big[\hat x_0^{(t)}\big]_i ,

the variance over the steps without Bessel's correction, about the trajectory's own mean, averaged over all entries of
the sample. The released program (commit a1da899) takes the last ten steps of a thousand; here they are named by their
times, as the same times are fewer steps of a shorter run. There nothing is clipped; DDIM and DDPM with ``clip_sample``
tell the clipped prediction, whose variance is smaller. Thresholds belong to the sampler that they were found with:
ancestral steps vary far more than DDIM's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.callbacks import PipelineCallback

from sfumato.schedulers.noise_schedule import split_prediction

__all__ = ["TrajectoryVariance", "threshold_for", "trajectory_variance"]


class TrajectoryVariance(PipelineCallback):
    """Score the samples of a run by the variance of their predicted clean samples, in memory that does not grow.

        watch = TrajectoryVariance(t_max=200)
        pipe(prompts, callback_on_step_end=watch)
        watch.scores                                # (B,); the higher, the likelier the sample is made up

    It goes together with other callbacks in diffusers' ``MultiPipelineCallbacks``. What is predicted at the first step
    of a run is over before a callback is called for the first time, and so is left out; ``with watch.watching(pipe):``
    has it too, and works with pipelines that take no callbacks.

    Args:
        t_min: Least time that counts, in the scheduler's units.
        t_max: Largest time that counts.

    Attributes:
        threshold: The largest score that is kept; None until `calibrate` is called or it is set.

    A run that is broken off leaves nothing behind but its score so far: the next one ends it.

    Raises:
        ValueError: If `t_max` is below `t_min`; and from the first step that is watched, if the scheduler does not say
            what is predicted or counts times in other units (EDM).
    """

    tensor_inputs: list[str] = []  # noqa: RUF012

    def __init__(self, t_min: float = 0.0, t_max: float = 200.0) -> None:
        super().__init__()
        if not t_min <= t_max:
            raise ValueError(f"`t_max` must be at least `t_min`, got {t_max} and {t_min}.")
        self.t_min, self.t_max = t_min, t_max
        self.threshold: float | None = None
        self._watched: _Watched | None = None
        self._every_run = False
        self._begin()

    def callback_fn(
        self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Be called at the end of each step, as diffusers does it."""
        if step_index == 0:
            self._begin()
            self._attach(pipeline.scheduler)
        last = step_index >= getattr(pipeline, "num_timesteps", len(pipeline.scheduler.timesteps)) - 1
        if last or getattr(pipeline, "interrupt", False):
            self._detach()
        return callback_kwargs

    @contextmanager
    def watching(self, pipeline: Any) -> Iterator[TrajectoryVariance]:
        """Watch all steps of a pipeline's runs, for as long as the context lasts; the scores are those of the last.

        A run of `DiTPipeline` with guidance steps each sample twice: the first half of the scores is the pictures'.
        """
        self._begin()
        self._attach(pipeline.scheduler, every_run=True)
        try:
            yield self
        finally:
            self._detach()

    @property
    def scores(self) -> torch.Tensor:
        """Of the last run, ``(B,)``, float32 on the CPU.

        Raises:
            ValueError: If fewer than two steps of it lay between `t_min` and `t_max`.
        """
        if self._count < 2:
            raise ValueError(
                f"Of the last run {self._count} steps lay between the times {self.t_min:g} and {self.t_max:g}, and a"
                " variance needs two: take more steps, or a larger `t_max`."
            )
        return (self._squares / self._count).flatten(1).mean(1).float().cpu()

    @property
    def kept(self) -> torch.Tensor:
        """Which samples of the last run have a score that is kept, ``(B,)``.

        Raises:
            ValueError: If there is no threshold.
        """
        if self.threshold is None:
            raise ValueError("There is no threshold: call `calibrate` with the scores of some samples, or set it.")
        return self.scores <= self.threshold

    def calibrate(self, scores: torch.Tensor, kept: float = 0.96) -> float:
        """Set the threshold so that a share of some samples is kept; see `threshold_for`."""
        self.threshold = threshold_for(scores, kept)
        return self.threshold

    def _begin(self) -> None:
        self._count = 0
        self._mean = self._squares = torch.zeros(0)

    def _attach(self, scheduler: Any, every_run: bool = False) -> None:
        """Let every step of the scheduler be seen, of this run or of all that follow."""
        self._detach()
        _check_times(scheduler)
        self._watched, self._every_run = _Watched.of(scheduler), every_run
        self._watched.by.append(self)

    def _detach(self) -> None:
        if self._watched is not None:
            self._watched.leave(self)
            self._watched = None

    def _run_begins(self) -> None:
        """The scheduler is set up for another run."""
        if self._every_run:
            self._begin()
        else:
            self._detach()

    def _step_taken(self, timestep: Any, clean: torch.Tensor) -> None:
        if self.t_min <= float(timestep) <= self.t_max:
            self._add(clean)

    def _add(self, clean: torch.Tensor) -> None:
        """Welford's update of the mean and of the sum of squares about it."""
        clean = clean.float()
        if self._count == 0:
            self._mean, self._squares = torch.zeros_like(clean), torch.zeros_like(clean)
        self._count += 1
        apart = clean - self._mean
        self._mean = self._mean + apart / self._count
        self._squares = self._squares + apart * (clean - self._mean)


class _Watched:
    """A scheduler whose steps are seen, by one or more; its own methods are looked up again when the last one leaves.

    Args:
        scheduler: The scheduler.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.by = scheduler, list[TrajectoryVariance]()
        step, set_timesteps = scheduler.step, scheduler.set_timesteps

        @functools.wraps(step)
        def seen(
            model_output: Any, timestep: Any, sample: Any, *args: Any, return_dict: bool = True, **more: Any
        ) -> Any:
            index = getattr(scheduler, "step_index", None)
            found = step(model_output, timestep, sample, *args, return_dict=True, **more)
            clean = getattr(found, "pred_original_sample", None)
            clean = _predicted(scheduler, index, model_output, timestep, sample) if clean is None else clean
            for watch in self.by:
                watch._step_taken(timestep, clean.detach())
            return found if return_dict else found.to_tuple()

        @functools.wraps(set_timesteps)
        def begins(*args: Any, **more: Any) -> Any:
            for watch in list(self.by):
                watch._run_begins()
            return set_timesteps(*args, **more)

        scheduler.step, scheduler.set_timesteps = seen, begins
        seen.watched = self  # type: ignore[attr-defined]

    @classmethod
    def of(cls, scheduler: Any) -> _Watched:
        """The one of a scheduler."""
        return getattr(scheduler.step, "watched", None) or cls(scheduler)

    def leave(self, watch: TrajectoryVariance) -> None:
        """Be watched by one less."""
        self.by.remove(watch)
        if not self.by:
            del self.scheduler.step, self.scheduler.set_timesteps


def trajectory_variance(
    pred_original_samples: torch.Tensor, timesteps: torch.Tensor, t_min: float, t_max: float
) -> torch.Tensor:
    """Score samples whose predictions were kept.

    Args:
        pred_original_samples: ``(S, B, ...)``, the clean samples that were predicted at each step.
        timesteps: Their times, ``(S,)``.
        t_min: Least time that counts.
        t_max: Largest time that counts.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: If fewer than two steps count.
    """
    inside = (timesteps >= t_min) & (timesteps <= t_max)
    if int(inside.sum()) < 2:
        raise ValueError(f"{int(inside.sum())} steps lie between {t_min:g} and {t_max:g}: a variance needs two.")
    return pred_original_samples[inside].var(0, unbiased=False).flatten(1).mean(1)


def threshold_for(scores: torch.Tensor, kept: float = 0.96) -> float:
    """Give the threshold at which a share of some samples is kept.

    Args:
        scores: Of samples that are to be kept, ``(N,)``; or of any, of which the worst are to go.
        kept: The share, above 0 and at most 1.

    Raises:
        ValueError: If there are no scores, one is not finite, or the share is out of its range.
    """
    if scores.numel() == 0 or not bool(torch.isfinite(scores).all()):
        raise ValueError("`scores` must be at least one, and all finite.")
    if not 0 < kept <= 1:
        raise ValueError(f"`kept` must lie above 0 and be at most 1, got {kept}.")
    enough = max(1, math.ceil(kept * scores.numel() - 1e-9))
    return float(scores.flatten().double().kthvalue(enough).values)


def _check_times(scheduler: Any) -> None:
    """Raise a ValueError if a scheduler's times are not those that `t_min` and `t_max` are."""
    config: Mapping[str, Any] = scheduler.config
    edm = config["process"] == "edm" if "process" in config else "sigma_data" in config
    if edm or config.get("timestep_type") == "continuous":
        raise ValueError(
            f"{type(scheduler).__name__} counts times as logarithms of sigma, and `t_min` and `t_max` are training"
            " times: use a scheduler that counts these."
        )


def _predicted(scheduler: Any, index: int | None, output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> Any:
    """The clean sample that a model's output stands for, where the scheduler does not tell it."""
    config: Mapping[str, Any] = scheduler.config
    name = type(scheduler).__name__
    if name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction":
        sigma = scheduler.sigmas[scheduler.index_for_timestep(timestep) if index is None else index]
        return sample - sigma.to(sample) * output
    if float(getattr(scheduler, "init_noise_sigma", 1.0)) == 1.0 and hasattr(scheduler, "alphas_cumprod"):
        alpha = scheduler.alphas_cumprod[int(timestep)].to(sample)
        kind = str(config.get("prediction_type", "epsilon"))
        return split_prediction(kind, output[:, : sample.shape[1]], sample, alpha)[0]
    raise ValueError(f"{name} does not tell the clean sample that is predicted: use DDIM, DDPM, Euler or DPM-Solver.")
