"""RDDMScheduler: the authors' programs, the method's properties, DDIM as a special case, and its own contract.

As a scheduler for stock models it is one of those in `test_conformance.py`, too; here is what its own models need.
"""

import json
import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.schedulers.scheduling_bdia import BDIAScheduler
from sfumato.schedulers.scheduling_rddm import RDDMScheduler, RDDMSchedulerOutput


def load(name):
    with np.load(Path(__file__).parent.parent / "golden" / f"{name}.npz") as archive:
        return {key: archive[key] for key in archive.files}


GOLDEN, DDIM = load("rddm"), load("rddm_from_ddim")
META, DDIM_META = (json.loads(str(golden["meta"])) for golden in (GOLDEN, DDIM))
CASES = [name for name in META if f"{name}/f64/traj" in GOLDEN]
DDIM_CASES = [name for name in DDIM_META if f"{name}/traj" in DDIM]
X0, Y = torch.from_numpy(GOLDEN["x0"]), torch.from_numpy(GOLDEN["x_input"])
NOISES = torch.from_numpy(GOLDEN["noises"])
TWO = ["pred_res_noise", "pred_res_add_noise", "pred_x0_noise", "pred_x0_add_noise"]
OBJECTIVES = [*TWO, "pred_noise", "pred_res"]
STOCK_TYPES = ["epsilon", "sample", "v_prediction"]
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def toy_network(x, t):
    t = torch.as_tensor(t).double()
    t = t.reshape(-1, 1, 1, 1) if t.ndim else t
    return 0.3 * x * torch.cos(t / 5) + 0.1 * torch.sin(3 * x + t / 3)


def toy_heads(objective, x, t, degraded):
    """The networks of the reference cases."""
    first = toy_network(x, t)
    second = toy_network(x if degraded is None else x + 0.5 * degraded, t + 7)
    return {"pred_res": (first,), "pred_noise": (second,)}.get(objective, (first, second))


def relative_error(out, reference):
    reference = torch.as_tensor(reference)
    return float((out.detach() - reference).abs().max() / reference.abs().max())


def make(**config):
    return RDDMScheduler(**config)


def of_stock(stock=None, **config):
    return RDDMScheduler.from_config((stock or diffusers.DDIMScheduler(**SD, clip_sample=False)).config, **config)


def run(scheduler, degraded=Y, start=None, views=True, stop=None, eta=0.0, network=None, **kwargs):
    """The loop of a pipeline; gives the states, the first one included."""
    objective = scheduler.config.prediction_type
    network = network or (lambda x, t: toy_heads(objective, x, t, degraded))
    states = [scheduler.initial_sample(degraded, NOISES[0]) if start is None else start]
    for index, t in enumerate(scheduler.timesteps[:stop]):
        t = t if views else t.item()
        given = kwargs or {"variance_noise": NOISES[min(index + 1, len(NOISES) - 1)]}
        states.append(scheduler.step(network(states[-1], t), t, states[-1], degraded, eta=eta, **given).prev_sample)
    return states


# ---------------------------------------------------------------- the authors' programs


@pytest.mark.parametrize("tables", ["f64", "f32coef"])
@pytest.mark.parametrize("name", CASES)
def test_every_step_gives_the_numbers_of_the_authors_program(name, tables):
    case, reference = META[name], GOLDEN[f"{name}/{tables}/traj"]
    scheduler = make(num_train_timesteps=case["T"], sum_scale=case["sum_scale"], prediction_type=case["objective"])
    scheduler.set_timesteps(case["steps"])
    assert scheduler.timesteps.tolist() == GOLDEN[f"{name}/model_t"][:, 0].tolist()
    states = run(scheduler, Y if case["cond"] else None, eta=case["eta"])
    states = states[len(states) - len(reference) :]  # of unconditional runs, the first state is not there
    for state, expected in zip(states, reference, strict=True):
        assert relative_error(state, expected) < (1e-9 if tables == "f64" else 1e-6)


def test_the_tables_are_those_of_the_authors_program():
    scheduler, prefix = make(num_train_timesteps=20, sum_scale=0.01), "posterior_restore_T20/f64"
    for name in ("alphas_cumsum", "betas2_cumsum", "betas_cumsum"):
        assert relative_error(getattr(scheduler, name), GOLDEN[f"{prefix}/{name}"]) < 1e-14
        assert getattr(scheduler, name).dtype == torch.float64


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_losses_are_those_of_the_authors_program(objective):
    scheduler, t = make(prediction_type=objective), torch.from_numpy(GOLDEN["train/t"])
    x = scheduler.add_noise(X0, NOISES[0], t, Y)
    assert relative_error(x, GOLDEN["train/x_t"]) < 1e-14
    pairs = zip(
        scheduler.training_target(X0, NOISES[0], t, Y), toy_heads(objective, x, t, Y), strict=True
    )  # one a head
    errors = [target - output for target, output in pairs]
    losses = {"l1": sum(e.abs().mean() for e in errors), "l2": sum((e**2).mean() for e in errors)}
    for kind, loss in losses.items():
        assert float(loss) == pytest.approx(float(GOLDEN[f"train/{objective}/{kind}"]), rel=1e-12)


def test_residual_first_then_noise_is_the_authors_path_independent_sampler():
    scheduler = make(alpha_schedule=None, beta_schedule="linear")
    scheduler.set_timesteps(10)
    states, reference = [NOISES[0]], GOLDEN["pathind_s10/traj"]
    for sweep in (scheduler.step_residual, scheduler.step_noise):
        for t in scheduler.timesteps:
            told = [float(time) for time in scheduler.network_times(t.reshape(1))]
            row = len(states) - 1
            of_program = [GOLDEN[f"pathind_s10/model_t_{head}"][row, 0] for head in ("res", "noise")]
            assert told == pytest.approx(of_program, rel=1e-5)  # float32 there
            x = states[-1]
            heads = toy_network(x, of_program[0]), toy_network(x, of_program[1] + 7)
            states.append(sweep(heads, t, x).prev_sample)
    for state, expected in zip(states[1:], reference, strict=True):
        assert relative_error(state, expected) < 1e-6


