"""FixedPointScheduler: stock samplers and inversions, the fixed point, and the contract with diffusers."""

import ast
from pathlib import Path

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.schedulers import scheduling_fixed_point
from sfumato.schedulers.scheduling_fixed_point import FixedPointScheduler, LatentPair

SCHEDULES = {
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
PROCESSES = [
    {"process": "vp", "prediction_type": "epsilon"},
    {"process": "vp", "prediction_type": "sample"},
    {"process": "vp", "prediction_type": "v_prediction"},
    {"process": "flow", "shift": 3.0},
    {"process": "edm", "prediction_type": "epsilon"},
    {"process": "edm", "prediction_type": "v_prediction"},
]


def make(schedule="linear", **config):
    return FixedPointScheduler(**{**SCHEDULES[schedule], **config})


def both(steps, *, iterations=5, average_last=1, **config):
    """A sampler and its inverse, ready for a run."""
    sampler = make(**config)
    inverse = make(inverse=True, num_iterations=iterations, average_last=average_last, **config)
    for scheduler in (sampler, inverse):
        scheduler.set_timesteps(steps)
    return sampler, inverse


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = noise(2, 3, 4, 4)


def level_of(scheduler, t):
    return min(scheduler._levels, key=lambda level: abs(level.time - float(t)) + (level.noise == 0))


def gauss_network(scheduler, data_variance=0.25, ripple=0.0):
    """The best prediction for data ~ N(0, data_variance I), as the process asks for it; `ripple` bends it."""
    config = scheduler.config

    def predict(x, t):
        level = level_of(scheduler, t)
        x = x / level.scale
        a, b = (1 - level.noise, level.noise) if config.process == "flow" else (level.signal, level.noise)
        total = a * a * data_variance + b * b
        clean, eps = a * data_variance / total * x, b / total * x
        eps = eps + ripple * torch.sin(2 * x)
        clean = clean - ripple * b / a * torch.sin(2 * x) if a else clean
        if config.process == "flow":
            return eps - clean
        if config.process == "edm":
            return (clean - level.clean[0] * x) / level.clean[1]
        return {"epsilon": eps, "sample": clean, "v_prediction": a * eps - b * clean}[config.prediction_type]

    return predict


def run(scheduler, network, x, **step_kwargs):
    """The loop of a pipeline, over the entries of `timesteps` themselves."""
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, t), t, x, **step_kwargs).prev_sample
    return x


# ---------------------------------------------------------------- sampling is the stock samplers'


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("to_one", [True, False])
def test_sampling_is_stock_ddim_where_that_takes_the_neighbours_of_the_schedule(prediction_type, to_one):
    scheduler = make("scaled_linear", prediction_type=prediction_type, steps_offset=1, set_alpha_to_one=to_one)
    stock = diffusers.DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    for s in (scheduler, stock):
        s.set_timesteps(20)
    assert scheduler.timesteps.tolist() == stock.timesteps.tolist() and scheduler.order == 1
    network = gauss_network(scheduler)
    assert (run(scheduler, network, X) - run(stock, network, X)).abs().max() < 1e-4  # stock tables are float32


def test_sampling_is_stock_euler_for_flows_and_edm():
    for stock in (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), diffusers.EDMEulerScheduler()):
        scheduler = FixedPointScheduler.from_config(stock.config)
        for s in (scheduler, stock):
            s.set_timesteps(12)
        x = X * float(stock.init_noise_sigma) if hasattr(stock, "init_noise_sigma") else X
        ours, theirs = (run(s, gauss_network(scheduler), x) for s in (scheduler, stock))
        assert (ours - theirs).abs().max() < 1e-5  # stock states are float32, and begin at 80 for EDM
        assert scheduler.config.process == ("flow" if "FlowMatch" in type(stock).__name__ else "edm")


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_every_step_goes_to_the_next_time_of_the_schedule(spacing, steps):
    scheduler = make(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    network, x = gauss_network(scheduler), X
    alphas = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], torch.ones(1)])
    for t, a, b in zip(scheduler.timesteps, alphas, alphas[1:], strict=False):
        eps = network(x, t)
        x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    assert (run(scheduler, network, X) - x).abs().max() < 1e-12


