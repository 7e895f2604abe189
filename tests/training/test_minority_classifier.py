"""The objective of the minority classifier is its equation; scores, classes, what is held out, what is measured."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sfumato
from sfumato.families import family_of
from sfumato.guidance.pictures import pictures_for
from sfumato.minority import minority_labels, minority_scores, minority_thresholds
from sfumato.trainer import Shard, TrainingConfig, make_accelerator
from sfumato.training import minority_classifier
from sfumato.training.minority_classifier import (
    Minority,
    MinorityConfig,
    MinorityObjective,
    score_pictures,
    stratified,
)
from sfumato.unlearning.examples import Examples, encode_pictures


@pytest.fixture(scope="module")
def family():
    return family_of(sfumato.load("atelier-pixel"))


@pytest.fixture
def materials(family, fashion_mnist, tmp_path):
    pictures = pictures_for(family, "atelier", fashion_mnist, 40, 0)
    return SimpleNamespace(
        family=family, pictures=pictures, examples=encode_pictures(family, pictures.take, pictures.captions),
        facts={"pictures": pictures.facts()}, batch_size=8, seed=0, accelerator=make_accelerator(TrainingConfig()),
        folder=tmp_path,
    )  # fmt: skip


class Linear(nn.Module):
    """A classifier by the mean of the sample and the time."""

    def forward(self, noisy, times):
        self.asked = noisy, times
        return torch.stack([noisy.mean((1, 2, 3)) * k + times / 1000 for k in range(4)], dim=1)


def test_loss_is_the_equation(family):
    clean = torch.randn(30, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    labels, model = torch.arange(30) % 4, Linear()
    objective = MinorityObjective(family, Examples(clean, torch.zeros_like(clean), ("",) * 30), labels, 8, 3)
    found = objective.losses(model, 2, Shard(0, 1))
    noisy, times = model.asked
    assert len(set(times.tolist())) > 4 and noisy.shape == (8, 1, 16, 16)
    from sfumato.unlearning.noising import noisy_batch

    batch = noisy_batch(family, objective.examples, 8, 2, Shard(0, 1), seed=3, stream=minority_classifier.TRAINED)
    alphas = family.pipe.scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
    expected = alphas.sqrt() * clean[batch.rows] + (1 - alphas).sqrt() * batch.noise
    assert torch.allclose(noisy, expected, atol=1e-5)
    loss = F.cross_entropy(model(noisy, times), labels[batch.rows])
    assert found["cross_entropy"].item() == pytest.approx(loss.item(), rel=1e-6)
    halves = [objective.losses(model, 2, Shard(k, 2))["cross_entropy"].item() for k in range(2)]
    assert sum(halves) / 2 == pytest.approx(loss.item(), rel=1e-6)


def test_times_are_uniform_over_all_of_the_model(family):
    clean = torch.zeros(30, 1, 16, 16)
    model = Linear()
    objective = MinorityObjective(family, Examples(clean, clean, ("",) * 30), torch.zeros(30).long(), 2000, 0)
    objective.losses(model, 0, Shard(0, 1))
    counts = torch.histc(model.asked[1].float(), bins=5, min=0, max=1000)
    assert counts.min() > 330 and model.asked[1].max() > 990 and model.asked[1].min() < 10


def test_of_every_class_a_share_is_held_out():
    labels = torch.arange(200) % 4
    trained, held_out = stratified(labels, 0.1, 0)
    assert sorted([*trained.tolist(), *held_out.tolist()]) == list(range(200))
    assert labels[held_out].bincount().tolist() == [5] * 4
    assert torch.equal(held_out, stratified(labels, 0.1, 0)[1])
    assert not torch.equal(held_out, stratified(labels, 0.1, 1)[1])
    assert stratified(torch.tensor([0, 0, 1, 2, 2]), 0.01, 0)[1].tolist() in ([0, 3], [0, 4], [1, 3], [1, 4])


def test_classes_end_at_their_thresholds():
    scores = torch.rand(101, generator=torch.Generator().manual_seed(0))
    labels, edges = minority_labels(scores, 10), minority_thresholds(scores, 10)
    assert len(edges) == 9 and torch.equal(edges, edges.sort().values)
    for label, edge in enumerate(edges):
        assert scores[labels == label].max() <= edge < scores[labels == label + 1].min()


def test_scores_are_those_of_the_whole_and_are_kept(materials, monkeypatch):
    """In parts, as processes share them; a run that goes on does not score again."""
    config, pictures = MinorityConfig(classes=4, repeats=2), materials.pictures
    whole = minority_scores(
        materials.family.pipe, pictures.take(range(40)), pictures.captions, repeats=2, progress=False
    )
    monkeypatch.setattr(minority_classifier, "AT_ONCE", 16)
    found = score_pictures(config, materials)
    assert torch.allclose(found, whole, rtol=1e-4)
    monkeypatch.setattr(minority_classifier, "minority_scores", None)  # may not be called
    assert torch.equal(score_pictures(config, materials), found)
    with pytest.raises(TypeError):
        score_pictures(MinorityConfig(classes=4, repeats=3), materials)


def test_parts_that_were_scored_before_a_run_was_cut_short_are_kept(materials, monkeypatch):
    config, calls, real = MinorityConfig(classes=4, repeats=1), [], minority_scores
    monkeypatch.setattr(minority_classifier, "AT_ONCE", 16)

    def stopping(*args, first, **kwargs):
        if first == 32 and not calls.count(32):
            calls.append(first)
            raise KeyboardInterrupt
        calls.append(first)
        return real(*args, first=first, **kwargs)

    monkeypatch.setattr(minority_classifier, "minority_scores", stopping)
    with pytest.raises(KeyboardInterrupt):
        score_pictures(config, materials)
    found = score_pictures(config, materials)
    assert calls == [0, 16, 32, 32]  # the first two once
    whole = real(
        materials.family.pipe, materials.pictures.take(range(40)), materials.pictures.captions, repeats=1,
        progress=False,
    )  # fmt: skip
    assert torch.allclose(found, whole, rtol=1e-4)
    assert [entry.name for entry in materials.folder.iterdir()] == ["scores.safetensors"]


def test_a_distance_that_is_not_there_is_said_before_pictures_are_encoded(materials):
    with pytest.raises(ValueError, match="alex, vgg and squeeze, got 'vg'"):
        Minority(MinorityConfig(classes=4, distance="lpips:vg")).check(materials.family, materials.pictures)


def test_held_out_pictures_are_not_learned_from_and_are_what_is_measured(materials):
    method = Minority(MinorityConfig(classes=4, repeats=1, held_out=0.3))
    objective = method.objective(materials)
    assert len(objective.examples) == 28 and objective.labels.bincount().tolist() == [7] * 4
    held_out = stratified(method._labels, 0.3, 0)[1]

    class Knows(nn.Module):
        """Knows the classes, or is so many off, where it can be."""

        def __init__(self, off):
            super().__init__()
            self.off, self.times = off, []

        def forward(self, noisy, times):
            self.times += times.tolist()
            seen = held_out[: len(noisy)] if len(noisy) == 8 else held_out[8:]
            return F.one_hot((method._labels[seen] - self.off).clamp(min=0), 4).float()

    right, wrong = Knows(0), Knows(1)
    found = method.measure(right, materials)
    assert found["held_out"] == 12 and [band["from"] for band in found["bands"]] == [0, 200, 400, 600, 800]
    assert all(band["accuracy"] == 1 and band["distance"] == 0 for band in found["bands"])
    for number, band in enumerate(found["bands"]):
        assert all(band["from"] <= time <= band["to"] for time in right.times[12 * number : 12 * (number + 1)])
    off = method.measure(wrong, materials)["bands"][0]
    assert off["accuracy"] == pytest.approx(0.25) and off["distance"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"classes": 21}, "21 classes need at least two pictures each, one of which is held out; there are 40"),
        ({"classes": 4, "timestep": 1000}, "`timestep` must be below the model's 1000 times, got 1000"),
    ],
)
def test_what_can_not_be_is_refused(materials, config, message):
    with pytest.raises(ValueError, match=message):
        Minority(MinorityConfig(**config)).check(materials.family, materials.pictures)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"classes": 1}, "`classes` must be at least 2"), ({"held_out": 1.0}, "`held_out` must lie between 0 and 1"),
        ({"pool": "max"}, "`pool` must be one of attention, average"), ({"repeats": 0}, "`repeats` must be at least"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        MinorityConfig(**config)
