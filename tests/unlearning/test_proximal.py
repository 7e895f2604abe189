import copy

import pytest
import torch

import sfumato
from sfumato import storage
from sfumato.trainer import Shard, TrainingConfig, make_accelerator, train
from sfumato.unlearning.examples import PromptTable
from sfumato.unlearning.proximal import ProximalConfig, ProximalObjective, soft_threshold
from sfumato.unlearning.pruning import prune
from sfumato.unlearning.saliency import kth_largest
from sfumato.unlearning.salun import SalUnConfig, SalUnObjective

PROMPTS = ["a sneaker", "a red sneaker", "a bag", "a red bag", "a coat", "a shirt"]
ANCHORS = {"a sneaker": "a bag", "a red sneaker": "a red bag"}
SMALL = {
    "forget_examples": 4, "retain_examples": 4, "example_steps": 2, "batch_size": 2, "steps": 3,
    "learning_rate": 1e-3, "verify": False,
}  # fmt: skip


def objective(family, model, forget, retain, steps, **config):
    config = ProximalConfig(batch_size=4, **config)
    salun = SalUnConfig(batch_size=4, retain_weight=config.retain_weight)
    relabelling = SalUnObjective(family, model, forget, retain, ANCHORS, PromptTable(family, PROMPTS), salun, 0)
    return ProximalObjective(relabelling, model, config, steps, make_accelerator(TrainingConfig()))


def moved_weights():
    generator = torch.Generator().manual_seed(5)
    shapes = {"a": (7, 5), "b": (300,), "c": (2, 3, 4, 5)}
    original = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: w + 0.1 * torch.randn(w.shape, generator=generator) for name, w in original.items()}, original


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9])
def test_threshold_is_the_equation(share):
    weights, original = moved_weights()
    before = {name: values.clone() for name, values in weights.items()}
    threshold = soft_threshold(weights, original, share)
    changes = torch.cat([(before[name] - original[name]).flatten() for name in original])
    allowed = int(share * len(changes))
    assert threshold == changes.abs().sort(descending=True).values[allowed].item()
    after = torch.cat([(weights[name] - original[name]).flatten() for name in original])
    assert torch.allclose(after, changes.sign() * (changes.abs() - threshold).clamp(min=0), atol=1e-6)
    assert int((after != 0).sum()) == allowed


def test_weights_that_may_not_differ_keep_their_bits():
    weights, original = moved_weights()
    original["b"][:150] = -0.0  # to which adding zero would give another sign
    chosen = {name: (weights[name] - original[name]).abs() for name in original}
    threshold = soft_threshold(weights, original, 0.1)
    for name, start in original.items():
        kept = chosen[name] <= threshold
        assert torch.equal(weights[name][kept].view(torch.int32), start[kept].view(torch.int32))
        assert kept.sum() > 0


def test_everything_may_move_at_a_share_of_one():
    weights, original = moved_weights()
    before = {name: values.clone() for name, values in weights.items()}
    assert soft_threshold(weights, original, 1.0) == 0
    assert all(torch.equal(weights[name], before[name]) for name in before)


@pytest.mark.parametrize("k", [1, 2, 17, 154, 155])
def test_kth_largest_is_that_of_a_sort(k):
    values = {"a": torch.rand(35).view(7, 5), "b": torch.rand(120).round(decimals=1)}
    expected = torch.cat([v.flatten() for v in values.values()]).sort(descending=True).values[k - 1]
    assert kth_largest(values, k) == expected.item()


@pytest.mark.parametrize(("schedule", "expected"), [("linear", [0.4, 0.3, 0.2, 0.1]), ("fixed", [0.4] * 4)])
def test_share_of_changed_weights_is_what_the_schedule_says(family, forget, retain, schedule, expected):
    class Watched(ProximalObjective):
        def after_step(self, model, step, shards):
            super().after_step(model, step, shards)
            shares.append(self.changed())

    shares, model = [], copy.deepcopy(family.denoiser)
    made = objective(family, model, forget, retain, 4, changed_ratio=0.4, schedule=schedule)
    watched = Watched(made.relabelling, model, made.config, 4, made.accelerator)
    train(model, watched, TrainingConfig(steps=4, learning_rate=1e-2))
    # Adam's first update is the same for most weights, to the last bits, so some tie with the threshold
    assert shares == pytest.approx(expected, abs=0.01)
    assert all(share <= limit for share, limit in zip(shares, expected, strict=True))


