"""Pack and measure the embedded models: from the finished stages of ``train_atelier.py`` to the folders that ship.

Writes ``atelier`` (a ``StableDiffusionPipeline`` with its ``concepts.json``), ``atelier-pixel``, ``judge`` and
``renders`` (test pictures as PNG files with captions), measures them, and writes the figures and training curves into
a model card beside each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

from sfumato import atelier, storage
from sfumato.concepts import VOCABULARY_FILE, Vocabulary
from sfumato.evaluation.generation import draw
from sfumato.evaluation.judge import Judge
from sfumato.evaluation.metrics import frechet_distance, psnr, wilson
from sfumato.pipelines.pipeline_class_conditional import ClassConditionalPipeline
from sfumato.randomness import randint_for
from sfumato.training import atelier_networks as networks

MEASURED_GUIDANCE = 3.0
RENDERS_PER_COMBINATION = 2


def release(
    run: Path, assets: Path, test: tuple[np.ndarray, np.ndarray], *, repeats: int = 9, steps: int = 50
) -> dict[str, Any]:
    """Pack the finished stages of a training run and measure the result.

    Args:
        run: The output folder of ``train_atelier.py``.
        assets: Where the folders go, an empty folder.
        test: Test pictures ``(N, 28, 28)`` and labels ``(N,)``, never trained on.
        repeats: Generated pictures for each of the 240 combinations of garment, style and colour.
        steps: DDIM steps of a generated picture.

    Returns:
        The measured figures.
    """
    pipe, pixel, judge = _pack(run, assets)
    _write_renders(assets / "renders", test)
    quality = measure(pipe, pixel, judge, test, repeats, steps)
    _write_cards(run, assets, quality)
    storage.write_text(assets / "quality.json", json.dumps(quality, indent=1))
    return quality


def vocabulary() -> Vocabulary:
    """Give the words and wordings of atelier."""
    domains = {"garment": atelier.GARMENTS, "style": atelier.STYLES, "colour": tuple(atelier.COLOURS)}
    return Vocabulary("atelier", domains, atelier.SYNONYMS, atelier.TEMPLATES)


def _pack(run: Path, assets: Path) -> tuple[StableDiffusionPipeline, ClassConditionalPipeline, Judge]:
    """Assemble the pipelines from finished stages, write them in float16, and give them as they will be loaded."""

    def finished(stage: str, module: Any) -> Any:
        module.load_state_dict(storage.load_tensors(run / stage / "finished.safetensors"))
        return module.eval()

    tokenizer = networks.make_tokenizer(run / "tokenizer")
    autoencoder = finished("autoencoder", networks.AutoencoderLoss(networks.make_autoencoder())).autoencoder
    scale = storage.read_metadata(run / "latents.safetensors")["scaling_factor"]
    autoencoder.register_to_config(scaling_factor=scale)
    both = finished("denoiser", networks.make_denoiser(tokenizer))
    pipe = StableDiffusionPipeline(
        vae=autoencoder, text_encoder=both.text_encoder, tokenizer=tokenizer, unet=both.unet,
        scheduler=networks.latent_schedule(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pixel = ClassConditionalPipeline(finished("pixel", networks.make_pixel_denoiser()), networks.pixel_schedule())
    words = vocabulary()
    judge = finished("judge", Judge(words.domains))
    for name, one in (("atelier", pipe), ("atelier-pixel", pixel)):
        with storage.atomic_directory(assets / name) as partial:
            one.to(torch.float16).save_pretrained(partial)
            if one is pipe:
                storage.write_text(partial / VOCABULARY_FILE, words.as_json())
        one.to(torch.float32)  # the values that were stored, so that what is measured is what ships
    with storage.atomic_directory(assets / "judge") as partial:
        judge.save(partial)
    return pipe, pixel, Judge.load(assets / "judge")


def _write_renders(folder: Path, test: tuple[np.ndarray, np.ndarray]) -> None:
    """Write a balanced set of test renders as an image folder: PNG files and ``metadata.jsonl``."""
    images, labels = test
    words = vocabulary()
    rows = []
    with storage.atomic_directory(folder) as partial:
        for number, one in enumerate(words.combinations({}) * RENDERS_PER_COMBINATION):
            label = atelier.GARMENTS.index(one["garment"])
            candidates = np.flatnonzero(labels == label)
            index = candidates[number % len(candidates)]
            picture = atelier.render(
                torch.from_numpy(images[index : index + 1]),
                torch.tensor([atelier.STYLES.index(one["style"])]),
                torch.tensor([list(atelier.COLOURS).index(one["colour"])]),
            )[0]
            array = (picture.permute(1, 2, 0) * 255).round().byte().numpy()
            name = f"{number:03d}-{one['garment']}-{one['style']}-{one['colour']}.png"
            Image.fromarray(array).save(partial / name, optimize=True)
            rows.append({"file_name": name, "text": words.prompt(one), **one})
        storage.write_text(partial / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def measure(
    pipe: StableDiffusionPipeline, pixel: ClassConditionalPipeline, judge: Judge,
    test: tuple[np.ndarray, np.ndarray], repeats: int, steps: int,
) -> dict[str, Any]:  # fmt: skip
    """Judge real test renders, their reconstructions, and pictures generated from balanced prompts."""
    real, truth = _test_renders(test)
    with torch.no_grad():
        restored = torch.cat([_reconstruct(pipe, batch) for batch in real.split(500)])
    words = vocabulary()
    wanted = words.combinations({}) * repeats
    drawn = draw(
        pipe, [words.prompt(one) for one in wanted], seed=1, num_inference_steps=steps,
        guidance_scale=MEASURED_GUIDANCE, description="measure",
    )  # fmt: skip
    asked = {d: torch.tensor([words.domains[d].index(one[d]) for one in wanted]) for d in words.domains}
    with torch.no_grad():
        features = [judge.features(pictures) for pictures in (real[: len(drawn)], real[-len(drawn) :], drawn)]
    return {
        "real": _accuracies(judge, real, truth),
        "reconstructed": _accuracies(judge, restored, truth),
        "generated": _accuracies(judge, drawn, asked),
        "reconstruction_psnr": psnr(restored, real),
        "frechet_generated_to_real": frechet_distance(features[2], features[0]),
        "frechet_real_to_real": frechet_distance(features[1], features[0]),
        "pictures": {"real": len(real), "generated": len(drawn)},
        "generation": {"num_inference_steps": steps, "guidance_scale": MEASURED_GUIDANCE, "seed": 1},
        "pixel": _measure_pixel(pixel, judge, test, steps),
    }


def _test_renders(test: tuple[np.ndarray, np.ndarray]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Render every test garment once, with a style and colour drawn for it."""
    images, labels = test
    look = randint_for([(2, k) for k in range(len(images))], len(atelier.STYLES) * len(atelier.COLOURS))
    truth = {
        "garment": torch.from_numpy(labels).long(),
        "style": look % len(atelier.STYLES),
        "colour": look // len(atelier.STYLES),
    }
    return atelier.render(torch.from_numpy(images), truth["style"], truth["colour"]), truth


