"""What a family answers about a pipeline, and what all families share.

A family says which module is the denoiser, how prompts become its conditioning, how pictures become latents and back,
where the noise schedule lives, what the network predicts, and how a picture is drawn. Everything else in the library
asks a family and never looks into a pipeline.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import DiffusionPipeline

from sfumato.families.latent_space import LatentSpace
from sfumato.families.process import process_of

__all__ = ["Conditioning", "Family", "Segment", "Subsets", "TextFamily"]

Conditioning = dict[str, torch.Tensor]
"""What a denoiser is told besides latents and times, each tensor with the batch first."""

Subsets = Mapping[str, Callable[[str], bool]]
"""Name of a subset of parameters to what tells a parameter's name belongs to it."""


class Segment(NamedTuple):
    """A stretch of the text encoder's output in which prompts stand as one tokenizer cuts them.

    Attributes:
        begin: Where the stretch begins.
        end: The position behind it.
        marks: Tokens before a prompt's own: 1 with a start token, else 0.
        tokens: Each prompt's own tokens, without the marks at its ends and padding.
    """

    begin: int
    end: int
    marks: int
    tokens: list[list[int]]

    def last(self, k: int, alike: int = 0) -> int:
        """Find prompt k's last own token but `alike`: where there is none, the mark before it, or the end's."""
        return max(self.begin + self.marks - 1 + len(self.tokens[k]) - alike, self.begin)


