"""Train the embedded models from raw Fashion-MNIST: ``accelerate launch training/train_atelier.py --output DIR``.

Five networks, in this order: an autoencoder (`AutoencoderKL`, 32x32x3 to 8x8x4), a judge (garment, style, colour), a
denoiser with its text encoder (`UNet2DConditionModel`, `CLIPTextModel`; epsilon prediction), and a class-conditional
pixel DDPM of grey 16x16 garments (`UNet2DModel`). Then the quality of each is measured, and the folders that ship in
``src/sfumato/assets`` are written with their model cards. Each stage checkpoints and resumes; a finished stage is not
run again. On two CPU cores all of it takes about two hours, on one accelerator minutes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

from sfumato import atelier, storage
from sfumato.arguments import make_parser
from sfumato.evaluation.judge import Judge
from sfumato.randomness import permuted_indices, randint_for, randn_for, rng_for
from sfumato.settings import check_seed, check_types
from sfumato.trainer import Objective, Shard, TrainingConfig, make_accelerator, train
from sfumato.training import atelier_networks as networks
from sfumato.training.atelier_release import release

LATENT_RENDERS = 3  # renders of each training garment whose latents the denoiser learns from
STAGES = ("autoencoder", "judge", "denoiser", "pixel")


@dataclass
class AtelierConfig:
    """What to train and where.

    Attributes:
        output: Folder for checkpoints and results; a finished stage in it is kept.
        data_dir: Folder with Fashion-MNIST's four ``*-ubyte.gz`` files; None looks for Debian's package, then the Hub.
        stages: Stages to run, comma-separated.
        autoencoder_steps: Steps of batch 64.
        judge_steps: Steps of batch 128.
        denoiser_steps: Steps of batch 64.
        pixel_steps: Steps of batch 64.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
        checkpoint_every: Steps between checkpoints.
        seed: Seeds everything.
        measured_repeats: Pictures generated for each combination of garment, style and colour, to measure the quality.
        measured_steps: Sampler steps of these.
    """

    output: str = "atelier"
    data_dir: str | None = None
    stages: str = ",".join(STAGES)
    autoencoder_steps: int = 4500
    judge_steps: int = 3000
    denoiser_steps: int = 7000
    pixel_steps: int = 6000
    mixed_precision: str = "no"
    checkpoint_every: int = 250
    seed: int = 0
    measured_repeats: int = 9
    measured_steps: int = 50

    def __post_init__(self) -> None:
        """Check the settings of all stages before the first."""
        check_types(self)
        check_seed(self.seed)
        unknown = set(self.stages.split(",")) - set(STAGES)
        if unknown:
            raise ValueError(f"Unknown stage {sorted(unknown)[0]!r}; choose from {', '.join(STAGES)}.")
        for name in (*(f"{stage}_steps" for stage in STAGES), "measured_repeats", "measured_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        stage_config(self, 1, 1e-3)


class Renders:
    """Training renders, drawn on demand: garment and look of a sample depend only on (seed, position)."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, seed: int) -> None:
        self.images, self.labels, self.seed = torch.from_numpy(images), torch.from_numpy(labels).long(), seed

    def draw(self, start: int, count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Give pictures ``(count, 3, 32, 32)`` in [0, 1] and their attributes, ``(count,)`` indices by domain."""
        index = torch.from_numpy(permuted_indices(self.seed, len(self.images), start, count))
        keys = [(self.seed, 1, start + k) for k in range(count)]
        look = randint_for(keys, len(atelier.STYLES) * len(atelier.COLOURS))
        styles, colours = look % len(atelier.STYLES), look // len(atelier.STYLES)
        pictures = atelier.render(self.images[index], styles, colours)
        return pictures, {"garment": self.labels[index], "style": styles, "colour": colours}


class Batch:
    """A process's share of a step's global batch: where it lies in the stream of samples, and on which device.

    Attributes:
        device: That of the model.
        start: Position of its first sample in the stream.
        count: Its number of samples.
    """

    def __init__(self, model: nn.Module, step: int, shard: Shard, size: int) -> None:
        span = shard.of(size)
        self.device, self.start, self.count = next(model.parameters()).device, step * size + span.start, len(span)

    def keys(self, *stream: int) -> list[tuple[int, ...]]:
        """Give each sample a key for `sfumato.randomness`: the stream's, then its position."""
        return [(*stream, self.start + k) for k in range(self.count)]

    def choose(self, seed: int, size: int) -> torch.Tensor:
        """Give each sample its place, ``(count,)``, in a data set of `size` that is shuffled anew each pass."""
        return torch.from_numpy(permuted_indices(seed, size, self.start, self.count))


class AutoencoderObjective:
    """L1 + L2 reconstruction and a faint KL term."""

    batch_size = 64

    def __init__(self, renders: Renders, seed: int) -> None:
        self.renders, self.seed = renders, seed

    def losses(self, model: nn.Module, step: int, shard: Shard) -> Mapping[str, torch.Tensor]:
        """See `sfumato.trainer.Objective`."""
        batch = Batch(model, step, shard, self.batch_size)
        pictures = 2 * self.renders.draw(batch.start, batch.count)[0].to(batch.device) - 1
        noise = randn_for(batch.keys(self.seed, 2), (4, 8, 8)).to(batch.device)
        return model(pictures.contiguous(memory_format=torch.channels_last), noise)


class JudgeObjective:
    """Cross-entropy of each head, on renders that are at times blurred or noisy, as decoded pictures are."""

    batch_size = 128

    def __init__(self, renders: Renders, seed: int) -> None:
        self.renders, self.seed = renders, seed

    def losses(self, model: nn.Module, step: int, shard: Shard) -> Mapping[str, torch.Tensor]:
        """See `sfumato.trainer.Objective`."""
        batch = Batch(model, step, shard, self.batch_size)
        pictures, truth = self.renders.draw(batch.start, batch.count)
        blur, noise = (randint_for(batch.keys(self.seed, 3, part), 101).view(-1, 1, 1, 1) / 100 for part in (0, 1))
        blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        pictures = torch.lerp(pictures, blurred, torch.clamp(blur - 0.5, min=0))  # half of them not at all
        pictures = pictures + 0.08 * noise * randn_for(batch.keys(self.seed, 3, 2), pictures.shape[1:])
        logits = model(pictures.to(batch.device))
        return {name: F.cross_entropy(values, truth[name].to(batch.device)) for name, values in logits.items()}


class DenoiserObjective:
    """Epsilon prediction on cached latents; captions name any subset of the attributes, none one time in ten."""

    batch_size = 64

    def __init__(
        self, latents: torch.Tensor, truth: Mapping[str, torch.Tensor], tokenizer: CLIPTokenizer,
        scheduler: DDIMScheduler, seed: int,
    ) -> None:  # fmt: skip
        self.latents, self.truth, self.tokenizer, self.scheduler, self.seed = (
            latents,
            truth,
            tokenizer,
            scheduler,
            seed,
        )

    def losses(self, model: nn.Module, step: int, shard: Shard) -> Mapping[str, torch.Tensor]:
        """See `sfumato.trainer.Objective`."""
        batch = Batch(model, step, shard, self.batch_size)
        index, keys = batch.choose(self.seed + 7, len(self.latents)), batch.keys(self.seed, 4)
        latents = self.latents[index].float().to(batch.device)
        garments, styles, colours = (self.truth[name][index].tolist() for name in ("garment", "style", "colour"))
        rows = zip(garments, styles, colours, keys, strict=True)
        captions = [atelier.random_caption(g, s, c, rng_for(*key)) for g, s, c, key in rows]
        noisy, noise, timesteps = add_noise(self.scheduler, latents, keys)
        tokens = networks.tokenize(self.tokenizer, captions).to(batch.device)
        return {"mse": F.mse_loss(model(noisy, timesteps, tokens), noise)}


class PixelObjective:
    """Epsilon prediction on grey 16x16 garments; one label in ten is replaced by the null class."""

    batch_size = 64

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, scheduler: DDPMScheduler, seed: int) -> None:
        self.images, self.labels, self.scheduler, self.seed = images, labels, scheduler, seed

    def losses(self, model: nn.Module, step: int, shard: Shard) -> Mapping[str, torch.Tensor]:
        """See `sfumato.trainer.Objective`."""
        batch = Batch(model, step, shard, self.batch_size)
        index, keys = batch.choose(self.seed + 11, len(self.images)), batch.keys(self.seed, 5)
        noisy, noise, timesteps = add_noise(self.scheduler, self.images[index].to(batch.device), keys)
        dropped = randint_for([(*key, 2) for key in keys], 10) == 0
        labels = torch.where(dropped, len(atelier.GARMENTS), self.labels[index]).to(batch.device)
        return {"mse": F.mse_loss(model(noisy, timesteps, class_labels=labels).sample, noise)}


