"""EditFriendlyDDPMScheduler: the equations, extraction and reconstruction, and the contract with diffusers."""

import ast
import inspect
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.schedulers import scheduling_edit_friendly_ddpm
from sfumato.schedulers.scheduling_edit_friendly_ddpm import EditFriendlyDDPMScheduler

SCHEDULES = {
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
PREDICTIONS = ["epsilon", "sample", "v_prediction"]


def make(schedule="linear", **config):
    return EditFriendlyDDPMScheduler(**{**SCHEDULES[schedule], **config})


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = noise(2, 3, 4, 4)


def network_of(scheduler, phase=0.0):
    """The best prediction for data ~ N(0, 0.25), bent; a different `phase` stands for a different prompt."""

    def predict(x, t):
        alpha = scheduler.alphas_cumprod[torch.as_tensor(t).long()]
        eps = (1 - alpha).sqrt() / (0.25 * alpha + 1 - alpha) * x + 0.1 * torch.sin(3 * x + phase)
        clean = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt().clamp_min(0.1)
        v = alpha.sqrt() * eps - (1 - alpha).sqrt() * clean
        return {"epsilon": eps, "sample": clean, "v_prediction": v}[scheduler.config.prediction_type]

    return predict


def run(scheduler, network, x, begin=0, **step_kwargs):
    """The loop of a pipeline, over the entries of `timesteps` themselves; gives all states."""
    states = [x]
    for t in scheduler.timesteps[begin:]:
        states.append(scheduler.step(network(states[-1], t), t, states[-1], **step_kwargs).prev_sample)
    return torch.stack(states)


def invert(steps=10, seed=0, network=None, source=X, **config):
    """An inversion that has run, as a stock pipeline runs it."""
    scheduler = make(inverse=True, **config)
    scheduler.set_source(source, torch.Generator().manual_seed(seed))
    scheduler.set_timesteps(steps)
    x = scheduler.initial_latents()
    scheduler.set_timesteps(steps)  # the pipeline's own call
    return scheduler, run(scheduler, network or network_of(scheduler), x)


def sampler_of(inverse, steps=None, **config):
    sampler = EditFriendlyDDPMScheduler.from_config(inverse.config, inverse=False, **config)
    x = sampler.set_noises(inverse.initial, inverse.noises)
    sampler.set_timesteps(steps or inverse.num_inference_steps)
    return sampler, x


# ---------------------------------------------------------------- the equations


def by_hand(scheduler, network, draws, source, final, eta):
    """States, maps and result from the definition, with drift correction a no-op in exact arithmetic."""
    alphas = [scheduler.alphas_cumprod[t] for t in scheduler.timesteps] + [torch.tensor(final, dtype=torch.float64)]
    states = [a.sqrt() * source + (1 - a).sqrt() * n for a, n in zip(alphas, draws, strict=False)]
    maps, deviations, means = [], [], []
    for index, (a, b) in enumerate(zip(alphas, alphas[1:], strict=False)):
        t, x = scheduler.timesteps[index], states[index]
        eps, kind = network(x, t), scheduler.config.prediction_type
        if kind == "sample":
            eps = (x - a.sqrt() * eps) / (1 - a).sqrt()
        elif kind == "v_prediction":
            eps = a.sqrt() * eps + (1 - a).sqrt() * x
        deviation = eta * ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
        mean = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b - deviation**2).clamp_min(0).sqrt() * eps
        last = index + 1 == len(scheduler.timesteps)
        maps.append(torch.zeros_like(x) if last else (states[index + 1] - mean) / deviation)
        deviations.append(deviation)
        means.append(mean)
    return torch.stack([*states, means[-1]]), torch.stack(maps), deviations


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("eta", [1.0, 0.4])
@pytest.mark.parametrize(("to_one", "offset"), [(True, 0), (False, 0), (False, 1)])
def test_states_and_maps_are_those_of_the_definition(prediction_type, eta, to_one, offset):
    config = {"prediction_type": prediction_type, "eta": eta, "set_alpha_to_one": to_one, "steps_offset": offset}
    inverse, states = invert(20, **config)
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(X.shape, generator=generator, dtype=torch.float64) for _ in range(20)]
    final = 1.0 if to_one else inverse.alphas_cumprod[0].item()
    expected, maps, _ = by_hand(inverse, network_of(inverse), draws, X, final, eta)
    assert (states - expected).abs().max() < 1e-12
    assert torch.equal(states, inverse.trajectory)
    assert (inverse.noises - maps).abs().max() < 1e-10  # divided by deviations down to 1e-2
    assert not inverse.noises[-1].any() and inverse.noises[:-1].any(dim=(1, 2, 3, 4)).all()
    assert inverse.noises.shape == (20, *X.shape) and inverse.noises.dtype == torch.float64
    assert torch.equal(inverse.initial, states[0])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [2, 3, 7, 30, 60])
