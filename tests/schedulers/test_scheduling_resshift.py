"""ResShiftScheduler: the authors' program, the chain's properties, and what of diffusers' contract applies to it."""

import json
import math
import shutil
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.schedulers import carried_state, noise_schedule, scheduling_resshift
from sfumato.schedulers.scheduling_bdia import BDIAScheduler
from sfumato.schedulers.scheduling_rddm import RDDMScheduler
from sfumato.schedulers.scheduling_resshift import ResShiftScheduler, ResShiftSchedulerOutput

# Of the reference arrays, those that the tests need: of runs with float32 coefficients the last state alone.
with np.load(Path(__file__).parent.parent / "golden" / "resshift.npz") as archive:
    GOLDEN = {key: archive[key] for key in archive.files}
META = json.loads(str(GOLDEN["meta"]))
CASES = [name for name in META if f"{name}/f64/samples" in GOLDEN]
X0, Y = torch.from_numpy(GOLDEN["x0"]), torch.from_numpy(GOLDEN["y"])
NOISES = torch.from_numpy(GOLDEN["noises"])
NAMES = {"xstart": "sample"}  # the program's, ours
KEYS = ("samples", "pred_x0", "model_inputs", "model_t", "z_y")
TYPES = ["sample", "residual", "epsilon", "epsilon_scale"]
FOUR = {"num_train_timesteps": 4, "min_noise_level": 0.2}


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def toy_network(x, t):
    t = torch.as_tensor(t).double()
    t = t.reshape(-1, 1, 1, 1) if t.ndim else t
    return 0.3 * x * torch.cos(t / 5) + 0.1 * torch.sin(3 * x + t / 3)


def relative_error(out, reference):
    reference = torch.as_tensor(reference).detach()
    return float((out.detach() - reference).abs().max() / reference.abs().max())


def make_case(name):
    case = META[name]
    scheduler = ResShiftScheduler(
        num_train_timesteps=case["steps"], min_noise_level=case["min_noise_level"], kappa=case["kappa"],
        power=case["schedule_kwargs"]["power"], etas_end=case["etas_end"], normalize_input=case["normalize_input"],
        latent_space=case["latent_flag"], clip_sample=case["clip_denoised"],
        prediction_type=NAMES.get(case["predict_type"], case["predict_type"]),
    )  # fmt: skip
    scheduler.set_timesteps(case["timestep_respacing"])
    return scheduler


def run(scheduler, network=toy_network, degraded=Y, start=None, views=True, stop=None, **kwargs):
    """The loop of a pipeline; gives the states, and the outputs of the steps."""
    x = scheduler.initial_sample(degraded, NOISES[0].to(degraded)) if start is None else start
    outs = []
    for index, t in enumerate(scheduler.timesteps[:stop]):
        t = t if views else t.item()
        given = kwargs or {"variance_noise": NOISES[index + 1]}
        outs.append(scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, degraded, **given))
        x = outs[-1].prev_sample
    return outs


# ---------------------------------------------------------------- the authors' program


@pytest.mark.parametrize("name", CASES)
def test_every_step_gives_the_numbers_of_the_authors_program(name):
    scheduler, reference = make_case(name), {key: GOLDEN.get(f"{name}/f64/{key}") for key in KEYS}
    degraded = torch.from_numpy(reference["z_y"])
    fed = []

    def network(x, t):
        fed.append((x, t))
        return toy_network(x, t)

    outs = run(scheduler, network, degraded)
    assert [int(t) for _, t in fed] == reference["model_t"][:, 0].tolist()
    for index, out in enumerate(outs):
        assert relative_error(out.prev_sample, reference["samples"][index]) < 1e-9
        if reference["pred_x0"] is not None:
            assert relative_error(out.pred_original_sample, reference["pred_x0"][index]) < 1e-9
            assert relative_error(fed[index][0], reference["model_inputs"][index]) < 1e-9
    # the program as released rounds its coefficients to float32
    assert relative_error(outs[-1].prev_sample, GOLDEN[f"{name}/f32coef/last_sample"]) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_the_schedule_is_the_one_of_the_authors_program(name):
    scheduler = make_case(name)
    assert scheduler.sqrt_etas.dtype == scheduler.etas.dtype == torch.float64
    assert relative_error(scheduler.sqrt_etas, GOLDEN[f"{name}/sqrt_etas"]) < 1e-14