# ---------------------------------------------------------------- one iteration is the usual inversion


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("steps", [10, 50])
def test_one_iteration_is_stock_ddim_inversion(spacing, offset, to_one, steps):
    config = {"timestep_spacing": spacing, "steps_offset": offset, "set_alpha_to_one": to_one}
    scheduler = make("scaled_linear", inverse=True, num_iterations=1, **config)
    stock = diffusers.DDIMInverseScheduler.from_config(scheduler.config, clip_sample=False)
    for s in (scheduler, stock):
        s.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == stock.timesteps.tolist()
    network = gauss_network(scheduler)
    assert (run(scheduler, network, X) - run(stock, network, X)).abs().max() < 1e-5


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_one_iteration_is_euler_backwards_for_a_flow(steps):
    scheduler = FixedPointScheduler(process="flow", shift=2.0, inverse=True, num_iterations=1)
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    for s in (scheduler, stock):
        s.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == stock.timesteps.flip(0).tolist()
    network, x, sigmas = gauss_network(scheduler), X, stock.sigmas.double().flip(0)
    for t, now, target in zip(scheduler.timesteps, sigmas, sigmas[1:], strict=False):
        x = x + (target - now) * network(x, t)
    assert (run(scheduler, network, X) - x).abs().max() < 1e-12


# ---------------------------------------------------------------- the fixed point


def gain(scheduler, step):
    """What one iteration does to a difference, for a Gaussian and betas: a_t (sigma_t - sigma_s) de/dx."""
    s, t = scheduler._levels[-1 - step], scheduler._levels[-2 - step]
    slope = t.noise / (t.signal**2 * 0.25 + t.noise**2)
    return t.signal * (t.noise / t.signal - s.noise / s.signal) * slope


def test_the_iterates_close_in_geometrically_with_the_gain_of_the_equation():
    _, inverse = both(5, iterations=6, timestep_spacing="trailing")
    network, y = gauss_network(inverse), X
    for step in range(5):
        distances = []
        for t in inverse.timesteps[6 * step : 6 * step + 6]:
            following = inverse.step(network(y, t), t, y).prev_sample
            distances.append((following - y).abs().flatten(1).amax(1))
            y = following
        distances = torch.stack(distances)  # (iterations, batch)
        assert (distances[1:] / distances[:-1] - gain(inverse, step)).abs().max() < 1e-6
        assert torch.equal(inverse.residual[step], distances[-1])
    assert 0 < gain(inverse, 0) < gain(inverse, 4) < 1
    assert inverse.residual.shape == (5, 2) and inverse.residual.dtype == torch.float64


def test_the_residual_is_the_round_trip_error_of_the_last_but_one_iterate():
    sampler, inverse = both(10, iterations=4)
    network, x = gauss_network(sampler, ripple=0.1), X
    for t in inverse.timesteps[:4]:
        y, x = x, inverse.step(network(x, t), t, x).prev_sample
    back = sampler.step(network(y, t), sampler.timesteps[-1], y).prev_sample
    ratio = sampler._levels[-2].signal / sampler._levels[-1].signal
    expected = (ratio * (back - X)).abs().flatten(1).amax(1)
    assert (inverse.residual[0] - expected).abs().max() < 1e-14


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_with_many_iterations_sampling_comes_back(process):
    sampler, inverse = both(20, iterations=50, sigma_max=5.0, **process)
    network = gauss_network(sampler, ripple=0.02)
    latents = run(inverse, network, X)
    assert inverse.residual.max() < 1e-10
    assert (run(sampler, network, latents) - X).abs().max() < 1e-10


@pytest.mark.parametrize("times", [[100], [200, 100], [300, 200, 100]])
def test_a_few_steps_will_do(times):
    sampler, inverse = make(), make(inverse=True, num_iterations=50)
    for scheduler in (sampler, inverse):
        scheduler.set_timesteps(timesteps=times)
    network = gauss_network(sampler, ripple=0.02)
    assert (run(sampler, network, run(inverse, network, X)) - X).abs().max() < 1e-10
    assert inverse.residual.shape == (len(times), 2)