@pytest.mark.parametrize("name", DDIM_CASES)
def test_a_model_of_ddpm_is_sampled_as_by_the_authors_program(name):
    case, noises = DDIM_META[name], torch.from_numpy(DDIM["noises"])
    scheduler = of_stock(diffusers.DDIMScheduler(clip_sample=case["clip"]))
    scheduler.set_timesteps(10)
    x = noises[0]
    for index, t in enumerate(scheduler.timesteps):
        assert int(t) == 900 - 100 * index
        out = scheduler.step(
            toy_network(x, t) + 0.5 * x, t, x, eta=case.get("eta", 0.0),
            use_clipped_model_output=case.get("ucmo", False), variance_noise=noises[index + 1],
        )  # fmt: skip
        x = out.prev_sample
        assert relative_error(x, DDIM[f"{name}/traj"][index]) < 1e-5  # its tables are float32
        assert relative_error(out.pred_original_sample, DDIM[f"{name}/pred_x0"][index]) < 1e-5
    assert relative_error(scheduler.alphas_cumsum, DDIM[f"{name}/alphas_cumsum_res"]) < 2e-6
    assert relative_error(scheduler.betas_cumsum, DDIM[f"{name}/betas_cumsum_res"]) < 2e-6


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize("ratio", [None, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("kind", ["increased", "decreased", "average", "normal"])
def test_weights_are_those_of_the_paper_and_sum_up(kind, ratio):
    count, scale = 50, 0.25
    scheduler = make(
        num_train_timesteps=count, alpha_schedule=kind, beta_schedule=kind, alpha_ratio=ratio, beta_ratio=ratio,
        sum_scale=scale,
    )  # fmt: skip
    rising = np.arange(1, count + 1) if ratio is None else np.linspace(0, 1, count) ** ratio
    weights = {
        "increased": rising, "decreased": rising[::-1], "average": np.ones(count),
        "normal": np.exp(-np.linspace(-3, 3, count) ** 2 / 2),
    }[kind]  # fmt: skip
    expected = np.cumsum(weights / weights.sum())
    assert relative_error(scheduler.alphas_cumsum, expected) < 1e-14
    assert relative_error(scheduler.betas2_cumsum, scale * expected) < 1e-14
    assert torch.equal(scheduler.betas_cumsum, scheduler.betas2_cumsum.sqrt())
    assert scheduler.alphas_cumsum[-1] == pytest.approx(1) and scheduler.alphas_cumsum.max() <= 1
    assert scheduler.betas2_cumsum[-1] == pytest.approx(scale)
    assert (scheduler.alphas_cumsum.diff() >= 0).all() and (scheduler.betas2_cumsum.diff() >= 0).all()


def test_the_two_schedules_have_ratios_of_their_own():
    scheduler = make(alpha_ratio=2.0, beta_ratio=3.0)
    assert torch.equal(scheduler.alphas_cumsum, make(alpha_ratio=2.0).alphas_cumsum)
    assert torch.equal(scheduler.betas_cumsum, make(beta_ratio=3.0).betas_cumsum)
    assert not torch.equal(scheduler.betas_cumsum, make(beta_ratio=2.0).betas_cumsum)


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_a_run_begins_at_the_degraded_picture_with_the_noise_of_the_last_time(scale):
    scheduler = make(sum_scale=scale)
    assert scheduler.init_noise_sigma == pytest.approx(scheduler.betas_cumsum[-1].item())
    assert torch.equal(scheduler.initial_sample(Y, NOISES[0]), Y + scale**0.5 * NOISES[0])
    assert torch.equal(scheduler.initial_sample(None, NOISES[0]), scale**0.5 * NOISES[0])
    assert (
        relative_error(
            scheduler.initial_sample(Y, NOISES[0]), scheduler.add_noise(X0, NOISES[0], torch.tensor([999]), Y)
        )
        < 1e-14
    )
    assert of_stock().init_noise_sigma == 1.0


# ---------------------------------------------------------------- times


def test_times_are_the_truncated_ones_of_the_program():
    scheduler = make()
    for steps, times in [(5, [999, 799, 599, 399, 199]), (7, [999, 856, 713, 570, 427, 284, 141]), (1, [999])]:
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == times and scheduler.num_inference_steps == steps
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        times = [int(time) for time in torch.linspace(-1, 999, steps + 1).tolist()]
        assert scheduler.timesteps.tolist() == times[:0:-1]
    scheduler.set_timesteps()
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))
    scheduler.set_timesteps(timesteps=[950, 30, 2])
    assert scheduler.timesteps.tolist() == [950, 30, 2]


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_the_grids_of_stock_are_there_too(spacing):
    scheduler = make(timestep_spacing=spacing)
    stock = diffusers.DDIMScheduler(timestep_spacing=spacing)
    for steps in (1, 5, 13):
        for s in (scheduler, stock):
            s.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == stock.timesteps.tolist()


# ---------------------------------------------------------------- a step


def oracle(objective, x, degraded, a, b, eps=NOISES[5]):
    """The heads of a network that knows the clean picture and the noise."""
    res = degraded - X0
    return {
        "pred_res_noise": (res, eps), "pred_res_add_noise": (res, res + eps), "pred_x0_noise": (X0, eps),
        "pred_x0_add_noise": (X0, X0 + eps), "pred_noise": (eps,), "pred_res": (res,),
    }[objective]  # fmt: skip


