"""TimeShiftScheduler: the authors' programs, the properties of the method, and the contract with diffusers."""

import importlib
import inspect
import json
import shutil
import sys
from copy import deepcopy
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.schedulers import scheduling_time_shift
from sfumato.schedulers.scheduling_time_shift import TimeShiftScheduler, TimeShiftSchedulerOutput

GOLDEN = Path(__file__).parent.parent / "golden"  # outputs of the authors' programs on closed-form networks
SCHEDULES = {
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
MODES = ["paper", "pnm", "adm"]
SOLVERS = ["ddim", "ddpm", "s_pndm", "f_pndm", "dpmsolver++"]
MULTISTEP = SOLVERS[2:]
SPACINGS = ["leading", "linspace", "trailing"]
WARM_UP = {"s_pndm": 1, "f_pndm": 3}  # steps
SILENT_END = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}  # starts at A = 0
UNSHIFTED = [{"window": 0}, {"window": 1}, {"cutoff": 999}, {"cutoff": 1000}, {"data_variance": 1.0}]


def make(schedule="linear", **config):
    return TimeShiftScheduler(**{"clip_sample": False, **SCHEDULES[schedule], **config})


def column(t):
    """Times, one or one per sample, to multiply images by."""
    return torch.as_tensor(t).double().reshape(-1, 1, 1, 1)


def toy_network(alphas):
    """Not a denoiser: states grow to 1e2."""
    return lambda x, t: 0.3 * x * torch.cos(column(t) / 500) + 0.1 * torch.sin(3 * x + column(t) / 100)


def gauss_network(alphas, data_variance=0.25):
    """The best epsilon for data ~ N(0, data_variance I)."""

    def predict(x, t):
        alpha = alphas[column(t).long()]
        return (1 - alpha).sqrt() * x / (alpha * data_variance + 1 - alpha)

    return predict


NETWORKS = {"toy": toy_network, "gauss": gauss_network}


def run(scheduler, network, x, noise=None, **step_kwargs):
    """The loop of a pipeline, over the entries of `timesteps`, or times per sample where there are any."""
    for index, t in enumerate(scheduler.timesteps):
        extra = {} if noise is None else {"variance_noise": noise[index]}
        own = getattr(scheduler, "sample_timesteps", None)
        seen = t if own is None else own
        x = scheduler.step(network(x, seen), t, x, **step_kwargs, **extra).prev_sample
    return x


def history(scheduler):
    return torch.stack(scheduler.shifted_timesteps).numpy()  # (steps, B)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_variance(variance, count=3072, batch=1):
    """Samples whose unbiased variance is exactly what is asked, `(batch, 3, ...)`."""
    x = noise(batch, count)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) * torch.as_tensor(variance).sqrt().reshape(-1, 1)
    return x.reshape(batch, 3, -1, 1)


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name == scheduling_time_shift.__name__]


# ---------------------------------------------------------------- the authors' programs


def golden(name):
    with np.load(GOLDEN / name) as archive:
        return {key: archive[key] for key in archive.files}


PNM, ADM, PNDM = golden("ts.npz"), golden("ts_adm.npz"), golden("pndm.npz")
PNM_META, ADM_META, PNDM_META = (json.loads(str(archive["meta_json"])) for archive in (PNM, ADM, PNDM))
PNM_CASES = [name for name in PNM_META if not name.startswith("f32_") and f"{name}__out" in PNM]
PNM_NAN = [name for name in PNM_CASES if np.isnan(PNM[f"{name}__out"]).any()]
ADM_CASES = [name for name in ADM_META if f"{name}__out" in ADM]
PNDM_CASES = [name for name in PNDM_META if f"{name}__out" in PNDM]


def run_pnm(name):
    m = PNM_META[name]
    scheduler = make(
        m["schedule"],
        mode="pnm",
        released=True,
        solver={"euler": "ddim"}.get(m["method"], m["method"]),
        window=m["window"] or 0,
        cutoff=m["cutoff"],
    )
    scheduler.shift_per_sample()  # as the program does in Runge-Kutta steps
    scheduler.set_timesteps(m["S"])
    network = NETWORKS[m["net"]](torch.from_numpy(PNM[f"alphas_cumprod_{m['schedule']}"]))
    noise = torch.from_numpy(PNM["ddpm_noise"]) if m["method"] == "ddpm" else None
    return scheduler, run(scheduler, network, torch.from_numpy(PNM["x"]), noise)


def step_times(scheduler):
    """Times of the steps, without the further evaluations in them."""
    times, extra = scheduler.timesteps.tolist(), {"s_pndm": 1, "f_pndm": 3}.get(scheduler.config.solver, 0)
    warm = WARM_UP.get(scheduler.config.solver, 0) * (extra + 1)
    return np.array(times[: warm : extra + 1] + times[warm:])


def relative_error(out, reference):
    return np.abs(out.numpy() - reference).max() / np.abs(reference).max()


@pytest.mark.parametrize("name", sorted(set(PNM_CASES) - set(PNM_NAN)))
def test_released_pnm_gives_the_outputs_and_times_of_the_authors_program(name):
    scheduler, out = run_pnm(name)
    assert relative_error(out, PNM[f"{name}__out"]) < 1e-9
    assert (step_times(scheduler)[:, None] == PNM[f"{name}__t"]).all()
    assert (history(scheduler) == PNM[f"{name}__tnext"]).all()
    assert scheduler.has_signal


@pytest.mark.parametrize("name", PNM_NAN)
def test_released_pnm_stays_finite_where_the_program_takes_the_root_of_a_negative_number(name):
    scheduler, out = run_pnm(name)
    theirs, times = PNM[f"{name}__tnext"], PNM[f"{name}__t"]
    assert torch.isfinite(out).all()
    for sample in range(theirs.shape[1]):  # their state is lost with the first time above the current one
        lost = np.argmax(theirs[:, sample] > times[:, sample])
        assert (history(scheduler)[: lost + 1, sample] == theirs[: lost + 1, sample]).all()


@pytest.mark.parametrize("name", PNDM_CASES)
def test_released_pndm_gives_the_outputs_and_times_of_its_authors_program(name):
    m = PNDM_META[name]
    solver = {"DDIM": "ddim", "S-PNDM": "s_pndm", "F-PNDM": "f_pndm"}[m["method"]]
    scheduler = make(m["schedule"], mode="pndm", released=True, solver=solver)
    scheduler.set_timesteps(m["S"])
    network = NETWORKS[m["net"]](torch.from_numpy(PNDM[f"alphas_cumprod_{m['schedule']}"]))
    out = run(scheduler, network, torch.from_numpy(PNDM["x"]))
    assert relative_error(out, PNDM[f"{name}__out"]) < 1e-9
    assert (scheduler.timesteps.numpy() == PNDM[f"{name}__tcalls"]).all()


@pytest.mark.parametrize("name", ADM_CASES)
def test_released_adm_gives_the_outputs_and_times_of_the_authors_program(name):
    m = ADM_META[name]
    window = m["window"] if m["shift"] else 0
    config = {"clip_sample": m["clip_denoised"], "window": window, "cutoff": m["cutoff"]}
    scheduler = make(m["schedule"], mode="adm", released=True, **config)
    scheduler.set_timesteps(len(m["timesteps"]))
    alphas = torch.from_numpy(ADM[f"alphas_cumprod_{m['schedule']}"])
    out = run(scheduler, NETWORKS[m["net"]](alphas), torch.from_numpy(ADM["x"]))
    assert relative_error(out, ADM[f"{name}__out"]) < 1e-9
    assert (scheduler.timesteps.numpy()[:, None] == ADM[f"{name}__t"]).all()
    if m["shift"]:
        assert (history(scheduler)[1:] == ADM[f"{name}__n"]).all()
    assert scheduler.has_signal


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedule_is_the_one_of_the_programs_in_float64(schedule):
    stored = (PNM if schedule == "scaled_linear" else ADM)[f"alphas_cumprod_{schedule}"]
    assert make(schedule).alphas_cumprod.dtype == torch.float64
    assert np.abs(make(schedule).alphas_cumprod.numpy() - stored).max() < 1e-14