def _reconstruct(pipe: StableDiffusionPipeline, pictures: torch.Tensor) -> torch.Tensor:
    latents = pipe.vae.encode(2 * pictures - 1).latent_dist.mean
    return (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def _accuracies(
    judge: Judge, pictures: torch.Tensor, truth: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, float]]:
    seen = judge.predict(pictures)
    return {name: wilson(int((seen[name] == truth[name]).sum()), len(pictures)).as_dict() for name in judge.domains}


def _measure_pixel(
    pixel: ClassConditionalPipeline, judge: Judge, test: tuple[np.ndarray, np.ndarray], steps: int
) -> dict[str, dict[str, float]]:
    """Judge the pixel model's garments, enlarged and drawn as blue photos, beside real ones shrunk to its size."""
    images, labels = test
    asked = torch.arange(1000) % len(atelier.GARMENTS)
    scheduler = pixel.scheduler
    pixel.scheduler = DDIMScheduler.from_config(scheduler.config)
    parts = [
        pixel(
            batch, num_inference_steps=steps, output_type="pt", return_dict=False,
            generator=torch.Generator().manual_seed(number),
        )[0]
        for number, batch in enumerate(asked.split(250))
    ]  # fmt: skip
    pixel.scheduler = scheduler
    real = (atelier.small_garments(images[:1000]) + 1) / 2
    truth = {"garment": torch.from_numpy(labels[:1000]).long()}
    verdicts = {}
    for name, small, wanted in (("generated", torch.cat(parts), asked), ("real", real, truth["garment"])):
        pictures = blue_photos(small)
        correct = int((judge.predict(pictures)["garment"] == wanted).sum())
        verdicts[name] = wilson(correct, len(pictures)).as_dict()
    return verdicts


def blue_photos(small: torch.Tensor) -> torch.Tensor:
    """Enlarge grey garments ``(B, 1, 16, 16)`` in [0, 1] and render them in blue as the judge knows them."""
    large = F.interpolate(small, scale_factor=2, mode="bilinear")[:, 0, 2:-2, 2:-2].clamp(0, 1)
    blue = torch.full((len(large),), list(atelier.COLOURS).index("blue"))
    return atelier.render((255 * large).byte(), torch.zeros_like(blue), blue)


