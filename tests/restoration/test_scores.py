"""Scores of restored pictures: a value a picture, as the definitions and torchmetrics say."""

from importlib.util import find_spec

import pytest
import torch

from sfumato.restoration.scores import (
    between_sets,
    feature_distance,
    find_distance,
    psnr,
    score,
    ssim,
    summarise,
)


def pictures(seed, count=5, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_psnr_by_hand():
    clean = torch.full((3, 3, 4, 4), 0.5)
    restored = clean.clone()
    restored[1] += 0.1
    restored[2, 0, 0, 0] += 0.4  # one value of 48
    expected = torch.tensor([100.0, 20.0, 10 * torch.log10(torch.tensor(48 / 0.16)).item()]).double()
    assert torch.allclose(psnr(restored, clean), expected, atol=1e-5)


def test_psnr_is_that_of_torchmetrics_for_each_picture():
    from torchmetrics.functional.image import peak_signal_noise_ratio

    restored, clean = pictures(1), pictures(2)
    one = [float(peak_signal_noise_ratio(a, b, data_range=1.0)) for a, b in zip(restored, clean, strict=True)]
    assert psnr(restored, clean).tolist() == pytest.approx(one, rel=1e-5)


def ssim_by_hand(a, b):
    """The mean over channels of the index in the 11x11 pixels, Gaussian of 1.5, around each; edges are reflected."""
    a, b = (torch.nn.functional.pad(values, (5,) * 4, mode="reflect") for values in (a, b))
    places = torch.arange(11.0).double() - 5
    line = torch.exp(-(places**2) / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2

    def mean(values):
        return torch.nn.functional.conv2d(values[:, None], window[None, None])[:, 0]

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    index = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    return index.mean()


def test_ssim_by_hand():
    clean = pictures(3, size=24).double()
    restored = (clean + 0.2 * pictures(4, size=24)).clamp(0, 1)
    by_hand = [float(ssim_by_hand(a, b)) for a, b in zip(restored, clean, strict=True)]
    assert ssim(restored, clean).tolist() == pytest.approx(by_hand, rel=1e-6)
    assert torch.allclose(ssim(clean, clean), torch.ones(5).double())
    with pytest.raises(ValueError, match="at least 11x11, got 8x8"):
        ssim(pictures(1, size=8), pictures(2, size=8))


def test_distances_of_features_are_in_units_of_the_variance_of_the_clean_ones():
    clean = pictures(5, count=200)
    extractor = torch.nn.Flatten()
    assert feature_distance(clean, clean, extractor).max() == 0
    mean = clean.mean(0, keepdim=True).expand_as(clean)
    assert float(feature_distance(mean, clean, extractor).mean()) == pytest.approx(1, rel=1e-4)
    assert float(feature_distance(pictures(6, count=200), clean, extractor).mean()) == pytest.approx(2, rel=0.05)
    with pytest.raises(ValueError, match="of several pictures, got 1"):
        feature_distance(clean[:1], clean[:1], extractor)


def test_the_judge_sees_what_is_blurred():
    clean = pictures(7, count=6, size=8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    blurred = torch.nn.functional.avg_pool2d(clean, 9, 1, 4, count_include_pad=False)
    little, much = (torch.lerp(clean, blurred, share) for share in (0.3, 1.0))
    distance = find_distance("judge")
    assert distance(clean, clean).max() == 0
    assert (distance(little, clean) < distance(much, clean)).all()
    assert between_sets("judge")(clean, clean) < 1e-6 < between_sets("judge")(blurred, clean)


def test_scores_are_one_a_picture_and_summarised_with_intervals():
    clean = pictures(8, count=30, size=32)
    restored = (clean + 0.1 * pictures(9, count=30, size=32)).clamp(0, 1)
    scores = score(restored, clean, find_distance("judge"))
    assert {name: tuple(values.shape) for name, values in scores.items()} == {
        "psnr": (30,), "ssim": (30,), "distance": (30,),
    }  # fmt: skip
    for name, estimate in summarise(scores).items():
        assert estimate.value == pytest.approx(float(scores[name].mean()), rel=1e-12)
        assert estimate.low < estimate.value < estimate.high


def test_pictures_that_can_not_be_compared_are_refused():
    with pytest.raises(ValueError, match="Restored pictures are"):
        score(pictures(1, size=16), pictures(1, size=32))
    with pytest.raises(ValueError, match="not finite"):
        score(pictures(1) / 0, pictures(1))


def test_distances_that_can_not_be_had_are_named():
    with pytest.raises(ValueError, match="alex, vgg and squeeze, got 'resnet'"):
        find_distance("lpips:resnet")
    with pytest.raises(ValueError, match="There are no features 'eyes'"):
        find_distance("eyes")


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is here, and may fetch weights")
def test_lpips_without_its_network_says_what_to_install():
    with pytest.raises(ImportError, match="LPIPS needs: pip install torchmetrics torchvision"):
        find_distance("lpips:alex")