def test_released_grids_are_those_of_the_programs_where_steps_do_not_divide_the_schedule():
    pnm, adm = make(mode="pnm", released=True), make(mode="adm", released=True)
    pnm.set_timesteps(30)
    assert pnm.timesteps.tolist() == [958 - 33 * k for k in range(29)] + [1]
    adm.set_timesteps(30)
    assert adm.timesteps.tolist() == [34 * k for k in range(29, -1, -1)]
    pndm = make(mode="pndm", released=True)
    pndm.set_timesteps(30)
    assert pndm.timesteps.tolist() == [33 * k for k in range(30, -1, -1)]


# ---------------------------------------------------------------- the method


def by_hand(scheduler, network, x, final):
    """DDIM between the neighbours of the schedule, from the equation."""
    times = scheduler.timesteps.tolist()
    for i, j in zip(times, [*times[1:], None], strict=True):
        a, b = scheduler.alphas_cumprod[i], final if j is None else scheduler.alphas_cumprod[j]
        eps = network(x, torch.tensor(i))
        x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    return x


@pytest.mark.parametrize("off", UNSHIFTED, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_without_a_shift_it_is_stock_ddim(mode, off):
    scheduler = make("scaled_linear", mode=mode, steps_offset=1, set_alpha_to_one=False, **off)
    stock = diffusers.DDIMScheduler.from_config(scheduler.config)
    for s in (scheduler, stock):
        s.set_timesteps(20)
    assert scheduler.timesteps.tolist() == stock.timesteps.tolist()
    network, x = gauss_network(scheduler.alphas_cumprod), noise(2, 3, 8, 8)
    assert (run(scheduler, network, x) - run(stock, network, x)).abs().max() < 1e-5  # stock tables are float32
    assert (history(scheduler)[:-1] == scheduler.timesteps.numpy()[slice(1, None), None]).all() or mode == "adm"


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("handling", [{"clip_sample": True}, {"thresholding": True, "sample_max_value": 1.5}], ids=str)
def test_predictions_and_clipping_are_those_of_stock_ddim(prediction_type, handling):
    scheduler = make(window=0, prediction_type=prediction_type, **handling)
    stock = diffusers.DDIMScheduler.from_config(scheduler.config)
    for s in (scheduler, stock):
        s.set_timesteps(10)
    t, x, output = scheduler.timesteps[6], noise(2, 3, 8, 8), noise(2, 3, 8, 8, seed=1)
    for clipped in (False, True):
        ours = scheduler.step(output, t, x, eta=0.5, use_clipped_model_output=clipped, variance_noise=x)
        theirs = stock.step(output, t, x, eta=0.5, use_clipped_model_output=clipped, variance_noise=x)
        assert (ours.prev_sample - theirs.prev_sample).abs().max() < 1e-5
        assert (ours.pred_original_sample - theirs.pred_original_sample).abs().max() < 1e-5


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 7, 30, 333])
@pytest.mark.parametrize("to_one", [True, False])
def test_every_step_goes_to_the_next_time_of_the_schedule_and_the_last_to_the_final_alpha(spacing, steps, to_one):
    scheduler = make(window=0, timestep_spacing=spacing, set_alpha_to_one=to_one)
    stock = diffusers.DDIMScheduler.from_config(scheduler.config)
    for s in (scheduler, stock):
        s.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == stock.timesteps.tolist()
    network, x = gauss_network(scheduler.alphas_cumprod), noise(2, 3, 8, 8)
    final = torch.tensor(1.0).double() if to_one else scheduler.alphas_cumprod[0]
    assert (run(scheduler, network, x) - by_hand(scheduler, network, x, final)).abs().max() < 1e-12
    assert scheduler.shifted_timesteps[-1].tolist() == [-1 if to_one else 0] * 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30])
def test_shifting_works_at_any_spacing_and_number_of_steps_and_ends_clean(mode, spacing, steps):
    scheduler = make(mode=mode, timestep_spacing=spacing, window=300, cutoff=0)
    scheduler.set_timesteps(steps)
    x = noise(2, 3, 8, 8)
    for t in scheduler.timesteps:
        output = scheduler.step(gauss_network(scheduler.alphas_cumprod)(x, t), t, x)
        x = output.prev_sample
    assert torch.isfinite(x).all()
    assert torch.equal(x, output.pred_original_sample)  # A = 1: nothing but x0
    assert scheduler.timesteps.min() >= 0 and scheduler.timesteps.max() <= 999


@pytest.mark.parametrize("mode", ["pnm", "adm"])
def test_samples_choose_their_times_alone(mode):
    scheduler = make(mode=mode, window=200)
    network, x = gauss_network(scheduler.alphas_cumprod), noise(4, 3, 8, 8)
    x = x * torch.tensor([0.7, 0.9, 1.0, 1.2]).reshape(4, 1, 1, 1)
    scheduler.set_timesteps(20)
    together, times = run(scheduler, network, x), history(scheduler)
    order = torch.tensor([2, 0, 3, 1])
    scheduler.set_timesteps(20)
    assert torch.equal(run(scheduler, network, x[order]), together[order])
    assert (history(scheduler) == times[:, order]).all()
    assert len(set(times[8])) > 1
    for k in range(4):
        scheduler.set_timesteps(20)
        assert (run(scheduler, network, x[k : k + 1]) - together[k]).abs().max() < 1e-12
        assert (history(scheduler)[:, 0] == times[:, k]).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_one_repeated_sample_has_one_time(mode):
    scheduler = make(mode=mode, window=200)
    scheduler.set_timesteps(20)
    run(scheduler, gauss_network(scheduler.alphas_cumprod), noise(1, 3, 8, 8).expand(3, -1, -1, -1))
    assert (history(scheduler) == history(scheduler)[:, :1]).all()


@pytest.mark.parametrize("mode", ["pnm", "adm"])
def test_a_larger_sample_never_has_an_earlier_time(mode):
    scheduler = make(mode=mode, window=400)
    scheduler.set_timesteps(timesteps=[900, 700, 500, 300])
    x = of_variance(torch.linspace(0.3, 1.3, 40), batch=40)
    for t in scheduler.timesteps[:2]:
        output = scheduler.step(0.5 * x, t, x)
    assert (output.shifted_timesteps.diff() >= 0).all()
    assert len(output.shifted_timesteps.unique()) > 4


def found_time(t, variance, **config):
    """Time that mode adm reads off a sample of the given variance, at nominal time t."""
    scheduler = make(mode="adm", window=120, cutoff=0, **config)
    scheduler.set_timesteps(timesteps=[t + 50, t, 10])
    network, x = gauss_network(scheduler.alphas_cumprod), of_variance(variance)
    for time in scheduler.timesteps[:2]:
        output = scheduler.step(network(x, time), time, x)
    return int(output.shifted_timesteps)


@pytest.mark.parametrize(("t", "late"), [(900, 16), (700, 20), (500, 28), (300, 44)])
def test_data_variance_removes_the_bias_of_the_published_criterion(t, late):
    variance = 1 - 0.75 * make().alphas_cumprod[t]
    assert found_time(t, variance) == t + late
    assert found_time(t, variance, data_variance=0.25) == t


def test_the_network_sees_the_shifted_time_in_paper_mode_and_the_update_aims_at_the_nominal_one():
    scheduler = make(window=100, data_variance=0.25)
    scheduler.set_timesteps(timesteps=[900, 700, 500, 300])
    alphas, x = scheduler.alphas_cumprod, noise(2, 3, 8, 8)
    seen, nominal = [], [900, 700, 500, 300]
    for index, t in enumerate(scheduler.timesteps):
        seen.append(int(t))
        eps = gauss_network(alphas)(x, t)
        a, b = alphas[seen[-1]], alphas[nominal[index + 1]] if index < 3 else torch.tensor(1.0)
        expected = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
        x = scheduler.step(eps, t, x).prev_sample
        assert (x - expected).abs().max() < 1e-12
        if index < 3:  # nominal 900, 700 and 500 are all above the cutoff
            j = nominal[index + 1]
            window = torch.arange(j - 50, j + 51)
            mismatch = (x.flatten(1).var(1)[:, None] - (1 - 0.75 * alphas[window])).square().sum(0)
            assert int(scheduler.timesteps[index + 1]) == int(window[mismatch.argmin()])
    assert seen != nominal
    assert seen == [900, *history(scheduler)[:-1, 0]]


