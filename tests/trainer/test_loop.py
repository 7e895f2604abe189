import json
from dataclasses import replace

import pytest
import torch

from sfumato import storage
from sfumato.randomness import randn_for
from sfumato.trainer import (
    NonFiniteLossError,
    Shard,
    TrainingConfig,
    make_accelerator,
    preflight,
    train,
)
from sfumato.trainer.masked_update import MaskedUpdate, zero_where


class Regression:
    """Fit a linear map to a fixed one, on inputs keyed by step and position."""

    batch_size = 8

    def __init__(self, bad_step=None, die_at=None):
        self.bad_step, self.die_at = bad_step, die_at

    def losses(self, model, step, shard):
        if step == self.die_at:
            raise KeyboardInterrupt
        span = shard.of(self.batch_size)
        inputs = randn_for([(step, k) for k in span], (3,))
        error = (model(inputs) - inputs.flip(1)).pow(2).mean()
        return {
            "fit": error * (float("nan") if step == self.bad_step else 1.0),
            "norm": 1e-3 * model.weight.pow(2).sum(),
        }


CONFIG = TrainingConfig(steps=12, learning_rate=0.05, optimizer="adamw", weight_decay=0.1, checkpoint_every=4)


def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 3)


def test_training_reduces_the_loss_and_reports_every_term():
    history = train(linear(), Regression(), replace(CONFIG, steps=200))
    assert history[-1]["fit"] < 0.1 * history[0]["fit"]
    assert set(history[0]) == {"step", "fit", "norm", "loss", "learning_rate", "seconds"}
    assert history[0]["loss"] == pytest.approx(history[0]["fit"] + history[0]["norm"], rel=1e-6)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_run_cut_short_resumes_to_the_same_bits(tmp_path, optimizer, ema_decay):
    config = replace(
        CONFIG,
        optimizer=optimizer,
        weight_decay=0.1 * (optimizer != "adam"),
        ema_decay=ema_decay,
        lr_schedule="cosine",
    )
    whole, cut, resumed = linear(), linear(), linear()
    expected = train(whole, Regression(), config)
    with pytest.raises(KeyboardInterrupt):
        train(cut, Regression(die_at=10), config, output_dir=tmp_path)
    history = train(resumed, Regression(), config, output_dir=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert [row["loss"] for row in history] == [row["loss"] for row in expected]


def scaling():
    """A process group with the scaler that fp16 has on CUDA, and a scale at which gradients soon overflow."""
    accelerator = make_accelerator(replace(CONFIG, mixed_precision="fp16"))
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**124, growth_interval=2)
    return accelerator


def test_run_in_fp16_resumes_with_the_scale_that_it_had(tmp_path):
    """A step whose scaled gradient overflows is left out, so the scale tells in the weights."""
    config = replace(CONFIG, mixed_precision="fp16")
    whole, cut, resumed, accelerator = linear(), linear(), linear(), scaling()
    train(whole, Regression(), config, accelerator=accelerator)
    with pytest.raises(KeyboardInterrupt):
        train(cut, Regression(die_at=7), config, output_dir=tmp_path, accelerator=scaling())
    again = scaling()
    train(resumed, Regression(), config, output_dir=tmp_path, resume=True, accelerator=again)
    assert again.scaler.state_dict() == accelerator.scaler.state_dict() != scaling().scaler.state_dict()
    assert torch.equal(whole.weight, resumed.weight)


@pytest.mark.parametrize("passes", [2, 4])
def test_accumulated_passes_give_the_whole_batch(passes):
    whole, split = linear(), linear()
    train(whole, Regression(), CONFIG)
    train(split, Regression(), replace(CONFIG, gradient_accumulation_steps=passes))
    assert torch.allclose(whole.weight, split.weight, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_masked_out_weights_keep_their_bits_under_weight_decay(optimizer):
    model = linear()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = {"weight": torch.rand(3, 3) < 0.5, "bias": torch.zeros(3, dtype=torch.bool)}
    train(model, Regression(), replace(CONFIG, optimizer=optimizer), masks=masks)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter[~masks[name]], before[name][~masks[name]])
        assert (parameter[masks[name]] != before[name][masks[name]]).all()


def test_mask_holds_even_if_moments_were_filled_before_it():
    model = linear()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(torch.randn(4, 3)).pow(2).sum().backward()
    optimizer.step()
    before = model.weight.detach().clone()
    MaskedUpdate(optimizer, {model.weight: torch.eye(3, dtype=torch.bool)})
    model(torch.randn(4, 3)).pow(2).sum().backward()
    optimizer.step()
    assert torch.equal(model.weight[~torch.eye(3, dtype=torch.bool)], before[~torch.eye(3, dtype=torch.bool)])
    assert (model.weight.diag() != before.diag()).all()


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_masked_out_weights_keep_their_bits_without_being_put_back(optimizer):
    """Zeros of both signs included."""
    model, mask = linear(), torch.eye(3, dtype=torch.bool)
    with torch.no_grad():
        model.weight[0, 1], model.weight[1, 0] = 0.0, -0.0
    before = model.weight.detach().clone()
    config = TrainingConfig(steps=5, learning_rate=0.05, optimizer=optimizer)
    train(model, Regression(), config, masks={"weight": mask})
    after = model.weight.detach()
    assert torch.equal(after.view(torch.int32)[~mask], before.view(torch.int32)[~mask])
    assert (after[mask] != before[mask]).all()