@pytest.mark.parametrize("process", ["vp", "flow", "edm"])
def test_skipped_steps_are_the_noisiest(process):
    sampler, inverse = both(20, iterations=50, process=process, skip_steps=8)
    full = make(process=process)
    full.set_timesteps(20)
    assert sampler.timesteps.tolist() == full.timesteps.tolist()[8:]
    assert inverse.timesteps[::50].tolist() == full.timesteps.tolist()[:7:-1]
    network = gauss_network(sampler)
    assert (run(sampler, network, run(inverse, network, X)) - X).abs().max() < 1e-10


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_more_iterations_come_back_more_closely(process):
    errors = []
    for iterations in (1, 2, 5, 12):
        sampler, inverse = both(10, iterations=iterations, **process)
        network = gauss_network(sampler, ripple=0.02)
        errors.append((run(sampler, network, run(inverse, network, X)) - X).abs().max().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 * errors[0]


def test_the_committed_state_uses_the_mean_of_the_last_slopes():
    plain, averaged = both(5, iterations=4)[1], both(5, iterations=4, average_last=3)[1]
    network, y, slopes = gauss_network(plain, ripple=0.1), X, []
    for t in averaged.timesteps[:4]:
        slopes.append(network(y, t))
        y = averaged.step(slopes[-1], t, y).prev_sample
    s, t = plain._levels[-1], plain._levels[-2]
    expected = t.signal * X + t.noise * torch.stack(slopes[1:]).mean(0)  # a_s = 1, sigma_s = 0
    assert s.noise == 0 and (y - expected).abs().max() < 1e-14
    run(plain, network, X)
    assert torch.equal(plain.residual[0], averaged.residual[0])  # of the iterates themselves


def test_averaging_steadies_an_iteration_that_swings():
    def network(x, t):
        return -4 * x

    errors = []
    for average_last in (1, 2):
        sampler, inverse = both(2, iterations=2, average_last=average_last)
        errors.append((run(sampler, network, run(inverse, network, X)) - X).abs().max().item())
    assert errors[1] < errors[0]


def test_a_network_that_ignores_the_sample_is_inverted_by_one_iteration():
    sampler, inverse = both(10, iterations=1)
    network = lambda x, t: torch.cos(t / 100) * torch.ones_like(x)  # noqa: E731
    assert (run(sampler, network, run(inverse, network, X)) - X).abs().max() < 1e-12


def test_samples_of_a_batch_do_not_meet():
    _, inverse = both(5)
    network = gauss_network(inverse, ripple=0.1)
    together = run(inverse, network, X)
    residual = inverse.residual
    inverse.set_timesteps(5)
    assert torch.equal(run(inverse, network, X[1:]), together[1:])
    assert torch.equal(inverse.residual, residual[:, 1:])


# ---------------------------------------------------------------- the contract with diffusers


def test_each_time_occurs_once_for_each_iteration():
    _, inverse = both(4, iterations=3)
    assert inverse.timesteps.tolist() == [t for t in (0, 250, 500, 750) for _ in range(3)]
    assert inverse.order == 3 and inverse.num_inference_steps == 4
    assert inverse.residual is None
    assert make(num_iterations=7).order == 1


@pytest.mark.parametrize("inverse", [False, True])
def test_runs_repeat_to_the_bit_even_after_an_interrupted_one(inverse):
    scheduler = make(inverse=inverse, num_iterations=3)
    outs, network = [], None
    for stop in (30, 30, 4, 30):
        scheduler.set_timesteps(10)
        network, x = gauss_network(scheduler, ripple=0.1), X
        for t in scheduler.timesteps[:stop]:
            x = scheduler.step(network(x, t), t, x).prev_sample
        if stop == 30:
            outs.append(x)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("give", ["views", "numbers", "copies"])
def test_a_run_may_begin_at_any_step(inverse, give):
    scheduler = make(inverse=inverse, num_iterations=3)
    scheduler.set_timesteps(10)
    network, x, begin = gauss_network(scheduler), X, 4 * scheduler.order
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(network(x, t), t, x).prev_sample
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(begin)
    y, times = X, scheduler.timesteps[begin:]
    for t in {"views": times, "numbers": times.tolist(), "copies": times.clone()}[give]:
        y = scheduler.step(network(y, torch.as_tensor(t)), t, y).prev_sample
    assert torch.equal(x, y)
    assert scheduler.pair.steps == 6


def test_the_pair_is_one_unrounded_latent_that_the_sampler_takes():
    sampler, inverse = both(10, iterations=60)
    network = gauss_network(sampler)
    half = lambda x, t: network(x.double(), t).to(x.dtype)  # noqa: E731
    x = X.bfloat16()
    latents = run(inverse, half, x)
    pair = inverse.pair
    assert isinstance(pair, LatentPair) and pair.steps == 10 and pair.first is pair.second
    assert pair.first.value.dtype == torch.float64 and torch.equal(pair.first.value.bfloat16(), latents)
    handed = sampler.set_pair(pair)
    sampler.set_timesteps(10)  # a pipeline does
    run(sampler, half, handed.bfloat16())
    assert (sampler.pair.first.value - x.double()).abs().max() < 0.02  # the network's own rounding
    sampler.set_pair(pair)
    sampler.set_timesteps(10)
    with pytest.raises(ValueError, match="hand the pipeline what `set_pair` returned"):
        run(sampler, half, latents + 1)


def test_for_edm_a_pair_is_not_scaled_by_the_pipeline():
    sampler, inverse = both(4, process="edm")
    assert sampler.init_noise_sigma > 80 and inverse.init_noise_sigma == 1
    run(inverse, gauss_network(inverse), X)
    sampler.set_pair(inverse.pair)
    sampler.set_timesteps(4)
    assert sampler.init_noise_sigma == 1


def test_latents_changed_between_calls_are_refused_or_adopted():
    for inverse in (False, True):
        for on_edit in ("raise", "adopt"):
            scheduler = make(inverse=inverse, on_edit=on_edit)
            scheduler.set_timesteps(10)
            x = scheduler.step(0.1 * X, scheduler.timesteps[0], X).prev_sample
            if on_edit == "raise":
                with pytest.raises(ValueError, match="changed between two steps"):
                    scheduler.step(0.1 * X, scheduler.timesteps[1], x + 1)
            else:
                assert torch.isfinite(scheduler.step(0.1 * X, scheduler.timesteps[1], x + 1).prev_sample).all()


def test_writing_to_the_given_latents_later_changes_nothing():
    outs = []
    for write in (False, True):
        _, inverse = both(5)
        network, given = gauss_network(inverse), X.clone()
        x = inverse.step(network(given, 0), inverse.timesteps[0], given).prev_sample
        if write:
            given.zero_()
        for t in inverse.timesteps[1:]:
            x = inverse.step(network(x, t), t, x).prev_sample
        outs.append(x)
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("inverse", [False, True])
def test_samples_keep_their_dtype_and_inputs_their_values(inverse, dtype):
    scheduler = make(inverse=inverse)
    scheduler.set_timesteps(10)
    x, eps = X.to(dtype), noise(2, 3, 4, 4, seed=1).to(dtype)
    given = x
    for t in scheduler.timesteps[:6]:
        output = scheduler.step(eps, t, x)
        x = output.prev_sample
        assert output.prev_sample.dtype == output.pred_original_sample.dtype == dtype
    assert torch.equal(given, X.to(dtype)) and torch.equal(eps, noise(2, 3, 4, 4, seed=1).to(dtype))


class CountReads(TorchDispatchMode):
    """Counts how often a tensor's value is brought to the host, which on an accelerator stalls the queue."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("process", ["vp", "flow", "edm"])
@pytest.mark.parametrize("inverse", [False, True])
def test_no_step_reads_a_value_back_from_the_device(inverse, process):
    scheduler = make(inverse=inverse, process=process, average_last=2)
    scheduler.set_timesteps(4)
    x = X
    with CountReads() as counter:
        for t in scheduler.timesteps:
            x = scheduler.step(0.5 * scheduler.scale_model_input(x, t), t, x).prev_sample
        assert inverse == (scheduler.residual is not None)
    assert counter.reads == 0


def test_it_works_under_inference_mode():
    sampler, inverse = both(10, iterations=60)
    network = gauss_network(sampler)
    with torch.inference_mode():
        assert (run(sampler, network, run(inverse, network, X)) - X).abs().max() < 1e-10


@pytest.mark.parametrize("loaded", [False, True])
def test_the_config_survives_a_round_trip(loaded, tmp_path):
    config = {"inverse": True, "num_iterations": 7, "average_last": 2, "process": "flow", "shift": 2.5}
    scheduler = make("scaled_linear", prediction_type="v_prediction", steps_offset=1, **config)
    if loaded:
        scheduler.save_pretrained(tmp_path)
        scheduler = FixedPointScheduler.from_pretrained(tmp_path)
    again = FixedPointScheduler.from_config(scheduler.config)
    visible = {k: v for k, v in again.config.items() if not k.startswith("_")}
    assert visible == {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    assert {**visible, **config} == visible and again.order == 7


@pytest.mark.parametrize("name", ["DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep"])
def test_the_noise_schedule_of_a_stock_scheduler_survives_the_way_here_and_back(name):
    stock_class = getattr(diffusers, f"{name}Scheduler")
    stock = stock_class(**SCHEDULES["scaled_linear"], prediction_type="v_prediction")
    ours = FixedPointScheduler.from_config(stock.config, num_iterations=12)
    back = stock_class.from_config(ours.config)
    for s in (ours, back):
        assert torch.allclose(s.alphas_cumprod.float(), stock.alphas_cumprod.float(), rtol=1e-4, atol=1e-7)
        assert s.config.prediction_type == "v_prediction"
    assert ours.config.num_iterations == 12


def test_the_file_names_every_sibling_it_needs():
    """Loading from the Hub copies the modules that the file itself imports, and not what those import."""
    folder = Path(scheduling_fixed_point.__file__).parent

    def siblings(path):
        nodes = ast.walk(ast.parse(path.read_text()))
        return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1}

    named = siblings(folder / "scheduling_fixed_point.py")
    assert named == {"levels", "noise_schedule", "reversible"}
    assert all(siblings(folder / f"{name}.py") <= named for name in named)
    assert hasattr(scheduling_fixed_point, "SchedulerMixin")  # diffusers looks it up to reload a saved pipeline


# ---------------------------------------------------------------- a stock pipeline


@pytest.fixture(scope="module")
def pipe():
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
    with torch.no_grad():
        unet.conv_out.weight *= 0.1  # an untrained network is so steep that no iteration would converge
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    none = dict.fromkeys(["text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    stock = diffusers.PNDMScheduler(**SCHEDULES["scaled_linear"], steps_offset=1, skip_prk_steps=True)
    pipe = diffusers.StableDiffusionPipeline(
        unet=unet, vae=vae, **none, scheduler=stock, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, latents, guidance_scale=1.0):
    """One call, and the times that the UNet was given in it."""
    seen = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(int(args[1])), with_kwargs=True
    )
    embeds = {"prompt_embeds": torch.ones(1, 4, 8), "negative_prompt_embeds": torch.zeros(1, 4, 8)}
    kwargs = {"num_inference_steps": 5, "output_type": "latent", "guidance_scale": guidance_scale}
    out = pipe(**embeds, **kwargs, latents=latents.to(pipe.dtype)).images
    hook.remove()
    return out, seen


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_stable_diffusion_inverts_and_comes_back(pipe, guidance_scale):
    x, errors = noise(1, 4, 8, 8).float(), []
    for iterations in (1, 4, 8):
        pipe.scheduler = FixedPointScheduler.from_config(
            pipe.scheduler.config, inverse=True, num_iterations=iterations
        )
        latents, seen = call(pipe, x, guidance_scale)
        inverse = pipe.scheduler
        assert seen == [t for t in range(1, 1000, 200) for _ in range(iterations)]
        pipe.scheduler = FixedPointScheduler.from_config(inverse.config, inverse=False)
        back, seen = call(pipe, pipe.scheduler.set_pair(inverse.pair), guidance_scale)
        assert seen == list(range(801, 0, -200))
        errors.append((back - x).abs().max().item())
    assert torch.equal(latents, inverse.pair.first.value.float())
    assert errors[0] > 1e-2 > errors[1] > errors[2] and errors[2] < 1e-4


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_iterations": 0}, "`num_iterations` must be a whole number of network calls >= 1, got 0"),
        ({"num_iterations": 2.5}, "`num_iterations` must be a whole number"),
        ({"average_last": 0}, r"`average_last` must be a whole number in \[1, 5\] \(`num_iterations`\), got 0"),
        ({"average_last": 6}, "`average_last` must be a whole number in"),
        ({"process": "ve"}, "`process` must be one of 'vp', 'flow', 'edm', got 've'"),
        ({"on_edit": "warn"}, "`on_edit` must be one of"),
        ({"prediction_type": "flow"}, "`prediction_type` must be one of"),
    ],
    ids=str,
)
def test_an_impossible_config_is_refused_with_the_reason(config, message):
    with pytest.raises(ValueError, match=message):
        FixedPointScheduler(**config)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({}, {"num_inference_steps": 0}, r"`num_inference_steps` must be a whole number"),
        ({}, {}, "pass one"),
        ({}, {"timesteps": [100, 200]}, "fall strictly"),
        ({"skip_steps": 5}, {"num_inference_steps": 5}, "`skip_steps` must leave one of the 5 steps at least"),
        ({"skip_steps": -1}, {"num_inference_steps": 5}, "`skip_steps` must not be negative"),
        ({"clip_sample": True}, {"num_inference_steps": 5}, "`clip_sample` can't be undone"),
        (
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
            {"num_inference_steps": 5},
            "can't be inverted to a time without signal",
        ),
    ],
    ids=str,
)
def test_impossible_times_are_refused_with_the_reason(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(inverse=True, **config).set_timesteps(**arguments)


def test_an_impossible_step_is_refused_with_the_reason():
    scheduler = make(inverse=True, num_iterations=3)
    with pytest.raises(ValueError, match="`set_timesteps` before `step`"):
        scheduler.step(X, 0, X)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="eta must be 0"):
        scheduler.step(X, 0, X, eta=0.5)
    with pytest.raises(ValueError, match="can't begin at call 4: give `set_begin_index` a multiple of 3"):
        scheduler.step(X, scheduler.timesteps[4], X)
