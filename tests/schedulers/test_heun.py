"""BDIA with Heun's increments: Karras et al.'s solver, its order, the calls that it makes."""

import pytest
import torch

from sfumato import sample_with_gradients
from sfumato.schedulers.scheduling_bdia import BDIAScheduler

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def edm_network(x, t):
    """F of a preconditioned model, no denoiser, given c_in x and log(sigma) / 4."""
    return 0.3 * x + 0.05 * torch.sin(3 * x + float(t))


def slope(x, sigma):
    """(x - D(x; sigma)) / sigma of `edm_network`, as Karras et al. write it with sigma_data = 0.5."""
    total = (sigma**2 + 0.25) ** 0.5
    denoised = 0.25 / total**2 * x + 0.5 * sigma / total * edm_network(x / total, sigma.log() / 4)
    return (x - denoised) / sigma


def increment(x, sigma, target):
    """One step of Algorithm 1 of Karras et al. without its noise, minus x."""
    first = slope(x, sigma)
    if target == 0:
        return (target - sigma) * first
    return (target - sigma) * (first + slope(x + (target - sigma) * first, target)) / 2


def run(scheduler, network, x):
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_edm_follows_the_rule_with_the_increments_of_karras_et_al(gamma):
    scheduler = BDIAScheduler(process="edm", gamma=gamma, solver="heun")
    scheduler.set_timesteps(8)
    x = 80 * noise(2, 3, 4, 4)
    sigmas = [*(4 * scheduler.timesteps[::3].double()).exp(), torch.tensor(0.0, dtype=torch.float64)]
    states = [x, x + increment(x, sigmas[0], sigmas[1])]
    for before, now, after in zip(sigmas, sigmas[1:], sigmas[2:], strict=False):
        u, t = states[-2:]
        states.append(u - (1 - gamma) * (u - t) - gamma * increment(t, now, before) + increment(t, now, after))
    out = run(scheduler, edm_network, x)
    assert (out - states[-1]).abs().max() < 1e-5 * x.abs().max()  # the times of stock are float32
    assert scheduler.pair.steps == 8


def test_every_call_is_at_the_level_of_its_point():
    scheduler = BDIAScheduler(**SD, solver="heun")
    scheduler.set_timesteps(timesteps=[900, 600, 300, 100])
    assert scheduler.timesteps.tolist() == [900, 900, 600, 600, 300, 900, 300, 100, 600, 100, 100, 300]
    inverse = BDIAScheduler(**SD, solver="heun", inverse=True)
    inverse.set_timesteps(timesteps=[900, 600, 300, 100])
    assert inverse.timesteps.tolist() == [0, 0, 0, 100, 100, 300, 300, 100, 600, 600, 300, 900]


@pytest.mark.parametrize(("solver", "gamma", "ratio"), [("heun", 0.5, 4.0), ("heun", 1.0, 4.0), ("euler", 0.5, 2.0)])
def test_it_is_of_second_order_for_every_gamma(solver, gamma, ratio):
    """A flow of data ~ N(0, 1/4): x(sigma) is x(1) times the standard deviation there. It stops short of sigma = 0,
    since the last increment is Euler's; its size is a small and fixed part of the run."""

    def network(x, t):
        sigma = float(t) / 1000
        return x * (sigma - 0.25 * (1 - sigma)) / (sigma**2 + 0.25 * (1 - sigma) ** 2)

    errors, x = [], noise(1, 1, 4, 4)
    for steps in (20, 40, 80):
        scheduler = BDIAScheduler(process="flow", solver=solver, gamma=gamma)
        scheduler.set_timesteps(sigmas=torch.linspace(1, 0.5, steps + 1, dtype=torch.float64).tolist())
        out = x
        for t in scheduler.timesteps[: scheduler.order * steps]:
            out = scheduler.step(network(out, t), t, out).prev_sample
        errors.append((out - x * (0.5**2 + 0.25 * 0.5**2) ** 0.5).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(ratio, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(ratio, rel=0.15)


def test_adopted_latents_are_carried_on_as_by_euler():
    """Where the network says nothing the two solvers are the same, edits and all."""
    outs = []
    for solver in ("euler", "heun"):
        scheduler = BDIAScheduler(**SD, solver=solver, on_edit="adopt")
        scheduler.set_timesteps(6)
        x = noise(1, 4, 4, 4)
        for index, t in enumerate(scheduler.timesteps):
            x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
            if index + 1 in (2 * scheduler.order, 3 * scheduler.order):
                x = x + 1
        outs.append(x)
    assert torch.allclose(*outs, rtol=1e-12)


@pytest.mark.parametrize("process", ["vp", "flow", "edm"])
@pytest.mark.parametrize("steps", [0, -3, 2.5, "5"])
def test_steps_that_are_no_number_of_steps_are_refused(process, steps):
    with pytest.raises(ValueError, match="`num_inference_steps` must be a whole number"):
        BDIAScheduler(process=process).set_timesteps(steps)
    with pytest.raises(ValueError, match="`skip_steps` must not be negative, got -3"):
        BDIAScheduler(process=process, skip_steps=-3).set_timesteps(10)


def test_what_it_can_not_do_is_refused_with_the_reason():
    scheduler = BDIAScheduler(**SD, solver="heun")
    scheduler.set_timesteps(10)
    x = noise(1, 4, 4, 4)
    with pytest.raises(ValueError, match="solver='euler'"):
        sample_with_gradients(scheduler, lambda x, t: 0.1 * x, x)
    with pytest.raises(ValueError, match="amid one"):
        scheduler.step(x, scheduler.timesteps[4], x)
    zero = BDIAScheduler(
        **SD, solver="heun", rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    with pytest.raises(ValueError, match="need some signal"):
        zero.set_timesteps(10)
    with pytest.raises(ValueError, match="`solver` must be one of 'euler', 'heun'"):
        BDIAScheduler(solver="dpm")