@pytest.mark.parametrize("table", ["tables15", "tables4"])
def test_the_posterior_is_the_one_of_the_authors_program(table):
    scheduler = ResShiftScheduler(**({} if table == "tables15" else FOUR))
    eta = scheduler.etas
    before = torch.cat([torch.zeros(1), eta[:-1]]).double()
    assert relative_error(eta, GOLDEN[f"{table}/etas"]) < 1e-14
    assert relative_error(before / eta, GOLDEN[f"{table}/posterior_mean_coef1"]) < 1e-14
    assert relative_error((eta - before) / eta, GOLDEN[f"{table}/posterior_mean_coef2"]) < 1e-14
    assert relative_error(4 * before / eta * (eta - before), GOLDEN[f"{table}/posterior_variance"]) < 1e-14


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["xstart", "residual", "epsilon", "epsilon_scale"])
def test_the_loss_is_that_of_the_authors_program(kind, weighted):
    scheduler, t = ResShiftScheduler(prediction_type=NAMES.get(kind, kind)), torch.from_numpy(GOLDEN["train/t"])
    key = f"train/{kind}/{'weighted' if weighted else 'plain'}"
    x = scheduler.add_noise(X0, NOISES[0], t, Y)
    output = toy_network(scheduler.scale_model_input(x, t), t)
    errors = (scheduler.training_target(X0, NOISES[0], t, Y) - output) ** 2
    losses = scheduler.loss_weights(t, weighted) * errors.mean((1, 2, 3))
    assert relative_error(x, GOLDEN[f"{key}/z_t"]) < 1e-14
    assert ((losses / torch.from_numpy(GOLDEN[f"{key}/mse"])) - 1).abs().max() < 1e-9
    assert relative_error(scheduler.predict_original(output, t, x, Y), GOLDEN[f"{key}/pred_z0"]) < 1e-9


# ---------------------------------------------------------------- the schedule


def test_the_schedules_are_those_of_the_released_models():
    fifteen = [.02, .117165, .176305, .233629, .291574, .351009, .412356, .475858, .541672, .60991, .680658, .753985,
               .829951, .908606, .99]  # fmt: skip
    assert ResShiftScheduler().sqrt_etas.tolist() == pytest.approx(fifteen, abs=6e-7)
    assert ResShiftScheduler(**FOUR).sqrt_etas.tolist() == pytest.approx([0.1, 0.520096, 0.761382, 0.99], abs=6e-7)


