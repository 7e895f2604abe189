"""BDIAScheduler: the authors' program, and the properties of the method."""

import json
import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from sfumato.schedulers.scheduling_bdia import BDIAScheduler

GOLDEN = (
    Path(__file__).parent.parent / "golden" / "bdia.npz"
)  # outputs of the authors' program, on closed-form networks
SCHEDULES = {
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
}
SPACINGS = ["leading", "linspace", "trailing"]


def toy_network(alphas):
    """Not a denoiser: states grow to 1e2."""
    return lambda x, t: 0.3 * x * math.cos(float(t) / 500) + 0.1 * torch.sin(3 * x + float(t) / 100)


def gauss_network(alphas, data_variance=0.25):
    """The best epsilon for data ~ N(0, data_variance I)."""

    def predict(x, t):
        alpha = alphas[int(t)]
        return (1 - alpha).sqrt() * x / (alpha * data_variance + 1 - alpha)

    return predict


NETWORKS = {"toy": toy_network, "gauss": gauss_network}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(scheduler, network, x):
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
    return x


def relative(out, reference):
    out, reference = torch.as_tensor(out), torch.as_tensor(reference)
    return ((out - reference).abs().max() / reference.abs().max()).item()


with np.load(GOLDEN) as archive:
    REFERENCE = {key: archive[key] for key in archive.files}
META = json.loads(str(REFERENCE["meta_json"]))


def reference_network(case):
    alphas = torch.from_numpy(REFERENCE[f"alphas_cumprod_{case['schedule']}"])
    return NETWORKS[case["net"]](alphas)


def reference(name):
    return torch.from_numpy(REFERENCE[name])


def test_the_schedules_are_those_of_the_program():
    for schedule, config in SCHEDULES.items():
        stored = reference(f"alphas_cumprod_{schedule}")
        assert relative(BDIAScheduler(**config).alphas_cumprod, stored) < 1e-13


@pytest.mark.parametrize("name", [name for name in META if name.startswith("edit")])
def test_inverting_and_editing_are_those_of_the_authors_program(name):
    case = META[name]
    steps, skipped = case["N"], case["N"] - int(case["N"] * case["strength"])
    network = reference_network(case)
    config = {**SCHEDULES[case["schedule"]], "set_alpha_to_one": False, "gamma": case["gamma"], "skip_steps": skipped}
    inverse, forward = BDIAScheduler(**config, inverse=True), BDIAScheduler(**config)
    for scheduler in (inverse, forward):
        scheduler.set_timesteps(steps)
    assert relative(run(inverse, network, reference("z0")), reference(f"{name}__inv_hi")) < 1e-9
    assert relative(inverse.pair.second.value, reference(f"{name}__inv_lo")) < 1e-9
    start = forward.set_pair((reference(f"{name}__inv_hi"), reference(f"{name}__inv_lo")))
    edited = run(forward, lambda x, t: network(x, t) + 0.15 * x, start)
    assert relative(edited, reference(f"{name}__edit_out")) < 1e-9
    assert relative(forward.pair.second.value, reference(f"{name}__edit_prev")) < 1e-9


@pytest.mark.parametrize("name", [name for name in META if name.startswith("t2i")])
def test_sampling_is_that_of_the_authors_program(name):
    case = META[name]
    config = {**SCHEDULES[case["schedule"]], "set_alpha_to_one": False, "steps_offset": 1, "gamma": case["gamma"]}
    scheduler = BDIAScheduler(**config)
    scheduler.set_timesteps(case["N"])
    out = run(scheduler, reference_network(case), reference("xT"))
    assert relative(out, reference(f"{name}__out")) < 1e-9


# ---------------------------------------------------------------- the method


def by_hand(levels, gamma, slope, x):
    """The published rule between levels (a, b), x = a p + b e, for a slope e of (x, index)."""

    def phi(x, e, now, target):
        return target[0] * (x - now[1] * e) / now[0] + target[1] * e

    states = [x]
    for index, (now, target) in enumerate(zip(levels, levels[1:], strict=False)):
        x, e = states[-1], slope(states[-1], index)
        step = phi(x, e, now, target)
        if index:
            step = step + gamma * (states[-2] - phi(x, e, now, levels[index - 1]))
        states.append(step)
    return states[-1]


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_step_is_the_published_rule_between_neighbours_of_the_schedule(spacing, gamma):
    scheduler = BDIAScheduler(**SCHEDULES["scaled_linear"], timestep_spacing=spacing, gamma=gamma)
    network, x = toy_network(None), noise(1, 1, 2, 4)
    for steps in range(2, 61):
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps.tolist()
        alphas = [*scheduler.alphas_cumprod[times].tolist(), 1.0]
        levels = [(math.sqrt(a), math.sqrt(1 - a)) for a in alphas]
        expected = by_hand(levels, gamma, lambda x, index, times=times: network(x, times[index]), x)
        assert relative(run(scheduler, network, x), expected) < 1e-11