def test_the_same_network_passes_through_the_same_states_to_the_bit(schedule, spacing, steps):
    # the cosine schedule has no signal to speak of at its last time
    config = {"prediction_type": "v_prediction"} if schedule == "cosine" else {}
    inverse, states = invert(steps, schedule=schedule, timestep_spacing=spacing, **config)
    sampler, x = sampler_of(inverse)
    assert sampler.timesteps.tolist() == inverse.timesteps.tolist()
    assert torch.equal(run(sampler, network_of(sampler), x), states)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_every_prediction_and_eta_comes_back_to_the_bit(prediction_type, eta):
    inverse, states = invert(20, prediction_type=prediction_type, eta=eta)
    sampler, x = sampler_of(inverse)
    assert torch.equal(run(sampler, network_of(sampler), x), states)


def test_the_source_comes_back_up_to_the_noise_of_the_last_step():
    """Where the last step has noise, the map that was set to 0 is exactly what is missing."""
    inverse, states = invert(20, set_alpha_to_one=False, steps_offset=1)
    final, first = inverse.alphas_cumprod[0], inverse.alphas_cumprod[1]
    deviation = ((1 - final) / (1 - first) * (1 - first / final)).sqrt()
    target = final.sqrt() * X + (1 - final).sqrt() * noise(*X.shape, seed=9)
    missing = (target - states[-1]) / deviation
    noises = inverse.noises.clone()
    noises[-1] = missing
    sampler = EditFriendlyDDPMScheduler.from_config(inverse.config, inverse=False)
    x = sampler.set_noises(inverse.initial, noises)
    sampler.set_timesteps(20)
    out = run(sampler, network_of(sampler), x)
    assert torch.equal(out[:-1], states[:-1])
    assert (out[-1] - target).abs().max() < 1e-12
    assert 0 < deviation < 0.02


def test_a_perfect_network_gives_the_source_back():
    scheduler = make()

    def network(x, t):
        alpha = scheduler.alphas_cumprod[t]
        return (x - alpha.sqrt() * X) / (1 - alpha).sqrt()

    inverse, states = invert(20, network=network)
    assert (states[-1] - X).abs().max() < 1e-12
    sampler, x = sampler_of(inverse)
    assert (run(sampler, network, x)[-1] - X).abs().max() < 1e-12


def test_states_are_noised_each_on_its_own():
    inverse, states = invert(4, source=torch.zeros(1, 1, 200, 200, dtype=torch.float64))
    flat = states[:-1].flatten(1)
    assert (torch.corrcoef(flat) - torch.eye(4)).abs().max() < 0.03
    alphas = inverse.alphas_cumprod[inverse.timesteps]
    assert (flat.var(1) / (1 - alphas) - 1).abs().max() < 0.03


def test_the_maps_have_more_variance_than_random_noise_and_neighbours_are_anticorrelated():
    """What makes the space edit-friendly, by the paper's figure 5."""
    source = 0.5 * noise(1, 1, 100, 100, seed=4)
    scheduler = make()

    def network(x, t):  # the best one for N(0, 0.25)
        alpha = scheduler.alphas_cumprod[t]
        return (1 - alpha).sqrt() / (0.25 * alpha + 1 - alpha) * x

    inverse, _ = invert(50, source=source, network=network)
    maps = inverse.noises[5:-5].flatten(1)
    assert maps.var(1).min() > 1.5
    assert max(torch.corrcoef(maps).diag(1)) < -0.2