@pytest.mark.parametrize("steps", [1, 5, 10, None])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_network_that_knows_residual_and_noise_restores_the_picture(objective, steps):
    scheduler = make(num_train_timesteps=40, prediction_type=objective, clip_sample=False)
    scheduler.set_timesteps(steps)
    x = scheduler.initial_sample(Y, NOISES[0])
    for index, t in enumerate(scheduler.timesteps):
        a, b = scheduler.alphas_cumsum[t], scheduler.betas_cumsum[t]
        eps = (x - (1 - a) * X0 - a * Y) / b
        out = scheduler.step(oracle(objective, x, Y, a, b, eps), t, x, Y, eta=0.6, variance_noise=NOISES[index % 9])
        if t < 39 or objective != "pred_noise":  # which can't know x0 where nothing of it is left
            assert relative_error(out.pred_original_sample, X0) < 1e-11
            assert relative_error(out.pred_residual, Y - X0) < 1e-11
            assert relative_error(out.pred_noise, eps) < 1e-11
            if index == 0 and steps == 10:
                expected = scheduler.add_noise(X0, NOISES[0], scheduler.timesteps[1:2], Y)
                free = scheduler.step(oracle(objective, x, Y, a, b, eps), t, x, Y).prev_sample
                assert relative_error(free, expected) < 1e-12
        x = out.prev_sample
    if steps != 1 or objective != "pred_noise":
        assert relative_error(x, X0) < 1e-6 if objective == "pred_noise" else relative_error(x, X0) < 1e-11


def test_clipping_lets_small_residuals_pass():
    y = X0.clamp(-1, 1) * 0.3
    x0, scheduler = y.clone().flip(-1), make()
    scheduler.set_timesteps(7)
    x = scheduler.initial_sample(y, NOISES[0])
    for t in scheduler.timesteps:
        x = scheduler.step((y - x0, NOISES[0]), t, x, y).prev_sample
    assert relative_error(x, x0) < 1e-14


def by_hand(scheduler, heads, x, y, t, s, eta, z):
    """The equations as the sheet of the method writes them."""
    a, b2 = scheduler.alphas_cumsum, scheduler.betas2_cumsum
    A, B = a[t], b2[t].sqrt()
    limit = scheduler.config.clip_sample_range

    def cl(v):
        return v.clamp(-limit, limit) if scheduler.config.clip_sample else v

    h, e, kind = heads[0], heads[-1], scheduler.config.prediction_type
    if kind in ("pred_res_noise", "pred_res_add_noise"):
        eps = e - h if "add" in kind else e
        res = cl(h)
        clean = cl(x - A * res - B * eps)
    elif kind in ("pred_x0_noise", "pred_x0_add_noise"):
        eps, res, clean = e - h if "add" in kind else e, cl(y - h), cl(h)
    elif kind == "pred_noise":
        rest = 1 - A if t < len(a) - 1 else 1e-6
        eps, clean = h, cl((x - A * y - B * h) / rest)
        res = cl(y - clean)
    else:
        res, clean = cl(h), cl(y - cl(h))
        eps = (x - y - (A - 1) * res) / B
    if s is None:
        return clean, clean, res, eps
    variance = eta * (b2[t] - b2[s]) * b2[s] / b2[t]
    out = x - (A - a[s]) * res - (B - (b2[s] - variance).sqrt()) * eps + variance.sqrt() * z
    return out, clean, res, eps


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [None, 1.0, 0.1])
@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_is_the_paper_s_equation(objective, conditional, clip, eta):
    scheduler = make(
        num_train_timesteps=200, prediction_type=objective, sum_scale=0.3, alpha_schedule="average", beta_ratio=2.0,
        clip_sample=clip is not None, clip_sample_range=clip or 1.0,
    )  # fmt: skip
    scheduler.set_timesteps(6)
    y = Y if conditional else None
    x, times = scheduler.initial_sample(y, NOISES[0]), scheduler.timesteps.tolist()
    for t, s, z in zip(times, [*times[1:], None], NOISES[1:], strict=False):
        heads = toy_heads(objective, x, t, y)
        out = scheduler.step(heads, t, x, y, eta=eta, variance_noise=z)
        expected = by_hand(scheduler, heads, x, Y if conditional else 0 * Y, t, s, eta, z)
        for part, by in zip(out.to_tuple(), expected, strict=True):
            assert relative_error(part, by) < 1e-12
        # the next one from a state of usual size: unclipped, the noise-only objective starts at 1e6
        x = scheduler.add_noise(X0, z, torch.tensor([s]), y) if s is not None else x
        scheduler.set_begin_index(0)


def test_eta_one_is_its_closed_form():
    scheduler = make(clip_sample=False)
    scheduler.set_timesteps(8)
    x, z = scheduler.initial_sample(Y, NOISES[0]), NOISES[1]
    for t, s in zip(scheduler.timesteps[:-1], scheduler.timesteps[1:], strict=True):
        res, eps = toy_heads("pred_res_noise", x, t, Y)
        a, b2 = scheduler.alphas_cumsum, scheduler.betas2_cumsum
        step = b2[t] - b2[s]
        expected = x - (a[t] - a[s]) * res - step / b2[t].sqrt() * eps + (step * b2[s]).sqrt() / b2[t].sqrt() * z
        x = scheduler.step((res, eps), t, x, Y, eta=1.0, variance_noise=z).prev_sample
        assert relative_error(x, expected) < 1e-14


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("config", [{}, {"alpha_ratio": 1.0, "beta_ratio": 1.0}])
def test_a_run_over_all_times_is_the_ancestral_sampler_and_unclipped_that_is_eta_one(objective, config):
    count = 25
    states = []
    for given in ({}, {"num_inference_steps": count}, {"timesteps": list(range(count - 1, -1, -1))}):
        scheduler = make(num_train_timesteps=count, prediction_type=objective, clip_sample=False, **config)
        scheduler.set_timesteps(**given)
        states.append(run(scheduler, eta=1.0 if "timesteps" in given else 0.0))
    assert torch.equal(states[0][-1], states[1][-1])
    for ancestral, skip in zip(states[0], states[2], strict=True):
        assert torch.isfinite(ancestral).all()
        if "res" in objective:  # else these networks do not say of one state what adds up to it
            assert relative_error(ancestral, skip) < 1e-9