@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_flows_and_edm_follow_the_same_rule_with_euler_steps(gamma):
    x = noise(1, 1, 2, 4)
    flow = BDIAScheduler(process="flow", shift=3.0, gamma=gamma)
    flow.set_timesteps(13)
    times, sigmas = flow.timesteps.tolist(), flow.sigmas.tolist()
    network = toy_network(None)
    expected = by_hand([(1.0, sigma) for sigma in sigmas], gamma, lambda x, i: network(x, times[i]), x)
    assert relative(run(flow, network, x), expected) < 1e-12

    edm = BDIAScheduler(process="edm", gamma=gamma)
    edm.set_timesteps(13)
    sigmas = edm.sigmas.double().tolist()

    def slope(x, index):  # (x - D(x)) / sigma with D = x / 2 at each level
        return x / 2 / sigmas[index]

    def denoiser(scaled, t):  # F with c_skip x + c_out F = x / 2
        sigma = sigmas[edm.step_index or 0]
        total = math.hypot(sigma, 0.5)
        return (0.5 - 0.25 / total**2) * scaled * total / (sigma * 0.5 / total)

    expected = by_hand([(1.0, sigma) for sigma in sigmas], gamma, slope, 80 * x)
    assert relative(run(edm, denoiser, 80 * x), expected) < 1e-9


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [2, 10, 20, 50, 100])
def test_gamma_zero_is_stock_ddim(steps, prediction_type, to_one):
    """The question that the discussion of huggingface/diffusers#9957 stalled on."""
    config = {**SCHEDULES["scaled_linear"], "steps_offset": 1, "set_alpha_to_one": to_one}
    stock = diffusers.DDIMScheduler(**config, prediction_type=prediction_type, clip_sample=False)
    stock.alphas_cumprod, stock.final_alpha_cumprod = stock.alphas_cumprod.double(), stock.final_alpha_cumprod.double()
    scheduler = BDIAScheduler.from_config(stock.config, gamma=0.0, clip_sample=False)
    outs = []
    for s in (scheduler, stock):
        s.set_timesteps(steps)
        outs.append(run(s, toy_network(None), noise(2, 3, 8, 8)))
    assert scheduler.timesteps.tolist() == stock.timesteps.tolist()
    assert relative(outs[0], outs[1]) < 1e-4  # stock's tables are float32


def test_gamma_zero_is_stock_euler_for_flows_and_edm():
    for stock in (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), diffusers.EDMEulerScheduler()):
        scheduler = BDIAScheduler.from_config(stock.config, gamma=0.0)
        ours = theirs = scheduler.init_noise_sigma * noise(2, 3, 8, 8)
        for s in (scheduler, stock):
            s.set_timesteps(12)
        for t, again in zip(scheduler.timesteps, stock.timesteps, strict=True):
            scaled = theirs if scheduler.config.process == "flow" else stock.scale_model_input(theirs, again)
            theirs = stock.step(toy_network(None)(scaled, again), again, theirs).prev_sample
            ours = scheduler.step(toy_network(None)(scheduler.scale_model_input(ours, t), t), t, ours).prev_sample
        assert relative(ours, theirs) < 1e-5  # stock's levels are float32


def test_a_step_is_linear_in_gamma():
    outs = {}
    for gamma in (0.0, 0.25, 0.5, 1.0):
        scheduler = BDIAScheduler(**SCHEDULES["linear"], gamma=gamma)
        scheduler.set_timesteps(10)
        x = noise(1, 3, 4, 4)
        for t in scheduler.timesteps[:2]:
            x = scheduler.step(toy_network(None)(x, t), t, x).prev_sample
        outs[gamma] = x
    for gamma in (0.25, 0.5):
        assert relative(outs[gamma], outs[0.0] + gamma * (outs[1.0] - outs[0.0])) < 1e-13


def test_with_one_noise_for_all_states_and_times_gamma_does_not_matter():
    x, z, outs = noise(1, 3, 4, 4), noise(1, 3, 4, 4, seed=1), []
    for gamma in (0.0, 0.4, 1.0):
        scheduler = BDIAScheduler(**SCHEDULES["scaled_linear"], gamma=gamma, timestep_spacing="linspace")
        scheduler.set_timesteps(17)
        outs.append(run(scheduler, lambda *_: z, x))
    assert all(relative(out, outs[0]) < 1e-11 for out in outs)