def test_another_network_edits_and_keeps_the_maps():
    inverse, states = invert(20)
    sampler, x = sampler_of(inverse)
    edited = run(sampler, network_of(sampler, phase=0.5), x)
    assert torch.equal(edited[0], states[0]) and 0.01 < (edited[-1] - states[-1]).abs().max() < 3
    sampler.set_timesteps(20)
    assert torch.equal(run(sampler, network_of(sampler), x), states)  # the maps hold until they are replaced


def test_without_maps_it_samples_as_stock_ddim_with_its_eta():
    for eta in (1.0, 0.6, 0.0):
        scheduler = make(eta=eta)
        stock = diffusers.DDIMScheduler.from_config(scheduler.config, clip_sample=False)
        network, outs = network_of(scheduler), []
        for s, kwargs in ((scheduler, {}), (stock, {"eta": eta})):
            s.set_timesteps(10)
            outs.append(run(s, network, X, generator=torch.Generator().manual_seed(3), **kwargs))
        assert (outs[0] - outs[1]).abs().max() < 1e-4  # stock tables are float32


# ---------------------------------------------------------------- later beginnings


def test_a_run_begun_later_uses_the_later_maps():
    inverse, states = invert(20)
    by_index, by_times, by_parts = (sampler_of(inverse)[0] for _ in range(3))
    by_index.set_begin_index(7)
    by_times.set_timesteps(timesteps=inverse.timesteps[7:])
    x = by_parts.set_noises(inverse.trajectory[7], inverse.noises[7:], inverse.timesteps[7:])
    by_parts.set_timesteps(timesteps=inverse.timesteps[7:])
    network = network_of(inverse)
    assert torch.equal(run(by_index, network, states[7], begin=7), states[7:])
    assert torch.equal(run(by_times, network, states[7]), states[7:])
    assert torch.equal(run(by_parts, network, x), states[7:])


@pytest.mark.parametrize("skip", [1, 7, 19])
def test_skipped_steps_are_the_noisiest_in_both_directions(skip):
    inverse, states = invert(20, skip_steps=skip)
    assert inverse.timesteps.tolist() == list(range(950 - 50 * skip, -1, -50))
    assert len(inverse.noises) == 20 - skip
    sampler, x = sampler_of(inverse, steps=20)
    assert sampler.timesteps.tolist() == inverse.timesteps.tolist()
    assert torch.equal(run(sampler, network_of(sampler), x), states)


def test_maps_of_a_full_inversion_serve_a_sampler_that_skips():
    inverse, states = invert(20)
    sampler = EditFriendlyDDPMScheduler.from_config(inverse.config, inverse=False, skip_steps=7)
    sampler.set_noises(inverse.initial, inverse.noises, inverse.timesteps)
    sampler.set_timesteps(20)
    assert torch.equal(run(sampler, network_of(sampler), states[7]), states[7:])


def test_an_inversion_may_begin_later():
    inverse, states = invert(20)
    inverse.set_timesteps(20)
    inverse.set_begin_index(7)
    x = inverse.initial_latents()
    assert (run(inverse, network_of(inverse), x, begin=7) - states[7:]).abs().max() < 1e-12
    assert len(inverse.noises) == 13 and torch.equal(inverse.initial, x)
    sampler, x = sampler_of(inverse, steps=10)
    sampler.set_timesteps(20)
    assert torch.equal(run(sampler, network_of(sampler), x, begin=7), inverse.trajectory)


# ---------------------------------------------------------------- the contract with diffusers


def test_the_same_generator_draws_the_same_states_and_one_source_is_drawn_once():
    a, b, c = invert(10, seed=1)[1], invert(10, seed=1)[1], invert(10, seed=2)[1]
    assert torch.equal(a, b) and not torch.equal(a, c)
    inverse, states = invert(10)
    for stop in (10, 4, 10):  # also after an interrupted run
        inverse.set_timesteps(10)
        x = inverse.initial_latents()
        for t in inverse.timesteps[:stop]:
            x = inverse.step(network_of(inverse)(x, t), t, x).prev_sample
        assert torch.equal(x, states[stop]) and len(inverse.noises) == stop
    inverse.set_timesteps(5)
    assert inverse.initial_latents().shape == X.shape