def test_windows_are_cut_at_the_ends_of_the_schedule():
    scheduler = make(mode="pnm", window=1000, cutoff=0)
    scheduler.set_timesteps(50)
    run(scheduler, gauss_network(scheduler.alphas_cumprod), noise(2, 3, 8, 8) * 1.5)
    assert history(scheduler).max() == 999


def test_no_shift_reaches_a_time_without_signal():
    scheduler = make(window=400, cutoff=0, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    assert scheduler.alphas_cumprod[-1] == 0
    t = scheduler.timesteps[1]
    scheduler.step(noise(1, 3, 8, 8), t, 5 * noise(1, 3, 8, 8))
    assert scheduler.shifted_timesteps[-1].tolist() == [998]


@pytest.mark.parametrize("mode", MODES)
def test_ddpm_is_ddim_with_eta_one_and_tends_to_ddim_as_eta_vanishes(mode):
    x, z = noise(2, 3, 8, 8), noise(20, 2, 3, 8, 8, seed=1)

    def out(solver, **kwargs):
        scheduler = make(mode=mode, solver=solver, window=60)
        scheduler.set_timesteps(20)
        return run(scheduler, gauss_network(scheduler.alphas_cumprod), x, z, **kwargs)

    assert torch.equal(out("ddpm"), out("ddim", eta=1.0))
    assert torch.equal(out("ddpm", eta=0.3), out("ddim", eta=0.3))
    assert (out("ddpm", eta=1e-9) - out("ddim")).abs().max() < 1e-8
    assert (out("ddpm") - out("ddim")).abs().max() > 0.1


def test_noise_comes_from_the_generator_as_in_stock_ddim():
    scheduler = make(window=0)
    stock = diffusers.DDIMScheduler.from_config(scheduler.config)
    network, x, outs = gauss_network(scheduler.alphas_cumprod), noise(2, 3, 8, 8), []
    for s in (scheduler, stock):
        s.set_timesteps(10)
        outs.append(run(s, network, x, eta=0.7, generator=torch.Generator().manual_seed(3)))
    assert (outs[0] - outs[1]).abs().max() < 1e-5


def test_estimate_data_variance_is_the_mean_of_the_unbiased_variances():
    images = of_variance(torch.tensor([0.1, 0.3]), batch=2) + 0.5
    assert TimeShiftScheduler.estimate_data_variance(images.float()) == pytest.approx(0.2, abs=1e-6)


# ---------------------------------------------------------------- multistep solvers


def pseudo_multistep_by_hand(scheduler, network, x, final):
    """S- and F-PNDM between the nominal times of the schedule, from the equations."""
    alphas, times = scheduler.alphas_cumprod, [int(time) for time in step_times(scheduler)]
    fourth, slopes = scheduler.config.solver == "f_pndm", []

    def move(x, eps, i, j):
        a, b = alphas[int(i)], final if j is None else alphas[int(j)]
        return b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps

    for index, (i, j) in enumerate(zip(times, [*times[1:], None], strict=True)):
        e = [network(x, i)]
        if fourth and index < 3:
            mid = (i + j) / 2
            e.append(network(move(x, e[0], i, mid), mid))
            e.append(network(move(x, e[1], i, mid), mid))
            e.append(network(move(x, e[2], i, j), j))
            slope = (e[0] + 2 * e[1] + 2 * e[2] + e[3]) / 6
        elif fourth:
            slope = (55 * e[0] - 59 * slopes[-1] + 37 * slopes[-2] - 9 * slopes[-3]) / 24
        elif index == 0:
            slope = (e[0] + network(move(x, e[0], i, j), j)) / 2
        else:
            slope = (3 * e[0] - slopes[-1]) / 2
        slopes.append(e[0])
        x = move(x, slope, i, j)
    return x


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("solver", ["s_pndm", "f_pndm"])
def test_pseudo_multistep_keeps_to_its_equations_at_any_spacing_and_number_of_steps(solver, spacing, to_one):
    scheduler = make(window=0, solver=solver, timestep_spacing=spacing, set_alpha_to_one=to_one)
    network, x = toy_network(scheduler.alphas_cumprod), noise(2, 3, 4, 4)
    final = torch.tensor(1.0).double() if to_one else scheduler.alphas_cumprod[0]
    for steps in range(WARM_UP[solver] + 1, 61):
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == steps + {"s_pndm": 1, "f_pndm": 9}[solver]
        expected = pseudo_multistep_by_hand(scheduler, network, x, final)
        assert relative_error(run(scheduler, network, x), expected.numpy()) < 1e-12
        assert scheduler.shifted_timesteps[-1].tolist() == [-1 if to_one else 0] * 2
        assert len(scheduler.shifted_timesteps) == steps


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_runge_kutta_steps_are_those_of_stock_pndm_where_half_steps_are_whole(spacing, to_one):
    for steps in (4, 5, 10, 20, 25, 50):
        config = {"timestep_spacing": spacing, "set_alpha_to_one": to_one}
        scheduler = make(window=0, solver="f_pndm", **config)
        stock = diffusers.PNDMScheduler(**SCHEDULES["linear"], **config)
        for s in (scheduler, stock):
            s.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == stock.timesteps.tolist()
        network, x = toy_network(scheduler.alphas_cumprod), noise(2, 3, 8, 8)
        assert relative_error(run(scheduler, network, x), run(stock_float64(stock), network, x).numpy()) < 1e-12


def stock_float64(stock):
    """A stock scheduler with its tables in float64 (it builds them in float32)."""
    stock.alphas_cumprod = make(window=0).alphas_cumprod
    stock.final_alpha_cumprod = (
        torch.tensor(1.0).double() if stock.config.set_alpha_to_one else stock.alphas_cumprod[0]
    )
    return stock


def test_improved_euler_and_second_order_are_those_of_stock_plms():
    scheduler = make(window=0, solver="s_pndm", set_alpha_to_one=False)
    stock = stock_float64(diffusers.PNDMScheduler(**SCHEDULES["linear"], skip_prk_steps=True))
    for s in (scheduler, stock):
        s.set_timesteps(20)
    network, x = toy_network(scheduler.alphas_cumprod), noise(2, 3, 8, 8)
    y = x
    assert scheduler.timesteps.tolist() == stock.timesteps.tolist()
    for t in scheduler.timesteps[:3]:  # then stock takes third and fourth order
        x = scheduler.step(network(x, t), t, x).prev_sample
        y = stock.step(network(y, t), t, y).prev_sample
        assert relative_error(x, y.numpy()) < 1e-13


def test_the_model_is_evaluated_where_the_paper_says():
    scheduler = make(solver="f_pndm", window=0)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.dtype == torch.float32
    expected = [900, 850, 850, 800, 800, 750, 750, 700, 700, 650, 650, 600, *range(600, -1, -100)]
    assert scheduler.timesteps.tolist() == expected
    scheduler.set_timesteps(8)  # 125 apart
    assert scheduler.timesteps.tolist()[:5] == [875, 812.5, 812.5, 750, 750]
    scheduler = make(solver="s_pndm", window=0)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps.dtype == torch.int64
    assert scheduler.timesteps.tolist() == [900, 800, 800, *range(700, -1, -100)]


@pytest.mark.parametrize("solver", MULTISTEP)
def test_all_solvers_are_ddim_where_the_prediction_is_constant(solver):
    x, eps, outs = noise(2, 3, 8, 8), noise(2, 3, 8, 8, seed=1), []
    for chosen in ("ddim", solver):
        scheduler = make(window=0, solver=chosen, prediction_type="sample" if solver == "dpmsolver++" else "epsilon")
        scheduler.set_timesteps(timesteps=[*range(900, -1, -50)])
        outs.append(run(scheduler, lambda x, t: eps, x))
    assert relative_error(outs[1], outs[0].numpy()) < 1e-12


def test_higher_order_solvers_are_closer_to_the_exact_solution():
    # For gaussian data the ODE shrinks every value by the ratio of standard deviations.
    errors = {}
    for solver in ("ddim", "dpmsolver++", "s_pndm", "f_pndm"):
        scheduler = make(window=0, solver=solver)
        scheduler.set_timesteps(timesteps=[*range(900, -1, -30)])
        network, alphas = gauss_network(scheduler.alphas_cumprod), scheduler.alphas_cumprod
        start = x = noise(2, 3, 8, 8)
        for t in scheduler.timesteps[:-2]:  # to time 30
            x = scheduler.step(network(x, t), t, x).prev_sample
        exact = start * ((1 - 0.75 * alphas[30]) / (1 - 0.75 * alphas[900])).sqrt()
        errors[solver] = relative_error(x, exact.numpy())
    assert errors["ddim"] > 3 * errors["dpmsolver++"] and errors["ddim"] > 3 * errors["s_pndm"]
    assert errors["f_pndm"] < 0.1 * errors["s_pndm"]


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_convert_predictions_first(solver, prediction_type):
    outs = []
    for kind in ("epsilon", prediction_type):
        scheduler = make(mode="pnm", solver=solver, window=60, prediction_type=kind)
        scheduler.set_timesteps(20)
        alphas, z = scheduler.alphas_cumprod, noise(40, 2, 3, 8, 8, seed=1) if solver == "ddpm" else None

        def network(x, t, alphas=alphas, kind=kind):
            a, eps = alphas[column(t).long()], gauss_network(alphas)(x, t)
            x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
            return {"epsilon": eps, "sample": x0, "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * x0}[kind]

        outs.append(run(scheduler, network, noise(2, 3, 8, 8), z))
    assert relative_error(outs[1], outs[0].numpy()) < 1e-10


def stock_dpm(steps, **config):
    stock = diffusers.DPMSolverMultistepScheduler(**{**SCHEDULES["linear"], **config})
    stock.set_timesteps(steps)
    return stock


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_dpm_solver_is_that_of_stock_at_any_spacing_and_number_of_steps(spacing, final):
    config = {"timestep_spacing": spacing, "steps_offset": 1 if spacing == "leading" else 0}
    scheduler = make(window=0, solver="dpmsolver++", set_alpha_to_one=final == "zero", **config)
    network, x = gauss_network(scheduler.alphas_cumprod), noise(2, 3, 4, 4)
    for steps in range(2, 61):
        scheduler.set_timesteps(steps)
        stock = stock_dpm(steps, final_sigmas_type=final, **config)
        assert scheduler.timesteps.tolist() == stock.timesteps.tolist()
        ours = run(scheduler, network, x)
        assert relative_error(ours, run(stock, network, x).numpy()) < 2e-5  # stock is in float32
        assert relative_error(ours, dpm_float64(stock, scheduler, network, x).numpy()) < 1e-11


def dpm_float64(stock, scheduler, network, x):
    """The updates of stock in float64; its `step` casts to float32 between them."""
    alphas = scheduler.alphas_cumprod
    sigmas = ((1 - alphas) / alphas).sqrt()
    last = torch.zeros(1) if stock.config.final_sigmas_type == "zero" else sigmas[:1]
    stock.sigmas = torch.cat([sigmas[stock.timesteps], last.double()])
    predictions, count = [], len(stock.timesteps)
    for index, t in enumerate(stock.timesteps):
        stock._step_index = index
        predictions.append(stock.convert_model_output(network(x, t), sample=x))
        first = index == 0 or (index + 1 == count and (count < 15 or last == 0))
        if first:
            x = stock.dpm_solver_first_order_update(predictions[-1], sample=x)
        else:
            x = stock.multistep_dpm_solver_second_order_update(predictions[-2:], sample=x)
    return x


@pytest.mark.parametrize(
    "config",
    [
        {"thresholding": True, "sample_max_value": 1.5},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"prediction_type": "sample"},
    ],
    ids=str,
)
def test_dpm_solver_handles_predictions_as_stock_does(config):
    scheduler, stock = (
        make(window=0, solver="dpmsolver++", **config),
        stock_dpm(12, **{"timestep_spacing": "leading"} | config),
    )
    scheduler.set_timesteps(12)
    network, x = toy_network(scheduler.alphas_cumprod), noise(2, 3, 8, 8)
    assert relative_error(run(scheduler, network, x), run(stock, network, x).numpy()) < 2e-5


@pytest.mark.parametrize("solver", MULTISTEP)
def test_multistep_solvers_clip_what_they_go_on_with(solver):
    scheduler = make(window=0, solver=solver, clip_sample=True, clip_sample_range=0.5)
    scheduler.set_timesteps(10)
    out = run(scheduler, lambda x, t: -x, 3 * noise(2, 3, 8, 8))  # without clipping, values near 100
    assert out.abs().max() < 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("solver", MULTISTEP)
@pytest.mark.parametrize("per_sample", [False, True])
def test_multistep_solvers_shift_at_any_spacing_and_number_of_steps_and_end_clean(mode, spacing, solver, per_sample):
    scheduler = make(mode=mode, solver=solver, timestep_spacing=spacing, window=60, cutoff=0)
    network, shifted = gauss_network(scheduler.alphas_cumprod), 0
    if per_sample:
        scheduler.shift_per_sample()
    for steps in (4, 5, 7, 30, 60):
        scheduler.set_timesteps(steps)
        nominal = step_times(scheduler)
        x = run(scheduler, network, noise(3, 3, 8, 8) * torch.tensor([0.8, 1.0, 1.2]).reshape(3, 1, 1, 1))
        assert torch.isfinite(x).all() and x.abs().max() < 10
        assert scheduler.timesteps.min() >= 0 and scheduler.timesteps.max() <= 999
        assert history(scheduler).shape == (steps, 3)
        shifted += (history(scheduler)[:-1] != (nominal[:-1] if mode == "adm" else nominal[1:])[:, None]).sum()
        assert scheduler.sample_timesteps is None
    assert shifted > 20


def test_the_evaluations_of_a_step_lie_between_its_shifted_ends():
    scheduler = make(solver="f_pndm", window=100, data_variance=0.25)
    scheduler.set_timesteps(10)
    x = run(scheduler, gauss_network(scheduler.alphas_cumprod), noise(2, 3, 8, 8))
    times, chosen = scheduler.timesteps.tolist(), history(scheduler)[:, 0].tolist()
    nominal = list(range(900, -1, -100))
    for k in range(3):
        start, goal = times[4 * k], nominal[k + 1]
        assert times[4 * k : 4 * k + 4] == [start, (start + goal) / 2, (start + goal) / 2, goal]
        assert times[4 * k + 4] == chosen[k] != goal
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("begin", range(1, 18))
def test_a_run_may_begin_between_the_evaluations_of_a_step(begin):
    scheduler = make(solver="f_pndm", window=0)
    scheduler.set_timesteps(10)
    network, alphas = gauss_network(scheduler.alphas_cumprod), scheduler.alphas_cumprod
    times = scheduler.timesteps.tolist()
    clean = of_variance(0.25, 48, 2)
    x = scheduler.add_noise(clean, noise(*clean.shape), scheduler.timesteps[begin : begin + 1])
    start = (1 - 0.75 * alphas[int(times[begin])]).sqrt()  # of gaussian data
    exact = 0.5 * x / start
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(network(x, t), t, x).prev_sample
    assert relative_error(x, exact.numpy()) < 0.25
    assert scheduler.step_index == 19 and len(scheduler.shifted_timesteps) == 10 - min(begin // 4, 3) - max(
        begin - 12, 0
    )


# ---------------------------------------------------------------- one time per sample


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mode", MODES)
def test_with_times_per_sample_a_batch_is_as_many_single_runs(mode, solver):
    scheduler = make(mode=mode, solver=solver, window=200, data_variance=None if mode == "paper" else 0.25)
    network, x = gauss_network(scheduler.alphas_cumprod), noise(4, 3, 16, 16)
    x = x * torch.tensor([0.7, 0.9, 1.0, 1.2]).reshape(4, 1, 1, 1)
    z = noise(40, 4, 3, 16, 16, seed=2) if solver == "ddpm" else None
    stop = scheduler.shift_per_sample()
    scheduler.set_timesteps(20)
    together, times = run(scheduler, network, x, z), history(scheduler)
    assert len(set(times[5])) > 1
    for k in range(4):
        scheduler.set_timesteps(20)
        alone = run(scheduler, network, x[k : k + 1], None if z is None else z[:, k : k + 1])
        assert (alone - together[k]).abs().max() < 1e-12
        assert (history(scheduler)[:, 0] == times[:, k]).all()
    stop()
    scheduler.set_timesteps(20)
    run(scheduler, network, x, z)
    assert mode != "paper" or all(len(set(row)) == 1 for row in history(scheduler))


def test_the_schedule_shows_the_mean_of_the_times_of_the_samples():
    scheduler = make(window=200, data_variance=0.25, solver="f_pndm")
    scheduler.shift_per_sample()
    scheduler.set_timesteps(10)
    x, means = noise(3, 3, 8, 8) * torch.tensor([0.7, 1.0, 1.2]).reshape(3, 1, 1, 1), []
    for index, t in enumerate(scheduler.timesteps):
        own = scheduler.sample_timesteps
        means.append(float(t) if own is None else float(own.mean()))
        assert own is None or own.shape == (3,) and own.dtype == scheduler.timesteps.dtype
        assert scheduler.timesteps.tolist()[index] == pytest.approx(means[-1], abs=1e-3)
        x = scheduler.step(0.5 * x, t if own is None else own, x).prev_sample
    assert scheduler.sample_timesteps is None


def test_a_denoiser_is_hooked_once_and_needs_a_timestep(components):
    scheduler, unet = make(), components["unet"]
    stop = scheduler.shift_per_sample(unet)
    with pytest.raises(ValueError, match="has its times from a scheduler already"):
        make().shift_per_sample(unet)
    stop()
    stop()
    make().shift_per_sample(unet)()
    with pytest.raises(ValueError, match="Linear takes no `timestep`"):
        scheduler.shift_per_sample(torch.nn.Linear(1, 1))


# ---------------------------------------------------------------- epsilon scaling


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_scale_of_one_changes_nothing(solver):
    x, z, outs = noise(2, 3, 8, 8), noise(40, 2, 3, 8, 8, seed=1) if solver == "ddpm" else None, []
    for scale in ({}, {"epsilon_scale": 1.0, "epsilon_scale_slope": 0.0}, {"epsilon_scale": 1.01}):
        scheduler = make(solver=solver, window=60, **scale)
        scheduler.set_timesteps(10)
        outs.append(run(scheduler, gauss_network(scheduler.alphas_cumprod), x, z))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("index", [0, 4, 9])
def test_one_step_with_scaled_epsilon_has_a_closed_form(prediction_type, index):
    scheduler = make(window=0, prediction_type=prediction_type, epsilon_scale=1.1, epsilon_scale_slope=0.02)
    scheduler.set_timesteps(10)
    t, x, eps = scheduler.timesteps[index], noise(2, 3, 8, 8), noise(2, 3, 8, 8, seed=1)
    a = scheduler.alphas_cumprod[t]
    b = scheduler.alphas_cumprod[t - 100] if index < 9 else torch.tensor(1.0).double()
    x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
    output = {"epsilon": eps, "sample": x0, "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * x0}[prediction_type]
    scaled = eps / (1.1 + 0.02 * index)
    expected = b.sqrt() * (x - (1 - a).sqrt() * scaled) / a.sqrt() + (1 - b).sqrt() * scaled
    assert (scheduler.step(output, t, x).prev_sample - expected).abs().max() < 1e-10


@pytest.mark.parametrize("solver", MULTISTEP)
def test_every_evaluation_of_a_step_has_the_scale_of_the_step(solver):
    plain, scaled = (make(window=0, solver=solver, epsilon_scale=s, epsilon_scale_slope=s - 1) for s in (1.0, 1.05))
    for s in (plain, scaled):
        s.set_timesteps(10)
    network, x = gauss_network(plain.alphas_cumprod), noise(2, 3, 8, 8)
    steps = iter(
        [
            k
            for k in range(10)
            for _ in range({"s_pndm": 2, "f_pndm": 4}.get(solver, 1) if k < WARM_UP.get(solver, 0) else 1)
        ]
    )
    by_network = run(plain, lambda x, t: network(x, t) / (1.05 + 0.05 * next(steps)), x)
    assert relative_error(run(scaled, network, x), by_network.numpy()) < 1e-12


def test_epsilon_scaling_composes_with_shifts_and_leaves_the_estimate_of_the_data_alone():
    scheduler = make(window=40, epsilon_scale=1.2)
    scheduler.set_timesteps(10)
    run(scheduler, gauss_network(scheduler.alphas_cumprod), noise(2, 3, 32, 32))
    assert float(scheduler.estimated_data_variance) == pytest.approx(0.25, abs=1e-6)
    assert scheduler.timesteps.tolist() != list(range(900, -1, -100))


# ---------------------------------------------------------------- no signal


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("count", "batch"), [(256, 8), (16384, 1)])
@pytest.mark.parametrize("steps", [10, 50])
def test_unit_variance_data_is_recognised_during_the_run_and_shifts_stop(mode, count, batch, steps, caplog):
    scheduler = make("scaled_linear", mode=mode, window=40)
    for _ in range(2):
        scheduler.set_timesteps(steps)
        nominal = scheduler.timesteps.tolist()
        run(scheduler, gauss_network(scheduler.alphas_cumprod, 1.0), noise(batch, 1, count, 1))
        chosen = [*history(scheduler)[:, 0]] if mode != "adm" else [*history(scheduler)[1:, 0], -1]
        known = [k for k, t in enumerate(nominal) if t <= 600][0]
        assert chosen[known:-1] == nominal[known + 1 :]
        assert chosen[:known] != nominal[1 : known + 1]
        assert not scheduler.has_signal
        assert float(scheduler.estimated_data_variance) == pytest.approx(1, abs=1e-6)
    assert len(warnings_of(caplog)) == 1
    assert "no signal" in warnings_of(caplog)[0]


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_image_like_data_is_never_taken_for_unit_variance_data(solver, caplog):
    scheduler = make(solver=solver, window=40)
    for variance in (0.1, 0.25, 0.6):
        scheduler.set_timesteps(50)
        run(scheduler, gauss_network(scheduler.alphas_cumprod, variance), noise(1, 3, 64, 64), generator=None)
        assert scheduler.has_signal
        assert float(scheduler.estimated_data_variance) == pytest.approx(variance, abs=1e-6)
    assert warnings_of(caplog) == []


def test_the_estimate_holds_for_data_that_are_not_gaussian():
    # Pixels are +-0.5 at random, on a mean of 0.2: the best prediction is a tanh, the data variance 0.25.
    scheduler = make(window=40)
    scheduler.set_timesteps(50)

    def network(x, t):
        a = scheduler.alphas_cumprod[t]
        x0 = 0.2 + 0.5 * torch.tanh(0.5 * a.sqrt() * (x - a.sqrt() * 0.2) / (1 - a))
        return (x - a.sqrt() * x0) / (1 - a).sqrt()

    run(scheduler, network, noise(1, 3, 128, 128))
    assert float(scheduler.estimated_data_variance) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("mode", MODES)
def test_a_given_data_variance_near_one_shifts_nothing_and_says_so_once(mode, caplog):
    scheduler = make(mode=mode, window=40, data_variance=0.97)
    for _ in range(2):
        scheduler.set_timesteps(10)
        run(scheduler, gauss_network(scheduler.alphas_cumprod, 1.0), noise(1, 3, 64, 64))
        assert scheduler.timesteps.tolist() == list(range(900, -1, -100))
    assert not scheduler.has_signal
    assert len(warnings_of(caplog)) == 1 and "0.97" in warnings_of(caplog)[0]


def test_a_given_data_variance_of_zero_is_the_published_criterion_without_the_guard(caplog):
    scheduler = make(window=40, data_variance=0.0)
    scheduler.set_timesteps(50)
    nominal = scheduler.timesteps.numpy().copy()
    run(scheduler, gauss_network(scheduler.alphas_cumprod, 1.0), noise(1, 3, 64, 64))
    assert (history(scheduler)[:-1, 0] != nominal[1:])[nominal[:-1] > 300].all()
    assert warnings_of(caplog) == []


# ---------------------------------------------------------------- the contract with diffusers


@pytest.mark.parametrize("loaded", [False, True])
def test_the_config_survives_a_round_trip(loaded, tmp_path):
    config = {"mode": "adm", "solver": "ddpm", "window": 8, "cutoff": 77, "data_variance": 0.3, "released": True}
    scheduler = make("scaled_linear", prediction_type="v_prediction", steps_offset=1, **config)
    if loaded:
        scheduler.save_pretrained(tmp_path)
        scheduler = TimeShiftScheduler.from_pretrained(tmp_path)
    again = TimeShiftScheduler.from_config(scheduler.config)
    visible = {k: v for k, v in again.config.items() if not k.startswith("_")}
    assert visible == {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)
    assert {**visible, **config} == visible


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("name", ["DDIM", "DDPM", "PNDM", "EulerDiscrete", "DPMSolverMultistep"])
def test_the_noise_schedule_of_a_stock_scheduler_survives_the_way_here_and_back(name, loaded, tmp_path):
    stock_class = getattr(diffusers, f"{name}Scheduler")
    stock = stock_class(**SCHEDULES["scaled_linear"], prediction_type="v_prediction")
    if loaded:
        stock.save_pretrained(tmp_path)
        stock = stock_class.from_pretrained(tmp_path)
    ours = TimeShiftScheduler.from_config(stock.config, window=12)
    back = stock_class.from_config(ours.config)
    for s in (ours, back):
        assert torch.allclose(s.alphas_cumprod.float(), stock.alphas_cumprod.float(), rtol=1e-4, atol=1e-7)
        assert s.config.prediction_type == "v_prediction"
    assert ours.config.window == 12


def test_trained_betas_are_used_saved_and_loaded(tmp_path):
    scheduler = TimeShiftScheduler(num_train_timesteps=3, trained_betas=np.array([0.1, 0.2, 0.3]))
    scheduler.save_pretrained(tmp_path)
    loaded = TimeShiftScheduler.from_pretrained(tmp_path)
    assert loaded.betas.tolist() == scheduler.betas.tolist() == [0.1, 0.2, 0.3]
    assert scheduler.alphas_cumprod.tolist() == pytest.approx([0.9, 0.72, 0.504])


def test_zero_terminal_snr_is_that_of_stock():
    stock = diffusers.DDIMScheduler(rescale_betas_zero_snr=True)
    assert torch.allclose(make(rescale_betas_zero_snr=True).alphas_cumprod.float(), stock.alphas_cumprod, atol=1e-5)


@pytest.mark.parametrize("numbers", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("solver", ["ddim", *MULTISTEP])
def test_runs_repeat_to_the_bit_even_after_an_interrupted_one(mode, numbers, solver):
    scheduler = make(mode=mode, window=60, solver=solver)
    network, outs, count = gauss_network(scheduler.alphas_cumprod), [], 20 + {"s_pndm": 1, "f_pndm": 9}.get(solver, 0)
    for stop in (count, count, 7, count):
        scheduler.set_timesteps(20)
        x = noise(2, 3, 8, 8)
        for t in scheduler.timesteps[:stop]:
            x = scheduler.step(network(x, t), t.item() if numbers else t, x).prev_sample
        assert scheduler.step_index == stop
        assert len(scheduler.shifted_timesteps) == stop - (
            count - 20 if stop > 7 else {"s_pndm": 1, "f_pndm": 6}.get(solver, 0)
        )
        if stop == count:
            outs.append((x, history(scheduler), scheduler.timesteps.clone()))
    for out in outs[1:]:
        assert torch.equal(out[0], outs[0][0]) and (out[1] == outs[0][1]).all() and torch.equal(out[2], outs[0][2])


@pytest.mark.parametrize("mode", ["pnm", "adm"])
@pytest.mark.parametrize("solver", ["ddim", *MULTISTEP])
def test_a_loop_started_again_without_set_timesteps_is_a_new_run(mode, solver):
    scheduler = make(mode=mode, window=60, solver=solver)
    scheduler.set_timesteps(20)
    network, x = gauss_network(scheduler.alphas_cumprod), noise(2, 3, 8, 8)
    first = run(scheduler, network, x), history(scheduler)
    assert torch.equal(run(scheduler, network, x), first[0])
    assert (history(scheduler) == first[1]).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_run_may_begin_anywhere(mode):
    scheduler = make(mode=mode, window=60)
    network, x, outs = gauss_network(scheduler.alphas_cumprod), noise(2, 3, 8, 8), []
    for give in ("views", "views and index", "numbers", "numbers and index"):
        scheduler.set_timesteps(20)
        if "index" in give:
            scheduler.set_begin_index(6)
            assert scheduler.begin_index == 6
        y = x
        for k in range(6, 20):
            t = scheduler.timesteps[k] if "views" in give else int(scheduler.timesteps[k])
            y = scheduler.step(network(y, torch.as_tensor(t)), t, y).prev_sample
        outs.append(y)
        assert scheduler.begin_index is None or scheduler.step_index == 20
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_begin_index_decides_where_the_time_alone_would_not():
    scheduler, x = make(window=0), noise(1, 3, 8, 8)
    scheduler.set_timesteps(20)
    scheduler.set_begin_index(6)
    with CountReads() as counter:
        scheduler.step(0.5 * x, torch.tensor(999), x)
    assert scheduler.step_index == 7 and scheduler.shifted_timesteps[0].tolist() == [600]
    assert counter.reads == 0


def test_iterating_over_a_copy_uses_the_times_the_network_saw_and_warns_once(caplog):
    scheduler = make(window=60)
    network, x = gauss_network(scheduler.alphas_cumprod), noise(2, 3, 8, 8)
    for copy in (lambda t: t.clone(), lambda t: t.tolist()):
        scheduler.set_timesteps(20)
        nominal, y = copy(scheduler.timesteps), x
        for t in nominal:
            y = scheduler.step(network(y, torch.as_tensor(t)), t, y).prev_sample
        assert (y - by_hand_of([*range(950, -1, -50)], scheduler, network, x)).abs().max() < 1e-12
    assert len(warnings_of(caplog)) == 1 and "not over a copy" in warnings_of(caplog)[0]


def by_hand_of(times, scheduler, network, x):
    plain = make(window=0)
    plain.set_timesteps(timesteps=times)
    return by_hand(plain, network, x, torch.tensor(1.0).double())


def test_a_time_off_the_schedule_is_stepped_to_the_next_time_below_it():
    scheduler = make(window=0)
    scheduler.set_timesteps(50)
    x, a, b = noise(1, 3, 8, 8), *scheduler.alphas_cumprod[[7, 0]]
    expected = b.sqrt() * (x - (1 - a).sqrt() * 0.1 * x) / a.sqrt() + (1 - b).sqrt() * 0.1 * x
    assert (scheduler.step(0.1 * x, 7, x).prev_sample - expected).abs().max() < 1e-12
    scheduler.set_timesteps(50)
    for t in (0, 1):  # after the last step, a number starts again
        assert scheduler.step(0.1 * x, t, x).prev_sample.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("solver", ["ddim", *MULTISTEP])
def test_samples_keep_their_dtype_and_inputs_their_values(mode, dtype, solver):
    scheduler = make(mode=mode, window=60, solver=solver)
    scheduler.set_timesteps(10)
    x, eps = noise(2, 3, 8, 8).to(dtype), noise(2, 3, 8, 8, seed=1).to(dtype)
    kept = x.clone(), eps.clone()
    for t in scheduler.timesteps[:3]:
        output = scheduler.step(eps, t, x)
    assert isinstance(output, TimeShiftSchedulerOutput)
    assert output.prev_sample.dtype == output.pred_original_sample.dtype == dtype
    assert output.shifted_timesteps.dtype == torch.int64 and output.shifted_timesteps.shape == (2,)
    assert torch.equal(x, kept[0]) and torch.equal(eps, kept[1])
    assert scheduler.add_noise(x, eps, torch.tensor([5, 500])).dtype == dtype


def test_float32_samples_give_the_float64_result_to_rounding():
    scheduler = make("scaled_linear", window=0)
    network, outs = gauss_network(scheduler.alphas_cumprod), []
    for dtype in (torch.float32, torch.float64):
        scheduler.set_timesteps(50)
        outs.append(run(scheduler, lambda x, t: network(x.double(), t).to(x.dtype), noise(1, 3, 8, 8).to(dtype)))
    assert (outs[0] - outs[1]).abs().max() < 1e-5


class CountReads(TorchDispatchMode):
    """Counts how often a tensor's value is brought to the host, which on an accelerator stalls the queue."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("solver", ["ddim", *MULTISTEP])
@pytest.mark.parametrize("per_sample", [False, True])
def test_no_step_but_the_last_reads_a_value_back_from_the_device(mode, solver, per_sample):
    scheduler = make(mode=mode, window=60, solver=solver, epsilon_scale=1.01)
    if per_sample:
        scheduler.shift_per_sample()
    scheduler.set_timesteps(10)
    x = noise(2, 3, 8, 8)
    for t in scheduler.timesteps:
        with CountReads() as counter:
            scheduler.step(0.5 * x, t, x)
        assert counter.reads <= (scheduler.step_index == len(scheduler.timesteps))


@pytest.mark.parametrize("solver", SOLVERS)
def test_it_works_under_inference_mode(solver):
    scheduler = make(window=60, solver=solver)
    scheduler.set_timesteps(10)
    nominal = scheduler.timesteps.tolist()
    with torch.inference_mode():
        assert torch.isfinite(run(scheduler, gauss_network(scheduler.alphas_cumprod), noise(1, 3, 8, 8))).all()
    assert scheduler.timesteps.tolist() != nominal


def test_add_noise_and_get_velocity_are_those_of_stock_ddim():
    ours, stock = make(), diffusers.DDIMScheduler()
    x, z, t = noise(3, 3, 8, 8).float(), noise(3, 3, 8, 8, seed=1).float(), torch.tensor([0, 500, 999])
    assert torch.allclose(ours.add_noise(x, z, t), stock.add_noise(x, z, t), atol=1e-5)
    assert torch.allclose(ours.get_velocity(x, z, t), stock.get_velocity(x, z, t), atol=1e-5)
    assert ours.add_noise(x, z, t[1:2]).shape == x.shape


def test_the_rest_of_the_interface_is_stock():
    scheduler = make()
    x = noise(1, 3, 8, 8)
    assert scheduler.scale_model_input(x, 0.0) is x
    assert len(scheduler) == 1000 and scheduler.order == 1 and scheduler.init_noise_sigma == 1.0
    assert {"eta", "generator"} <= set(inspect.signature(scheduler.step).parameters)
    assert {"timesteps", "device"} <= set(inspect.signature(scheduler.set_timesteps).parameters)
    scheduler.set_timesteps(10)
    as_tuple = scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)
    scheduler.set_timesteps(10)
    as_output = scheduler.step(x, scheduler.timesteps[0], x)
    assert all(torch.equal(a, b) for a, b in zip(as_tuple, as_output.to_tuple(), strict=True))


def test_the_file_stands_alone(tmp_path, monkeypatch):
    """It loads as remote code, with the siblings that it imports itself, where sfumato is not installed."""
    file = Path(scheduling_time_shift.__file__)
    siblings = get_relative_imports(file)  # what loading from the Hub carries along: no further
    assert sorted(siblings) == ["multistep_solvers", "noise_schedule", "shifted_times"]
    folder = tmp_path / "remote_code"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for name in (file.stem, *siblings):
        assert name == file.stem or get_relative_imports(file.parent / f"{name}.py") == []
        shutil.copy(file.parent / f"{name}.py", folder)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "sfumato"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    module = importlib.import_module("remote_code.scheduling_time_shift")
    scheduler = module.TimeShiftScheduler(solver="f_pndm", clip_sample=False)
    scheduler.set_timesteps(10)
    assert torch.isfinite(run(scheduler, gauss_network(scheduler.alphas_cumprod), noise(1, 3, 8, 8))).all()
    assert hasattr(module, "SchedulerMixin")  # diffusers looks it up to reload a saved pipeline


# ---------------------------------------------------------------- stock pipelines


@pytest.fixture(scope="module")
def components():
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    none = dict.fromkeys(["text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    return {"unet": unet, "vae": vae, **none}


def pipeline(pipeline_class, components, mode, **config):
    stock = diffusers.PNDMScheduler(**SCHEDULES["scaled_linear"], steps_offset=1, skip_prk_steps=True)
    pipe = pipeline_class(**components, scheduler=stock, requires_safety_checker=False)
    pipe.scheduler = TimeShiftScheduler.from_config(pipe.scheduler.config, mode=mode, window=100, **config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, **kwargs):
    """One call, and the times that the UNet was given in it."""
    seen = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[1].item()), with_kwargs=True
    )
    embeds = {"prompt_embeds": torch.ones(1, 4, 8), "negative_prompt_embeds": torch.zeros(1, 4, 8)}
    generator = torch.Generator().manual_seed(0)
    images = pipe(**embeds, generator=generator, num_inference_steps=10, output_type="latent", **kwargs).images
    hook.remove()
    return images, seen


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
@pytest.mark.parametrize("mode", MODES)
def test_stable_diffusion_shows_the_unet_exactly_the_times_of_the_schedule(mode, solver, components):
    pipe = pipeline(diffusers.StableDiffusionPipeline, components, mode, solver=solver, data_variance=0.25)
    latents, seen = call(pipe)
    nominal = list(range(901, 0, -100))
    assert seen == pipe.scheduler.timesteps.tolist()
    assert (seen == nominal) == (mode != "paper")
    assert seen[8:] == nominal[8:]  # chosen below the cutoff
    if mode != "adm":
        assert (history(pipe.scheduler)[:-1, 0].tolist() == seen[1:]) == (mode == "paper")
    assert torch.equal(call(pipe)[0], latents)


@pytest.mark.parametrize("solver", MULTISTEP)
@pytest.mark.parametrize("mode", MODES)
def test_stable_diffusion_shows_the_unet_the_further_evaluations_of_multistep_solvers(mode, solver, components):
    pipe = pipeline(diffusers.StableDiffusionPipeline, components, mode, solver=solver, data_variance=0.25)
    latents, seen = call(pipe)
    assert seen == pipe.scheduler.timesteps.tolist()
    assert len(seen) == {"s_pndm": 11, "f_pndm": 19, "dpmsolver++": 10}[solver]
    assert len(pipe.scheduler.shifted_timesteps) == 10
    assert torch.isfinite(latents).all() and torch.equal(call(pipe)[0], latents)


@pytest.mark.parametrize("solver", MULTISTEP)
@pytest.mark.parametrize("strength", [0.3, 0.6, 0.9])
def test_multistep_solvers_begin_in_the_middle_of_stable_diffusion_img2img(solver, strength, components):
    pipe = pipeline(diffusers.StableDiffusionImg2ImgPipeline, components, "pnm", solver=solver, data_variance=0.25)
    latents, seen = call(pipe, image=0.5 * noise(1, 4, 8, 8).float(), strength=strength)
    begin = 10 - int(10 * strength)
    assert pipe.scheduler.begin_index == begin
    assert seen == pipe.scheduler.timesteps.tolist()[begin:]
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize(
    ("mode", "solver", "guidance_scale"),
    [("paper", "ddim", 1.0), *((mode, solver, 3.0) for mode in MODES for solver in ("ddim", *MULTISTEP))],
)
def test_with_a_hooked_unet_a_batch_of_stable_diffusion_is_as_many_single_runs(
    mode, solver, guidance_scale, components
):
    pipe = pipeline(diffusers.StableDiffusionPipeline, components, mode, solver=solver, data_variance=0.25)
    pipe.scheduler = TimeShiftScheduler.from_config(pipe.scheduler.config, window=400, cutoff=0, clip_sample=False)
    pipe.unet = deepcopy(pipe.unet).double()
    latents = noise(3, 4, 8, 8) * torch.tensor([0.3, 0.5, 0.7]).reshape(3, 1, 1, 1)
    stop = pipe.scheduler.shift_per_sample(pipe.unet)
    together, times, seen = generate(pipe, latents, guidance_scale)
    runs = [generate(pipe, latents[k : k + 1], guidance_scale) for k in range(3)]
    stop()
    assert any(len(set(row)) > 1 for row in times)
    own = [row for row in seen if len(set(row)) > 1]
    assert bool(own) == (mode == "paper" or solver == "f_pndm")
    assert all(len(row) == (6 if guidance_scale > 1 else 3) and row[:3] == row[-3:] for row in own)
    for k, (alone, own_times, _) in enumerate(runs):
        assert (own_times[:, 0] == times[:, k]).all()
        assert (alone[0] - together[k]).abs().max() < 1e-9 * together[k].abs().max()
    assert all(len(set(row)) == 1 for row in generate(pipe, latents, guidance_scale)[2])


def generate(pipe, latents, guidance_scale):
    """Latents, the times chosen and the times that the UNet embedded, a list a call."""
    seen = []
    hook = pipe.unet.time_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].tolist()))
    embeds = {"prompt_embeds": torch.ones(1, 4, 8), "negative_prompt_embeds": torch.zeros(1, 4, 8)}
    embeds = {name: embed.to(latents).expand(len(latents), -1, -1) for name, embed in embeds.items()}
    options = {"num_inference_steps": 8, "output_type": "latent", "guidance_scale": guidance_scale}
    images = pipe(**embeds, **options, latents=latents).images
    hook.remove()
    return images, history(pipe.scheduler), seen


def test_ddpm_is_stochastic_in_a_stock_pipeline_that_was_not_told_eta(components):
    outs = []
    for solver, kwargs in (("ddpm", {}), ("ddim", {"eta": 1.0}), ("ddim", {})):
        outs.append(call(pipeline(diffusers.StableDiffusionPipeline, components, "pnm", solver=solver), **kwargs)[0])
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("mode", MODES)
def test_stable_diffusion_img2img_begins_in_the_middle(mode, components):
    pipe = pipeline(diffusers.StableDiffusionImg2ImgPipeline, components, mode, data_variance=0.25)
    latents, seen = call(pipe, image=0.5 * noise(1, 4, 8, 8).float(), strength=0.6)
    assert pipe.scheduler.begin_index == 4
    assert seen == pipe.scheduler.timesteps.tolist()[4:]
    assert seen[0] == 501 and len(pipe.scheduler.shifted_timesteps) == 6
    assert pipe.scheduler.timesteps.tolist()[:4] == [901, 801, 701, 601]
    assert (seen != [501, 401, 301, 201, 101, 1]) == (mode == "paper")
    assert torch.isfinite(latents).all()


def test_an_interrupted_pipeline_leaves_no_trace(components):
    pipe = pipeline(diffusers.StableDiffusionPipeline, components, "paper", data_variance=0.25)
    latents, seen = call(pipe)

    def interrupt(pipe, index, t, kwargs):
        pipe._interrupt = index == 3
        return kwargs

    assert len(call(pipe, callback_on_step_end=interrupt)[1]) == 4
    again, seen_again = call(pipe)
    assert torch.equal(again, latents) and seen_again == seen


@pytest.mark.parametrize("mode", MODES)
def test_a_pixel_space_pipeline_runs(mode):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
    )
    pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    pipe.scheduler = TimeShiftScheduler.from_config(pipe.scheduler.config, mode=mode)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, num_inference_steps=5, output_type="pt").images
    assert images.shape == (2, 3, 8, 8) and len(pipe.scheduler.shifted_timesteps) == 5


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mode": "deis"}, "`mode` must be one of 'paper', 'pnm', 'adm', 'pndm', got 'deis'"),
        ({"solver": "heun"}, "`solver` must be one of"),
        ({"beta_schedule": "sigmoid"}, "`beta_schedule` must be one of"),
        ({"prediction_type": "flow_prediction"}, "`prediction_type` must be one of"),
        ({"timestep_spacing": "quad"}, "`timestep_spacing` must be one of"),
        ({"window": -1}, "`window` must be a whole number of training steps >= 0, got -1"),
        ({"window": 2.5}, "`window` must be a whole number"),
        ({"window": 1001}, "`window` must not reach beyond the 1000 training steps .*, got 1001"),
        ({"cutoff": -1}, r"`cutoff` must lie in \[0, 1000\]"),
        ({"cutoff": 1001}, r"`cutoff` must lie in \[0, 1000\]"),
        ({"data_variance": -0.1}, "`data_variance` must be >= 0 or None, got -0.1"),
        ({"data_variance": float("nan")}, "`data_variance` must be >= 0"),
        ({"released": True}, "`released=True` needs mode 'pnm' or 'adm'"),
        ({"mode": "pndm"}, "pass `released=True`"),
        (
            {"mode": "adm", "released": True, "solver": "f_pndm"},
            "mode 'adm' has the solvers 'ddim', 'ddpm', got 'f_pndm'",
        ),
        ({"mode": "pnm", "released": True, "solver": "dpmsolver++"}, "mode 'pnm' has the solvers"),
    ],
    ids=str,
)
def test_an_impossible_config_is_refused_with_the_reason(config, message):
    with pytest.raises(ValueError, match=message):
        TimeShiftScheduler(**config)


@pytest.mark.parametrize(
    "stock",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.FlowMatchHeunDiscreteScheduler(),
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
    ids=lambda stock: type(stock).__name__,
)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_flow_matching_config_is_refused(stock, loaded, tmp_path):
    stock.save_pretrained(tmp_path)
    config = TimeShiftScheduler.load_config(tmp_path) if loaded else stock.config
    with pytest.raises(ValueError, match="flow-matching config"):
        TimeShiftScheduler.from_config(config)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({}, {"num_inference_steps": 0}, r"`num_inference_steps` must be a whole number in \[1, 1000\]"),
        ({}, {"num_inference_steps": 1001}, r"`num_inference_steps` must be a whole number in \[1, 1000\]"),
        ({}, {}, "pass exactly one"),
        ({}, {"num_inference_steps": 2, "timesteps": [5, 3]}, "pass exactly one"),
        ({}, {"timesteps": []}, "at least one"),
        ({}, {"timesteps": [100, 200]}, "fall strictly"),
        ({}, {"timesteps": torch.tensor([200, 200])}, "fall strictly"),
        ({}, {"timesteps": [200.5, 100]}, "must be whole"),
        ({}, {"timesteps": [1000, 100]}, r"Times must lie in \[0, 999\]"),
        ({}, {"timesteps": [100, -1]}, r"Times must lie in \[0, 999\]"),
        ({"steps_offset": 1}, {"num_inference_steps": 1000}, "`steps_offset`"),
        ({"mode": "pnm", "released": True}, {"num_inference_steps": 1}, "at least one"),
        ({"mode": "adm", "released": True}, {"num_inference_steps": 600}, "cannot have 600 steps"),
        ({"mode": "pndm", "released": True}, {"num_inference_steps": 9}, r"Times must lie in \[0, 998\]"),
        ({"solver": "f_pndm"}, {"num_inference_steps": 3}, r"'f_pndm' needs at least 4 steps \(3 to warm up\), got 3"),
        ({"solver": "s_pndm"}, {"num_inference_steps": 1}, r"'s_pndm' needs at least 2 steps \(1 to warm up\), got 1"),
        ({"solver": "f_pndm"}, {"timesteps": [500, 100]}, "needs at least 4 steps"),
        ({"solver": "dpmsolver++"}, {"num_inference_steps": 1000}, "fall strictly"),
        ({"epsilon_scale": 0.0}, {"num_inference_steps": 5}, "`epsilon_scale` must stay above 0"),
        ({"epsilon_scale_slope": -0.3}, {"num_inference_steps": 5}, "`epsilon_scale` must stay above 0"),
        ({"epsilon_scale": float("nan")}, {"num_inference_steps": 5}, "`epsilon_scale` must stay above 0"),
        ({"solver": "s_pndm", **SILENT_END}, {"num_inference_steps": 5}, "At time 999 no signal is left"),
        ({"epsilon_scale": 1.1, **SILENT_END}, {"num_inference_steps": 5}, "At time 999 no signal is left"),
    ],
    ids=str,
)
def test_impossible_times_are_refused_with_the_reason(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**config).set_timesteps(**arguments)


def test_an_impossible_step_is_refused_with_the_reason():
    scheduler, x = make(), noise(1, 3, 8, 8)
    with pytest.raises(ValueError, match="`set_timesteps` before `step`"):
        scheduler.step(x, 0, x)
    scheduler.set_timesteps(10)
    for eta in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"`eta` must lie in \[0, 1\]"):
            scheduler.step(x, 0, x, eta=eta)
    with pytest.raises(ValueError, match="either `generator` or `variance_noise`"):
        scheduler.step(x, 0, x, eta=1.0, generator=torch.Generator(), variance_noise=x)


@pytest.mark.parametrize("solver", MULTISTEP)
def test_noise_is_refused_by_solvers_that_take_none(solver):
    scheduler, x = make(solver=solver), noise(1, 3, 8, 8)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="takes no noise, got `eta` 0.5: use 'ddim' or 'ddpm'"):
        scheduler.step(x, scheduler.timesteps[0], x, eta=0.5)
