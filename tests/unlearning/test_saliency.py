import numpy as np
import pytest
import torch

from sfumato import storage
from sfumato.unlearning.saliency import load_mask, mask_density, save_mask, top_mask


def by_full_sort(saliency, ratio):
    """The released way: concatenate, sort everything, rank."""
    flat = torch.cat([values.reshape(-1) for values in saliency.values()])
    order = torch.argsort(flat, descending=True, stable=True)
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[order[: int(ratio * len(flat))]] = True
    parts = chosen.split([values.numel() for values in saliency.values()])
    return {name: part.view_as(values) for part, (name, values) in zip(parts, saliency.items(), strict=True)}


def sample(kind):
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (7, 5), "b": (300,), "c": (2, 3, 4, 5), "d": ()}
    values = {name: torch.randn(shape, generator=generator).abs() for name, shape in shapes.items()}
    if kind == "ties":
        return {name: (4 * part).round() / 4 for name, part in values.items()}
    if kind == "zeros":
        return {name: part * (part > 1) for name, part in values.items()}
    if kind == "wide":
        return {name: (20 * (part - 1)).exp() for name, part in values.items()}
    if kind == "tiny":
        return {name: part * 1e-42 for name, part in values.items()}  # subnormal numbers
    return values


@pytest.mark.parametrize("kind", ["plain", "ties", "zeros", "wide", "tiny"])
@pytest.mark.parametrize("ratio", [0.0, 0.001, 0.1, 0.5, 0.77, 0.999, 1.0])
def test_mask_equals_that_of_a_stable_full_sort(kind, ratio):
    saliency = sample(kind)
    masks, threshold = top_mask(saliency, ratio)
    expected = by_full_sort(saliency, ratio)
    assert all(torch.equal(masks[name], expected[name]) for name in saliency)
    if any(mask.any() for mask in masks.values()):
        chosen = torch.cat([saliency[name][mask].reshape(-1) for name, mask in masks.items()])
        assert float(chosen.min()) == threshold


def test_exactly_the_wanted_number_is_chosen_when_all_are_equal():
    masks, _ = top_mask({"a": torch.ones(10), "b": torch.ones(11)}, 0.5)
    assert masks["a"].all() and not masks["b"].any()
    assert mask_density(masks) == 10 / 21


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_saliency_that_is_not_a_magnitude_is_refused(value):
    with pytest.raises(ValueError, match="saliency of a"):
        top_mask({"a": torch.tensor([1.0, value])}, 0.5)


def test_ratio_outside_the_unit_interval_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\], got 1.5"):
        top_mask({"a": torch.ones(3)}, 1.5)


def test_masks_survive_the_file_as_packed_bits(tmp_path):
    masks, _ = top_mask({"w": torch.rand(1000, 1000), "b": torch.rand(13)}, 0.5)
    path = save_mask(tmp_path / "mask.safetensors", masks, {"base": "abc", "ratio": 0.5})
    loaded, provenance = load_mask(path)
    assert all(torch.equal(loaded[name], masks[name]) for name in masks)
    assert provenance == {"base": "abc", "ratio": 0.5}
    assert path.stat().st_size < 1_000_013 / 8 + 1000


def test_mask_of_another_model_is_refused(tmp_path):
    path = save_mask(tmp_path / "mask.safetensors", {"weight": torch.ones(3, 4, dtype=torch.bool)}, {})
    with pytest.raises(ValueError, match="mask of another model: weight is"):
        load_mask(path, torch.nn.Linear(4, 5))
    assert load_mask(path, torch.nn.Linear(4, 3))[0]["weight"].all()


def test_file_that_is_no_mask_is_refused(tmp_path):
    from sfumato.storage import save_tensors

    with pytest.raises(ValueError, match="not a saliency mask"):
        load_mask(save_tensors(tmp_path / "x.safetensors", {"w": torch.from_numpy(np.ones(3))}))
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="corrupt or cut short"):
        load_mask(tmp_path / "cut.safetensors")


def test_mask_file_without_shapes_is_refused_in_words(tmp_path):
    storage.save_tensors(tmp_path / "m.safetensors", {"a": torch.zeros(1)}, {"format": "sfumato-mask-1"})
    with pytest.raises(ValueError, match="is damaged: it does not say the shapes"):
        load_mask(tmp_path / "m.safetensors")