def test_set_source_gives_the_first_state_where_the_times_are_known():
    inverse = make(inverse=True)
    assert inverse.set_source(X) is None
    inverse.set_timesteps(10)
    assert torch.equal(inverse.set_source(X, torch.Generator().manual_seed(0)), invert(10)[1][0])


def test_samples_of_a_batch_do_not_meet():
    generators = [torch.Generator().manual_seed(k) for k in range(2)]
    together, alone = make(inverse=True), make(inverse=True)
    together.set_source(X, generators)
    alone.set_source(X[1:], torch.Generator().manual_seed(1))
    outs = []
    for scheduler in (together, alone):
        scheduler.set_timesteps(10)
        outs.append(run(scheduler, network_of(scheduler), scheduler.initial_latents()))
    assert torch.equal(outs[0][:, 1:], outs[1])


@pytest.mark.parametrize("give", ["views", "numbers", "copies"])
def test_times_may_be_views_numbers_or_copies(give):
    inverse, states = invert(10)
    for scheduler, x in (sampler_of(inverse), (inverse, states[0])):
        scheduler.set_timesteps(10)
        times = scheduler.timesteps
        for t in {"views": times, "numbers": times.tolist(), "copies": times.clone()}[give]:
            x = scheduler.step(network_of(scheduler)(x, t), t, x).prev_sample
        assert torch.equal(x, states[-1]) and scheduler.step_index == 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_comes_back_to_the_bit(dtype):
    inverse = make("scaled_linear", inverse=True)
    inverse.set_source(X.to(dtype), torch.Generator().manual_seed(0))
    network = network_of(inverse)
    half = lambda x, t: network(x.double(), t).to(dtype)  # noqa: E731
    inverse.set_timesteps(50)
    states = run(inverse, half, inverse.initial_latents().to(dtype))
    assert torch.equal(inverse.initial, states[0].double())  # `initial` may be kept in the dtype of the samples
    sampler, x = sampler_of(inverse)
    assert x.dtype == torch.float64 and states.dtype == dtype
    assert torch.equal(run(sampler, half, x.to(dtype)), states)
    output = sampler.step(X.to(dtype), sampler.timesteps[0], x.to(dtype))
    assert output.pred_original_sample.dtype == dtype


def test_inputs_keep_their_values_and_may_be_written_to():
    inverse = make(inverse=True)
    source = X.clone()
    inverse.set_source(source, torch.Generator().manual_seed(0))
    source.zero_()
    inverse.set_timesteps(10)
    x = inverse.initial_latents()
    states = run(inverse, network_of(inverse), x)
    inverse.initial.zero_()
    inverse.noises.zero_()
    assert torch.equal(states, invert(10)[1])
    sampler, x = sampler_of(inverse)
    given = x.clone()
    assert torch.equal(run(sampler, network_of(sampler), x), states)
    assert torch.equal(x, given)


def test_sampling_takes_up_latents_that_were_changed_and_inversion_refuses_them():
    inverse, _ = invert(10)
    sampler, x = sampler_of(inverse)
    network, maps = network_of(sampler), inverse.noises
    for write in (False, True):
        sampler.set_timesteps(10)
        y = sampler.step(network(x, 900), sampler.timesteps[0], x).prev_sample
        y = y.add_(1) if write else y + 1
        out = sampler.step(network(y, 800), sampler.timesteps[1], y).prev_sample
        z, a, b = maps[1], *sampler.alphas_cumprod[[800, 700]]
        variance = (1 - b) / (1 - a) * (1 - a / b)
        eps = network(y, 800)
        mean = b.sqrt() * (y - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b - variance).sqrt() * eps
        assert (out - mean - variance.sqrt() * z).abs().max() < 1e-12
        inverse.set_timesteps(10)
        y = inverse.initial_latents()
        y = inverse.step(network(y, 900), inverse.timesteps[0], y).prev_sample
        y = y.add_(1) if write else y + 1
        with pytest.raises(ValueError, match="are not the noised source"):
            inverse.step(network(y, 800), inverse.timesteps[1], y)


