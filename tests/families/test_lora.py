"""A LoRA of a change, loaded by stock diffusers, is that change; several add up."""

import copy
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from sfumato.lora import KOHYA_FILE, Lora, _factors, extract_lora, save_lora

RANK = 2
PARTS = {
    "sd": ("unet", "text_encoder"), "sdxl": ("unet", "text_encoder", "text_encoder_2"), "sd3": ("transformer",),
    "flux": ("transformer",),
}  # fmt: skip


def matrices(module):
    return [m.weight for m in module.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]


@torch.no_grad()
def changed(pipe, parts, seed=0, rank=RANK):
    """The same pipeline with every linear and convolution layer of some parts moved by a matrix of a rank."""
    generator = torch.Generator().manual_seed(seed)
    components = dict(pipe.components)
    for part in parts:
        components[part] = copy.deepcopy(components[part])
        for weight in matrices(components[part]):
            flat = weight.view(len(weight), -1)
            up = torch.randn(len(flat), rank, generator=generator)
            flat += 0.02 * up @ torch.randn(rank, flat.shape[1], generator=generator)
    return type(pipe)(**components)


def draw(pipe):
    generator = torch.Generator().manual_seed(3)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16}
    return torch.from_numpy(
        pipe("a red bag", num_inference_steps=2, generator=generator, output_type="np", **size).images
    )


@pytest.mark.parametrize("kind", PARTS)
def test_what_was_changed_by_a_lora_comes_out_as_it_is(kind, pipe, tmp_path):
    result = changed(pipe, PARTS[kind])
    lora = extract_lora(pipe, result, RANK)
    assert lora.missing < 1e-5 and set(lora.layers) == set(PARTS[kind])
    save_lora(pipe, lora, tmp_path / "lora")
    stock = changed(pipe, PARTS[kind], rank=0)  # a copy
    before = draw(stock)
    stock.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    assert torch.allclose(draw(stock), draw(result), atol=1e-4)
    assert (draw(result) - before).abs().max() > 1e-3
    stock.unload_lora_weights()
    assert torch.equal(draw(stock), before)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
def test_several_add_up(kind, pipe, tmp_path):
    parts = PARTS[kind]
    first, second = (changed(pipe, parts, seed) for seed in (1, 2))
    both = changed(first, parts, 2)
    stock = changed(pipe, parts, rank=0)
    for name, result in ("first", first), ("second", second):
        save_lora(pipe, extract_lora(pipe, result, RANK), tmp_path / name)
        stock.load_lora_weights(tmp_path / name, weight_name="pytorch_lora_weights.safetensors", adapter_name=name)
    stock.set_adapters(["first", "second"])
    assert torch.allclose(draw(stock), draw(both), atol=1e-4)
    assert not torch.allclose(draw(stock), draw(first), atol=1e-3)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_kohya_names_lead_to_the_same_model(kind, pipe, tmp_path):
    result = changed(pipe, PARTS[kind])
    save_lora(pipe, extract_lora(pipe, result, RANK), tmp_path / "lora")
    stored = load_file(tmp_path / "lora" / KOHYA_FILE)
    text = "lora_te" if kind == "sd" else "lora_te1"
    assert f"{text}_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in stored
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight" in stored
    assert all(value == RANK for name, value in stored.items() if name.endswith(".alpha"))
    stock = changed(pipe, PARTS[kind], rank=0)
    stock.load_lora_weights(tmp_path / "lora", weight_name=KOHYA_FILE)
    assert torch.allclose(draw(stock), draw(result), atol=1e-4)


