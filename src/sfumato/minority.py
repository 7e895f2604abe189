r"""How rare a picture is, for a diffusion model of its kind: the minority score, and classes of it.

Um, Lee, Ye, "Don't Play Favorites: Minority Guidance for Diffusion Models", ICLR 2024, arXiv 2301.12334. A picture x_0
that a model has seen few of is made into another by noise and denoising in one step:

.. math::
    \mathrm{score}(x_0) = E_\epsilon\, d\big(x_0,\, \hat x_0(x_t)\big), \qquad
        x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon,

with the clean picture that the model predicts at one time t, clipped to what pictures are. d is LPIPS (by VGG) in the
paper; here the L2 norm of the difference in [-1, 1], or any distance that is named. The released program (commit
e7e69bd) counts t in a chain of 100 times: its 60 is 605 of 1,000, the default here, and five noises are drawn. Of a
model with an autoencoder what that loses of the picture is a part of the score, the same at every t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline

from sfumato.families import Conditioning, Family, family_of
from sfumato.progress import Track
from sfumato.randomness import randn_for
from sfumato.settings import check_seed

__all__ = ["TIME_SHARE", "denoised_once", "minority_labels", "minority_scores", "minority_thresholds"]

NOISE_STREAM = 801  # a key that keeps the random stream apart
TIME_SHARE = 0.605
"""t as a share of the training times."""

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@torch.no_grad()
def minority_scores(
    model: DiffusionPipeline,
    pictures: torch.Tensor,
    prompts: Sequence[str] | None = None,
    *,
    timestep: int | None = None,
    repeats: int = 5,
    distance: str | Distance | None = None,
    seed: int = 0,
    batch_size: int = 32,
    first: int = 0,
    progress: bool = True,
) -> torch.Tensor:
    """Score pictures; the higher, the fewer like them the model has seen.

    Args:
        model: A pipeline of any family that `sfumato.families` knows.
        pictures: ``(N, C, H, W)`` in [0, 1], of the model's size and channels.
        prompts: What each shows, or its class's name; None is the unconditional model.
        timestep: t; None is 605 of 1,000.
        repeats: Draws of the noise.
        distance: ``lpips:vgg``, ``judge`` or the like, see `sfumato.restoration.scores.find_distance`, or a function
            of two batches of pictures in [0, 1]; None is the L2 norm in [-1, 1].
        seed: Seeds the noise, each picture's apart, so that a score does not depend on the batch.
        batch_size: Pictures at a time.
        first: Position of the first picture, where a set is scored in parts: the noise of each is that of the whole.
        progress: Whether to show a bar.

    Returns:
        ``(N,)``, float32 on the CPU.

    Raises:
        ValueError: If the pictures are not such, or there are not as many prompts, or a number is out of its range.
        ImportError: If the distance is not installed.
        OSError: If its weights can't be had.
    """
    family = family_of(model)
    time = _checked_time(family, pictures, prompts, timestep, repeats, batch_size)
    check_seed(seed)
    apart = _distance(distance, family)
    scores = []
    for start in Track(range(0, len(pictures), batch_size), "minority scores", shown=progress):
        some = pictures[start : start + batch_size].to(family.device).float()
        told = family.encode_prompts([""] * len(some) if prompts is None else list(prompts[start : start + len(some)]))
        clean = family.encode_images(some)[0].float()
        total = torch.zeros(len(some), device=family.device)
        for repeat in range(repeats):
            keys = [(seed, NOISE_STREAM, first + start + k, repeat) for k in range(len(some))]
            noise = randn_for(keys, clean.shape[1:]).to(clean)
            total += apart(some, family.decode(denoised_once(family, clean, noise, time, told)).float()).to(total)
        scores.append((total / repeats).cpu())
    return torch.cat(scores)


def minority_labels(scores: torch.Tensor, classes: int = 100) -> torch.Tensor:
    """Divide scores into classes of as many pictures each; the last is that of the rarest.

    Args:
        scores: ``(N,)``.
        classes: L. Class j holds the scores above the quantile j / L, up to (j + 1) / L.

    Returns:
        ``(N,)``, from 0 to L - 1.

    Raises:
        ValueError: If there are fewer scores than classes, or one is not finite.
    """
    return torch.bucketize(scores.double().cpu(), minority_thresholds(scores, classes))


def minority_thresholds(scores: torch.Tensor, classes: int = 100) -> torch.Tensor:
    """Give the scores at which the classes of `minority_labels` end, but the last: ``(L - 1,)``, float64, ascending.

    Args:
        scores: ``(N,)``.
        classes: L.

    Raises:
        ValueError: As `minority_labels`.
    """
    if classes < 2 or len(scores) < classes or not bool(torch.isfinite(scores).all()):
        raise ValueError(f"{classes} classes need at least 2 and as many scores, all finite; there are {len(scores)}.")
    shares = torch.arange(1, classes, dtype=torch.float64) / classes
    return torch.quantile(scores.double().cpu(), shares)


def denoised_once(
    family: Family, clean: torch.Tensor, noise: torch.Tensor, time: int, conditioning: Conditioning
) -> torch.Tensor:
    """Give what the model sees of clean latents, noised to a time.

    Args:
        family: The model's.
        clean: x_0, ``(B, C, H, W)`` in model units.
        noise: Of the same shape.
        time: t.
        conditioning: As `Family.encode_prompts` gives it, ``B`` rows.

    Returns:
        Of the same shape.
    """
    times = torch.full((len(clean),), time, device=clean.device)
    noisy = family.add_noise(clean, noise, times)
    return family.split(family.ask(family.denoiser, noisy, times, conditioning), noisy, times)[0]


def _checked_time(
    family: Family, pictures: torch.Tensor, prompts: Sequence[str] | None, timestep: int | None, repeats: int,
    batch_size: int,
) -> int:  # fmt: skip
    """Give t, once the arguments are known to fit."""
    if pictures.ndim != 4 or len(pictures) == 0 or tuple(pictures.shape[-2:]) != tuple(family.image_size):
        size = " x ".join(map(str, family.image_size))
        raise ValueError(f"`pictures` must be (N, C, H, W), of {size} pixels, got {tuple(pictures.shape)}.")
    if not bool(((pictures >= 0) & (pictures <= 1)).all()):
        raise ValueError("`pictures` must lie in [0, 1].")
    if prompts is not None and (isinstance(prompts, str) or len(prompts) != len(pictures)):
        raise ValueError(f"`prompts` must be a list of {len(pictures)}, one for each picture.")
    for name, value in (("repeats", repeats), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    time = int(TIME_SHARE * family.num_train_timesteps) if timestep is None else timestep
    if not 0 <= time < family.num_train_timesteps:
        raise ValueError(f"`timestep` must lie in [0, {family.num_train_timesteps - 1}], got {time}.")
    return time


def _distance(named: str | Distance | None, family: Family) -> Distance:
    if named is None:
        return lambda a, b: 2 * torch.linalg.vector_norm((a - b).flatten(1), dim=1)
    if isinstance(named, str):
        from sfumato.restoration.scores import find_distance

        return find_distance(named, family.device)
    return named