class CountReads(TorchDispatchMode):
    """Counts how often a tensor's value is brought to the host, which on an accelerator stalls the queue."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("inverse", [False, True])
def test_only_the_first_step_reads_a_value_back_and_that_on_the_cpu(inverse):
    scheduler, _ = invert(10)
    x = scheduler.initial
    if not inverse:
        scheduler, x = sampler_of(scheduler)
    scheduler.set_timesteps(10)
    for index, t in enumerate(scheduler.timesteps):
        with CountReads() as counter:
            x = scheduler.step(0.5 * x, t, x).prev_sample
        assert counter.reads == (index == 0)


def test_it_works_under_inference_mode():
    with torch.inference_mode():
        inverse, states = invert(10)
        sampler, x = sampler_of(inverse)
        assert torch.equal(run(sampler, network_of(sampler), x), states)


def test_zero_terminal_snr_begins_with_pure_noise():
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    inverse, states = invert(10, **config)
    assert torch.isfinite(states).all() and torch.isfinite(inverse.noises).all()
    draw = torch.randn(X.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(states[0], draw)
    sampler, x = sampler_of(inverse)
    assert torch.equal(run(sampler, network_of(sampler), x), states)


@pytest.mark.parametrize("loaded", [False, True])
def test_the_config_survives_a_round_trip(loaded, tmp_path):
    config = {"inverse": True, "eta": 0.7, "skip_steps": 3, "set_alpha_to_one": False}
    scheduler = make("scaled_linear", prediction_type="v_prediction", steps_offset=1, **config)
    if loaded:
        scheduler.save_pretrained(tmp_path)
        scheduler = EditFriendlyDDPMScheduler.from_pretrained(tmp_path)
    again = EditFriendlyDDPMScheduler.from_config(scheduler.config)
    visible = {k: v for k, v in again.config.items() if not k.startswith("_")}
    assert visible == {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)
    assert {**visible, **config} == visible


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "PNDM", "EulerDiscrete", "DPMSolverMultistep"])
def test_the_noise_schedule_of_a_stock_scheduler_survives_the_way_here_and_back(name):
    stock_class = getattr(diffusers, f"{name}Scheduler")
    stock = stock_class(**SCHEDULES["scaled_linear"], prediction_type="v_prediction")
    ours = EditFriendlyDDPMScheduler.from_config(stock.config, eta=0.5)
    back = stock_class.from_config(ours.config)
    for s in (ours, back):
        assert torch.allclose(s.alphas_cumprod.float(), stock.alphas_cumprod.float(), rtol=1e-4, atol=1e-7)
        assert s.config.prediction_type == "v_prediction"
    assert ours.config.eta == 0.5


def test_add_noise_and_get_velocity_are_those_of_stock_ddim():
    ours, stock = make(), diffusers.DDIMScheduler()
    x, z, t = noise(3, 3, 8, 8).float(), noise(3, 3, 8, 8, seed=1).float(), torch.tensor([0, 500, 999])
    assert torch.allclose(ours.add_noise(x, z, t), stock.add_noise(x, z, t), atol=1e-5)
    assert torch.allclose(ours.get_velocity(x, z, t), stock.get_velocity(x, z, t), atol=1e-5)
    assert ours.add_noise(x, z, t[1:2]).shape == x.shape


def test_the_rest_of_the_interface_is_stock():
    scheduler = make()
    assert scheduler.scale_model_input(X, 0.0) is X
    assert len(scheduler) == 1000 and scheduler.order == 1 and scheduler.init_noise_sigma == 1.0
    names = set(inspect.signature(scheduler.step).parameters)
    assert {"eta", "use_clipped_model_output", "generator"} <= names  # `DDIMPipeline` passes all three
    assert {"timesteps", "device"} <= set(inspect.signature(scheduler.set_timesteps).parameters)
    assert scheduler.noises is None and scheduler.trajectory is None and scheduler.initial is None
    trained = EditFriendlyDDPMScheduler(num_train_timesteps=3, trained_betas=np.array([0.1, 0.2, 0.3]))
    assert trained.betas.tolist() == [0.1, 0.2, 0.3]


def test_the_file_names_every_sibling_it_needs():
    """Loading from the Hub copies the modules that the file itself imports, and not what those import."""
    folder = Path(scheduling_edit_friendly_ddpm.__file__).parent

    def siblings(path):
        nodes = ast.walk(ast.parse(path.read_text()))
        return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1}

    named = siblings(folder / "scheduling_edit_friendly_ddpm.py")
    assert named == {"levels", "noise_schedule"}
    assert all(siblings(folder / f"{name}.py") <= named for name in named)
    assert hasattr(scheduling_edit_friendly_ddpm, "SchedulerMixin")  # diffusers needs it to reload a saved pipeline


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
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    none = dict.fromkeys(["text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    stock = diffusers.PNDMScheduler(**SCHEDULES["scaled_linear"], steps_offset=1, skip_prk_steps=True)
    pipe = diffusers.StableDiffusionPipeline(
        unet=unet, vae=vae, **none, scheduler=stock, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, latents, prompt=1.0, **kwargs):
    embeds = {"prompt_embeds": prompt * torch.ones(1, 4, 8), "negative_prompt_embeds": torch.zeros(1, 4, 8)}
    kwargs = {"num_inference_steps": 10, "guidance_scale": 3.5, "output_type": "latent", **kwargs}
    return pipe(**embeds, latents=latents.to(pipe.dtype), **kwargs).images


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stable_diffusion_extracts_reconstructs_and_edits(pipe, dtype):
    pipe.to(dtype)
    inverse = EditFriendlyDDPMScheduler.from_config(pipe.scheduler.config, inverse=True, skip_steps=0)
    inverse.set_source(noise(1, 4, 8, 8).to(dtype), torch.Generator().manual_seed(0))
    inverse.set_timesteps(10)
    pipe.scheduler = inverse
    end = call(pipe, inverse.initial_latents())
    assert inverse.timesteps.tolist() == list(range(901, 0, -100))
    assert torch.equal(end, inverse.trajectory[-1].to(dtype))
    pipe.scheduler = EditFriendlyDDPMScheduler.from_config(inverse.config, inverse=False)
    x = pipe.scheduler.set_noises(inverse.initial, inverse.noises, inverse.timesteps)
    assert torch.equal(call(pipe, x), end)
    assert not torch.equal(call(pipe, x, prompt=-1.0), end)
    x = pipe.scheduler.set_noises(inverse.trajectory[4], inverse.noises[4:])
    times = inverse.timesteps[4:].tolist()
    assert torch.equal(call(pipe, x, num_inference_steps=None, timesteps=times), end)
    pipe.scheduler = EditFriendlyDDPMScheduler.from_config(pipe.scheduler.config, skip_steps=4)
    assert torch.equal(call(pipe, pipe.scheduler.set_noises(x, inverse.noises[4:])), end)
    pipe.to(torch.float32)


def test_a_pipeline_given_clean_latents_is_stopped_at_its_first_step(pipe):
    pipe.scheduler = EditFriendlyDDPMScheduler.from_config(pipe.scheduler.config, inverse=True, skip_steps=0)
    latents = noise(1, 4, 8, 8)
    pipe.scheduler.set_source(latents)
    with pytest.raises(ValueError, match="hand the pipeline what `initial_latents` returned"):
        call(pipe, latents)
    assert pipe.scheduler.noises is None


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "`beta_schedule` must be one of"),
        ({"prediction_type": "flow_prediction"}, "`prediction_type` must be one of"),
        ({"timestep_spacing": "quad"}, "`timestep_spacing` must be one of"),
        ({"eta": 1.5}, r"`eta` must lie in \[0, 1\], got 1.5"),
        ({"eta": 0.0, "inverse": True}, "no noise maps to extract: take `eta` above 0"),
    ],
    ids=str,
)
def test_an_impossible_config_is_refused_with_the_reason(config, message):
    with pytest.raises(ValueError, match=message):
        EditFriendlyDDPMScheduler(**config)


@pytest.mark.parametrize("stock", [diffusers.FlowMatchEulerDiscreteScheduler, diffusers.EDMEulerScheduler])
def test_a_model_without_betas_is_refused(stock):
    with pytest.raises(ValueError, match="needs a schedule of betas"):
        EditFriendlyDDPMScheduler.from_config(stock().config)


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({}, {"num_inference_steps": 0}, r"`num_inference_steps` must be a whole number"),
        ({}, {}, "pass exactly one"),
        ({}, {"num_inference_steps": 2, "timesteps": [5, 3]}, "pass exactly one"),
        ({}, {"timesteps": [100, 200]}, "fall strictly"),
        ({}, {"timesteps": [1000, 100]}, r"Times must lie in \[0, 999\]"),
        ({"skip_steps": 10}, {"num_inference_steps": 10}, "`skip_steps` must leave one of the 10 steps at least"),
        (
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            {"num_inference_steps": 5},
            "A predicted noise says nothing where no signal is left",
        ),
    ],
    ids=str,
)
def test_impossible_times_are_refused_with_the_reason(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**config).set_timesteps(**arguments)


def test_what_a_run_lacks_is_said_in_one_sentence():
    scheduler, inverse = make(), make(inverse=True)
    with pytest.raises(ValueError, match="`set_timesteps` before `step`"):
        scheduler.step(X, 0, X)
    inverse.set_timesteps(10)
    with pytest.raises(ValueError, match="`set_source` first"):
        inverse.initial_latents()
    with pytest.raises(ValueError, match="`set_source` first"):
        inverse.step(X, inverse.timesteps[0], X)
    inverse = make(inverse=True)
    inverse.set_source(X)
    with pytest.raises(ValueError, match="`set_timesteps` first"):
        inverse.initial_latents()
    with pytest.raises(ValueError, match="set the source there"):
        scheduler.set_source(X)
    with pytest.raises(ValueError, match="give them to one with inverse=False"):
        inverse.set_noises(X, X[None])


def test_another_eta_than_the_config_s_is_refused():
    scheduler = make(eta=0.5)
    scheduler.set_timesteps(10)
    for eta in (0.0, 0.5):  # pipelines pass 0 where their caller says nothing
        scheduler.step(X, scheduler.timesteps[0], X, eta=eta)
    with pytest.raises(ValueError, match="`eta` is the scheduler's, 0.5, got 1.0"):
        scheduler.step(X, scheduler.timesteps[0], X, eta=1.0)


def test_maps_that_do_not_fit_are_refused_with_the_reason():
    inverse, states = invert(10)
    sampler = make()
    with pytest.raises(ValueError, match="must have the shape of `initial` behind a dimension of steps"):
        sampler.set_noises(inverse.initial, inverse.noises[0])
    with pytest.raises(ValueError, match="got 10 maps and 9 times"):
        sampler.set_noises(inverse.initial, inverse.noises, inverse.timesteps[1:])
    x = sampler.set_noises(inverse.initial, inverse.noises, inverse.timesteps)
    t = torch.tensor(900)
    sampler.set_timesteps(20)
    with pytest.raises(ValueError, match="A run of 19 steps needs as many noise maps, got 10"):
        sampler.step(x, t, x)
    sampler.set_timesteps(10)
    with pytest.raises(ValueError, match="for samples of the shape"):
        sampler.step(x[:1], t, x[:1])
    with pytest.raises(ValueError, match="not those of the noise maps"):
        sampler.step(x, t, x + 1)
    sampler.set_timesteps(timesteps=[*range(901, 0, -100)])
    with pytest.raises(ValueError, match="The noise maps belong to the times"):
        sampler.step(x, sampler.timesteps[0], x)
    inverse.set_timesteps(10)
    with pytest.raises(ValueError, match="are not the noised source"):
        inverse.step(x[:1], inverse.timesteps[0], x[:1])
    assert len(states) == 11