def test_the_ancestral_sampler_is_the_paper_s_equation():
    scheduler = make(num_train_timesteps=20, sum_scale=0.5)
    scheduler.set_timesteps()
    x = scheduler.initial_sample(Y, NOISES[0])
    a, b2 = scheduler.alphas_cumsum, scheduler.betas2_cumsum
    for t in range(19, -1, -1):
        res, eps = toy_heads("pred_res_noise", x, t, Y)
        clean = (x - a[t] * res.clamp(-1, 1) - b2[t].sqrt() * eps).clamp(-1, 1)
        expected = clean
        if t > 0:
            da, db = a[t] - a[t - 1], b2[t] - b2[t - 1]
            mean = b2[t - 1] / b2[t] * x + (db * a[t - 1] - b2[t - 1] * da) / b2[t] * res.clamp(-1, 1)
            expected = mean + db / b2[t] * clean + (db * b2[t - 1] / b2[t]).sqrt() * NOISES[1]
        x = scheduler.step((res, eps), t, x, Y, variance_noise=NOISES[1]).prev_sample
        assert relative_error(x, expected) < 1e-12


@pytest.mark.parametrize("objective", ["pred_res_noise", "pred_res_add_noise"])
def test_residual_and_noise_may_be_removed_one_after_the_other(objective):
    scheduler = make(prediction_type=objective, clip_sample=False)
    scheduler.set_timesteps(9)
    res, eps = Y - X0, NOISES[0]
    heads = res, (res + eps if "add" in objective else eps)
    x, times = scheduler.initial_sample(Y, eps), scheduler.timesteps.tolist()
    for index, t in enumerate(times[:-1]):
        x = scheduler.step_residual(heads, t, x, Y).prev_sample
        expected = X0 + scheduler.alphas_cumsum[times[index + 1]] * res + eps  # all of the noise is still there
        assert relative_error(x, expected) < 1e-13
    scheduler.set_timesteps(9)
    x = scheduler.add_noise(X0, eps, scheduler.timesteps[:1], X0)  # no residual
    for index, t in enumerate(times[:-1]):
        x = scheduler.step_noise(heads, t, x, Y).prev_sample
        assert relative_error(x, X0 + scheduler.betas_cumsum[times[index + 1]] * eps) < 1e-13


def test_the_second_sweep_goes_on_from_the_unrounded_result_of_the_first():
    outs = []
    for dtype in (torch.float64, torch.bfloat16):
        scheduler = make()
        scheduler.set_timesteps(6)
        x = (Y + NOISES[0]).bfloat16().to(dtype)
        for sweep in (scheduler.step_residual, scheduler.step_noise):
            for t in scheduler.timesteps:
                x = sweep((0.1 * NOISES[1], 0.02 * NOISES[2] * math.cos(t)), t, x, Y).prev_sample
                if sweep == scheduler.step_noise and t < 500:
                    break
        outs.append(x)
        assert scheduler.step_index == scheduler.timesteps.tolist().index(int(t)) + 1
    assert torch.equal(outs[1], outs[0].bfloat16())  # one rounding, at the end


# ---------------------------------------------------------------- models of DDPM


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("kind", STOCK_TYPES)
def test_a_model_of_ddpm_is_sampled_step_by_step_as_by_stock_ddim(kind, spacing, to_one, eta):
    settings = {"set_alpha_to_one": to_one, "timestep_spacing": spacing, "prediction_type": kind}
    stock = diffusers.DDIMScheduler(**SD, clip_sample=False, **settings)
    scheduler = of_stock(stock)
    stock.alphas_cumprod = scheduler.alphas_cumprod  # float64
    stock.final_alpha_cumprod = torch.tensor(1.0).double() if to_one else scheduler.alphas_cumprod[0]
    for s in (scheduler, stock):
        s.set_timesteps(10)
    assert scheduler.timesteps.tolist() == stock.timesteps.tolist()
    x, z = NOISES[0], NOISES[1]
    for t in scheduler.timesteps:
        output = toy_network(x, t)
        ours, theirs = (s.step(output, t, x, eta=eta, variance_noise=z) for s in (scheduler, stock))
        assert relative_error(ours.prev_sample, theirs.prev_sample) < 1e-11
        assert relative_error(ours.pred_original_sample, theirs.pred_original_sample) < 1e-12
        assert torch.equal(ours.pred_residual, -ours.pred_original_sample)
        x = ours.prev_sample


def test_a_clipped_model_of_ddpm_is_stock_ddim_if_its_noise_is_clipped_too():
    stock = diffusers.DDIMScheduler(clip_sample_range=0.8)
    scheduler = of_stock(stock)
    assert scheduler.config.clip_sample and scheduler.config.clip_sample_range == 0.8
    stock.alphas_cumprod, stock.final_alpha_cumprod = scheduler.alphas_cumprod, torch.tensor(1.0).double()
    for s in (scheduler, stock):
        s.set_timesteps(10)
    x = NOISES[0]
    for t in scheduler.timesteps:
        output = toy_network(x, t) + 0.5 * x
        ours, theirs = (s.step(output, t, x, use_clipped_model_output=True) for s in (scheduler, stock))
        assert relative_error(ours.prev_sample, theirs.prev_sample) < 1e-12
        free = scheduler.step(output, t, x)
        assert torch.equal(free.pred_residual, ours.pred_residual) and torch.equal(free.pred_noise, output)
        assert not torch.allclose(free.prev_sample, ours.prev_sample)
        x = ours.prev_sample


def test_the_difference_of_two_sums_is_that_of_the_signals():
    scheduler = of_stock()
    signal = scheduler.alphas_cumprod.sqrt()
    assert relative_error(scheduler.alphas_cumsum.diff(), signal[:-1] - signal[1:]) < 1e-12
    assert relative_error(scheduler.betas2_cumsum, 1 - scheduler.alphas_cumprod) == 0


