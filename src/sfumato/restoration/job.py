"""Training a restoration model as one job: what ``training/resshift.py`` and ``training/rddm.py`` share.

A method brings an objective and a pipeline; the pictures, their degradation, the network, the loop, validation and the
result are the same for all. The output folder is a pipeline that ``from_pretrained`` loads, with ``manifest.json``
(settings, seed, versions, fingerprints), a card, and what validation saw on the way.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import nn

from sfumato import atelier, jobs, storage
from sfumato.memory import explained
from sfumato.restoration import validation
from sfumato.restoration.card import make_card
from sfumato.restoration.degradations import Degradation
from sfumato.restoration.examples import Examples, HeldOut, hold_out
from sfumato.restoration.networks import (
    Autoencoder,
    Grid,
    NetworkConfig,
    TwoNetworks,
    load_autoencoder,
    make_unet,
)  # fmt: skip
from sfumato.restoration.pictures import Pictures, Renders, folder_pictures, holds_rows, hub_pictures, split
from sfumato.restoration.scores import Distance, between_sets, find_distance
from sfumato.restoration.validation import Restorer, Validation
from sfumato.settings import check_ranges, check_types
from sfumato.trainer import Objective, TrainingConfig, checkpoints, make_accelerator, preflight, train

__all__ = ["JobConfig", "Method", "main", "train_restoration"]

OWN_FILES = storage.JOB_FILES | set(validation.FILES)


@dataclass
class JobConfig:
    """What to learn from, and where the result goes.

    Attributes:
        output: Folder for the result; a finished model in it is never overwritten.
        data: ``atelier`` (renders of Fashion-MNIST, 32x32), a folder of pictures, or a data set: of the Hub, or a
            folder of parquet or arrow files. (Data sets need the package datasets.)
        data_dir: Of ``atelier``: folder with Fashion-MNIST's four ``*-ubyte.gz`` files; None looks for Debian's
            package, then the Hub.
        data_split: Of a data set.
        size: Height and width that pictures are trained at, cropped from larger ones; None is 32 for ``atelier``,
            otherwise 64.
        unfit: What to do with pictures that can't be read or are smaller: ``"refuse"`` or ``"skip"``.
        held_out: A folder of pictures to validate with, which are left out of the data if they lie in its folder;
            None holds some out of the data (of ``atelier``, takes the test pictures).
        held_out_pictures: How many to validate with, at each checkpoint; held out of the data, no more than a tenth
            of it.
        batch_size: Pictures of a step, on all processes together.
        distance: Beside PSNR and SSIM: ``judge``, ``lpips:alex``, or any of `sfumato.evaluation.features`; ``none``
            measures none, None is ``judge`` for ``atelier``.
        save_dtype: Precision of the weights that are saved at the end.
        config: A YAML file of settings; those of the command line go before it.
        resume: Continue a run that was cut short.
    """

    output: str = field()
    data: str = "atelier"
    data_dir: str | None = None
    data_split: str = "train"
    size: int | None = None
    unfit: str = field(default="refuse", metadata={"choices": ["refuse", "skip"]})
    held_out: str | None = None
    held_out_pictures: int = 64
    batch_size: int = 32
    distance: str | None = None
    save_dtype: str = field(default="float32", metadata={"choices": jobs.DTYPES})
    config: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        """Check the settings, and put the data's own in the place of None."""
        check_types(self)
        renders = self.data == "atelier"
        if self.size is None:
            self.size = atelier.IMAGE_SIZE if renders else 64
        if self.distance is None:
            self.distance = "judge" if renders else "none"
        check_ranges(self, {"size": 11, "held_out_pictures": 2, "batch_size": 1})
        if renders and self.size != atelier.IMAGE_SIZE:
            raise ValueError(
                f"The pictures of atelier are {atelier.IMAGE_SIZE}x{atelier.IMAGE_SIZE}, not {self.size}."
            )

    @property
    def side(self) -> int:
        """Height and width of the clean pictures."""
        return self.size or atelier.IMAGE_SIZE