@pytest.mark.parametrize("kappa", [0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("steps", [2, 4, 15, 100])
def test_noise_rises_from_the_least_level_to_the_last_one(steps, kappa):
    scheduler = ResShiftScheduler(steps, min_noise_level=0.1, kappa=kappa)
    roots, etas = scheduler.sqrt_etas, scheduler.etas
    assert roots[0] * max(kappa, 1) == pytest.approx(0.1, rel=1e-15)
    assert roots[-1] == pytest.approx(0.99, rel=1e-15) and (roots.diff() > 0).all()
    assert (etas.diff().sum() + etas[0]).item() == pytest.approx(0.99**2, rel=1e-14)
    assert len(roots) == steps == len(scheduler) == len(scheduler.timesteps)


# ---------------------------------------------------------------- a step


def by_hand(scheduler, i, j, x, y, output, z):
    """The equations as the sheet of the method writes them, for every kind of prediction."""
    config, k, s = scheduler.config, scheduler.config.kappa, scheduler.sqrt_etas[i]
    eta, before = s**2, (scheduler.sqrt_etas[j] ** 2 if j is not None else torch.zeros(()).double())
    clean = {
        "sample": lambda: output,
        "residual": lambda: y - output,
        "epsilon": lambda: (x - k * s * output - eta * y) / (1 - eta),
        "epsilon_scale": lambda: (x - output - eta * y) / (1 - eta),
    }[config.prediction_type]()
    clean = clean.clamp(-config.clip_sample_range, config.clip_sample_range) if config.clip_sample else clean
    a = eta - before
    return before / eta * x + a / eta * clean + (k**2 * before / eta * a).sqrt() * z, clean


@pytest.mark.parametrize("steps", [None, 5, 7, 2, 1, [14, 10, 5, 0], [14, 3]])
@pytest.mark.parametrize("clip", [None, 1.0, 0.4])
@pytest.mark.parametrize("kind", TYPES)
def test_a_step_is_the_paper_s_equation(kind, clip, steps):
    scheduler = ResShiftScheduler(
        kappa=1.5,
        prediction_type=kind,
        latent_space=False,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )
    scheduler.set_timesteps(**({"timesteps": steps} if isinstance(steps, list) else {"num_inference_steps": steps}))
    times = scheduler.timesteps.tolist()
    x = Y + 1.5 * scheduler.sqrt_etas[times[0]] * NOISES[0]
    outs = run(scheduler)
    for index, (i, j) in enumerate(zip(times, [*times[1:], None], strict=True)):
        output = toy_network(x / (3 * 1.5 * scheduler.sqrt_etas[i] + 1), i)
        x, clean = by_hand(scheduler, i, j, x, Y, output, NOISES[index + 1])
        assert relative_error(outs[index].prev_sample, x) < 1e-11
        assert relative_error(outs[index].pred_original_sample, clean) < 1e-11
    assert torch.equal(outs[-1].prev_sample, outs[-1].pred_original_sample)


@pytest.mark.parametrize("config", [{}, {"kappa": 0.5}, FOUR])
def test_the_network_is_given_inputs_of_about_unit_size(config):
    x = noise(2, 3, 4, 4)
    for times in (torch.tensor([0, 3]), torch.tensor([2])):
        root = ResShiftScheduler(**config).sqrt_etas[times].reshape(-1, 1, 1, 1)
        k = config.get("kappa", 2.0)
        for settings, expected in [
            ({}, x / (root**2 * k**2 + 1).sqrt()),
            ({"latent_space": False}, x / (3 * k * root + 1)),
            ({"normalize_input": False}, x),
        ]:
            scaled = ResShiftScheduler(**config, **settings).scale_model_input(x, times)
            assert relative_error(scaled, expected) < 1e-15
    scheduler = ResShiftScheduler()
    assert torch.equal(scheduler.scale_model_input(x, 3), scheduler.scale_model_input(x, torch.tensor(3)))
    assert torch.equal(scheduler.scale_model_input(x, 0.0), scheduler.scale_model_input(x, 0))
    assert scheduler.scale_model_input(x.half(), 3).dtype == torch.float16


@pytest.mark.parametrize("steps", [None, 5, 2, 1])
@pytest.mark.parametrize("kind", TYPES)
def test_a_network_that_knows_the_answer_restores_it(kind, steps):
    scheduler = ResShiftScheduler(prediction_type=kind)
    scheduler.set_timesteps(steps)
    x = scheduler.initial_sample(Y, NOISES[0])
    for index, t in enumerate(scheduler.timesteps):
        root = scheduler.sqrt_etas[t]
        scaled = x - X0 - root**2 * (Y - X0)  # k s noise
        output = {"sample": X0, "residual": Y - X0, "epsilon": scaled / (2 * root), "epsilon_scale": scaled}[kind]
        x = scheduler.step(output, t, x, Y, variance_noise=NOISES[index + 1]).prev_sample
    assert torch.equal(x, X0) if kind == "sample" else relative_error(x, X0) < 1e-12


@pytest.mark.parametrize("kind", TYPES[1:])
def test_one_network_gives_one_result_whatever_it_is_said_to_predict(kind):
    outs = []
    for each in ("sample", kind):
        scheduler = ResShiftScheduler(prediction_type=each, normalize_input=False)
        scheduler.set_timesteps(6)

        def network(x, t, scheduler=scheduler, each=each):
            clean, root = toy_network(x, t), scheduler.sqrt_etas[t]
            scaled = x - clean - root**2 * (Y - clean)
            return {
                "sample": clean, "residual": Y - clean, "epsilon": scaled / (2 * root), "epsilon_scale": scaled
            }[each]  # fmt: skip

        outs.append(run(scheduler, network)[-1].prev_sample)
    assert relative_error(outs[1], outs[0]) < 1e-11


def test_the_mean_of_a_step_is_the_chain_s_mean_at_the_next_time():
    scheduler = ResShiftScheduler()
    scheduler.set_timesteps()
    zero = torch.zeros_like(X0)
    for i in range(14, 0, -1):
        x = scheduler.add_noise(X0, zero, torch.tensor([i]), Y)
        mean = scheduler.step(X0, i, x, Y, variance_noise=zero).prev_sample
        assert relative_error(mean, scheduler.add_noise(X0, zero, torch.tensor([i - 1]), Y)) < 1e-14


@pytest.mark.parametrize("steps", [None, 5])
def test_the_variance_of_a_step_is_the_chain_s_at_the_next_time(steps):
    scheduler, one = ResShiftScheduler(kappa=1.7), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    for i, j in zip(times, times[1:], strict=False):
        carried = scheduler.step(0 * one, i, one, variance_noise=0 * one).prev_sample.item()
        added = scheduler.step(0 * one, i, 0 * one, variance_noise=one).prev_sample.item()
        variance = carried**2 * 1.7**2 * scheduler.etas[i] + added**2
        assert variance.item() == pytest.approx(1.7**2 * scheduler.etas[j].item(), rel=1e-13)


def test_the_chain_keeps_its_spread_in_a_long_run_of_samples():
    scheduler, x0, y = ResShiftScheduler(), torch.zeros(1, 1, 200, 200).double(), torch.ones(1, 1, 200, 200).double()
    scheduler.set_timesteps()
    x = scheduler.add_noise(x0, noise(*x0.shape), torch.tensor([14]), y)
    for t in scheduler.timesteps[:8]:
        x = scheduler.step(x0, t, x, y, generator=torch.Generator().manual_seed(int(t))).prev_sample
    eta = scheduler.etas[6].item()
    assert x.mean().item() == pytest.approx(eta, abs=0.03) and x.std().item() == pytest.approx(2 * eta**0.5, rel=0.02)


# ---------------------------------------------------------------- times


def test_fewer_steps_are_respaced_as_in_the_program_and_start_with_less_noise():
    scheduler = ResShiftScheduler()
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [12, 9, 6, 3, 0] and scheduler.num_inference_steps == 5
    assert scheduler.init_noise_sigma == pytest.approx(2 * 0.829951, abs=1e-6)
    assert torch.equal(scheduler.initial_sample(Y, NOISES[0]), Y + scheduler.init_noise_sigma * NOISES[0])
    scheduler.set_timesteps()
    assert scheduler.timesteps.tolist() == list(range(14, -1, -1)) and scheduler.num_inference_steps == 15
    assert scheduler.init_noise_sigma == pytest.approx(1.98)
    for steps in range(1, 16):
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps.tolist()
        assert times == [int(15 / steps * j) for j in range(steps)][::-1] and times[-1] == 0
        assert len(set(times)) == steps and (times[0] < 14 or steps == 15)


def test_given_times_may_start_at_the_noisiest_one():
    scheduler = ResShiftScheduler()
    for given in ([14, 9, 4, 0], torch.tensor([14, 9, 4, 0])):
        scheduler.set_timesteps(timesteps=given)
        assert scheduler.timesteps.tolist() == [14, 9, 4, 0]
        assert scheduler.init_noise_sigma == pytest.approx(1.98)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, r"`num_inference_steps` must be a whole number in \[1, 15\]"),
        ({"num_inference_steps": 16}, r"`num_inference_steps` must be a whole number in \[1, 15\]"),
        ({"num_inference_steps": 2.5}, "whole number"),
        ({"num_inference_steps": 3, "timesteps": [5, 3, 1]}, "pass one"),
        ({"timesteps": []}, "at least one"),
        ({"timesteps": [0, 5]}, "fall strictly"),
        ({"timesteps": [15, 5]}, r"Times must lie in \[0, 14\]"),
        ({"timesteps": [14, -1]}, r"Times must lie in \[0, 14\]"),
    ],
    ids=str,
)
def test_impossible_times_are_refused_with_the_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResShiftScheduler().set_timesteps(**arguments)