def test_loss_that_is_not_a_number_stops_with_the_last_good_weights(tmp_path):
    model, good = linear(), linear()
    with pytest.raises(NonFiniteLossError, match="nan at step 9"):
        train(model, Regression(bad_step=9), CONFIG, output_dir=tmp_path)
    train(good, Regression(), replace(CONFIG, steps=8))
    stored = storage.load_tensors(tmp_path / "checkpoints" / "step-00000008" / "weights.safetensors")
    assert torch.equal(stored["weight"], good.weight)
    assert torch.isfinite(model.weight).all()


def test_checkpoint_of_another_run_is_refused(tmp_path):
    train(linear(), Regression(), CONFIG, output_dir=tmp_path, identity={"base": "one"})
    with pytest.raises(ValueError, match="checkpoint of another run: base differ"):
        train(linear(), Regression(), CONFIG, output_dir=tmp_path, identity={"base": "two"}, resume=True)
    with pytest.raises(ValueError, match="another run: training.learning_rate differ .there 0.05, here 1.0"):
        train(
            linear(),
            Regression(),
            replace(CONFIG, learning_rate=1.0),
            output_dir=tmp_path,
            identity={"base": "one"},
            resume=True,
        )


def test_corrupt_checkpoint_is_named_and_kept(tmp_path):
    train(linear(), Regression(), CONFIG, output_dir=tmp_path)
    file = tmp_path / "checkpoints" / "step-00000012" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match="corrupt or cut short"):
        train(linear(), Regression(), CONFIG, output_dir=tmp_path, resume=True)
    assert file.exists()


@pytest.mark.parametrize("name", ["optimizer.safetensors", "weights.safetensors", "history.json"])
def test_a_checkpoint_with_a_file_missing_is_refused_before_the_work(tmp_path, name):
    train(linear(), Regression(), CONFIG, output_dir=tmp_path)
    checkpoint = next(tmp_path.glob("checkpoints/*"))
    (checkpoint / name).unlink()
    with pytest.raises(ValueError, match=f"{name}.*delete .* to fall back"):
        preflight(
            linear(), 8, CONFIG, accelerator=make_accelerator(CONFIG), output_dir=tmp_path, identity=None, resume=True
        )


def test_damaged_state_is_named(tmp_path):
    train(linear(), Regression(), CONFIG, output_dir=tmp_path)
    (tmp_path / "checkpoints" / "step-00000012" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="state.json is damaged; delete"):
        train(linear(), Regression(), CONFIG, output_dir=tmp_path, resume=True)


class InfiniteGradient(Regression):
    """A finite loss whose gradient is not: the square root at zero."""

    def losses(self, model, step, shard):
        return {"root": (0 * model.weight).sum().sqrt()}


def test_gradient_that_is_not_a_number_stops_before_it_reaches_the_weights():
    model = linear()
    with pytest.raises(NonFiniteLossError, match="The gradient became nan at step 0"):
        train(model, InfiniteGradient(), CONFIG)
    assert torch.equal(model.weight, linear().weight)


def checkpoints_in(folder):
    return sorted(path.name for path in folder.glob("checkpoints/*"))


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_learning_rate_that_ruins_the_weights_leaves_no_checkpoint(tmp_path, steps, optimizer):
    config = TrainingConfig(steps=steps, learning_rate=1e30, optimizer=optimizer, checkpoint_every=1)
    with pytest.raises(NonFiniteLossError, match="The weights of step 0 give a loss of inf; stopped, and nothing"):
        train(linear(), Regression(), config, output_dir=tmp_path)
    assert checkpoints_in(tmp_path) == []


def test_largest_learning_rate_is_stopped_by_the_loss_and_not_by_the_optimiser():
    with pytest.raises(NonFiniteLossError):
        train(linear(), Regression(), TrainingConfig(steps=1, learning_rate=1e36))


class Ruinous(Regression):
    """One step whose loss is finite, but whose gradient throws the weights out of all measure."""

    def losses(self, model, step, shard):
        terms = super().losses(model, step, shard)
        return {**terms, "fit": terms["fit"] * (1e18 if step == 7 else 1)}


def test_ruined_weights_do_not_replace_the_good_checkpoint_and_the_run_resumes_from_it(tmp_path):
    config = replace(CONFIG, optimizer="sgd", keep_checkpoints=1)
    with pytest.raises(NonFiniteLossError, match="The weights of step 7 give a loss of"):
        train(linear(), Ruinous(), config, output_dir=tmp_path)
    assert checkpoints_in(tmp_path) == ["step-00000004"]
    whole, resumed = linear(), linear()
    train(whole, Regression(), config)
    history = train(resumed, Regression(), config, output_dir=tmp_path, resume=True)
    assert [row["step"] for row in history] == list(range(12))
    assert torch.equal(whole.weight, resumed.weight)