@pytest.mark.parametrize("kind", ["sdxl"])
def test_the_layer_that_a1111_misplaces_is_also_named_by_its_place(kind, pipe, tmp_path):
    shape = {"lora_A": (RANK, 8, 3, 3), "lora_B": (8, RANK, 1, 1)}
    layer = "up_blocks.0.upsamplers.0.conv"
    factors = {f"{layer}.{side}.weight": torch.full(size, 0.1) for side, size in shape.items()}
    save_lora(pipe, Lora({"unet": factors}, RANK, 0.0), tmp_path / "lora")
    stored = load_file(tmp_path / "lora" / KOHYA_FILE)
    places = {name.split(".")[0] for name in stored}
    assert places == {"lora_unet_up_blocks_0_upsamplers_0_conv", "lora_unet_output_blocks_2_2_conv"}
    assert len(stored) == 2 * 3  # down, up, alpha
    read, _ = type(pipe).lora_state_dict(tmp_path / "lora", weight_name=KOHYA_FILE, unet_config=pipe.unet.config)
    assert {name.split(".lora")[0] for name in read} == {f"unet.{layer}"}


@pytest.mark.parametrize("kind", ["sd"])
def test_what_a_lora_can_not_hold_is_measured(kind, pipe):
    result = changed(pipe, ["unet"])
    with torch.no_grad():
        result.unet.conv_in.bias += 1
    lora = extract_lora(pipe, result, RANK)
    whole = sum(
        float((a - b).double().square().sum())
        for a, b in zip(pipe.unet.parameters(), result.unet.parameters(), strict=True)
    )
    assert lora.missing == pytest.approx((len(result.unet.conv_in.bias) / whole) ** 0.5, rel=1e-3)
    errors = [extract_lora(pipe, changed(pipe, ["unet"], rank=4), rank).missing for rank in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.3 and errors[-1] < 1e-5


@pytest.mark.parametrize("kind", ["pixart"])
def test_what_stock_diffusers_can_not_load_is_refused(kind, pipe):
    with pytest.raises(ValueError, match="Stock diffusers has no LoRA for transformer of PixArtSigmaPipeline"):
        extract_lora(pipe, changed(pipe, ["transformer"]))
    with pytest.raises(ValueError, match="there is no LoRA of it"):
        extract_lora(pipe, pipe)
    with pytest.raises(ValueError, match="`rank` must be at least 1"):
        extract_lora(pipe, pipe, 0)


def test_factors_of_a_large_matrix_are_the_best_ones():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(1100, 6, generator=generator) @ torch.randn(6, 1200, generator=generator)
    matrix += 0.01 * torch.randn(1100, 1200, generator=generator)
    down, up = _factors(matrix, 6)
    values = torch.linalg.svdvals(matrix)
    best = values[6:].square().sum().sqrt()
    assert (matrix - up @ down).norm() <= 1.001 * best
    assert torch.equal(down, _factors(matrix, 6)[0])


ELSEWHERE = """
import sys; sys.modules["sfumato"] = None
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
pipe = DiffusionPipeline.from_pretrained("base")
size = {"height": 16, "width": 16}
pictures = {}
for name in sys.argv[1:]:
    pipe.load_lora_weights("lora", weight_name=name)
    generator = torch.Generator().manual_seed(3)
    drawn = pipe("a red bag", num_inference_steps=2, generator=generator, output_type="np", **size).images
    pictures[name] = torch.from_numpy(drawn).contiguous()
    pipe.unload_lora_weights()
save_file(pictures, "pictures.safetensors")
"""


@pytest.mark.parametrize("kind", ["sd"])
def test_pictures_are_the_same_where_sfumato_is_not_installed(kind, pipe, tmp_path):
    result = changed(pipe, PARTS[kind])
    save_lora(pipe, extract_lora(pipe, result, RANK), tmp_path / "lora")
    pipe.save_pretrained(tmp_path / "base")
    files = ("pytorch_lora_weights.safetensors", KOHYA_FILE)
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, *files], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pictures, expected = load_file(tmp_path / "pictures.safetensors"), draw(result)
    assert pictures.keys() == set(files) and not torch.allclose(draw(pipe), expected, atol=1e-3)
    for drawn in pictures.values():
        assert torch.allclose(drawn, expected, atol=1e-4)