def test_times_live_on_the_device_that_was_asked_for():
    scheduler = ResShiftScheduler()
    for device in ("meta", torch.device("meta"), "cpu", None):
        scheduler.set_timesteps(5, device=device)
        assert scheduler.timesteps.device.type == (str(device) if device else "cpu")


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", TYPES)
def test_training_arguments_keep_their_dtype_and_every_sample_has_its_time(kind, dtype):
    scheduler, times = ResShiftScheduler(prediction_type=kind), torch.tensor([0, 14, 7, 3])
    x0, y, z = X0.to(dtype), Y.to(dtype), NOISES[0].to(dtype)
    made = [getattr(scheduler, name)(x0, z, times, y) for name in ("add_noise", "training_target")]
    output = toy_network(made[0], times).to(dtype)
    made.append(scheduler.predict_original(output, times, made[0], y))
    made.append(scheduler.scale_model_input(made[0], times))
    for k in range(4):
        one = slice(k, k + 1)
        for index, name in enumerate(("add_noise", "training_target")):
            assert torch.equal(getattr(scheduler, name)(x0[one], z[one], times[one], y[one]), made[index][one])
        single = scheduler.predict_original(output[one], times[one], made[0][one], y[one])
        assert torch.equal(single, made[2][one])
    for tensor in made:
        assert tensor.dtype == dtype and tensor.shape == X0.shape and torch.isfinite(tensor).all()
    shared = scheduler.add_noise(x0, z, times[2:3], y)
    assert torch.equal(shared[2], made[0][2])
    assert torch.equal(scheduler.add_noise(x0, z, times[2], y), shared)
    root = scheduler.sqrt_etas[times].reshape(-1, 1, 1, 1)
    expected = X0 + root**2 * (Y - X0) + 2 * root * NOISES[0]
    assert relative_error(made[0].double(), expected) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", TYPES)