class Saturating(Regression):
    """A loss that stays finite even where the bias is infinite."""

    def losses(self, model, step, shard):
        return {"saturating": 1e10 * model.bias.tanh().sum()}


def test_infinite_weight_is_found_where_the_loss_stays_finite(tmp_path):
    model = linear()
    config = TrainingConfig(steps=1, learning_rate=1e30, optimizer="sgd")
    with pytest.raises(NonFiniteLossError, match="The update of step 0 left weights that are NaN or infinite"):
        train(model, Saturating(), config, output_dir=tmp_path)
    assert model.bias.isinf().any() and Saturating().losses(model, 0, Shard(0, 1))["saturating"].isfinite()
    assert checkpoints_in(tmp_path) == []


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    train(linear(), Regression(), replace(CONFIG, keep_checkpoints=2), output_dir=tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]
    assert json.loads((tmp_path / "checkpoints" / "step-00000012" / "state.json").read_text())["step"] == 12


def test_batch_that_can_not_be_shared_equally_is_refused():
    with pytest.raises(ValueError, match="batch of 8 can't be shared equally"):
        train(linear(), Regression(), replace(CONFIG, gradient_accumulation_steps=3))


def test_half_precision_weights_are_refused():
    with pytest.raises(ValueError, match="must be float32"):
        train(linear().half(), Regression(), CONFIG)


def test_model_without_trainable_weights_is_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        train(linear().requires_grad_(False), Regression(), CONFIG)


def test_bf16_trains_with_float32_weights():
    model = linear()
    history = train(model, Regression(), replace(CONFIG, steps=100, mixed_precision="bf16"))
    assert model.weight.dtype == torch.float32
    assert history[-1]["fit"] < 0.3 * history[0]["fit"]
    assert model(torch.randn(1, 3)).dtype == torch.float32


def test_tensorboard_receives_the_losses(tmp_path):
    train(linear(), Regression(), replace(CONFIG, log_with="tensorboard"), output_dir=tmp_path)
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "`steps` must be at least 1, got 0"),
        ("steps", "3", "`steps` must be a whole number, got '3'"),
        ("steps", 2.5, "`steps` must be a whole number, got 2.5"),
        ("learning_rate", float("nan"), "`learning_rate` must be a finite number, got nan"),
        ("learning_rate", 0, "`learning_rate` must be a positive number of at most 1e.36, .* got 0"),
        ("learning_rate", 1e38, "`learning_rate` must be a positive number of at most 1e.36, .* got 1e.38"),
        ("learning_rate", "1e-5", "`learning_rate` must be a finite number, got '1e-5'; .* in YAML with a point"),
        ("gradient_checkpointing", "false", "`gradient_checkpointing` must be True or False, got 'false'"),
        ("optimizer", "adagrad", "`optimizer` must be one of adam, adamw, sgd, adam8bit, adamw8bit, got 'adagrad'"),
        ("lr_schedule", "step", "`lr_schedule` must be"),
        ("mixed_precision", "int8", "`mixed_precision` must be"),
        ("gradient_accumulation_steps", 0, "must be at least 1"),
        ("warmup_steps", -5, "`warmup_steps` must be at least 0, got -5"),
        ("weight_decay", -0.1, "`weight_decay` must be at least 0"),
        ("checkpoint_every", -1, "`checkpoint_every` must be at least 0"),
        ("max_grad_norm", -1.0, "`max_grad_norm` must be above 0"),
        ("max_grad_norm", 0.0, "`max_grad_norm` must be above 0"),
        ("ema_decay", 5.0, r"`ema_decay` must lie in \[0, 1\)"),
        ("seed", -1, "`seed` must be a whole number from 0"),
        ("seed", 2**70, "`seed` must be a whole number from 0"),
    ],
)
def test_bad_settings_are_refused_at_construction(field, value, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{field: value})


def test_weight_decay_in_plain_adam_is_refused():
    with pytest.raises(ValueError, match="adamw"):
        TrainingConfig(optimizer="adam", weight_decay=0.1)


def test_shards_cover_the_batch_without_overlap():
    assert [k for i in range(4) for k in Shard(i, 4).of(12)] == list(range(12))


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (2, 70_000), (131_072,), (131_073,)])
def test_zeroing_by_bits_is_masked_fill(shape):
    generator = torch.Generator().manual_seed(0)
    values, where = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) < 0.5
    if values.numel() > 4:
        values.view(-1)[:4] = torch.tensor([-0.0, torch.inf, torch.nan, -1.0])
        where.view(-1)[:4] = torch.tensor([True, True, True, False])
    expected = values.masked_fill(where, 0)
    zero_where(values, where)
    assert torch.equal(values.view(torch.int32), expected.view(torch.int32))
    transposed, mask = torch.randn(4, 3).T, torch.rand(3, 4) < 0.5
    expected = transposed.masked_fill(mask, 0)
    zero_where(transposed, mask)
    assert torch.equal(transposed, expected)


def test_more_processes_than_devices_are_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with pytest.raises(ValueError, match="has 2 CUDA devices, fewer than the 4 processes .* --num_processes 2"):
        make_accelerator(TrainingConfig())