@pytest.mark.parametrize("schedule", ["average", "decreased", "increased", "normal"])
def test_another_schedule_of_the_residual_changes_how_it_is_removed_alone(schedule):
    stock = diffusers.DDIMScheduler(clip_sample=False)
    scheduler = of_stock(stock, alpha_schedule=schedule, alpha_ratio=0.3)
    plain = of_stock(stock)
    assert torch.equal(scheduler.betas_cumsum, plain.betas_cumsum)
    a = make(alpha_schedule=schedule, alpha_ratio=0.3).alphas_cumsum
    assert torch.equal(scheduler.alphas_cumsum, a)
    for s in (scheduler, plain):
        s.set_timesteps(10)
    times = scheduler.timesteps.tolist()
    x = NOISES[0]
    for t, s in zip(times, [*times[1:], None], strict=True):
        eps = toy_network(x, t) + 0.5 * x
        signal, b = plain.alphas_cumprod[t].sqrt(), plain.betas_cumsum
        res = (x - b[t] * eps) / -signal  # the divisor is the model's
        after, b_after = (a[s], b[s]) if s is not None else (0.0, 0.0)
        expected = x - (a[t] - after) * res - (b[t] - b_after) * eps
        x = scheduler.step(eps, t, x).prev_sample
        assert relative_error(x, expected) < 1e-12


@pytest.mark.parametrize("loaded", [False, True], ids=["built", "loaded"])
@pytest.mark.parametrize("stock", [diffusers.DDIMScheduler, diffusers.DDPMScheduler, diffusers.HeunDiscreteScheduler])
def test_even_the_defaults_of_a_stock_scheduler_are_taken_over(stock, loaded, tmp_path):
    config = stock().config
    if loaded:
        stock().save_pretrained(tmp_path)
        config = stock.load_config(tmp_path)
    scheduler = RDDMScheduler.from_config(config)
    keys = "beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_spacing"
    assert {key: scheduler.config[key] for key in keys} == {key: stock().config[key] for key in keys}
    assert scheduler.config.alpha_schedule is None
    assert scheduler.config.clip_sample == stock().config.get("clip_sample", False)
    expected = stock().alphas_cumprod.double()
    assert relative_error(scheduler.alphas_cumprod, expected) < 1e-5
    again = RDDMScheduler.from_config(stock.from_config(scheduler.config).config)
    assert torch.equal(again.alphas_cumsum, scheduler.alphas_cumsum)


def test_products_of_alphas_make_the_same_scheduler(tmp_path):
    scheduler = of_stock()
    products = scheduler.alphas_cumprod
    for given in (products, products.tolist()):
        made = RDDMScheduler.from_alphas_cumprod(given, clip_sample=False)
        assert relative_error(made.alphas_cumprod, products) < 1e-13
        assert relative_error(made.alphas_cumsum, scheduler.alphas_cumsum) < 1e-13
        assert made.config.prediction_type == "epsilon" and not made.config.clip_sample
    made.save_pretrained(tmp_path)
    again = RDDMScheduler.from_pretrained(tmp_path)
    assert torch.equal(again.alphas_cumsum, made.alphas_cumsum)
    average = RDDMScheduler.from_alphas_cumprod(products, alpha_schedule="average")
    assert torch.equal(average.alphas_cumsum, make(alpha_schedule="average").alphas_cumsum)
    RDDMScheduler.from_alphas_cumprod([0.9, 0.5, 0.0], prediction_type="v_prediction").set_timesteps(3)
    for wrong in ([0.9, 0.95], [1.1, 0.5], [0.9, -0.1], [0.9, 0.0, 0.0], [0.9, math.nan]):
        with pytest.raises(ValueError, match="`alphas_cumprod` must lie in"):
            RDDMScheduler.from_alphas_cumprod(wrong)


def test_a_stock_pipeline_takes_it_in_one_line(tiny):
    pipe = tiny("sd", diffusers.DDIMScheduler)
    expected, _ = pipe(steps=5)
    pipe.pipe.scheduler = RDDMScheduler.from_config(pipe.pipe.scheduler.config)
    out, _ = pipe(steps=5)
    assert relative_error(out, expected) < 1e-5
    pipe.pipe.scheduler = RDDMScheduler.from_config(pipe.pipe.scheduler.config, alpha_schedule="average")
    out, _ = pipe(steps=5)
    assert torch.isfinite(out).all() and relative_error(out, expected) > 1e-3


def test_a_start_without_any_signal_is_fine_for_a_velocity_and_refused_for_epsilon():
    settings = {"alpha_schedule": None, **SD, "rescale_betas_zero_snr": True, "clip_sample": False}
    for kind in ("v_prediction", "sample"):
        scheduler = make(prediction_type=kind, **settings)
        scheduler.set_timesteps(4)
        states = run(scheduler, None, eta=0.5, network=toy_network)
        assert torch.isfinite(states[-1]).all()
    with pytest.raises(ValueError, match="At the time 999 no signal is left"):
        make(prediction_type="epsilon", **settings).set_timesteps(4)


@pytest.mark.parametrize("kind", STOCK_TYPES)
def test_a_model_of_ddpm_may_restore_if_its_state_holds_the_degraded_picture(kind):
    scheduler = of_stock(prediction_type=kind)
    scheduler.set_timesteps(6)
    x, z = scheduler.add_noise(X0, NOISES[0], scheduler.timesteps[:1], Y), NOISES[1]
    for t in scheduler.timesteps:
        b, signal = scheduler.betas_cumsum[t], 1 - scheduler.alphas_cumsum[t]
        eps = (x - signal * X0 - (1 - signal) * Y) / b
        output = {"epsilon": eps, "sample": X0, "v_prediction": signal * eps - b * X0}[kind]
        out = scheduler.step(output, t, x, Y, eta=0.3, variance_noise=z)
        assert relative_error(out.pred_original_sample, X0) < 1e-11
        assert relative_error(out.pred_residual, Y - X0) < 1e-11
        x = out.prev_sample
    assert relative_error(x, X0) < 1e-11


# ---------------------------------------------------------------- heads