def test_a_network_that_hits_its_target_predicts_the_clean_picture(kind):
    scheduler, times = ResShiftScheduler(prediction_type=kind), torch.tensor([0, 14, 7, 3])
    x = scheduler.add_noise(X0, NOISES[0], times, Y)
    target = scheduler.training_target(X0, NOISES[0], times, Y)
    assert relative_error(scheduler.predict_original(target, times, x, Y), X0) < 1e-13


def test_the_prediction_in_training_is_the_one_of_a_step_and_passes_gradients():
    scheduler = ResShiftScheduler(prediction_type="epsilon", clip_sample=True)
    scheduler.set_timesteps()
    output = toy_network(X0, 5).requires_grad_()
    clean = scheduler.predict_original(output, torch.tensor([5]), Y, Y)
    assert relative_error(clean, scheduler.step(output, 5, Y, Y).pred_original_sample) < 1e-14
    clean.sum().backward()
    assert output.grad is not None and output.grad.abs().max() > 0


def test_loss_weights_are_one_a_sample_and_finite():
    for kind in TYPES:
        scheduler = ResShiftScheduler(prediction_type=kind)
        plain, weighted = (scheduler.loss_weights(torch.arange(15), flag) for flag in (False, True))
        assert plain.shape == weighted.shape == (15,) and plain.dtype == torch.float64
        expected = 1 / (4 * scheduler.etas) if kind == "epsilon_scale" else torch.ones(15).double()
        assert torch.allclose(plain, expected, rtol=1e-14)
        assert torch.isfinite(weighted).all() and (weighted > 0).all()


# ---------------------------------------------------------------- the contract with diffusers


@pytest.mark.parametrize("loaded", [False, True], ids=["from_config", "from_pretrained"])
def test_every_argument_of_the_config_survives(loaded, tmp_path):
    config = dict(
        num_train_timesteps=9, min_noise_level=0.1, kappa=1.5, power=0.5, etas_end=0.95, prediction_type="residual",
        normalize_input=False, latent_space=False, clip_sample=True, clip_sample_range=0.8,
    )  # fmt: skip
    scheduler = ResShiftScheduler(**config)
    scheduler.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert stored["_class_name"] == "ResShiftScheduler"
    copy = ResShiftScheduler.from_pretrained(tmp_path) if loaded else ResShiftScheduler.from_config(scheduler.config)
    assert {key: copy.config[key] for key in config} == config
    outs = []
    for s in (scheduler, copy):
        s.set_timesteps(5)
        outs.append(run(s)[-1].prev_sample)
    assert torch.equal(*outs)
    assert ResShiftScheduler.from_config(scheduler.config, kappa=3.0).config.kappa == 3.0


@pytest.mark.parametrize(
    "config",
    [
        diffusers.DDIMScheduler().config,
        diffusers.FlowMatchEulerDiscreteScheduler().config,
        diffusers.EDMEulerScheduler().config,
        RDDMScheduler().config,
    ],
    ids=["ddim", "flow", "edm", "rddm"],
)
def test_a_model_that_was_not_trained_with_it_is_refused(config):
    with pytest.raises(ValueError, match="needs a network that was trained with residual shifting"):
        ResShiftScheduler.from_config(config)