def _write_cards(run: Path, assets: Path, quality: Mapping[str, Any]) -> None:
    cards = {
        "atelier": ("atelier: text to 32x32 garments", ("autoencoder", "denoiser"), _atelier_text(quality)),
        "atelier-pixel": ("atelier-pixel: grey 16x16 garments", ("pixel",), _pixel_text(quality)),
        "judge": ("judge: garment, style and colour of a picture", ("judge",), _judge_text(quality)),
    }
    for name, (title, stages, text) in cards.items():
        _draw_curves(run, stages, assets / name / "training.png")
        data = ModelCardData(
            license="apache-2.0", library_name="diffusers", datasets=["zalando-datasets/fashion_mnist"],
            tags=["sfumato", "embedded"],
        )  # fmt: skip
        trained = f"## Training\n\n{_training_text(run, stages)}\n\n![training curves](training.png)\n"
        body = f"# {title}\n\n{text}\n\n{trained}"
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}").save(assets / name / "README.md")


def _percent(cell: Mapping[str, float]) -> str:
    return f"{cell['value']:.1%} [{cell['low']:.1%}, {cell['high']:.1%}]"


def _atelier_text(quality: Mapping[str, Any]) -> str:
    kinds = ("real", "reconstructed", "generated")
    rows = [
        f"| {domain} | " + " | ".join(_percent(quality[kind][domain]) for kind in kinds) + " |"
        for domain in quality["real"]
    ]
    settings = quality["generation"]
    return (
        "A `StableDiffusionPipeline` small enough to ship inside a Python package, for trying and testing samplers "
        "and unlearning without a download: ten Fashion-MNIST garments in four styles and six colours. Load it with "
        "`sfumato.load('atelier')`.\n\n"
        f"The judge's accuracy on {quality['pictures']['real']:,} real test renders, on their reconstructions by the "
        f"autoencoder, and on {quality['pictures']['generated']:,} pictures generated from balanced prompts "
        f"({settings['num_inference_steps']} DDIM steps, guidance {settings['guidance_scale']:g}), with 95 % Wilson "
        "intervals:\n\n| | real | reconstructed | generated |\n|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
        f"Reconstruction PSNR {quality['reconstruction_psnr']:.1f} dB. Fréchet distance in the judge's features: "
        f"generated to real {quality['frechet_generated_to_real']:.2f}, real to other real "
        f"{quality['frechet_real_to_real']:.2f}."
    )


def _pixel_text(quality: Mapping[str, Any]) -> str:
    return (
        "A class-conditional DDPM in pixel space (epsilon prediction, linear betas), for samplers that need pixel "
        "statistics. Load it with `sfumato.load('atelier-pixel')`; labels 0 to 9 are "
        f"{', '.join(atelier.GARMENTS)}.\n\nGarment accuracy of the judge on 1,000 pictures "
        f"({quality['generation']['num_inference_steps']} DDIM steps, no guidance), "
        f"enlarged and coloured: generated {_percent(quality['pixel']['generated'])}, real test pictures at the same "
        f"size {_percent(quality['pixel']['real'])}."
    )


def _judge_text(quality: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| {domain} | {_percent(cell)} |" for domain, cell in quality["real"].items())
    return (
        "A small classifier with three heads, trained on renders of Fashion-MNIST's training pictures only. Load it "
        "with `sfumato.Judge.load(folder)`.\n\nAccuracy on real test renders, with 95 % Wilson intervals; much of "
        "what is missing on garments is lost in silhouettes and mosaics:\n\n| | accuracy |\n|---|---|\n" + rows
    )


def _training_text(run: Path, stages: tuple[str, ...]) -> str:
    lines = []
    for stage in stages:
        history = json.loads((run / stage / "history.json").read_text())
        tail = [row["loss"] for row in history[-200:]]
        lines.append(f"* {stage}: {len(history):,} steps, mean loss of the last {len(tail)}: {np.mean(tail):.4f}")
    return "\n".join(lines) + "\n\nReproduce with `accelerate launch training/train_atelier.py`."


def _draw_curves(run: Path, stages: tuple[str, ...], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(stages), 2.6), dpi=90, layout="constrained")
    for axes, stage in zip(np.atleast_1d(figure.subplots(1, len(stages))), stages, strict=True):
        loss = np.array([row["loss"] for row in json.loads((run / stage / "history.json").read_text())])
        width = max(1, len(loss) // 100)
        axes.semilogy(np.arange(len(loss)), loss, alpha=0.25, linewidth=0.6)
        axes.semilogy(
            np.arange(width - 1, len(loss)), np.convolve(loss, np.ones(width) / width, "valid"), linewidth=1.2
        )
        axes.set(title=stage, xlabel="step", ylabel="loss")
    figure.savefig(path)