@pytest.mark.parametrize("objective", TWO)
def test_two_heads_may_be_one_tensor_with_twice_the_channels(objective):
    scheduler, heads = make(prediction_type=objective), (NOISES[1], NOISES[2])
    scheduler.set_timesteps(5)
    outs = [scheduler.step(given, 999, NOISES[0], Y) for given in (heads, list(heads), torch.cat(heads, 1))]
    for out in outs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(out.to_tuple(), outs[0].to_tuple(), strict=True))
    split = scheduler.split_heads(torch.cat(heads, 1), NOISES[0])
    assert len(split) == 2 and all(torch.equal(a, b) for a, b in zip(split, heads, strict=True))


@pytest.mark.parametrize("objective", ["pred_noise", "pred_res"])
def test_one_head_may_be_a_tuple(objective):
    scheduler = make(prediction_type=objective)
    scheduler.set_timesteps(5)
    outs = [scheduler.step(given, 799, NOISES[0], Y).prev_sample for given in (NOISES[1], (NOISES[1],))]
    assert torch.equal(*outs)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("conditional", [True, False])
def test_noise_is_added_at_every_sample_s_own_time_in_its_dtype(conditional, dtype):
    scheduler, times = make(sum_scale=0.2), torch.tensor([0, 999, 500, 3])
    x0, z, y = X0.to(dtype), NOISES[0].to(dtype), Y.to(dtype) if conditional else None
    out = scheduler.add_noise(x0, z, times, y)
    assert out.dtype == dtype and out.shape == X0.shape
    a, b = (table[times].reshape(-1, 1, 1, 1) for table in (scheduler.alphas_cumsum, scheduler.betas_cumsum))
    expected = (1 - a) * X0 + b * NOISES[0] + (a * Y if conditional else 0)
    assert relative_error(out.double(), expected) < 4 * torch.finfo(dtype).eps
    for k in range(4):
        one = slice(k, k + 1)
        given = None if y is None else y[one]
        assert torch.equal(scheduler.add_noise(x0[one], z[one], times[one], given), out[one])
    shared = scheduler.add_noise(x0, z, times[2:3], y)
    assert torch.equal(shared[2], out[2]) and torch.equal(scheduler.add_noise(x0, z, times[2], y), shared)


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("objective", [*OBJECTIVES, *STOCK_TYPES])
def test_a_network_that_hits_its_targets_predicts_the_clean_picture(objective, conditional):
    scheduler = of_stock(prediction_type=objective) if objective in STOCK_TYPES else make(
        prediction_type=objective, clip_sample=False
    )  # fmt: skip
    scheduler.set_timesteps(5)
    y = Y if conditional else None
    for t in scheduler.timesteps[1:]:
        x = scheduler.add_noise(X0, NOISES[0], t.reshape(1), y)
        targets = scheduler.training_target(X0, NOISES[0], t.reshape(1), y)
        assert all(target.dtype == X0.dtype and target.shape == X0.shape for target in targets)
        out = scheduler.step(targets, t, x, y)
        assert relative_error(out.pred_original_sample, X0) < 1e-11
        assert relative_error(out.pred_residual, (0 * Y if y is None else Y) - X0) < 1e-11
        assert relative_error(out.pred_noise, NOISES[0]) < 1e-11


def test_two_networks_may_be_told_the_sums_in_place_of_the_time():
    scheduler, times = make(sum_scale=0.01), torch.tensor([0, 999, 500])
    a, b = scheduler.network_times(times)
    assert a.shape == b.shape == (3,) and a.dtype == torch.float64
    assert torch.equal(a, 1000 * scheduler.alphas_cumsum[times])
    assert torch.equal(b, 1000 * scheduler.betas_cumsum[times])


# ---------------------------------------------------------------- the contract with diffusers, for its own models


