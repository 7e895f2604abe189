"""Sampling undoes inversion and inversion undoes sampling: to rounding, and with `exact=True` to the bit."""

import math

import diffusers
import pytest
import torch

from sfumato.schedulers.scheduling_bdia import BDIAScheduler
from sfumato.schedulers.scheduling_belm import BELMScheduler
from sfumato.schedulers.scheduling_edict import EDICTScheduler

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PROCESSES = {"vp": SD, "flow": {"process": "flow", "shift": 3.0}, "edm": {"process": "edm"}}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
CASES = {
    "BDIA": (BDIAScheduler, {}),
    "BDIA, 0.94": (BDIAScheduler, {"gamma": 0.94}),
    "BDIA, Heun": (BDIAScheduler, {"solver": "heun"}),
    "BELM": (BELMScheduler, {"timestep_spacing": "trailing"}),
    "EDICT": (EDICTScheduler, {}),
    "EDICT, no leapfrog": (EDICTScheduler, {"leapfrog_steps": False}),
    "EDICT, no mixing": (EDICTScheduler, {"mixing_coeff": 1.0, "timestep_spacing": "linspace"}),
}
EXACT = {
    "BDIA": (BDIAScheduler, SD),
    "BDIA, trailing": (BDIAScheduler, {**SD, "timestep_spacing": "trailing"}),
    "BDIA, 0.94": (BDIAScheduler, {**SD, "gamma": 0.94}),
    "BDIA, zero SNR": (
        BDIAScheduler,
        {**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ),
    "BDIA, Heun": (BDIAScheduler, {**SD, "solver": "heun"}),
    "BDIA, flow": (BDIAScheduler, {"process": "flow"}),
    "BDIA, flow, shift 3": (BDIAScheduler, {"process": "flow", "shift": 3.0}),
    "BDIA, flow, 0.94": (BDIAScheduler, {"process": "flow", "gamma": 0.94}),
    "BDIA, edm": (BDIAScheduler, {"process": "edm"}),
    "BDIA, edm, Heun": (BDIAScheduler, {"process": "edm", "solver": "heun"}),
    "BELM, trailing": (BELMScheduler, {**SD, "timestep_spacing": "trailing"}),
    "BELM, linspace": (BELMScheduler, {**SD, "timestep_spacing": "linspace"}),
    "BELM, flow": (BELMScheduler, {"process": "flow"}),
    "BELM, flow, shift 3": (BELMScheduler, {"process": "flow", "shift": 3.0}),
}


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def model(x, t, guidance=1.0):
    """Not a denoiser; computed in the precision of its input."""
    out = 0.3 * x * math.cos(float(t) / 500) + 0.1 * torch.sin(3 * x + float(t) / 100)
    return out + guidance * 0.05 * x


def run(scheduler, x, start=0, **kwargs):
    """The last sample, and the magnitude of the largest one on the way."""
    largest = x.double().abs().max().item()
    for t in scheduler.timesteps[start:]:
        output = model(scheduler.scale_model_input(x, t), t, **kwargs)
        x = scheduler.step(output, t, x, return_dict=False)[0]
        largest = max(largest, x.double().abs().max().item())
    return x, largest


def round_trip(cls, config, steps, x, inverse_first=False, **kwargs):
    """Both schedulers after a run there and back, what came back, and the largest magnitude on the way."""
    there, back = (cls(**config, inverse=inverse) for inverse in (inverse_first, not inverse_first))
    for scheduler in (there, back):
        scheduler.set_timesteps(steps)
    _, largest = run(there, x, **kwargs)
    start = back.set_pair(there.pair).to(x.dtype)
    returned, _ = run(back, start, **kwargs)
    return there, back, returned, largest


def bound(scheduler):
    """Relative error that a round trip may have: an ill-conditioned run amplifies rounding errors."""
    return 1e-12 if scheduler.condition_number < 100 else max(1e-11, 1e-17 * scheduler.condition_number)


@pytest.mark.parametrize("inverse_first", [False, True], ids=["sample-invert", "invert-sample"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", CASES)
def test_a_round_trip_gives_back_the_sample_whatever_the_precision_of_the_network(name, process, dtype, inverse_first):
    cls, config = CASES[name]
    scale = 80.0 if process == "edm" and not inverse_first else 1.0
    for steps in (2, 3, 10, 11, 25):
        x = scale * noise(2, 4, 4, 4, dtype=dtype)
        there, back, returned, largest = round_trip(cls, {**PROCESSES[process], **config}, steps, x, inverse_first)
        assert (back.pair.first.value - x.double()).abs().max() <= bound(there) * largest
        assert returned.dtype == dtype and back.pair.steps == steps
        if cls is EDICTScheduler:  # both latents were the sample
            assert (back.pair.second.value - x.double()).abs().max() <= bound(there) * largest


@pytest.mark.parametrize("skipped", [3, 4])
@pytest.mark.parametrize("steps", [10, 11])
@pytest.mark.parametrize("name", CASES)
def test_a_round_trip_over_a_part_of_the_schedule_gives_back_the_sample(name, steps, skipped):
    cls, config = CASES[name]
    x, partial = noise(1, 4, 4, 4), {**SD, **config, "skip_steps": skipped}
    for inverse_first in (False, True):
        _, back, returned, largest = round_trip(cls, partial, steps, x, inverse_first)
        assert (returned - x).abs().max() <= 1e-12 * largest
        assert back.pair.steps == steps - skipped
    # A pipeline that begins in the middle takes the same steps, and its run is undone by the same inversion.
    whole, inverse = cls(**SD, **config), cls(**partial, inverse=True)
    for scheduler in (whole, inverse):
        scheduler.set_timesteps(steps)
    whole.set_begin_index(skipped * whole.order)
    _, largest = run(whole, x, start=skipped * whole.order)
    assert whole.pair.steps == steps - skipped
    returned, _ = run(inverse, inverse.set_pair(whole.pair))
    assert (returned - x).abs().max() <= 1e-12 * largest


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", ["BDIA", "BELM", "EDICT"])
def test_round_trips_hold_for_every_number_of_steps_and_spacing(name, spacing):
    cls, config = CASES[name]
    x = noise(1, 1, 2, 4)
    for steps in range(2, 61):
        there, _, returned, largest = round_trip(cls, {**SD, **config, "timestep_spacing": spacing}, steps, x, True)
        assert (returned - x).abs().max() <= bound(there) * largest


@pytest.mark.parametrize("name", CASES)
def test_the_second_latent_is_needed(name):
    cls, config = CASES[name]
    x = noise(1, 4, 4, 4)
    inverse, forward = (cls(**SD, **config, inverse=inverse) for inverse in (True, False))
    for scheduler in (inverse, forward):
        scheduler.set_timesteps(10)
    latents, _ = run(inverse, x)
    assert (run(forward, latents)[0] - x).abs().max() > 1e-4


@pytest.mark.parametrize("name", CASES)
def test_a_pair_is_used_once_and_forgotten_with_an_error(name):
    cls, config = CASES[name]
    inverse, forward = (cls(**SD, **config, inverse=inverse) for inverse in (True, False))
    for scheduler in (inverse, forward):
        scheduler.set_timesteps(5)
    run(inverse, noise(1, 4, 4, 4))
    start = forward.set_pair(inverse.pair)
    first, _ = run(forward, start)
    alone, _ = run(forward, start)
    assert not torch.equal(first, alone)
    forward.set_pair(inverse.pair)
    with pytest.raises(ValueError, match="not those of the pair"):
        run(forward, start + 1)
    assert torch.equal(run(forward, start)[0], alone)
    forward.set_pair(inverse.pair)
    with pytest.raises(ValueError, match="not those of the pair"):
        run(forward, start.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="one shape"):
        forward.set_pair((start, start[:, :2]))
    assert torch.equal(run(forward, start)[0], alone)


# ---------------------------------------------------------------- to the bit


def odd_values(dtype):
    """Noise with values that the grid has no room for, among them the smallest of the dtype."""
    x = noise(2, 4, 4, 4)
    x.view(-1)[:7] = torch.tensor([0.0, 1e-30, -1e-300, 1e-7, 100.0, -1e-12, torch.finfo(dtype).tiny])
    return x.to(dtype)


@pytest.mark.parametrize("inverse_first", [False, True], ids=["sample-invert", "invert-sample"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXACT)
def test_exact_gives_back_every_bit(name, dtype, inverse_first):
    cls, config = EXACT[name]
    x = odd_values(dtype)
    for steps in (10, 11, 50) if cls is BELMScheduler else (2, 3, 10, 11, 50):  # its gains leave no range for 2 and 3
        for guidance in (1.0, 10.0):
            exact = {**config, "exact": True}
            there, back, returned, _ = round_trip(cls, exact, steps, x, inverse_first, guidance=guidance)
            assert torch.equal(returned, x)
            assert torch.equal(back.pair.first.value, x.double())
            assert torch.isfinite(there.pair.first.value).all()


@pytest.mark.parametrize("name", [name for name in EXACT if "0.94" not in name])
def test_exact_gives_back_every_bit_after_a_thousand_steps(name):
    cls, config = EXACT[name]
    x = odd_values(torch.float16)[:1, :1]
    for inverse_first in (False, True):
        exact = {**config, "exact": True}
        _, _, returned, _ = round_trip(cls, exact, 1000, x, inverse_first, guidance=10.0)
        assert torch.equal(returned, x)


@pytest.mark.parametrize("name", EXACT)
def test_exact_moves_a_run_by_no_more_than_its_grid(name):
    cls, config = EXACT[name]
    x, outs = noise(1, 4, 4, 4), []
    for exact in (False, True):
        scheduler = cls(**config, exact=exact)
        scheduler.set_timesteps(20)
        outs.append(run(scheduler, x))
    assert (outs[0][0] - outs[1][0]).abs().max() < 1e-9 * outs[0][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "kind"), [("BDIA", "sd"), ("BDIA, 0.94", "sd"), ("BELM, trailing", "sdxl"),
                                            ("BDIA, flow", "sd3"), ("BELM, flow", "flux")])  # fmt: skip
def test_exact_gives_back_every_bit_through_stock_pipelines(name, kind, dtype, tiny):
    cls, config = EXACT[name]
    options = {key: value for key, value in config.items() if key in ("gamma", "timestep_spacing")}
    pipe = tiny(kind, cls, **options, exact=True)
    call = {"guidance_scale": 7.5}
    call |= pipe.cast(dtype)
    for inverse_first in (False, True):
        x = noise(*pipe.kind.shape, dtype=dtype)
        there = pipe.use(cls, **options, exact=True, inverse=inverse_first)
        pipe(steps=7, latents=x, **call)
        back = pipe.use(cls, **options, exact=True, inverse=not inverse_first)
        start = back.set_pair(there.pair).to(dtype)
        assert torch.equal(pipe(steps=7, latents=start, **call)[0], x)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sdxl, edm", "sd3", "flux"])
@pytest.mark.parametrize("name", ["BDIA", "BELM", "EDICT"])
def test_stock_pipelines_undo_what_they_did(name, kind, tiny):
    cls, config = CASES[name]
    pipe = tiny(kind, cls, **config)
    x = noise(*pipe.kind.shape, dtype=torch.float32)
    there = pipe.use(cls, **config, inverse=True)
    pipe(steps=7, latents=x)
    back = pipe.use(cls, **config)
    pipe(steps=7, latents=back.set_pair(there.pair).float())
    largest = max(1.0, there.pair.first.value.abs().max().item())
    assert (back.pair.first.value - x.double()).abs().max() <= 10 * bound(there) * largest


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", ["BDIA", "BDIA, 0.94", "BDIA, flow", "BELM, flow"])
def test_leaving_the_grid_is_an_error(name, inverse):
    cls, config = EXACT[name]
    scheduler = cls(**config, exact=True, inverse=inverse)
    for wrong in (1e13, float("nan"), float("inf")):
        scheduler.set_timesteps(10)
        with pytest.raises(ValueError, match="left the range of the grid"):
            run(scheduler, noise(1, 4, 4, 4).index_fill(3, torch.tensor([1]), wrong))
        for at in (0, 1, 5):
            scheduler.set_timesteps(10)
            x = noise(1, 4, 4, 4)
            with pytest.raises(ValueError, match="left the range of the grid"):
                for index, t in enumerate(scheduler.timesteps):
                    x = scheduler.step(model(x, t) + (wrong if index == at else 0), t, x, return_dict=False)[0]
    scheduler.set_timesteps(10)
    assert torch.isfinite(run(scheduler, noise(1, 4, 4, 4))[0]).all()


def test_a_run_that_diverges_is_an_error_and_never_silent():
    scheduler = BDIAScheduler(**SD, exact=True)
    scheduler.set_timesteps(50)
    with pytest.raises(ValueError, match="the run diverges"):
        run(scheduler, noise(1, 4, 4, 4), guidance=1000.0)


@pytest.mark.parametrize(
    ("cls", "config", "steps", "message"),
    [
        (BDIAScheduler, {"gamma": 0.5}, 50, "gains multiply to"),
        (BDIAScheduler, {"gamma": 0.94}, 1000, "gains multiply to"),
        (BDIAScheduler, {"gamma": 0.0}, 10, "DDIM"),
        (BELMScheduler, {"process": "edm"}, 10, "gains multiply to"),
        (BDIAScheduler, {"on_edit": "adopt"}, 10, "on_edit='raise'"),
    ],
    ids=str,
)
def test_runs_that_the_grid_cannot_hold_are_refused_before_they_start(cls, config, steps, message):
    for inverse in (False, True):
        with pytest.raises(ValueError, match=message):
            cls(**config, exact=True, inverse=inverse).set_timesteps(steps)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_gives_back_every_bit_with_a_network_of_the_size_of_stable_diffusion(dtype):
    """860 million random weights at guidance 7.5; slow, and 3.4 GB."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(sample_size=8, cross_attention_dim=768).to(dtype)
    assert unet.num_parameters() == 859_520_964
    text = noise(2, 77, 768, seed=1, dtype=dtype)
    for cls, config in (BDIAScheduler, SD), (BELMScheduler, {**SD, "timestep_spacing": "trailing"}):
        x = noise(1, 4, 8, 8, dtype=dtype)
        there, back = (cls(**config, exact=True, inverse=inverse) for inverse in (True, False))
        out = x
        for scheduler in (there, back):
            scheduler.set_timesteps(10)
            if scheduler is back:
                out = back.set_pair(there.pair).to(dtype)
            for t in scheduler.timesteps:
                with torch.no_grad():
                    free, wanted = unet(torch.cat([out] * 2), t, text).sample.chunk(2)
                out = scheduler.step(free + 7.5 * (wanted - free), t, out, return_dict=False)[0]
        assert torch.equal(out, x)
        assert (there.pair.first.value - x.double()).abs().max() > 0.1