class Family(ABC):
    """An adapter of a kind of pipelines.

    Args:
        pipe: The pipeline; it is read, never changed.

    Attributes:
        label: What the family is called.
        denoiser_name: The denoiser's name among the pipeline's components.
        flow: Whether its models are flows.
        subsets: Part to the subsets of its parameters that may be trained; see `trainable_parameters`.
    """

    label: ClassVar[str]
    denoiser_name: ClassVar[str]
    flow: ClassVar[bool] = False
    subsets: ClassVar[Mapping[str, Subsets]]

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe
        self.process = process_of(pipe.scheduler, self.tokens, flow=self.flow, label=self.label)

    @property
    def denoiser(self) -> torch.nn.Module:
        """The network that methods train."""
        network: torch.nn.Module = getattr(self.pipe, self.denoiser_name)
        return network

    @property
    def origin(self) -> str | None:
        """The Hub id that the model was loaded from, or its folder's name; None if it was made otherwise."""
        origin = self.pipe.config.get("_name_or_path")
        if not origin:
            return None
        return Path(origin).name if Path(origin).is_dir() else str(origin)

    @property
    def config(self) -> Any:
        """The denoiser's config."""
        return self.denoiser.config

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's dtype."""
        return next(self.denoiser.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    @property
    def prediction_type(self) -> str:
        """What the denoiser predicts; see `sfumato.families.process`."""
        return self.process.prediction_type

    @property
    def num_train_timesteps(self) -> int:
        """The length of the noise schedule."""
        return self.process.levels

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent at the model's native size."""
        size = self.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.config.in_channels, height, width

    @property
    def tokens(self) -> int:
        """How many tokens a transformer makes of one latent; what flows shift their levels by."""
        return 0

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Height and width, in pixels, of one picture at the model's native size."""

    @property
    def image_channels(self) -> int:
        """Channels of a picture: 1 if it is grey."""
        return 3

    def is_cut(self, prompt: str) -> bool:
        """Whether the model sees only the beginning of a prompt, as it is longer than its text encoder's limit."""
        return False

    def check_dtypes(self) -> None:
        """Refuse, with a ValueError, parts whose dtypes do not fit together; the autoencoder's is free."""
        return

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts.

        Args:
            prompts: ``B`` prompts, or names of classes; ``""`` is the unconditional one.

        Returns:
            Tensors with ``B`` rows, on the pipeline's device.
        """

    @abstractmethod
    def predict(
        self, denoiser: torch.nn.Module, latents: torch.Tensor, model_times: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """Run a denoiser of this family on what it takes.

        Args:
            denoiser: `self.denoiser`, a copy of it, or one wrapped by accelerate.
            latents: Noisy latents ``(B, C, H, W)`` in model units, in the denoiser's dtype.
            model_times: What it is told of the times, ``(B,)``; see `sfumato.families.process.Process.model_times`.
            conditioning: What `encode_prompts` gave, in the denoiser's dtype.

        Returns:
            Its prediction ``(B, C, H, W)``; `target` says of what.
        """

    def ask(
        self, denoiser: torch.nn.Module, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """Run a denoiser as `predict` does, whatever dtype it is in.

        Args:
            denoiser: As in `predict`.
            latents: Noisy latents ``(B, C, H, W)``, of any dtype.
            timesteps: ``(B,)``, integers of the noise schedule.
            conditioning: What `encode_prompts` gave, of any dtype.

        Returns:
            Its prediction ``(B, C, H, W)``, float32.
        """
        dtype: Any = getattr(denoiser, "dtype", None) or next(denoiser.parameters()).dtype
        told = {n: values.to(dtype) if values.is_floating_point() else values for n, values in conditioning.items()}
        times = self.process.model_times(timesteps)
        return self.predict(denoiser, latents.to(dtype), times, told).float()

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Give noisy latents for latents and noise ``(B, C, H, W)``, timesteps ``(B,)``."""
        signal, sigma = (scale.view(-1, 1, 1, 1).to(latents) for scale in self.process.scales(timesteps))
        return signal * latents + sigma * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Give what the network should predict: the noise, a velocity, or x_0; shapes as in `add_noise`."""
        return self.process.target(latents, noise, timesteps)

    def split(
        self, prediction: torch.Tensor, latents: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take noisy latents apart into what a prediction says they are made of.

        Args:
            prediction: What `ask` gave, ``(B, C, H, W)``.
            latents: The noisy latents it was given, ``(B, C, H, W)``.
            timesteps: Their times ``(B,)``.

        Returns:
            The clean latents x_0 and the noise, ``(B, C, H, W)`` each; `add_noise` puts them together again.
        """
        return self.process.split(prediction, latents, timesteps)

    def inference_timesteps(self, num_inference_steps: int) -> torch.Tensor:
        """Give the descending times ``(N,)`` that a sampler of the pipeline's config visits, on the CPU.

        A diffusion's are DDIM's. A flow's are those of `FluxPipeline`: evenly spaced from 1 to 1/N, then shifted.
        `StableDiffusion3Pipeline` spaces its own down to the last level of the table, which is shifted already, and
        shifts them again: its last step begins at a much lower level (0.009 instead of 0.5 with 4 steps and shift 3).
        """
        return self.process.inference_timesteps(num_inference_steps)

    @abstractmethod
    def encode_images(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode pictures ``(B, 3, H, W)`` in [0, 1]; gives the posterior's mean and std in model units."""

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents ``(B, C, H, W)`` in model units; gives pictures ``(B, 3, H, W)`` in [0, 1], float32."""

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        num_inference_steps: int,
        guidance_scale: float,
        latents_only: bool = False,
        conditioning: Conditioning | None = None,
    ) -> torch.Tensor:
        """Draw one picture a prompt with the pipeline's own loop and scheduler.

        Args:
            prompts: ``B`` prompts.
            generators: ``B`` generators, one a picture, so that a picture does not depend on its batch.
            num_inference_steps: Sampler steps.
            guidance_scale: Classifier-free guidance; 1 is none.
            latents_only: Give latents ``(B, C, H, W)`` in model units instead of pictures.
            conditioning: What to show in place of the prompts, as `encode_prompts` gives it, ``B`` rows.

        Returns:
            Pictures ``(B, 3, H, W)`` in [0, 1], float32, or latents, on the pipeline's device.
        """

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        """Every network of the pipeline, by its component's name."""
        return {name: part for name, part in self.pipe.components.items() if isinstance(part, torch.nn.Module)}

    @property
    def class_names(self) -> list[str] | None:
        """One name of each class, in the order of their numbers; None if the model is told no class."""
        return None

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        """What a method may change, for instance ``"denoiser"``."""
        return {"denoiser": self.denoiser}

    def trainable_parameters(self, subset: str, part: str = "denoiser") -> list[str]:
        """Name the parameters of a part that belong to a subset.

        Args:
            subset: ``"full"``: all (of a text encoder: all but its embeddings). For the denoiser, as far as it has
                them, also ``"xattn"`` (cross-attention), ``"xattn-kv"`` (its key and value projections),
                ``"selfattn"``, ``"noxattn"`` (all but cross-attention, the time embedding and the last layers: ESD-u),
                ``"notime"`` (all but the last two), and ``"text"`` (the linear layers that read the text encoder's
                output as it is, which closed-form methods edit).
            part: Whose.

        Returns:
            Parameter names, in the module's order.

        Raises:
            ValueError: If the subset is unknown or empty.
        """
        if part not in self.subsets:
            raise ValueError(f"{self.label} has no {part} to train; its parts: {', '.join(self.subsets)}.")
        keep = self.subsets[part]
        if subset not in keep:
            raise ValueError(
                f"Unknown parameter subset {subset!r} of the {part} of {self.label}; choose from {', '.join(keep)}."
            )
        names = [name for name, _ in self.parts[part].named_parameters() if keep[subset](name)]
        if not names:
            raise ValueError(f"The {part} has no parameters in the subset {subset!r}.")
        return names

    def with_parts(self, parts: Mapping[str, torch.nn.Module]) -> DiffusionPipeline:
        """Make a pipeline that shares every component with this one but the parts given, by the names of `parts`."""
        named: dict[str, torch.nn.Module] = {}
        for name, module in parts.items():
            named.update({self.denoiser_name: module} if name == "denoiser" else self._components_of(name, module))
        made = type(self.pipe)(**{**self.pipe.components, **named}, **self._options())
        if self.pipe.config.get("_name_or_path"):
            made.register_to_config(_name_or_path=self.pipe.config["_name_or_path"])
        return made

    def _components_of(self, part: str, module: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """The pipeline's components that a part other than the denoiser consists of."""
        return {part: module}

    def _options(self) -> dict[str, Any]:
        """What the pipeline's constructor takes besides its components."""
        return {}

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Hide the pipeline's progress bar."""
        hidden = getattr(self.pipe, "_progress_bar_config", {})
        self.pipe.set_progress_bar_config(**{**hidden, "disable": True})
        try:
            yield
        finally:
            self.pipe.set_progress_bar_config(**hidden)


class TextFamily(Family):
    """Text-to-image pipelines with an autoencoder."""

    encoders: ClassVar[Sequence[str]] = ("text_encoder",)
    """The text encoders among the pipeline's components."""

    @abstractmethod
    def segments(self, prompts: Sequence[str]) -> list[Segment]:
        """Where each prompt's own tokens stand in ``encoder_hidden_states`` of `encode_prompts`."""

    @property
    def space(self) -> LatentSpace:
        """Between pictures and latents ``(B, C, h, w)``."""
        return LatentSpace(self.pipe)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width, in pixels, of one picture at the model's native size."""
        scale = 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)
        _, height, width = self.latent_shape
        return height * scale, width * scale

    def is_cut(self, prompt: str) -> bool:
        """Whether no text encoder sees a prompt to its end; see `Family.is_cut`."""
        named = ((getattr(self.pipe, name, None), name.replace("text_encoder", "tokenizer")) for name in self.encoders)
        cutters = [getattr(self.pipe, tokenizer) for encoder, tokenizer in named if encoder is not None]
        whole = [len(cut(prompt, verbose=False)["input_ids"]) <= self._limit(cut) for cut in cutters]
        return bool(whole) and not any(whole)

    def _limit(self, tokenizer: Any) -> int:
        """How many tokens of a tokenizer the pipeline gives its text encoder: T5 gets as many as the call says."""
        told = signature(type(self.pipe).__call__).parameters.get("max_sequence_length")
        told = told if "T5" in type(tokenizer).__name__ else None
        return int(tokenizer.model_max_length if told is None else told.default)

    def check_dtypes(self) -> None:
        """Refuse text encoders and a denoiser of different dtypes."""
        for name in self.encoders:
            encoder, denoiser = getattr(self.pipe, name), self.dtype
            if encoder is not None and encoder.dtype != denoiser:
                label = name.replace("_", " ")
                raise ValueError(
                    f"The {label} is {encoder.dtype} and the {self.denoiser_name} {denoiser}, but they must be the "
                    "same; use pipe.to(torch.float32), or load the whole pipeline with one dtype."
                )

    def encode_images(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode pictures ``(B, 3, H, W)`` in [0, 1]; returns the posterior's mean and std in model units."""
        return self.space.posterior(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode latents ``(B, C, H, W)`` in model units; returns pictures ``(B, 3, H, W)`` in [0, 1], float32."""
        return self.space.decode_grid(latents)

    def generate(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        num_inference_steps: int,
        guidance_scale: float,
        latents_only: bool = False,
        conditioning: Conditioning | None = None,
    ) -> torch.Tensor:
        """Draw one picture a prompt; see `Family.generate`."""
        asked: dict[str, Any] = {"prompt": list(prompts), "height": self.image_size[0], "width": self.image_size[1]}
        if conditioning is not None:
            del asked["prompt"]
            asked |= self._arguments(conditioning, self.encode_prompts([""] * len(prompts)))
        asked |= self._guidance(guidance_scale, len(prompts), embedded=conditioning is not None)
        with self._quiet():
            latents = self.pipe(
                **asked, generator=list(generators), num_inference_steps=num_inference_steps, output_type="latent"
            ).images
        latents = self._grid(latents)
        return latents if latents_only else self.decode(latents)

    @abstractmethod
    def _arguments(self, conditioning: Conditioning, empty: Conditioning) -> dict[str, torch.Tensor]:
        """How the pipeline's call takes conditioning, and that of the empty prompt."""

    def _guidance(self, scale: float, count: int, *, embedded: bool) -> dict[str, Any]:
        """How the pipeline's call takes a guidance scale, for `count` prompts or embeddings."""
        return {"guidance_scale": scale}

    def _grid(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents ``(B, C, H, W)`` of those that the pipeline gives."""
        return latents