@dataclass(frozen=True)
class Method:
    """What is trained, beside all that methods share.

    Attributes:
        name: Of the method.
        title: What the card calls it.
        settings: Its config.
        objective: Makes the objective that learns from examples.
        assemble: Makes the pipeline of a network, of the autoencoder if there is one, and of the config that
            `sfumato.pipelines.restoration.RestorationPipeline` takes.
        heads: Pictures that the network puts out.
        two_networks: Whether there is one for each head.
        conditioned: Whether it is told the degraded picture.
        generation: Whether there is no degraded picture at all.
    """

    name: str
    title: str
    settings: Any
    objective: Callable[[Examples], Objective]
    assemble: Callable[[Any, Autoencoder | None, Mapping[str, Any]], Restorer]
    heads: int = 1
    two_networks: bool = False
    conditioned: bool = True
    generation: bool = False


def main(
    settings: type[Any], training: Mapping[str, Any], make: Callable[[Any, NetworkConfig], Method],
    description: str, arguments: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """Train from a command line.

    Values come from, in rising order: the configs' defaults, the YAML file, the command line.

    Args:
        settings: The method's config dataclass.
        training: The method's defaults of `TrainingConfig`.
        make: Makes the method of its config and the network's.
        description: Of the command.
        arguments: The command line; None takes the process's own.
    """

    def job(asked: JobConfig, degradation: Degradation, network: NetworkConfig, own: Any, how: TrainingConfig) -> None:
        train_restoration(make(own, network), asked, degradation, network, how)

    configs = (JobConfig, Degradation, NetworkConfig, settings, TrainingConfig)
    jobs.main(configs, training, job, description, arguments)


def train_restoration(
    method: Method, job: JobConfig, degradation: Degradation, network: NetworkConfig, training: TrainingConfig
) -> Restorer:
    """Train a restoration model.

    Args:
        method: What is trained.
        job: What to learn from, and where the result goes.
        degradation: What is to be undone.
        network: What the network looks like.
        training: How to train it.

    Returns:
        The pipeline, with the weights that were saved, on the CPU.

    Raises:
        ValueError: If settings, pictures, network and autoencoder do not fit together, pictures are broken, or the
            checkpoint to resume from is of another run.
        FileNotFoundError: If there are no pictures.
        FileExistsError: If the output folder already holds a result, or other files.
        OSError: If it can't be written or its disk is full.
        ImportError: If an optional package that a setting asks for is missing.
        NonFiniteLossError: If the loss or a weight becomes NaN or infinite.
        MemoryError: If the memory does not suffice; the last checkpoint is kept.
    """
    began = time.perf_counter()
    _check_apart(job)
    folder = storage.check_output_dir(job.output, resume=job.resume, own=OWN_FILES)
    if method.generation:
        _check_nothing_degraded(degradation)
    asked = None if method.generation else degradation
    if asked is not None:
        asked.check(job.side)
    vae = None if network.vae is None else load_autoencoder(network.vae)
    masked = asked is not None and asked.task == "inpaint"
    scale = 1 if asked is None else asked.factor
    grid = Grid.of(vae, job.side, scale, masked=masked, conditioned=method.conditioned)
    model = _network(method, network, grid, training.seed)
    config = {
        "scale": scale, "patch_size": network.patch_size, "masked": masked, "conditioned": method.conditioned,
    }  # fmt: skip
    method.assemble(model, vae, config)  # says what does not fit
    first = jobs.is_first()
    source, others = _pictures(job, training.seed, shown=first)
    with storage.claimed(folder if first else None, resume=job.resume, own=OWN_FILES):
        accelerator = make_accelerator(training, folder)
        if vae is not None:
            vae.to(accelerator.device)
        examples = Examples(source, asked, job.batch_size, training.seed, vae, method.conditioned)
        run = _Run(method, job, network, training, model, examples, config, accelerator, folder, began)
        with explained(accelerator.device, folder, {"batch_size", *asdict(training)}):
            history = run.train(hold_out(others, asked, job.held_out_pictures, training.seed))
        nn.Module.to(model, "cpu", getattr(torch, job.save_dtype))  # diffusers' own warns of every cast
        pipe = method.assemble(model, vae if vae is None else vae.cpu(), config)
        if accelerator.is_main_process:
            parts = {"job": job, "degradation": asked, "network": network, "method": method.settings}
            run.write(pipe, history, {**parts, "training": training})
        accelerator.wait_for_everyone()
    return pipe


def _check_nothing_degraded(degradation: Degradation) -> None:
    """Raise a ValueError for what is asked to be undone, where pictures are drawn from nothing."""
    plain = asdict(Degradation())
    asked = [f"{name}={value!r}" for name, value in asdict(degradation).items() if value != plain[name]]
    if asked:
        raise ValueError(f"`generation` draws pictures and undoes nothing: leave out {', '.join(asked)}.")


def _check_apart(job: JobConfig) -> None:
    """Raise a ValueError if what the run draws would lie among the pictures that it learns from."""
    for name, place in (("data", job.data), ("held_out", job.held_out)):
        named = place is not None and place != "atelier" and Path(place).is_dir()
        if named and Path(job.output).resolve().is_relative_to(Path(str(place)).resolve()):
            raise ValueError(
                f"The output folder {job.output} lies in `{name}`, {place}, and the pictures that are written there"
                " would be taken for pictures to learn from: choose one elsewhere."
            )


def _network(method: Method, config: NetworkConfig, grid: Grid, seed: int) -> Any:
    """The untrained network, or two."""

    def make() -> Any:
        if method.two_networks:
            return TwoNetworks(*(make_unet(config, grid, 1) for _ in range(method.heads)))
        return make_unet(config, grid, method.heads)

    return jobs.untrained(make, seed)


def _pictures(job: JobConfig, seed: int, shown: bool) -> tuple[Pictures, Pictures]:
    """What to train on, and what to validate with."""
    others: Pictures | None = None
    if job.held_out is not None:
        others = folder_pictures(job.held_out, job.side, unfit=job.unfit, shown=shown)
    if job.data == "atelier":
        return Renders(job.data_dir), others or Renders(job.data_dir, "test")
    how: dict[str, Any] = {"unfit": job.unfit, "shown": shown}
    if Path(job.data).is_dir() and not holds_rows(job.data):
        whole = folder_pictures(job.data, job.side, without=job.held_out, **how)
    else:
        whole = hub_pictures(job.data, job.side, split=job.data_split, **how)
    return split(whole, job.held_out_pictures, seed) if others is None else (whole, others)


class _Run:
    """A training run in its folder."""

    def __init__(
        self, method: Method, job: JobConfig, network: NetworkConfig, training: TrainingConfig, model: nn.Module,
        examples: Examples, config: Mapping[str, Any], accelerator: Accelerator, folder: Path, began: float,
    ) -> None:  # fmt: skip
        self.method, self.job, self.training, self.model, self.examples = method, job, training, model, examples
        self.config, self.accelerator, self.folder, self.began = config, accelerator, folder, began
        degradation, vae = examples.degradation, examples.vae
        self.identity = {
            "method": method.name, "settings": asdict(method.settings), "config": dict(config),
            "degradation": None if degradation is None else asdict(degradation),
            "pictures": examples.pictures.facts(), "network": storage.fingerprint(model.named_parameters()),
            "shape": {name: value for name, value in asdict(network).items() if name != "vae"},
            "vae": None if vae is None else storage.fingerprint(vae.named_parameters()),
            "scaling_factor": None if vae is None else vae.config.scaling_factor,
        }  # fmt: skip
        self.shadow = copy.deepcopy(model).eval().requires_grad_(False)  # what validation looks with
        self.validation: Validation | None = None
        self.earlier = 0.0

    def train(self, held_out: HeldOut) -> list[dict[str, float]]:
        """Train, and look at held-out pictures at each checkpoint; the model is left with its result."""
        resume, accelerator = self.job.resume, self.accelerator
        common: dict[str, Any] = {"identity": self.identity, "output_dir": self.folder, "accelerator": accelerator}
        preflight(self.model, self.examples.batch_size, self.training, resume=resume, **common)
        if resume and checkpoints.newest(self.folder) is not None:
            validation.check_same_curves(self.folder, held_out, str(self.job.distance))
        if accelerator.is_main_process:
            self._prepare_validation(held_out)
        history = train(
            self.model, self.method.objective(self.examples), self.training, resume=resume,
            on_checkpoint=self._checkpointed, description=self.method.name, **common,
        )  # fmt: skip
        self.model.eval()
        return history

    def _prepare_validation(self, held_out: HeldOut) -> None:
        """Measure where restoration starts from, and make up for a look that a kill prevented."""
        name, device = str(self.job.distance), self.accelerator.device
        distance: Distance | None = None
        sets = None
        if name != "none" and held_out.degraded is None:
            sets = between_sets(name, device)
        elif name != "none":
            distance = find_distance(name, device)
        self.validation = Validation(held_out, self.config["scale"], distance, self.folder, sets, name)
        newest = checkpoints.newest(self.folder) if self.job.resume else None
        if newest is not None:
            self.validation.go_on(checkpoints.step_of(newest))
            self.earlier = self.validation.seconds
            if not self.validation.rows or self.validation.rows[-1]["step"] != checkpoints.step_of(newest):
                self._look(self.validation)

    def _checkpointed(self) -> None:
        """Validate; the other processes go on when the first has."""
        if self.validation is not None:
            self._look(self.validation)
        self.accelerator.wait_for_everyone()

    def _look(self, looking: Validation) -> None:
        """Validate the newest checkpoint."""
        newest = checkpoints.newest(self.folder)
        assert newest is not None
        self.shadow.load_state_dict(checkpoints.best_weights(newest))
        pipe: Any = self.method.assemble(self.shadow.to(self.accelerator.device), self.examples.vae, self.config)
        pipe.set_progress_bar_config(disable=True)
        row = looking.look(pipe, checkpoints.step_of(newest), self._seconds())
        if self.accelerator.trackers:
            found = {name: score["value"] for name, score in row.items() if isinstance(score, Mapping)}
            self.accelerator.log({f"validation/{name}": value for name, value in found.items()}, row["step"])

    def _seconds(self) -> float:
        return self.earlier + time.perf_counter() - self.began

    def write(self, pipe: Restorer, history: list[dict[str, float]], configs: Mapping[str, Any]) -> None:
        """Write the result, and put it in its place whole."""
        assert self.validation is not None
        with storage.atomic_directory(self.folder / "result") as partial:
            pipe.save_pretrained(partial)
            storage.write_text(partial / "history.json", json.dumps(history))
            self.validation.draw_curves(partial / validation.CURVES_FILE)
            manifest = self._manifest(pipe, configs)
            storage.write_text(partial / "manifest.json", json.dumps(manifest, indent=1))
            storage.write_text(partial / "README.md", make_card(manifest, self.validation.content))
        last = "model_index.json" if (self.folder / "result" / "model_index.json").exists() else "manifest.json"
        storage.put_in_place(self.folder / "result", last)
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def _manifest(self, pipe: Restorer, configs: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "method": self.method.name,
            "title": self.method.title,
            "pipeline": type(pipe).__name__ if isinstance(pipe, DiffusionPipeline) else None,
            **self.config,
            "pictures": self.identity["pictures"],
            **jobs.manifest_of(self.model, configs, self.accelerator, self._seconds()),
        }