def test_released_schedule_counts_the_retain_batches_too():
    config = ProximalConfig(changed_ratio=0.5, schedule="released")
    total = 2 * (3 + 9)  # passes of 3 forget and 9 retain batches
    shares = [config.share_at(step, 6, 3, 9) for step in range(6)]
    assert shares == pytest.approx([0.5 * (1 - k / total) for k in (1, 2, 3, 13, 14, 15)])
    assert shares[-1] == pytest.approx(0.5 * 9 / total)


def test_weights_that_did_not_change_have_the_bits_of_the_original(tiny_pipe):
    result = sfumato.unlearn(tiny_pipe, "a sneaker", "proximal", changed_ratio=0.3, schedule="fixed", **SMALL)
    after = dict(result.unet.named_parameters())
    same = [torch.eq(w.view(torch.int32), after[n].view(torch.int32)) for n, w in tiny_pipe.unet.named_parameters()]
    share = sum(int(part.sum()) for part in same) / sum(part.numel() for part in same)
    assert share == pytest.approx(0.7, abs=0.01)


def test_pruned_weights_stay_zero(tiny_pipe, tmp_path):
    result = sfumato.unlearn(
        tiny_pipe, "a sneaker", "proximal", changed_ratio=0.9, schedule="fixed", prune_ratio=0.5,
        output_dir=tmp_path, **SMALL,
    )  # fmt: skip
    after, kept = dict(result.unet.named_parameters()), prune(copy.deepcopy(tiny_pipe.unet), 0.5)
    assert all(not after[name][~mask].any() for name, mask in kept.items())
    assert any((after[name] != tiny_pipe.unet.get_parameter(name))[mask].any() for name, mask in kept.items())


def test_terms_are_those_of_salun(family, forget, retain):
    ours = objective(family, family.denoiser, forget, retain, 4)
    expected = ours.relabelling.losses(family.denoiser, 2, Shard(0, 1))
    assert ours.losses(family.denoiser, 2, Shard(0, 1)) == expected


def test_run_cut_short_resumes_to_the_same_bits(tiny_pipe, tmp_path, monkeypatch):
    settings = {**SMALL, "steps": 4, "checkpoint_every": 2}
    whole = sfumato.unlearn(tiny_pipe, "a sneaker", "proximal", **settings)
    plain = ProximalObjective.losses

    def die(self, model, step, shard):
        if step == 3:
            raise KeyboardInterrupt
        return plain(self, model, step, shard)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ProximalObjective, "losses", die)
        sfumato.unlearn(tiny_pipe, "a sneaker", "proximal", output_dir=tmp_path, **settings)
    resumed = sfumato.unlearn(tiny_pipe, "a sneaker", "proximal", output_dir=tmp_path, resume=True, **settings)
    assert storage.fingerprint(resumed.unet.named_parameters()) == storage.fingerprint(whole.unet.named_parameters())


def test_training_lowers_the_loss_with_few_weights(family, forget, retain):
    model = copy.deepcopy(family.denoiser)
    ours = objective(family, model, forget, retain, 25, changed_ratio=0.2, schedule="fixed", retain_weight=1.0)
    history = train(model, ours, TrainingConfig(steps=25, learning_rate=2e-2))
    first, last = (sum(row["retain"] for row in rows) for rows in (history[:5], history[-5:]))
    assert last < 0.9 * first
    assert ours.changed() <= 0.2


def test_share_goes_into_the_manifest(tiny_pipe, tmp_path):
    sfumato.unlearn(
        tiny_pipe, "a sneaker", "proximal", changed_ratio=0.5, schedule="fixed", output_dir=tmp_path, **SMALL
    )
    assert storage.read_json(tmp_path / "manifest.json")["changed_share"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"changed_ratio": 0.0}, r"`changed_ratio` must lie in \(0, 1\], got 0.0"),
        ({"changed_ratio": 1.5}, r"`changed_ratio` must lie in \(0, 1\], got 1.5"),
        ({"schedule": "cosine"}, "`schedule` must be one of linear, fixed, released, got 'cosine'"),
        ({"retain_weight": -1.0}, "`retain_weight` must not be negative, got -1.0"),
        ({"ema_decay": 0.9}, "an average of sparse changes is not sparse"),
        ({"mask_ratio": 0.5}, "Unknown setting 'mask_ratio'"),
        ({"retain": []}, "retain set is empty"),
    ],
)
def test_bad_input_gets_one_sentence_before_the_long_work(tiny_pipe, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        sfumato.unlearn(tiny_pipe, "a sneaker", "proximal", output_dir=tmp_path / "out", **{**SMALL, **settings})
    assert not (tmp_path / "out" / "model_index.json").exists()
