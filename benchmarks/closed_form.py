"""Time UCE and RECE on the cross-attention of Stable Diffusion 1.5: ``python benchmarks/closed_form.py``.

Side by side with a straightforward implementation of each released algorithm, which encodes every text once more for
every projection, adds up its outer products there and inverts a matrix in float32 there. Weights are random, in the
shapes of the stock `UNet2DConditionModel` (32 projections, 19 million weights) and of CLIP's text encoder (12 layers
of 768, 77 tokens), since neither method's time depends on their values. Also printed: the error of each, against the
straightforward implementation in float64, relative to the edit.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from sfumato.arguments import make_parser
from sfumato.unlearning import rece, uce
from sfumato.unlearning.closed_form import NormalEquations, Pairs, edit_map, stack, write
from sfumato.unlearning.rece import RECEConfig
from sfumato.unlearning.uce import UCEConfig

WIDTH, LENGTH, SUBJECT = 768, 77, 2  # the subject's last token is at position 2, as in "a sneaker"
LIMIT = 5.0


@dataclass
class ClosedFormConfig:
    """What to time.

    Attributes:
        keep: Prompts to keep; the released script encodes each for each projection.
        epochs: RECE's.
        threads: CPU threads; 0 leaves torch's own number.
        seed: Seeds weights and tokens.
    """

    keep: int = 4
    epochs: int = 3
    threads: int = 0
    seed: int = 0


def projections() -> dict[str, torch.Tensor]:
    """Random keys and values, (outputs, 768) each, float32, in the shapes of SD 1.5's."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=WIDTH)
    shapes = {name: p.shape for name, p in unet.named_parameters() if "attn2.to_k" in name or "attn2.to_v" in name}
    return {name: torch.randn(shape) / WIDTH**0.5 for name, shape in shapes.items()}


def text_encoder() -> CLIPTextModel:
    """SD 1.5's text encoder with random weights."""
    return CLIPTextModel(
        CLIPTextConfig(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=12, num_attention_heads=12)
    ).eval()


def our_uce(
    weights: dict[str, torch.Tensor], encoder: CLIPTextModel, texts: torch.Tensor, config: UCEConfig
) -> tuple[float, float]:
    """UCE in place; texts are concept, anchor and prompts to keep, (N, 77). Gives seconds of encoding and solving."""
    start = time.perf_counter()
    states = encoder(texts)[0].double()
    encoded = time.perf_counter()
    uce.solve(weights, _pairs(states, SUBJECT), _kept(states[2:], config.preserve_scale), config)
    return encoded - start, time.perf_counter() - encoded


def our_rece(
    weights: dict[str, torch.Tensor], encoder: CLIPTextModel, texts: torch.Tensor, config: RECEConfig
) -> tuple[float, float]:
    """RECE, its first edit by UCE included; as `our_uce`."""
    start = time.perf_counter()
    states = encoder(texts)[0].double()
    encoded = time.perf_counter()
    original, pairs = stack(weights), _pairs(states, SUBJECT)
    ones = torch.ones(len(pairs.inputs), dtype=torch.float64)
    equations = NormalEquations(pairs.inputs, ones, _kept(states[2:], config.preserve_scale), config)
    first = torch.eye(WIDTH, dtype=torch.float64) + edit_map(equations, pairs, ones)
    kept = _kept(states[1:2], config.erase_preserve_scale)
    maps, _, _ = rece.solve(original.T @ original, first, _pairs(states, 0), kept, config)
    write(weights, original @ maps[-1])
    return encoded - start, time.perf_counter() - encoded


def _pairs(states: torch.Tensor, start: int) -> Pairs:
    count = LENGTH - start
    return Pairs(states[0, start:], states[1, start:], torch.zeros(count, dtype=torch.long))


def _kept(states: torch.Tensor, scale: float | None) -> torch.Tensor:
    rows = states.reshape(-1, WIDTH)
    return (scale or 0.0) * rows.T @ rows