@pytest.mark.parametrize("loaded", [False, True], ids=["from_config", "from_pretrained"])
def test_every_argument_of_the_config_survives(loaded, tmp_path):
    config = dict(
        num_train_timesteps=200, alpha_schedule="average", beta_schedule="normal", alpha_ratio=2.0, beta_ratio=0.5,
        sum_scale=0.01, prediction_type="pred_x0_add_noise", clip_sample=False, clip_sample_range=0.9,
        timestep_spacing="trailing", beta_start=0.001, beta_end=0.03, rescale_betas_zero_snr=True,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    for settings in (config, {}):
        scheduler = make(**settings)
        scheduler.save_pretrained(tmp_path)
        copy = RDDMScheduler.from_pretrained(tmp_path) if loaded else RDDMScheduler.from_config(scheduler.config)
        assert {key: copy.config[key] for key in config} == {key: scheduler.config[key] for key in config}
        outs = []
        for s in (scheduler, copy):
            s.set_timesteps(5)
            outs.append(run(s)[-1])
        assert torch.equal(*outs)


def test_the_config_of_its_own_models_is_refused_by_the_others():
    with pytest.raises(ValueError, match="`beta_schedule` must be one of"):
        BDIAScheduler.from_config(make(beta_schedule="average").config)
    ours = BDIAScheduler.from_config(of_stock(alpha_schedule="average").config)
    assert ours.config.beta_schedule == "scaled_linear" and "alpha_schedule" not in ours.config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("steps", [6, None])
def test_samples_keep_their_dtype_and_inputs_their_values(steps, objective, dtype):
    scheduler = make(num_train_timesteps=12, prediction_type=objective)
    scheduler.set_timesteps(steps)
    y = noise(2, 3, 4, 4, seed=1, dtype=dtype)
    heads = tuple(noise(2, 3, 4, 4, seed=k, dtype=dtype) for k in range(2 if objective in TWO else 1))
    x = scheduler.initial_sample(y, noise(2, 3, 4, 4, seed=2))
    for t in scheduler.timesteps:
        before = [part.clone() for part in (x, y, *heads)]
        result = scheduler.step(heads, t, x, y, eta=0.5, generator=torch.Generator().manual_seed(0))
        assert all(torch.equal(a, b) for a, b in zip((x, y, *heads), before, strict=True))
        assert {x.dtype, *(part.dtype for part in result.to_tuple())} == {dtype}
        x = result.prev_sample
    assert torch.isfinite(x).all()


def test_half_precision_states_lose_nothing_between_steps():
    outs = []
    for dtype in (torch.float64, torch.bfloat16):
        scheduler = make()
        scheduler.set_timesteps(20)
        y, start = Y.bfloat16().to(dtype), NOISES[0].bfloat16().to(dtype)

        def network(x, t):
            return toy_network(X0, t).bfloat16(), toy_network(NOISES[3], t).bfloat16()

        outs.append(run(scheduler, y, start, stop=17, network=network)[-1].double())
    assert relative_error(outs[1], outs[0]) < 0.004  # one rounding, at the end


@pytest.mark.parametrize("steps", [6, None])
def test_a_batch_is_so_many_single_samples(steps):
    scheduler = make(num_train_timesteps=12)
    scheduler.set_timesteps(steps)
    together = run(scheduler, eta=0.7, generator=[torch.Generator().manual_seed(k) for k in range(4)])[-1]
    for k in range(4):
        scheduler.set_timesteps(steps)
        one = slice(k, k + 1)
        alone = run(
            scheduler, Y[one], scheduler.initial_sample(Y[one], NOISES[0, one]), eta=0.7,
            generator=torch.Generator().manual_seed(k),
        )  # fmt: skip
        assert torch.equal(alone[-1], together[one])


@pytest.mark.parametrize("views", [True, False], ids=["views", "numbers"])
@pytest.mark.parametrize("steps", [7, None])
def test_runs_repeat_to_the_bit_even_after_an_interrupted_one(steps, views):
    scheduler, outs = make(num_train_timesteps=12), []
    for stop in (None, None, 3, None, "sweep", None, "again"):
        if stop != "again":
            scheduler.set_timesteps(steps)
        if stop == "sweep":
            for t in scheduler.timesteps:
                scheduler.step_residual((X0, X0), t, X0.float())
            continue
        start = scheduler.initial_sample(Y, NOISES[0]).float()
        out = run(scheduler, Y, start, views, stop if isinstance(stop, int) else None)[-1]
        outs += [out] if not isinstance(stop, int) else []
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("method", ["step", "step_residual", "step_noise"])
def test_a_run_that_begins_anew_takes_its_sample_as_it_is(method):
    scheduler, fresh = make(clip_sample=False), make(clip_sample=False)
    for s in (scheduler, fresh):
        s.set_timesteps(6)
    x, heads = NOISES[0].bfloat16(), (0.1 * X0, 0.1 * Y)
    for t in scheduler.timesteps[:3]:
        x = scheduler.step(heads, t, x, Y).prev_sample  # rounded: the scheduler knows what was there before
    outs = [getattr(s, method)(heads, 999, x.double().to(x.dtype), Y) for s in (scheduler, fresh)]
    assert torch.equal(outs[0].prev_sample, outs[1].prev_sample)
    assert torch.equal(scheduler._master, fresh._master)


def test_noise_comes_from_the_generator_and_none_is_drawn_for_the_last_step():
    for steps, eta in ((4, 0.5), (4, 0.0), (None, 0.0)):
        generator, drawn = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
        scheduler, x = make(num_train_timesteps=8), NOISES[0]
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            draws = t != scheduler.timesteps[-1] and (eta > 0 or steps is None)
            z = torch.randn(X0.shape, generator=drawn, dtype=torch.float64) if draws else None
            heads = toy_heads("pred_res_noise", x, t, Y)
            expected = scheduler.step(heads, t, x, Y, eta=eta, variance_noise=z).prev_sample
            x = scheduler.step(heads, t, x, Y, eta=eta, generator=generator).prev_sample
            assert torch.equal(x, expected)
        assert torch.equal(generator.get_state(), drawn.get_state())


def test_a_tuple_holds_what_the_output_holds():
    scheduler = make()
    scheduler.set_timesteps(5)
    outs = [scheduler.step((X0, Y), 999, NOISES[0], Y, return_dict=flag) for flag in (False, True)]
    assert isinstance(outs[0], tuple) and isinstance(outs[1], RDDMSchedulerOutput)
    assert all(torch.equal(a, b) for a, b in zip(outs[0], outs[1].to_tuple(), strict=True))
    residual = scheduler.step_residual((X0, Y), 999, NOISES[0], Y, return_dict=False)
    assert isinstance(residual, tuple) and len(residual) == 4


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_works_under_inference_mode_and_passes_gradients_outside(objective):
    scheduler = make(prediction_type=objective, clip_sample=False)
    scheduler.set_timesteps(5)
    expected = run(scheduler)[-1]
    with torch.inference_mode():
        scheduler.set_timesteps(5)
        assert torch.equal(run(scheduler)[-1], expected)
    scheduler.set_timesteps(5)
    y = Y.clone().float().requires_grad_()
    run(scheduler, y)[-1].sum().backward()
    assert torch.isfinite(y.grad).all() and y.grad.abs().max() > 0


class CountReads(TorchDispatchMode):
    """Counts how often a tensor's value is brought to the host, which on an accelerator stalls the queue."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("steps", [5, None])
def test_no_step_reads_a_value_back_from_the_device(objective, steps):
    scheduler, heads = make(num_train_timesteps=12, prediction_type=objective), (X0, Y)[: 1 + (objective in TWO)]
    scheduler.set_timesteps(steps)
    sweeps = [scheduler.step]
    sweeps += [scheduler.step_residual, scheduler.step_noise] if "res_" in objective else []
    with CountReads() as counter:
        for sweep in sweeps:
            x = scheduler.initial_sample(Y, NOISES[0]).float()
            for t in scheduler.timesteps:
                extra = {"eta": 0.5, "generator": torch.Generator().manual_seed(0)} if sweep == scheduler.step else {}
                x = sweep(heads, t, x, Y, **extra).prev_sample
    assert counter.reads == 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_needs_no_value_of_any_tensor(objective):
    scheduler, y = make(prediction_type=objective), torch.empty(2, 3, 4, 4, device="meta")
    scheduler.set_timesteps(5, device="meta")  # tensors without values: reading one is an error
    scheduler.set_begin_index(0)
    x = scheduler.initial_sample(y, y)
    for t in scheduler.timesteps:
        x = scheduler.step((y, y)[: 1 + (objective in TWO)], t, x, y, eta=0.5, variance_noise=y).prev_sample
    assert scheduler.step_index == 5 and x.device.type == "meta"
    assert scheduler.add_noise(y, y, torch.zeros(2, device="meta", dtype=torch.int64), y).device.type == "meta"


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "pred_v"}, "`prediction_type` must be one of 'pred_res_noise'"),
        ({"alpha_schedule": "cosine"}, "`alpha_schedule` must be one of 'increased'"),
        ({"beta_schedule": "sigmoid"}, "`beta_schedule` must be one of 'increased'"),
        ({"timestep_spacing": "quad"}, "`timestep_spacing` must be one of 'truncated'"),
        ({"alpha_schedule": None}, "`alpha_schedule=None` takes the residual's schedule from betas"),
        ({"prediction_type": "epsilon"}, "'epsilon' is that of a model of DDPM, which has betas"),
        ({"sum_scale": 0.0}, r"`sum_scale` is a variance in \(0, 1\], got 0.0"),
        ({"sum_scale": 1.5}, r"`sum_scale` is a variance in \(0, 1\]"),
        ({"alpha_ratio": -1.0}, "`alpha_ratio` must be a number above 0"),
        ({"beta_ratio": math.inf}, "`beta_ratio` must be a number above 0"),
        ({"clip_sample_range": 0.0}, "`clip_sample_range` must be a number above 0"),
        ({"num_train_timesteps": 1}, "`num_train_timesteps` must be a whole number from 2 on"),
    ],
    ids=str,
)
def test_an_impossible_config_is_refused_with_the_reason(config, message):
    with pytest.raises(ValueError, match=message):
        make(**config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, r"`num_inference_steps` must be a whole number in \[1, 1000\]"),
        ({"num_inference_steps": 1001}, r"`num_inference_steps` must be a whole number in \[1, 1000\]"),
        ({"num_inference_steps": 5.0}, "must be a whole number"),
        ({"num_inference_steps": 3, "timesteps": [5, 3, 1]}, "pass one"),
        ({"timesteps": []}, "at least one"),
        ({"timesteps": [1, 3]}, "fall strictly"),
        ({"timesteps": [1000, 3]}, r"Times must lie in \[0, 999\]"),
    ],
    ids=str,
)
def test_impossible_times_are_refused_with_the_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        make().set_timesteps(**arguments)


def test_an_impossible_step_is_refused_with_the_reason():
    scheduler, x, heads = make(), NOISES[0], (X0, Y)
    for method in (scheduler.step, scheduler.step_residual, scheduler.step_noise):
        with pytest.raises(ValueError, match="`set_timesteps` before `step`"):
            method(heads, 999, x, Y)
    scheduler.set_timesteps(5)
    for arguments, message in [
        ((X0, 999, x, Y), "two heads of 'pred_res_noise', as a tuple or as twice the channels"),
        (((X0,), 999, x, Y), "`model_output` must hold 2 for 'pred_res_noise', one a head, got 1"),
        (((X0, Y, Y), 999, x, Y), "`model_output` must hold 2"),
        (((X0, Y[:1]), 999, x, Y), "`model_output` must have the shape of the sample"),
        ((heads, 999, x, Y[:1]), "`degraded` must have the shape of the sample"),
        ((heads, 1000, x, Y), r"`timestep` must be a whole number in \[0, 999\]"),
        ((heads, torch.tensor([999, 799]), x, Y), "one time for the whole batch, got 2"),
    ]:
        for method in (scheduler.step, scheduler.step_residual, scheduler.step_noise):
            with pytest.raises(ValueError, match=message):
                method(*arguments)
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"`eta` must lie in \[0, 1\]"):
            scheduler.step(heads, 999, x, Y, eta=eta)
    with pytest.raises(ValueError, match="either `generator` or `variance_noise`"):
        scheduler.step(heads, 999, x, Y, generator=torch.Generator(), variance_noise=x)
    with pytest.raises(ValueError, match="`variance_noise` must have the shape"):
        scheduler.step(heads, 999, x, Y, variance_noise=x[:1])
    assert scheduler.step_index is None  # nothing was begun
    for kind in ("pred_x0_noise", "pred_noise", "pred_res"):
        other = make(prediction_type=kind)
        other.set_timesteps(5)
        with pytest.raises(ValueError, match=f"one after the other with a head for each.*{kind}.*use `step`"):
            other.step_residual(heads, 999, x, Y)


def test_impossible_training_arguments_are_refused_with_the_reason():
    scheduler, times = make(), torch.tensor([0, 1, 2, 3])
    for method in (scheduler.add_noise, scheduler.training_target):
        with pytest.raises(ValueError, match="`noise` must have the shape"):
            method(X0, NOISES[0, :2], times, Y)
        with pytest.raises(ValueError, match="`degraded` must have the shape"):
            method(X0, NOISES[0], times, Y[..., :2])
        with pytest.raises(ValueError, match="one time or 4, one a sample, got 3"):
            method(X0, NOISES[0], times[:3], Y)
        with pytest.raises(ValueError, match=r"`timesteps` must lie in \[0, 999\]"):
            method(X0, NOISES[0], times + 997, Y)
    with pytest.raises(ValueError, match="`noise` must have the shape"):
        scheduler.initial_sample(Y, NOISES[0, :1])
    with pytest.raises(ValueError, match="Velocities are defined for a schedule of betas"):
        scheduler.get_velocity(X0, NOISES[0], times)
    with pytest.raises(ValueError, match="`timesteps` must lie in"):
        scheduler.network_times(times - 1)