def test_other_schedulers_refuse_its_models(tmp_path):
    scheduler = ResShiftScheduler()
    scheduler.save_pretrained(tmp_path)
    for config in (scheduler.config, ResShiftScheduler.load_config(tmp_path)):
        for cls in (BDIAScheduler, RDDMScheduler):
            with pytest.raises(ValueError, match="noise schedule of .* is not one of"):
                cls.from_config(config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", TYPES)
def test_samples_keep_their_dtype_and_inputs_their_values(kind, dtype):
    scheduler, output = ResShiftScheduler(prediction_type=kind), noise(2, 3, 4, 4, dtype=dtype)
    y = noise(2, 3, 4, 4, seed=1, dtype=dtype)
    scheduler.set_timesteps()
    x = scheduler.initial_sample(y, noise(2, 3, 4, 4, seed=2))
    for t in scheduler.timesteps:
        before = x.clone(), output.clone(), y.clone()
        result = scheduler.step(output, t, x, y, generator=torch.Generator().manual_seed(0))
        assert all(torch.equal(a, b) for a, b in zip((x, output, y), before, strict=True))
        assert x.dtype == result.prev_sample.dtype == result.pred_original_sample.dtype == dtype
        x = result.prev_sample
    assert torch.isfinite(x).all()


def test_half_precision_states_lose_nothing_between_steps():
    outs = []
    for dtype in (torch.float64, torch.bfloat16):
        scheduler = ResShiftScheduler()
        scheduler.set_timesteps()
        y = Y.bfloat16().to(dtype)
        start = scheduler.initial_sample(y, NOISES[0].to(dtype)).bfloat16().to(dtype)
        outs.append(run(scheduler, lambda x, t: toy_network(X0, t).bfloat16(), y, start, stop=12)[-1].prev_sample)
    assert relative_error(outs[1].double(), outs[0]) < 0.004  # one rounding, at the end


def test_values_that_the_caller_changed_are_taken_as_they_are():
    outs = []
    for dtype in (torch.float64, torch.float32):
        scheduler = ResShiftScheduler()
        scheduler.set_timesteps(timesteps=[14, 7, 0])
        x = NOISES[0].to(dtype)
        for t, z in zip(scheduler.timesteps[:2], NOISES[1:], strict=False):
            x = scheduler.step(toy_network(X0, t), t, x, variance_noise=z).prev_sample.clone()
            x[..., :4] = 0.25
        outs.append(x.double())
    assert relative_error(outs[1], outs[0]) < 1e-6


def test_a_batch_is_so_many_single_samples():
    scheduler = ResShiftScheduler()
    scheduler.set_timesteps(6)
    generators = [torch.Generator().manual_seed(k) for k in range(4)]
    together = run(scheduler, generator=generators)[-1].prev_sample
    for k in range(4):
        scheduler.set_timesteps(6)
        start = scheduler.initial_sample(Y, NOISES[0])[k : k + 1]
        alone = run(scheduler, degraded=Y[k : k + 1], start=start, generator=torch.Generator().manual_seed(k))
        assert torch.equal(alone[-1].prev_sample, together[k : k + 1])


@pytest.mark.parametrize("views", [True, False], ids=["views", "numbers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_runs_repeat_to_the_bit_even_after_an_interrupted_one(views, dtype):
    scheduler, outs = ResShiftScheduler(prediction_type="residual"), []
    for stop in (None, None, 3, None, 5, "again", None):
        if stop != "again":
            scheduler.set_timesteps(7)
        made = run(scheduler, degraded=Y.to(dtype), views=views, stop=stop if isinstance(stop, int) else None)
        outs += [made[-1].prev_sample] if not isinstance(stop, int) else []
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert scheduler.step_index == 7 and scheduler.begin_index is None


def test_a_run_may_begin_in_the_middle():
    scheduler = ResShiftScheduler()
    scheduler.set_timesteps(7)
    scheduler.set_begin_index(3)
    x, outs = NOISES[0], []
    for t, z in zip(scheduler.timesteps[3:], NOISES[1:], strict=False):
        x = scheduler.step(toy_network(x, t), t, x, variance_noise=z).prev_sample
    outs.append(x)
    assert scheduler.begin_index == 3 and scheduler.step_index == 7
    scheduler.set_timesteps(timesteps=scheduler.timesteps[3:])
    assert scheduler.begin_index is None
    outs.append(run(scheduler, lambda x, t: toy_network(x * (4 * scheduler.etas[t] + 1).sqrt(), t), start=NOISES[0]))
    assert relative_error(outs[1][-1].prev_sample, outs[0]) < 1e-13


def test_a_time_between_those_of_the_run_leads_to_the_next_one():
    scheduler = ResShiftScheduler()
    scheduler.set_timesteps(timesteps=[14, 8, 2])
    output, z = toy_network(X0, 3), NOISES[1]
    out = scheduler.step(output, 11, NOISES[0], Y, variance_noise=z).prev_sample
    assert scheduler.step_index == 1
    assert relative_error(out, by_hand(scheduler, 11, 8, NOISES[0], Y, output, z)[0]) < 1e-14


def test_noise_comes_from_the_generator_and_none_is_drawn_for_the_last_step():
    generator, drawn = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    scheduler, x = ResShiftScheduler(**FOUR), NOISES[0]
    scheduler.set_timesteps()
    for index, t in enumerate(scheduler.timesteps):
        z = torch.randn(X0.shape, generator=drawn, dtype=torch.float64) if index < 3 else None
        output = toy_network(x, t)
        expected = scheduler.step(output, t, x, variance_noise=z).prev_sample
        x = scheduler.step(output, t, x, generator=generator).prev_sample
        assert torch.equal(x, expected)
    assert torch.equal(generator.get_state(), drawn.get_state())


def test_a_tuple_holds_what_the_output_holds():
    scheduler = ResShiftScheduler()
    scheduler.set_timesteps()
    outs = [scheduler.step(X0, 14, Y, variance_noise=X0, return_dict=flag) for flag in (False, True)]
    assert isinstance(outs[0], tuple) and isinstance(outs[1], ResShiftSchedulerOutput)
    assert torch.equal(outs[0][0], outs[1].prev_sample) and torch.equal(outs[0][1], outs[1].pred_original_sample)


@pytest.mark.parametrize("shape", [(2, 5), (1, 16, 8), (2, 3, 4, 4, 4)], ids=str)
def test_samples_of_any_shape_are_stepped(shape):
    scheduler, y = ResShiftScheduler(prediction_type="epsilon_scale"), noise(*shape)
    scheduler.set_timesteps(4)
    outs = run(scheduler, lambda x, t: 0.1 * x, y, noise(*shape, seed=1), generator=torch.Generator().manual_seed(0))
    assert outs[-1].prev_sample.shape == shape
    assert scheduler.add_noise(y, y, torch.tensor([3]), y).shape == shape


def test_it_works_under_inference_mode_and_passes_gradients_outside():
    scheduler = ResShiftScheduler(prediction_type="residual")
    scheduler.set_timesteps(5)
    expected = run(scheduler)[-1].prev_sample
    with torch.inference_mode():
        scheduler.set_timesteps(5)
        assert torch.equal(run(scheduler)[-1].prev_sample, expected)
    scheduler.set_timesteps(5)
    y = Y.clone().float().requires_grad_()
    run(scheduler, degraded=y)[-1].prev_sample.sum().backward()
    assert torch.isfinite(y.grad).all() and y.grad.abs().max() > 0


class CountReads(TorchDispatchMode):
    """Counts how often a tensor's value is brought to the host, which on an accelerator stalls the queue."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", TYPES)
def test_no_step_reads_a_value_back_from_the_device(kind):
    scheduler = ResShiftScheduler(prediction_type=kind, clip_sample=True)
    scheduler.set_timesteps()
    with CountReads() as counter:
        x = scheduler.initial_sample(Y.float(), NOISES[0].float())
        for t in scheduler.timesteps:
            output = 0.5 * scheduler.scale_model_input(x, t)
            x = scheduler.step(output, t, x, Y, generator=torch.Generator().manual_seed(0)).prev_sample
    assert counter.reads == 0


def test_a_run_needs_no_value_of_any_tensor():
    scheduler, y = ResShiftScheduler(prediction_type="epsilon"), torch.empty(2, 3, 4, 4, device="meta")
    scheduler.set_timesteps(5, device="meta")  # tensors without values: reading one is an error
    scheduler.set_begin_index(0)
    x = scheduler.initial_sample(y, y)
    for t in scheduler.timesteps:
        x = scheduler.step(scheduler.scale_model_input(x, t), t, x, y, variance_noise=y).prev_sample
    assert scheduler.step_index == 5
    times = torch.zeros(2, device="meta", dtype=torch.int64)
    assert scheduler.add_noise(y, y, times, y).device.type == scheduler.loss_weights(times).device.type == "meta"


@pytest.fixture
def no_remote_code():
    """Forget the folder of remote code that an earlier test used, and the one that this test uses."""

    def forget():
        for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
            del sys.modules[name]

    forget()
    yield
    forget()


def test_a_repository_that_ships_the_file_loads_it_as_remote_code(no_remote_code, tmp_path, monkeypatch):
    pixel = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    diffusers.DDPMPipeline(pixel, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "repo")
    ResShiftScheduler(**FOUR).save_pretrained(tmp_path / "repo" / "scheduler")
    for module in (scheduling_resshift, carried_state, noise_schedule):
        shutil.copy(module.__file__, tmp_path / "repo" / "scheduler")
    index = tmp_path / "repo" / "model_index.json"
    entry = ["scheduling_resshift", "ResShiftScheduler"]
    index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": entry}))
    modules = tmp_path / "modules"
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(modules)
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "repo", trust_remote_code=True)
    assert type(pipe.scheduler).__name__ == "ResShiftScheduler" and pipe.scheduler.config.num_train_timesteps == 4
    assert type(pipe.scheduler).__module__ != scheduling_resshift.__name__
    pipe.scheduler.set_timesteps()
    ours = ResShiftScheduler(**FOUR)
    ours.set_timesteps()
    assert torch.equal(run(pipe.scheduler)[-1].prev_sample, run(ours)[-1].prev_sample)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "xstart"}, "`prediction_type` must be one of 'sample', 'residual', 'epsilon'"),
        ({"num_train_timesteps": 1}, "`num_train_timesteps` must be a whole number from 2 on, got 1"),
        ({"num_train_timesteps": 4.5}, "`num_train_timesteps` must be a whole number"),
        ({"kappa": 0}, "`kappa` must be a number above 0, got 0"),
        ({"min_noise_level": -0.1}, "`min_noise_level` must be a number above 0"),
        ({"power": math.nan}, "`power` must be a number above 0"),
        ({"clip_sample_range": 0.0}, "`clip_sample_range` must be a number above 0"),
        ({"etas_end": 1.0}, "`etas_end` must lie between the first"),
        ({"etas_end": 0.02}, "`etas_end` must lie between the first"),
        ({"min_noise_level": 3.0}, "`etas_end` must lie between the first"),
    ],
    ids=str,
)
def test_an_impossible_config_is_refused_with_the_reason(config, message):
    with pytest.raises(ValueError, match=message):
        ResShiftScheduler(**config)


def test_an_impossible_step_is_refused_with_the_reason():
    scheduler, x = ResShiftScheduler(prediction_type="epsilon"), X0
    with pytest.raises(ValueError, match="`set_timesteps` before `step`"):
        scheduler.step(x, 14, x, Y)
    scheduler.set_timesteps()
    for arguments, message in [
        ((x[:1], 14, x, Y), "`model_output` must have the shape of `sample`"),
        ((x, 14, x, Y[..., :4]), "`degraded` must have the shape of the sample"),
        ((x, 14, x, None), '"epsilon" is relative to the degraded picture: pass `degraded`'),
        ((x, 15, x, Y), r"`timestep` must be a whole number in \[0, 14\], got 15"),
        ((x, 3.5, x, Y), "`timestep` must be a whole number"),
        ((x, torch.tensor([3, 2]), x, Y), "one time for the whole batch, got 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            scheduler.step(*arguments)
    with pytest.raises(ValueError, match="either `generator` or `variance_noise`"):
        scheduler.step(x, 14, x, Y, generator=torch.Generator(), variance_noise=x)
    with pytest.raises(ValueError, match="`variance_noise` must have the shape"):
        scheduler.step(x, 14, x, Y, variance_noise=x[:1])
    assert scheduler.step_index is None  # nothing was begun


def test_impossible_training_arguments_are_refused_with_the_reason():
    scheduler, times = ResShiftScheduler(prediction_type="residual"), torch.tensor([0, 1, 2, 3])
    for method in (scheduler.add_noise, scheduler.training_target):
        with pytest.raises(ValueError, match="`noise` must have the shape"):
            method(X0, NOISES[0, :2], times, Y)
        with pytest.raises(ValueError, match="`degraded` must have the shape"):
            method(X0, NOISES[0], times, Y[..., :2])
        with pytest.raises(ValueError, match="one time or 4, one a sample, got 3"):
            method(X0, NOISES[0], times[:3], Y)
        with pytest.raises(ValueError, match=r"`timesteps` must lie in \[0, 14\]"):
            method(X0, NOISES[0], times + 12, Y)
    with pytest.raises(ValueError, match=r"`timesteps` must lie in \[0, 14\]"):
        scheduler.loss_weights(times - 1)
    with pytest.raises(ValueError, match="pass `degraded`"):
        scheduler.predict_original(X0, times, X0)
    with pytest.raises(ValueError, match="`noise` must have the shape"):
        scheduler.initial_sample(Y, NOISES[0, :1])