def straightforward_edit(
    weights: dict[str, torch.Tensor], encoder: CLIPTextModel, edit: torch.Tensor, like: torch.Tensor,
    keep: torch.Tensor, start: int, scales: tuple[float, float], given: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """One edit as released: layer by layer, each text encoded there, lambda W + sum v c^T times an inverse.

    Args:
        weights: The projections.
        encoder: Encodes.
        edit: The concept's tokens (1, 77).
        like: The anchor's.
        keep: Those of prompts to keep, (N, 77).
        start: First position edited.
        scales: lambda and s_p; s_e is 1.
        given: Embeddings (77, 768) to edit in place of the concept's (RECE's c').
    """
    ridge, preserve = scales
    edited = {}
    for name, weight in weights.items():
        first, second = ridge * weight, ridge * torch.eye(WIDTH, dtype=weight.dtype)
        pair = encoder(torch.cat([edit, like]))[0]
        concept = (pair[0] if given is None else given)[start:]
        values = pair[1][start:] @ weight.T
        first, second = first + values.T @ concept, second + concept.T @ concept
        for text in keep:
            state = encoder(text[None])[0][0]
            first, second = first + preserve * (state @ weight.T).T @ state, second + preserve * state.T @ state
        edited[name] = first @ torch.inverse(second)
    return edited


def straightforward_uce(
    weights: dict[str, torch.Tensor], encoder: CLIPTextModel, texts: torch.Tensor, config: UCEConfig
) -> dict[str, torch.Tensor]:
    """UCE as released."""
    scales = (config.lambda_abs, config.preserve_scale or 0.0)
    return straightforward_edit(weights, encoder, texts[:1], texts[1:2], texts[2:], SUBJECT, scales)


def straightforward_rece(
    weights: dict[str, torch.Tensor], encoder: CLIPTextModel, texts: torch.Tensor, config: RECEConfig
) -> dict[str, torch.Tensor]:
    """RECE as released: sums of products over all layers in each epoch, then an edit as UCE's."""
    scales = (config.lambda_abs, config.preserve_scale or 0.0)
    edited = straightforward_edit(weights, encoder, texts[:1], texts[1:2], texts[2:], SUBJECT, scales)
    for _ in range(config.epochs):
        dtype = next(iter(weights.values())).dtype
        left, right = config.lambda_r * torch.eye(WIDTH, dtype=dtype), torch.zeros(WIDTH, WIDTH, dtype=dtype)
        for name, new in edited.items():
            left, right = left + new.T @ new, right + new.T @ weights[name]
        found = encoder(texts[:1])[0][0] @ (torch.inverse(left) @ right).T
        later = (config.erase_lambda, config.erase_preserve_scale)
        edited = straightforward_edit(edited, encoder, texts[:1], texts[1:2], texts[1:2], 0, later, found)
    return edited


def encoded_once(encoder: CLIPTextModel, texts: torch.Tensor) -> Callable[[torch.Tensor], tuple[torch.Tensor]]:
    """An encoder that looks its answers up, in float64."""
    known = {tuple(text.tolist()): state.double() for text, state in zip(texts, encoder(texts)[0], strict=True)}
    return lambda asked: (torch.stack([known[tuple(text.tolist())] for text in asked]),)


def error(result: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], original: dict[str, torch.Tensor]) -> float:
    """How far a result is from the exact one, over how far that is from the original."""
    return float((stack(result) - stack(exact)).norm() / (stack(exact) - stack(original)).norm())


@torch.no_grad()
def main(config: ClosedFormConfig) -> None:
    """Measure, print a table, and JSON."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    original, encoder = projections(), text_encoder()
    texts = torch.randint(0, 49000, (2 + config.keep, LENGTH))
    outputs = sum(len(weight) for weight in original.values())
    print(f"{len(original)} projections, {outputs} outputs of {WIDTH}, {torch.get_num_threads()} threads")
    encoder(texts)  # the first call of a network is slow
    rows = []
    for name, ours, straightforward, settings in (
        ("UCE", our_uce, straightforward_uce, UCEConfig(preserve_scale=0.25)),
        ("RECE", our_rece, straightforward_rece, RECEConfig(preserve_scale=0.25, keep="anchor", epochs=config.epochs)),
    ):
        mine = {key: weight.clone() for key, weight in original.items()}
        encoding, solving = ours(mine, encoder, texts, settings)
        start = time.perf_counter()
        theirs = straightforward(original, encoder, texts, settings)
        released = time.perf_counter() - start
        double = {key: weight.double() for key, weight in original.items()}
        exact = straightforward(double, encoded_once(encoder, texts), texts, settings)
        row = {
            "method": name, "seconds": encoding + solving, "encoding": encoding, "solving": solving, "limit": LIMIT,
            "straightforward": released, "error": error(mine, exact, original),
            "straightforward_error": error(theirs, exact, original),
        }  # fmt: skip
        rows.append(row)
        print(
            f"{name:5} ours {encoding + solving:6.2f} s (encoding {encoding:.2f}, solving {solving:.2f}; limit"
            f" {LIMIT:g})  straightforward {released:7.2f} s  {released / (encoding + solving):5.1f} x"
            f"  errors {row['error']:.0e} and {row['straightforward_error']:.0e}"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main(make_parser(ClosedFormConfig, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0])
