"""BELMScheduler: the authors' program, and the properties of the method."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.schedulers.scheduling_bdia import BDIAScheduler
from sfumato.schedulers.scheduling_belm import BELMScheduler

GOLDEN = (
    Path(__file__).parent.parent / "golden" / "belm.npz"
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
        assert relative(BELMScheduler(**config).alphas_cumprod, stored) < 1e-13


@pytest.mark.parametrize("name", META)
def test_inverting_editing_and_sampling_are_those_of_the_authors_program(name):
    case = META[name]
    times, network = REFERENCE[f"{name}__timesteps"], reference_network(case)
    config = {**SCHEDULES[case["schedule"]], "released": True, "skip_steps": case["freeze_step"]}
    inverse, forward = BELMScheduler(**config, inverse=True), BELMScheduler(**config)
    for scheduler in (inverse, forward):
        scheduler.set_timesteps(timesteps=times)
    assert relative(run(inverse, network, reference("z0")), reference(f"{name}__inv_hi")) < 1e-9
    assert relative(inverse.pair.second.value, reference(f"{name}__inv_hi2")) < 1e-9
    start = forward.set_pair((reference(f"{name}__inv_hi"), reference(f"{name}__inv_hi2")))
    edited = run(forward, lambda x, t: network(x, t) + 0.05 * x, start)
    assert relative(edited, reference(f"{name}__edit")) < 1e-9
    if f"{name}__gen" in REFERENCE:
        assert relative(run(forward, network, reference("xT")), reference(f"{name}__gen")) < 1e-9


def test_the_times_of_the_released_program_are_those_of_linspace_spacing():
    name = next(name for name, case in META.items() if case["spacing"] == "linspace" and case["N"] == 50)
    scheduler = BELMScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == REFERENCE[f"{name}__timesteps"].tolist()


# ---------------------------------------------------------------- the method


def roots(scheduler):
    """alpha and s = sqrt((1 - A) / A) of every level, noisiest first."""
    alphas = [*scheduler.alphas_cumprod[scheduler.timesteps].tolist(), 1.0]
    return [math.sqrt(a) for a in alphas], [math.sqrt((1 - a) / a) for a in alphas]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_path_whose_x_over_alpha_is_quadratic_in_s_is_followed_exactly_at_any_number_of_steps(spacing):
    """Only the right neighbours and gaps do that; the pair gives the first step, which DDIM would take."""
    x0, x1, x2 = (noise(1, 1, 2, 2, seed=seed) for seed in range(3))
    scheduler = BELMScheduler(**SCHEDULES["scaled_linear"], timestep_spacing=spacing)
    inverse = BELMScheduler.from_config(scheduler.config, inverse=True)
    for steps in range(2, 61):
        for s in (scheduler, inverse):
            s.set_timesteps(steps)
        alphas, levels = roots(scheduler)
        path = [a * (x0 + x1 * s + x2 * s**2) for a, s in zip(alphas, levels, strict=True)]
        slopes = dict(zip(scheduler.timesteps.tolist(), [x1 + 2 * x2 * s for s in levels], strict=False))
        start = scheduler.set_pair((path[0], path[1]))
        assert relative(run(scheduler, lambda _, t, slopes=slopes: slopes[int(t)], start), path[-1]) < 1e-11
        start, slopes = inverse.set_pair((path[-1], path[-2])), {0: x1, **slopes}
        end = run(inverse, lambda _, t, slopes=slopes: slopes[int(t)], start)
        assert relative(end, path[0]) < 1e-14 * max(100.0, inverse.condition_number)


def test_every_step_is_the_published_formula():
    scheduler, x, network = (
        BELMScheduler(**SCHEDULES["linear"], timestep_spacing="trailing"),
        noise(1, 1, 4, 4),
        toy_network(None),
    )
    scheduler.set_timesteps(9)
    alphas, levels = roots(scheduler)
    states = [x]
    for index, t in enumerate(scheduler.timesteps.tolist()):
        (a_t, a_c), (s_t, s_c) = alphas[index : index + 2], levels[index : index + 2]
        e, x = network(states[-1], t), states[-1]
        if index == 0:
            states.append(a_c * (x / a_t + (s_c - s_t) * e))
            continue
        h, r = s_t - s_c, (s_t - s_c) / (levels[index - 1] - s_t)
        a_u, x_u = alphas[index - 1], states[-2]
        states.append(r**2 * (a_c / a_u) * x_u + (1 - r**2) * (a_c / a_t) * x - a_c * h * (1 + r) * e)
    assert relative(run(scheduler, network, states[0]), states[-1]) < 1e-12


def test_on_a_uniform_flow_grid_it_is_bdia_with_gamma_one():
    sigmas, outs = np.linspace(1, 1 / 16, 16).tolist(), []
    for scheduler in (BELMScheduler(process="flow"), BDIAScheduler(process="flow", gamma=1.0)):
        scheduler.set_timesteps(sigmas=sigmas)
        outs.append(run(scheduler, toy_network(None), noise(2, 4, 4, 4)))
    assert relative(outs[0], outs[1]) < 1e-6  # stock's levels are float32, which makes r differ from 1 a little


def test_it_is_of_second_order_for_flows():
    data, errors = 0.25, []
    for steps in (80, 160):
        scheduler = BELMScheduler(process="flow")
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())

        def velocity(x, t):
            sigma = float(t) / 1000
            return x * (sigma - data * (1 - sigma)) / (sigma**2 + data * (1 - sigma) ** 2)

        x = noise(1, 1, 4, 4)
        errors.append(relative(run(scheduler, velocity, x), math.sqrt(data) * x))  # paths are x ~ the deviation
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.1)


# The factor q^2 of the first step of an inversion after DDIM's, as measured on the released program.
MEASURED = [
    ("scaled_linear", "linspace", {}, {10: 136, 20: 49, 50: 14}),
    ("linear", "linspace", {}, {10: 1372, 20: 309, 50: 48}),
    ("scaled_linear", "leading", {"steps_offset": 1, "set_alpha_to_one": False}, {10: 630, 20: 237, 50: 68}),
    ("scaled_linear", "trailing", {}, {10: 0.4, 20: 0.3, 50: 0.2}),
    ("linear", "trailing", {}, {10: 1.3, 20: 0.9, 50: 0.7}),
]


@pytest.mark.parametrize(("schedule", "spacing", "config", "factors"), MEASURED)
def test_the_condition_number_says_which_schedules_amplify_errors_and_a_warning_goes_with_it(
    schedule, spacing, config, factors, caplog
):
    for steps, factor in factors.items():
        caplog.clear()
        scheduler = BELMScheduler(**SCHEDULES[schedule], timestep_spacing=spacing, **config, inverse=True)
        scheduler.set_timesteps(steps)
        s = scheduler.sigmas.double()
        gaps = (s[:-1] - s[1:]).tolist()
        assert (gaps[-2] / gaps[-1]) ** 2 == pytest.approx(factor, rel=0.02 if factor > 10 else 0.2)
        assert scheduler.condition_number >= 0.9 * factor and scheduler.condition_number >= 1
        warned = [r.getMessage() for r in caplog.records if "amplify errors" in r.getMessage()]
        assert len(warned) == (scheduler.condition_number > 100)
        forward = BELMScheduler.from_config(scheduler.config, inverse=False)
        forward.set_timesteps(steps)
        assert forward.condition_number == pytest.approx(scheduler.condition_number)
        assert len([r for r in caplog.records if "amplify errors" in r.getMessage()]) == len(warned)


def test_an_inversion_amplifies_an_error_as_the_condition_number_says():
    scheduler = BELMScheduler(**SCHEDULES["scaled_linear"], timestep_spacing="linspace", inverse=True)
    scheduler.set_timesteps(10)
    x, error, largest = noise(1, 1, 2, 2), 1e-6, [0.0]
    for k in range(3, 11):
        ends = []
        for off in (0.0, error):
            scheduler.set_pair((x, x + off))
            y = x
            for t in scheduler.timesteps[:k]:
                y = scheduler.step(torch.zeros_like(y), t, y).prev_sample
            ends.append(y)
        largest.append((ends[1] - ends[0]).abs().max().item() / error)
    assert 0.1 * scheduler.condition_number < max(largest) < 10 * scheduler.condition_number


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_a_last_gap_of_zero_is_refused_with_the_way_out(spacing, inverse):
    scheduler = BELMScheduler(set_alpha_to_one=False, timestep_spacing=spacing, inverse=inverse)
    with pytest.raises(ValueError, match="use set_alpha_to_one=True, steps_offset=1 or timestep_spacing='trailing'"):
        scheduler.set_timesteps(10)
    for way_out in ({"set_alpha_to_one": True}, {"timestep_spacing": "trailing"}):
        BELMScheduler.from_config(scheduler.config, **way_out).set_timesteps(10)
    BELMScheduler(set_alpha_to_one=False, steps_offset=1).set_timesteps(10)


def test_a_time_without_signal_is_refused():
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    with pytest.raises(ValueError, match="O-BELM needs some signal at every time"):
        BELMScheduler(**config).set_timesteps(10)
    BELMScheduler(**{**config, "timestep_spacing": "leading"}).set_timesteps(10)


@pytest.mark.parametrize("arguments", [{"num_inference_steps": 1}, {"timesteps": [500]}], ids=str)
def test_fewer_than_two_steps_are_refused(arguments):
    with pytest.raises(ValueError, match="at least 2 steps"):
        BELMScheduler().set_timesteps(**arguments)