def add_noise(
    scheduler: DDIMScheduler | DDPMScheduler, clean: torch.Tensor, keys: list[tuple[int, ...]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise samples ``(B, ...)`` to random times; returns them, the noise of the same shape, and times ``(B,)``."""
    noise = randn_for(keys, clean.shape[1:]).to(clean.device)
    high = scheduler.config.num_train_timesteps
    timesteps = randint_for([(*key, 1) for key in keys], high).to(clean.device)
    return scheduler.add_noise(clean, noise, timesteps), noise, timesteps


@torch.no_grad()
def encode_all(
    folder: Path, renders: Renders, accelerator: Accelerator
) -> tuple[torch.Tensor, dict[str, torch.Tensor], float]:
    """Cache the posterior means of `LATENT_RENDERS` renders of every garment.

    Returns:
        Latents ``(N, 4, 8, 8)``, float16, their attributes, and the factor that gives them unit variance.
    """
    cache = folder / "latents.safetensors"
    if accelerator.is_main_process and not cache.exists():
        module = networks.AutoencoderLoss(networks.make_autoencoder())
        module.load_state_dict(storage.load_tensors(folder / "autoencoder" / "finished.safetensors"))
        autoencoder = module.autoencoder.to(accelerator.device).eval()
        latents, truths, batch = [], [], 500
        for start in tqdm(range(0, LATENT_RENDERS * len(renders.images), batch), desc="encode"):
            pictures, truth = renders.draw(start, batch)
            posterior = autoencoder.encode(2 * pictures.to(accelerator.device) - 1).latent_dist
            latents.append(posterior.mean.half().cpu())
            truths.append(truth)
        columns = {name: torch.cat([truth[name] for truth in truths]) for name in truths[0]}
        encoded = torch.cat(latents)
        factor = {"scaling_factor": 1 / encoded.float().std().item()}
        storage.save_tensors(cache, {"latents": encoded, **columns}, factor)
    accelerator.wait_for_everyone()
    stored = storage.load_tensors(cache)
    return stored.pop("latents"), stored, storage.read_metadata(cache)["scaling_factor"]


def stage_config(
    config: AtelierConfig, steps: int, learning_rate: float, ema_decay: float | None = None
) -> TrainingConfig:
    """The settings that all stages share."""
    return TrainingConfig(
        steps=steps, learning_rate=learning_rate, optimizer="adamw", lr_schedule="cosine", warmup_steps=100,
        max_grad_norm=1.0, mixed_precision=config.mixed_precision, checkpoint_every=config.checkpoint_every,
        seed=config.seed, ema_decay=ema_decay,
    )  # fmt: skip


def run_stage(
    name: str, model: nn.Module, objective: Objective, settings: TrainingConfig, folder: Path, accelerator: Accelerator
) -> nn.Module:
    """Train one stage, or load it if it is finished; returns the model in evaluation mode.

    Raises:
        FileExistsError: If it was finished with other settings.
    """
    finished, identity = folder / name / "finished.safetensors", json.loads(json.dumps(asdict(settings)))
    if finished.exists():
        stored = storage.read_metadata(finished).get("settings", {})
        differing = [key for key in identity if stored.get(key) != identity[key]]
        if differing:
            key = differing[0]
            raise FileExistsError(
                f"{finished.parent} was finished with {key} {stored.get(key)}, not {identity[key]}: use the same"
                " settings, or another --output."
            )
    else:
        model.train()
        history = train(
            model, objective, settings, output_dir=folder / name, resume=True, identity={"stage": name},
            accelerator=accelerator, description=name,
        )  # fmt: skip
        if accelerator.is_main_process:
            storage.write_text(folder / name / "history.json", json.dumps(history))
            storage.save_tensors(finished, model.state_dict(), {"settings": identity})
        accelerator.wait_for_everyone()
    model.load_state_dict(storage.load_tensors(finished))
    return model.to(accelerator.device).eval()


def main(config: AtelierConfig) -> None:
    """Run the chosen stages."""
    folder, seed = Path(config.output), config.seed
    if (folder / "assets").exists():
        raise FileExistsError(f"{folder / 'assets'} exists already, and is not overwritten: choose another --output.")
    images, labels = atelier.find_fashion_mnist(config.data_dir)
    torch.manual_seed(seed)
    renders = Renders(images, labels, seed)
    accelerator = make_accelerator(TrainingConfig(mixed_precision=config.mixed_precision))
    stages = config.stages.split(",")

    autoencoder = networks.AutoencoderLoss(networks.make_autoencoder())
    autoencoder.autoencoder.to(memory_format=torch.channels_last)  # a sixth faster on a CPU
    if "autoencoder" in stages:
        settings = stage_config(config, config.autoencoder_steps, 2e-3)
        run_stage("autoencoder", autoencoder, AutoencoderObjective(renders, seed), settings, folder, accelerator)
    if "judge" in stages:
        judge = Judge({"garment": atelier.GARMENTS, "style": atelier.STYLES, "colour": tuple(atelier.COLOURS)})
        settings = stage_config(config, config.judge_steps, 2e-3)
        run_stage("judge", judge, JudgeObjective(renders, seed), settings, folder, accelerator)
    if "denoiser" in stages:
        latents, truth, scale = encode_all(folder, renders, accelerator)
        tokenizer = networks.make_tokenizer(folder / "tokenizer")
        captioned = DenoiserObjective(latents.float() * scale, truth, tokenizer, networks.latent_schedule(), seed)
        settings = stage_config(config, config.denoiser_steps, 7e-4, ema_decay=0.999)
        run_stage("denoiser", networks.make_denoiser(tokenizer), captioned, settings, folder, accelerator)
    if "pixel" in stages:
        garments, classes = atelier.small_garments(images), torch.from_numpy(labels).long()
        labelled = PixelObjective(garments, classes, networks.pixel_schedule(), seed)
        settings = stage_config(config, config.pixel_steps, 1e-3, ema_decay=0.999)
        run_stage("pixel", networks.make_pixel_denoiser(), labelled, settings, folder, accelerator)
    if accelerator.is_main_process and all((folder / stage / "finished.safetensors").exists() for stage in STAGES):
        with storage.atomic_directory(folder / "assets") as assets:
            quality = release(
                folder, assets, atelier.find_fashion_mnist(config.data_dir, "test"), repeats=config.measured_repeats,
                steps=config.measured_steps,
            )  # fmt: skip
        print(json.dumps(quality, indent=1))


if __name__ == "__main__":
    try:
        main(make_parser(AtelierConfig, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0])
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
