"""Degradations: what is random in a sample depends on its key alone, and each is as strong as was asked for."""

import pytest
import torch
import torch.nn.functional as F

from sfumato.restoration.degradations import TASKS, Degradation

KEYS = [(3, 1, k) for k in range(6)]
EVERY = {
    "sr": {"scale": 4, "noise": 0.1, "vary": True},
    "inpaint": {"blocks": 4},
    "denoise": {"vary": True},
    "deblur": {"blur": 1.0, "noise": 0.02, "vary": True},
}


def pictures(count=6, size=16, seed=0):
    smooth = torch.rand(count, 3, size // 4, size // 4, generator=torch.Generator().manual_seed(seed))
    return 1.6 * F.interpolate(smooth, size, mode="bilinear") - 0.8


def joined(parts):
    masks = [part.mask for part in parts]
    return torch.cat([part.picture for part in parts]), None if masks[0] is None else torch.cat(masks)


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_depends_on_its_key_alone(task):
    degradation, clean = Degradation(task, **EVERY[task]), pictures()
    whole = degradation.apply(clean, KEYS)
    torch.manual_seed(5)  # whatever torch has drawn before
    split = joined([degradation.apply(clean[:1], KEYS[:1]), degradation.apply(clean[1:], KEYS[1:])])
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    turned = degradation.apply(clean[order], [KEYS[k] for k in order])
    # a convolution may round otherwise in a batch of another size, all else is the same to the bit
    slack = 1e-6 if degradation.blur else 0
    for name, other in (("split", split), ("turned", turned)):
        expected = joined([whole]) if name == "split" else [w if w is None else w[order] for w in whole]
        for a, b in zip(expected, other, strict=True):
            assert (a is None) == (b is None)
            assert a is None or float((a - b).abs().max()) <= slack
    another = degradation.apply(clean, [(3, 2, k) for k in range(6)])
    assert not torch.equal(whole.picture, another.picture)


@pytest.mark.parametrize("task", TASKS)
def test_shapes_and_ranges(task):
    found = Degradation(task, **EVERY[task]).apply(pictures(), KEYS)
    side = 4 if task == "sr" else 16
    assert found.picture.shape == (6, 3, side, side)
    assert found.picture.dtype == torch.float32 and found.picture.abs().max() <= 1
    assert (found.mask is not None) == (task == "inpaint")


def test_super_resolution_shrinks_by_antialiased_bicubic():
    clean = pictures()
    found = Degradation("sr", scale=4).apply(clean, KEYS).picture
    assert torch.equal(found, F.interpolate(clean, scale_factor=0.25, mode="bicubic", antialias=True).clamp(-1, 1))
    edge = torch.ones(1, 3, 16, 16)
    edge[..., :8] = -1  # bicubic overshoots at an edge, a picture can't
    assert Degradation("sr", scale=2).apply(edge, KEYS[:1]).picture.abs().max() == 1


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_noise_has_the_level_that_was_asked_for_in_pictures_from_0_to_1(noise):
    grey = torch.zeros(6, 3, 32, 32)
    found = Degradation("denoise", noise=noise).apply(grey, KEYS).picture / 2
    assert float(found.std()) == pytest.approx(noise, rel=0.03)  # of 18,432 values, to six standard errors
    assert abs(float(found.mean())) < 5 * noise / 18432**0.5


def test_varied_levels_lie_between_nothing_and_what_was_asked_for():
    grey, keys = torch.zeros(64, 3, 32, 32), [(1, k) for k in range(64)]
    levels = Degradation("denoise", noise=0.1, vary=True).apply(grey, keys).picture.flatten(1).std(1) / 2
    assert levels.max() < 0.105 and levels.min() < 0.02
    assert float(levels.mean()) == pytest.approx(0.05, abs=0.015)


def test_blur_is_a_gaussian_of_the_width_that_was_asked_for():
    point = torch.full((1, 3, 33, 33), -1.0)
    point[..., 16, 16] = 1
    found = (Degradation("deblur", blur=2.0).apply(point, KEYS[:1]).picture + 1) / 2
    places = torch.arange(33.0) - 16
    spread = (found[0, 0].sum(0) * places**2).sum() / found[0, 0].sum()
    assert float(found[0, 0].sum()) == pytest.approx(1, rel=1e-4)
    assert float(spread) ** 0.5 == pytest.approx(2, rel=0.03)  # cut off at three standard deviations


@pytest.mark.parametrize("size", [2, 3, 16])
@pytest.mark.parametrize("most", [0.3, 0.99])
def test_masks_are_never_empty_or_full_and_hide_what_is_under_them(size, most):
    keys = [(9, k) for k in range(200)]
    clean = torch.linspace(-0.9, 0.9, 3 * size**2).reshape(1, 3, size, size).expand(200, -1, -1, -1)
    degradation = Degradation("inpaint", blocks=8, block_least=0.2, block_most=most)
    found, mask = degradation.apply(clean, keys)
    shares = mask.flatten(1).mean(1)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert shares.min() > 0 and shares.max() < 1
    assert torch.equal(found, torch.where(mask == 1, -1.0, clean))
    assert len({tuple(row.tolist()) for row in mask.flatten(1)}) > 3 or size == 2


def test_a_single_block_has_the_sides_that_were_asked_for():
    keys = [(2, k) for k in range(100)]
    degradation = Degradation("inpaint", blocks=1, block_least=0.25, block_most=0.5)
    mask = degradation.apply(torch.zeros(100, 3, 32, 32), keys).mask
    for axis in (2, 3):
        sides = mask.amax(axis).flatten(1).sum(1)
        assert sides.min() >= 8 and sides.max() <= 16
        assert len(sides.unique()) > 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "colourise"}, "`task` must be one of sr, inpaint, denoise, deblur, got 'colourise'"),
        ({"scale": 1}, "`scale` of super-resolution must be at least 2"),
        ({"task": "inpaint", "scale": 4}, "inpaint keeps the size"),
        ({"task": "denoise", "noise": 0.0}, "`noise` must be above 0 for the task denoise"),
        ({"task": "deblur", "blur": 0.0}, "`blur` must be above 0 for the task deblur"),
        ({"noise": -0.1}, "`noise` must be at least 0"),
        ({"task": "inpaint", "noise": 0.1}, "`noise` must be 0 for the task inpaint, .* got 0.1"),
        ({"task": "inpaint", "blur": 1.0}, "`blur` must be 0 for the task inpaint, .* got 1.0"),
        ({"task": "inpaint", "blocks": 0}, "`blocks` must be at least 1"),
        ({"task": "inpaint", "block_most": 1.0}, "shares with 0 < block_least <= block_most < 1"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Degradation(**settings)


def test_pictures_that_can_not_be_degraded_so_are_refused():
    with pytest.raises(ValueError, match="`scale` 3 does not divide the pictures' size, 32"):
        Degradation("sr", scale=3).check(32)
    with pytest.raises(ValueError, match="too wide for pictures of 8x8"):
        Degradation("deblur", blur=4.0).check(8)
    with pytest.raises(ValueError, match="does not divide"):
        Degradation("sr", scale=4).apply(torch.zeros(1, 3, 16, 18), KEYS[:1])