def gaussian_flow_error(scheduler, steps, data=0.25):
    """Error of a run of a flow for data ~ N(0, 1/4) on a uniform grid, whose paths are known: x ~ the deviation."""
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())

    def velocity(x, t):
        sigma = float(t) / 1000
        return x * (sigma - data * (1 - sigma)) / (sigma**2 + data * (1 - sigma) ** 2)

    return relative(run(scheduler, velocity, noise(1, 1, 4, 4)), math.sqrt(data) * noise(1, 1, 4, 4))


@pytest.mark.parametrize(("gamma", "ratio"), [(1.0, 4.0), (0.5, 2.0), (0.0, 2.0)])
def test_on_a_uniform_grid_it_is_of_second_order_for_gamma_one_and_of_first_below(gamma, ratio):
    scheduler = BDIAScheduler(process="flow", gamma=gamma)
    errors = [gaussian_flow_error(scheduler, steps) for steps in (80, 160)]
    assert errors[0] / errors[1] == pytest.approx(ratio, rel=0.1)


@pytest.mark.parametrize(("gamma", "steps"), [(1.0, 10), (0.94, 25), (0.5, 10)])
def test_the_condition_number_is_that_of_the_rule(gamma, steps):
    scheduler = BDIAScheduler(**SCHEDULES["linear"], gamma=gamma)
    scheduler.set_timesteps(steps)
    assert scheduler.condition_number == pytest.approx(gamma ** -(steps - 1))


def test_an_inversion_amplifies_an_error_as_the_condition_number_says():
    scheduler = BDIAScheduler(process="flow", gamma=0.7, inverse=True)
    scheduler.set_timesteps(12)
    x, error, ends = noise(1, 1, 2, 2), 1e-6, []
    for off in (0.0, error):  # in the second latent, as the rule is linear in it
        scheduler.set_pair((x, x + off))
        ends.append(run(scheduler, lambda x, t: torch.zeros_like(x), x))
    growth = (ends[1] - ends[0]).abs().max().item() / error
    assert 0.1 * scheduler.condition_number < growth < 10 * scheduler.condition_number


def test_zero_terminal_snr_is_for_models_that_predict_more_than_noise():
    config = {**SCHEDULES["scaled_linear"], "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(ValueError, match="no signal is left"):
        BDIAScheduler(**config).set_timesteps(10)
    for kind in ("v_prediction", "sample"):
        inverse, forward = (BDIAScheduler(**config, prediction_type=kind, inverse=i) for i in (True, False))
        stock = diffusers.DDIMScheduler.from_config(forward.config, clip_sample=False)
        plain = BDIAScheduler(**config, prediction_type=kind, gamma=0.0)
        for scheduler in (inverse, forward, plain, stock):
            scheduler.set_timesteps(10)
        assert forward.alphas_cumprod[forward.timesteps[0]] == 0
        x, network = noise(1, 1, 4, 4), toy_network(None)
        run(inverse, network, x)
        assert relative(run(forward, network, forward.set_pair(inverse.pair)), x) < 1e-12
        assert relative(run(plain, network, x), run(stock, network, x)) < 1e-3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gamma": -0.1}, r"`gamma` must lie in \[0, 1\], got -0.1"),
        ({"gamma": 1.1}, r"`gamma` must lie in \[0, 1\], got 1.1"),
        ({"gamma": float("nan")}, "`gamma` must lie in"),
        ({"process": "ve"}, "`process` must be one of 'vp', 'flow', 'edm', got 've'"),
        ({"on_edit": "warn"}, "`on_edit` must be one of"),
        ({"process": "edm", "prediction_type": "sample"}, "prediction types"),
    ],
    ids=str,
)
def test_an_impossible_config_is_refused_with_the_reason(config, message):
    with pytest.raises(ValueError, match=message):
        BDIAScheduler(**config)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({}, {"num_inference_steps": 1}, "at least 2 steps"),
        ({}, {"timesteps": [500]}, "at least 2 steps"),
        ({"skip_steps": 9}, {"num_inference_steps": 10}, "skip_steps=9"),
        ({"gamma": 0.0, "inverse": True}, {"num_inference_steps": 10}, "DDIM, which has no exact inverse"),
        ({}, {"sigmas": [3.0, 1.0]}, "give `timesteps`"),
        ({}, {"num_inference_steps": 5, "mu": 1.0}, "`mu` is for flow-matching"),
        ({"process": "edm"}, {"timesteps": [3.0, 1.0]}, "take `sigmas`"),
        ({"process": "flow"}, {"sigmas": [0.5, 1.0]}, "fall strictly"),
        ({"process": "flow", "use_dynamic_shifting": True}, {"num_inference_steps": 5}, "`mu` must be passed"),
        ({"steps_offset": 1}, {"num_inference_steps": 1000}, "steps_offset"),
    ],
    ids=str,
)
def test_impossible_times_are_refused_with_the_reason(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        BDIAScheduler(**config).set_timesteps(**arguments)
