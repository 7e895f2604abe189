"""Count what ESD and AdvUnlearn cost, and as released: ``python benchmarks/unlearning_cost.py``.

Side by side on the embedded model, at one number of steps and one batch: the methods by their recipes, and
straightforward implementations of the released algorithms, which walk a new trajectory for every sample of every step
(and of every step of every attack) and ask the original model again. They learn by the recipe's optimiser and rates
and attack as it says; samples of a step share their level, which the released code, with one sample a step, need not.
Denoiser evaluations are samples that pass through a denoiser, counted as they happen; a guided prediction is two. A
straightforward run of fewer steps than the recipe's is extrapolated, which the table says, and has no scores.
"""

import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiffusionPipeline

import sfumato
from sfumato import concepts, recipes
from sfumato.arguments import make_parser
from sfumato.concepts import vocabulary_of
from sfumato.evaluation.judge import Judge
from sfumato.evaluation.unlearning import Protocol, score_pipeline
from sfumato.families import family_of
from sfumato.loading import assets_folder
from sfumato.unlearning.methods import method_named

LIMITS = {"esd": 5.0, "advunlearn": 10.0}


@dataclass
class CostConfig:
    """What to measure.

    Attributes:
        methods: Comma-separated: esd, advunlearn.
        concept: What to forget.
        seed: Of the training and of the pictures.
        steps: Training steps of both; 0 is the recipe's.
        esd_steps: Steps of the straightforward ESD that are run; 0 is all.
        advunlearn_steps: Steps of the straightforward AdvUnlearn that are run with an attack, and as many without; 0
            is all.
        forget_repeats: Pictures of each prompt of the concept to judge.
        retain_repeats: Pictures of each other prompt to judge; 0 judges nothing.
    """

    methods: str = "esd,advunlearn"
    concept: str = "sneaker"
    seed: int = 0
    steps: int = 0
    esd_steps: int = 0
    advunlearn_steps: int = 1
    forget_repeats: int = 2
    retain_repeats: int = 1


@contextmanager
def counting(*denoisers: torch.nn.Module) -> Iterator[list[int]]:
    """Collect the batch sizes that denoisers are called with."""
    seen: list[int] = []
    hooks = [d.register_forward_pre_hook(lambda _, args: seen.append(len(args[0]))) for d in denoisers]
    yield seen
    for hook in hooks:
        hook.remove()


