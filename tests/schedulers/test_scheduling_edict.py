"""EDICTScheduler: the authors' program, and the properties of the method."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sfumato.schedulers.scheduling_bdia import BDIAScheduler
from sfumato.schedulers.scheduling_edict import EDICTScheduler

GOLDEN = (
    Path(__file__).parent.parent / "golden" / "edict.npz"
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
        assert relative(EDICTScheduler(**config).alphas_cumprod, stored) < 1e-13


@pytest.mark.parametrize("name", META)
def test_inverting_editing_and_sampling_are_those_of_the_authors_program(name):
    case = META[name]
    network, times = reference_network(case), REFERENCE[f"{name}__t_fwd"]
    config = {**SCHEDULES[case["schedule"]], "set_alpha_to_one": False, "released": True}
    config |= {"mixing_coeff": case["p"], "leapfrog_steps": case["leapfrog"]}
    inverse, forward = EDICTScheduler(**config, inverse=True), EDICTScheduler(**config)
    for scheduler in (inverse, forward):
        scheduler.set_timesteps(timesteps=sorted({int(time) for time in times}, reverse=True))
    assert forward.timesteps.tolist() == times.tolist()
    run(inverse, network, reference("z0"))
    assert relative(inverse.pair.first.value, reference(f"{name}__inv_x")) < 1e-9
    assert relative(inverse.pair.second.value, reference(f"{name}__inv_y")) < 1e-9
    start = forward.set_pair((reference(f"{name}__inv_x"), reference(f"{name}__inv_y")))
    run(forward, lambda x, t: network(x, t) + 0.15 * x, start)
    assert relative(forward.pair.first.value, reference(f"{name}__edit_x")) < 1e-9
    assert relative(forward.pair.second.value, reference(f"{name}__edit_y")) < 1e-9
    if f"{name}__gen_x" in REFERENCE:
        forward.set_timesteps(case["N"])
        assert relative(run(forward, network, reference("xT")), reference(f"{name}__gen_x")) < 1e-9
        assert relative(forward.pair.second.value, reference(f"{name}__gen_y")) < 1e-9


@pytest.mark.parametrize("name", [name for name, case in META.items() if "N10" in name or "N50" in name][::3])
def test_leaving_out_the_noisiest_steps_is_the_strength_of_the_program(name):
    case = META[name]
    config = {**SCHEDULES[case["schedule"]], "set_alpha_to_one": False, "mixing_coeff": case["p"], "released": True}
    skipped = case["N"] - int(case["N"] * case["strength"])
    scheduler = EDICTScheduler(**config, leapfrog_steps=case["leapfrog"], skip_steps=skipped, inverse=True)
    scheduler.set_timesteps(case["N"])
    run(scheduler, reference_network(case), reference("z0"))
    assert relative(scheduler.pair.first.value, reference(f"{name}__inv_x")) < 1e-9


# ---------------------------------------------------------------- the method


def by_hand(levels, slope, x, y, p=0.93, leapfrog=True, first=0):
    """The published equations between levels (alpha, sigma); `first` counts the steps taken before."""
    for index, ((a, s), (b, q)) in enumerate(zip(levels, levels[1:], strict=False)):
        r, c = b / a, q - b / a * s
        if leapfrog and (first + index) % 2:
            y = r * y + c * slope(x, index)
            x = r * x + c * slope(y, index)
        else:
            x = r * x + c * slope(y, index)
            y = r * y + c * slope(x, index)
        x = p * x + (1 - p) * y
        y = p * y + (1 - p) * x
    return x, y


def levels_of(scheduler):
    alphas = [*scheduler.alphas_cumprod[scheduler.timesteps[::2]].tolist(), 1.0]
    return [(math.sqrt(a), math.sqrt(1 - a)) for a in alphas]


@pytest.mark.parametrize("p", [0.93, 1.0])
@pytest.mark.parametrize("leapfrog", [True, False])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_step_is_the_published_one_between_neighbours_of_the_schedule(spacing, leapfrog, p):
    config = {"timestep_spacing": spacing, "leapfrog_steps": leapfrog, "mixing_coeff": p}
    scheduler, network, x = (
        EDICTScheduler(**SCHEDULES["scaled_linear"], **config),
        toy_network(None),
        noise(1, 1, 2, 4),
    )
    for steps in range(2, 61, 3):
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps[::2].tolist()
        expected = by_hand(
            levels_of(scheduler), lambda x, index, times=times: network(x, times[index]), x, x, p, leapfrog
        )
        assert relative(run(scheduler, network, x), expected[0]) < 1e-12
        assert relative(scheduler.pair.second.value, expected[1]) < 1e-12


def test_flows_and_edm_follow_the_same_equations_with_euler_steps():
    x, network = noise(1, 1, 2, 4), toy_network(None)
    for process in ("flow", "edm"):
        scheduler = EDICTScheduler(process=process, shift=3.0)
        scheduler.set_timesteps(13)
        sigmas = scheduler.sigmas.double().tolist()
        times = scheduler.timesteps[::2].tolist()

        def slope(x, index, process=process, sigmas=sigmas, times=times):
            if process == "flow":
                return network(x, times[index])
            sigma, total = sigmas[index], math.hypot(sigmas[index], 0.5)
            clean = x * 0.25 / total**2 + sigma * 0.5 / total * network(x / total, times[index])
            return (x - clean) / sigma

        expected = by_hand([(1.0, sigma) for sigma in sigmas], slope, x, x)
        assert relative(run(scheduler, network, x), expected[0]) < 1e-6  # their times are float32


@pytest.mark.parametrize("p", [0.5, 0.93, 1.0])
def test_with_a_noise_that_depends_on_the_time_alone_it_is_ddim_and_both_latents_agree(p):
    scheduler, z = EDICTScheduler(**SCHEDULES["scaled_linear"], mixing_coeff=p), noise(1, 3, 4, 4, seed=1)
    plain = BDIAScheduler.from_config(scheduler.config, gamma=0.0)
    outs = []
    for s in (scheduler, plain):
        s.set_timesteps(23)
        outs.append(run(s, lambda _, t: math.cos(float(t) / 300) * z, noise(1, 3, 4, 4)))
    assert relative(outs[0], outs[1]) < 1e-12
    assert relative(scheduler.pair.second.value, scheduler.pair.first.value) < 1e-12


@pytest.mark.parametrize(("p", "symmetric"), [(1.0, True), (0.93, False)])
def test_swapping_the_latents_with_the_parity_is_a_symmetry_only_without_mixing(p, symmetric):
    scheduler, network = EDICTScheduler(**SCHEDULES["scaled_linear"], mixing_coeff=p), toy_network(None)
    x, y = noise(1, 1, 4, 4), noise(1, 1, 4, 4, seed=1)
    scheduler.set_timesteps(11)
    times, levels = scheduler.timesteps[::2].tolist(), levels_of(scheduler)
    run(scheduler, network, scheduler.set_pair((x, y)))
    ends = [latent.value for latent in scheduler.pair[:2]]
    x, y = by_hand(levels[:2], lambda x, index: network(x, times[0]), x, y, p)
    scheduler.set_timesteps(timesteps=times[1:])  # its first step is now led by the other latent
    run(scheduler, network, scheduler.set_pair((y, x)))
    swapped = [latent.value for latent in scheduler.pair[1::-1]]
    assert max(relative(*pair) for pair in zip(swapped, ends, strict=True)) < (1e-12 if symmetric else 1)
    assert symmetric or relative(swapped[0], ends[0]) > 1e-6


@pytest.mark.parametrize(("p", "steps"), [(0.93, 10), (0.93, 50), (1.0, 20)])
def test_a_difference_of_the_latents_grows_by_the_condition_number(p, steps):
    scheduler = EDICTScheduler(process="flow", mixing_coeff=p, inverse=True, leapfrog_steps=False)
    scheduler.set_timesteps(steps)
    assert scheduler.condition_number == pytest.approx(p ** (-2 * steps))
    x, difference = noise(1, 1, 2, 2), 1e-6
    start = scheduler.set_pair((x, x + difference))
    for t in scheduler.timesteps:
        start = scheduler.step(torch.zeros_like(x), t, start).prev_sample
    x, y = (latent.value for latent in scheduler.pair[:2])
    assert ((y - x) / difference).max().item() == pytest.approx(scheduler.condition_number, rel=1e-6)


def test_each_time_is_told_twice_and_a_run_cannot_begin_between():
    scheduler, x = EDICTScheduler(), noise(1, 1, 4, 4)
    scheduler.set_timesteps(6)
    assert scheduler.order == 2 and scheduler.timesteps.tolist() == [t for t in range(830, -1, -166) for _ in range(2)]
    scheduler.set_begin_index(3)
    with pytest.raises(ValueError, match="begin at call 3, in the middle of one"):
        scheduler.step(x, scheduler.timesteps[3], x)


def test_to_invert_with_leapfrog_the_number_of_steps_of_a_pair_must_be_known():
    x = noise(1, 1, 4, 4)
    with pytest.raises(ValueError, match="how many steps a pair was made with"):
        EDICTScheduler(inverse=True).set_pair((x, x))
    scheduler = EDICTScheduler(inverse=True, leapfrog_steps=False)
    scheduler.set_timesteps(5)
    run(scheduler, toy_network(None), scheduler.set_pair((x, x)))
    assert scheduler.pair.steps == 5


def test_a_time_without_signal_is_refused():
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    with pytest.raises(ValueError, match="EDICT needs some signal at every time"):
        EDICTScheduler(**config).set_timesteps(10)
    EDICTScheduler(**{**config, "timestep_spacing": "leading"}).set_timesteps(10)


@pytest.mark.parametrize("p", [-0.1, 0.0, 1.1])
def test_an_impossible_mixing_coefficient_is_refused(p):
    with pytest.raises(ValueError, match="`mixing_coeff` must"):
        EDICTScheduler(mixing_coeff=p)


@pytest.mark.parametrize("arguments", [{"num_inference_steps": 1}, {"timesteps": [500]}], ids=str)
def test_fewer_than_two_steps_are_refused(arguments):
    with pytest.raises(ValueError, match="at least 2 steps"):
        EDICTScheduler().set_timesteps(**arguments)