class Released:
    """The released algorithms, written down as they are, on diffusers alone; a step takes a batch of samples."""

    def __init__(self, pipe: DiffusionPipeline, settings: Any, training: Any, concept: Any, seed: int) -> None:
        self.pipe, self.settings, self.training, self.concept = pipe, settings, training, concept
        self.generator = torch.Generator().manual_seed(seed)
        self.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        self.scheduler.set_timesteps(settings.trajectory_steps)
        part = pipe.text_encoder if settings.part == "text_encoder" else pipe.unet
        names = set(family_of(pipe).trainable_parameters(settings.parameters, settings.part))
        self.original = copy.deepcopy(pipe.unet).requires_grad_(False).eval()
        self.model = copy.deepcopy(part).eval()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in names)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizers: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
        self.optimizer, self.step = optimizers[training.optimizer](trained, lr=training.learning_rate), 0

    def draw(self, high: int, count: int) -> list[int]:
        """Draw integers below `high`."""
        return torch.randint(high, (count,), generator=self.generator).tolist()

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> torch.Tensor:
        """Encode with the original text encoder."""
        return self.pipe.encode_prompt(prompts, "cpu", 1, False)[0]

    @torch.no_grad()
    def partial_sample(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Walk from new noise to a random level: latents and its time."""
        count = len(prompts)
        latents = torch.randn(count, *family_of(self.pipe).latent_shape, generator=self.generator)
        level = self.draw(len(self.scheduler.timesteps), 1)[0]
        embeddings = self.encode([""] * count + prompts)
        for when in self.scheduler.timesteps[:level]:
            empty, prompt = self.original(latents.repeat(2, 1, 1, 1), when, embeddings).sample.chunk(2)
            guided = empty + self.settings.trajectory_guidance * (prompt - empty)
            latents = self.scheduler.step(guided, when, latents).prev_sample
        return latents, self.scheduler.timesteps[level]

    @torch.no_grad()
    def ask(self, latents: torch.Tensor, when: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Ask the original denoiser for the noise."""
        return self.original(latents, when, self.encode(prompts)).sample

    def target(self, latents: torch.Tensor, when: torch.Tensor, prompts: list[str], eta: float) -> torch.Tensor:
        """Guide the original's prediction away from the prompts, or from the concept's name in them."""
        empty, prompt = self.ask(latents, when, [""] * len(prompts)), self.ask(latents, when, prompts)
        if self.settings.direction == "prompt":
            return empty - eta * (prompt - empty)
        names = dict(zip(self.concept.prompts, self.concept.names, strict=True))
        return prompt - (1 + eta) * (self.ask(latents, when, [names[p] for p in prompts]) - empty)

    def descend(self, loss: torch.Tensor) -> None:
        """Take one step of the optimiser, at the learning rate that the recipe has for it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.learning_rate_at(self.step)
        self.step += 1
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def esd_step(self) -> None:
        """Walk, ask three times, step."""
        prompts = [self.concept.prompts[k] for k in self.draw(len(self.concept.prompts), self.settings.batch_size)]
        latents, when = self.partial_sample(prompts)
        target = self.target(latents, when, prompts, self.settings.paper_eta)
        self.descend(F.mse_loss(self.model(latents, when, self.encode(prompts)).sample, target))

    def advunlearn_step(self, attacked: bool) -> None:
        """Attack, walk for the concept and for what is retained, step."""
        settings, concept = self.settings, self.concept
        prompts = [concept.prompts[k] for k in self.draw(len(concept.prompts), settings.batch_size)]
        kept = [concept.retain[k] for k in self.draw(len(concept.retain), settings.retain_batch_size)]
        delta = self.attack(prompts) if attacked else None
        latents, when = self.partial_sample(prompts)
        target = self.target(latents, when, prompts, settings.eta)
        said = self.original(latents, when, self.embed(prompts, delta)).sample
        latents, when = self.partial_sample(kept)
        repeated = self.original(latents, when, self.embed(kept, None)).sample
        retain = F.mse_loss(repeated, self.ask(latents, when, kept))
        self.descend(F.mse_loss(said, target) + settings.retain_weight * retain)

    def attack(self, prompts: list[str]) -> torch.Tensor:
        """Find prefix embeddings, walking anew at each step of the attack."""
        table = self.pipe.text_encoder.get_input_embeddings().weight.detach()
        start = torch.tensor(self.draw(len(table), len(prompts) * self.settings.attack_tokens))
        delta = table[start].view(len(prompts), self.settings.attack_tokens, -1).clone().requires_grad_()
        radius, rate = float(table.norm(dim=1).max()), self.settings.attack_learning_rate
        optimizer = torch.optim.Adam([delta], lr=rate)
        for _ in range(self.settings.attack_steps):
            latents, when = self.partial_sample(prompts)
            wanted = self.ask(latents, when, prompts)
            said = self.original(latents, when, self.embed(prompts, delta)).sample
            error = (said - wanted).square().flatten(1).mean(1).sum()
            gradient = torch.autograd.grad(error, delta)[0]
            if self.settings.attack == "released":  # the gradient is never cleared
                delta.grad = gradient if delta.grad is None else delta.grad + gradient
                optimizer.step()
            else:
                delta.data -= rate * gradient / gradient.flatten(1).norm(dim=1)[:, None, None]
                delta.data *= (radius / delta.data.norm(dim=2, keepdim=True)).clamp(max=1)
        return delta.detach()

    def embed(self, prompts: list[str], delta: torch.Tensor | None) -> torch.Tensor:
        """Encode with the encoder being trained, with a prefix attack if there is one."""
        family = family_of(self.pipe)
        tokens, _ = family.tokenize(prompts)
        embeddings = self.pipe.text_encoder.get_input_embeddings()(tokens).detach()
        if delta is not None:
            behind = embeddings[:, 1 : embeddings.shape[1] - delta.shape[1]]
            embeddings = torch.cat([embeddings[:, :1], delta, behind], 1)
        return family.encode_embeddings(self.model, tokens, embeddings)["encoder_hidden_states"]

    def result(self) -> DiffusionPipeline:
        """Give the unlearned pipeline."""
        return family_of(self.pipe).with_parts({self.settings.part: self.model})


def run_released(method: str, released: Released, config: CostConfig) -> dict[str, Any]:
    """Run a straightforward implementation, or the part of it that is asked for, and scale up what that took."""
    steps = released.training.steps
    if method == "esd":
        kinds: list[tuple[int, int, Callable[[], None]]] = [(steps, config.esd_steps, released.esd_step)]
    else:
        warm = min(steps, released.settings.warmup_rounds)
        kinds = [
            (warm, config.advunlearn_steps, lambda: released.advunlearn_step(attacked=False)),
            (steps - warm, config.advunlearn_steps, lambda: released.advunlearn_step(attacked=True)),
        ]
    evaluations = seconds = 0.0
    whole = True
    for wanted, limit, step in kinds:
        done = min(wanted, limit) if limit else wanted
        whole &= done == wanted
        began = time.perf_counter()
        watched = [released.original, *([released.model] if method == "esd" else [])]
        with counting(*watched) as seen:
            for _ in range(done):
                step()
        scale = wanted / max(done, 1)
        evaluations += sum(seen) * scale
        seconds += (time.perf_counter() - began) * scale
    return {"evaluations": evaluations, "seconds": seconds, "extrapolated": not whole}


def scores_of(pipe: DiffusionPipeline, config: CostConfig) -> dict[str, float]:
    """UA, IRA and CRA, in per cent."""
    vocabulary = vocabulary_of(sfumato.load("atelier"))
    assert vocabulary is not None
    protocol = Protocol.for_concept(
        vocabulary, config.concept, forget_repeats=config.forget_repeats, retain_repeats=config.retain_repeats
    )
    found, _ = score_pipeline(
        pipe, protocol, Judge.load(assets_folder() / "judge"), seed=config.seed, num_inference_steps=20,
        guidance_scale=3.0, description=None,
    )  # fmt: skip
    return {name: round(100 * getattr(found, name).value, 1) for name in ("ua", "ira", "cra")}


def compare(method: str, config: CostConfig) -> list[dict[str, Any]]:
    """Both implementations of a method, as rows."""
    pipe = sfumato.load("atelier")
    settings = {**recipes.find_recipe(method, pipe, config.concept).settings, "seed": config.seed}
    if config.steps:
        settings["steps"] = config.steps
    own, training, _ = (
        cls(**{name: settings[name] for name in cls.__dataclass_fields__ if name in settings})
        for cls in method_named(method).configs
    )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = sfumato.unlearn(
            pipe, config.concept, method, output_dir=Path(folder) / "out", verify=False, **settings
        )
        manifest = json.loads((Path(folder) / "out" / "manifest.json").read_text())
    rows = [
        {
            "method": method, "implementation": "sfumato", "steps": training.steps, "extrapolated": False,
            "evaluations": manifest["denoiser_evaluations"], "seconds": time.perf_counter() - began,
            **(scores_of(result, config) if config.retain_repeats else {}),
        }
    ]  # fmt: skip
    concept = concepts.resolve(pipe, config.concept)
    released = Released(pipe, own, training, concept, config.seed)
    measured = run_released(method, released, config)
    judged = config.retain_repeats and not measured["extrapolated"]
    return [
        *rows,
        {
            "method": method, "implementation": "as released", "steps": training.steps, **measured,
            **(scores_of(released.result(), config) if judged else {}),
        },
    ]  # fmt: skip


def main(config: CostConfig) -> None:
    """Measure, print a table, and JSON."""
    rows = []
    print(f"{'method':11} {'implementation':14} {'steps':>6} {'evaluations':>12} {'seconds':>8}     UA    IRA    CRA")
    for method in config.methods.split(","):
        pair = compare(method, config)
        for row in pair:
            scores = " ".join(f"{row[name]:6.1f}" if name in row else "     -" for name in ("ua", "ira", "cra"))
            note = " (extrapolated)" if row["extrapolated"] else ""
            print(
                f"{method:11} {row['implementation']:14} {row['steps']:6} {row['evaluations']:12.0f} "
                f"{row['seconds']:8.0f} {scores}{note}",
                flush=True,
            )
        ours, released = pair
        ratio, faster = (released[name] / ours[name] for name in ("evaluations", "seconds"))
        print(f"{method:11} {ratio:.1f} x fewer evaluations (limit {LIMITS[method]:.0f}), {faster:.1f} x less time")
        rows += pair
    print(json.dumps(rows))


if __name__ == "__main__":
    main(make_parser(CostConfig, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0])
