"""DDCMScheduler: the authors' program, the properties of virtual inversion, and the contract with diffusers."""

import ast
import inspect
import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.schedulers import noise_schedule, scheduling_ddcm
from sfumato.schedulers.scheduling_ddcm import DDCMScheduler, DDCMSchedulerOutput

with np.load(Path(__file__).parent.parent / "golden" / "infedit_ddcm.npz") as archive:
    GOLDEN = {key: archive[key] for key in archive.files}
META = json.loads(str(GOLDEN["meta_json"]))
CASES = [name for name in META if f"{name}__pred_x0_target" in GOLDEN]
PREDICTIONS = ["epsilon", "sample", "v_prediction"]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(**config):
    return DDCMScheduler(**{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, **config})


def toy_network(x, t):
    t = torch.as_tensor(t).double()
    return 0.3 * x * torch.cos(t / 500) + 0.1 * torch.sin(3 * x + t / 100)


def branch_network(x, t):
    """The networks of the reference cases: source, target and (with three branches) mutual differ."""
    eps = toy_network(x, t)
    changes = [lambda x: 0 * x, lambda x: 0.05 * x + 0.02, lambda x: 0.03 * torch.cos(x)]
    batch = len(SOURCE)
    parts = [change(part) for change, part in zip(changes, x.split(batch), strict=False)]
    return eps + torch.cat(parts)


SOURCE, START = torch.from_numpy(GOLDEN["x0"]), torch.from_numpy(GOLDEN["init_noise"])
NOISES = torch.from_numpy(GOLDEN["noises"])


def run(scheduler, network, eta=1.0, branches=3, dtype=torch.float64, strength=1.0, noises=NOISES, times=None):
    """The loop of a pipeline; returns what the last step gives."""
    scheduler.set_source(SOURCE)
    x = START if strength == 1 else scheduler.add_noise(SOURCE, START, scheduler.timesteps[:1])
    x = x.to(dtype).repeat(branches, 1, 1, 1)
    for index, t in enumerate(scheduler.timesteps if times is None else times):
        out = scheduler.step(network(x, t), t, x, eta=eta, variance_noise=noises[index])
        x = out.prev_sample
    return out


def relative_error(out, reference):
    return float((out - torch.as_tensor(reference)).abs().max() / torch.as_tensor(reference).abs().max())


# ---------------------------------------------------------------- the authors' program


@pytest.mark.parametrize("name", CASES)
def test_three_branches_give_the_outputs_and_times_of_the_authors_program(name):
    case, scheduler = META[name], make()
    scheduler.set_timesteps(case["N"], strength=case["strength"])
    out = run(scheduler, branch_network, case["eta"], strength=case["strength"]).pred_original_sample
    source, target, mutual = out.split(len(SOURCE))
    assert scheduler.timesteps.tolist() == GOLDEN[f"{name}__timesteps"].tolist()
    assert torch.equal(source, SOURCE)
    assert relative_error(target, GOLDEN[f"{name}__pred_x0_target"]) < 1e-9
    assert relative_error(mutual, GOLDEN[f"{name}__pred_x0_mutual"]) < 1e-9


def test_the_schedule_is_the_one_of_the_program_in_float64():
    scheduler = make()
    assert scheduler.alphas_cumprod.dtype == torch.float64
    assert np.abs(scheduler.alphas_cumprod.numpy() - GOLDEN["alphas_cumprod_scaled_linear"]).max() < 1e-14


def by_hand(scheduler, network, eta, branches):
    """The equations as the paper writes them, each branch by itself."""
    times, a = scheduler.timesteps.tolist(), scheduler.alphas_cumprod
    x = [START] * branches
    for index, (t, after) in enumerate(zip(times, [*times[1:], None], strict=True)):
        e = network(torch.cat(x), t).split(len(SOURCE))
        signal, sigma = a[t].sqrt(), (1 - a[t]).sqrt()
        consistent = (x[0] - signal * SOURCE) / sigma
        k = [consistent, *[e_b - e[0] + consistent for e_b in e[1:]]]
        p = [SOURCE, *[(x_b - sigma * k_b) / signal for x_b, k_b in zip(x[1:], k[1:], strict=True)]]
        if after is None:
            return torch.cat(p)
        if branches == 3:
            k[0] = k[2]
        b = a[after]
        x = [
            b.sqrt() * p_b + ((1 - b) * (1 - eta)).sqrt() * k_b + (eta * (1 - b)).sqrt() * NOISES[index]
            for p_b, k_b in zip(p, k, strict=True)
        ]


@pytest.mark.parametrize("eta", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("branches", [2, 3])
def test_a_step_is_the_paper_s_equation(branches, eta):
    scheduler = make()
    scheduler.set_timesteps(8)
    out = run(scheduler, branch_network, eta, branches).prev_sample
    assert relative_error(out, by_hand(scheduler, branch_network, eta, branches)) < 1e-11


# ---------------------------------------------------------------- the method


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("eta", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("branches", [2, 3])
def test_a_target_that_agrees_with_the_source_gives_it_back_to_the_bit(branches, dtype, eta, prediction_type):
    scheduler = make(prediction_type=prediction_type)
    for steps in (1, 12):
        scheduler.set_timesteps(steps)
        out = run(scheduler, toy_network, eta, branches, dtype)
        for part in out.prev_sample.split(len(SOURCE)):
            assert (part - SOURCE.to(dtype)).abs().max() == 0.0
        assert torch.equal(out.prev_sample, out.pred_original_sample)


@pytest.mark.parametrize("strength", [0.2, 0.7])
def test_a_noised_source_comes_back_to_the_bit_too(strength):
    scheduler = make()
    scheduler.set_timesteps(15, strength=strength)
    assert len(scheduler.timesteps) == int(15 * strength)
    assert torch.equal(run(scheduler, toy_network, strength=strength).prev_sample, SOURCE.repeat(3, 1, 1, 1))


def test_the_source_branch_always_decodes_to_the_source():
    scheduler = make()
    scheduler.set_timesteps(12)
    scheduler.set_source(SOURCE)
    x = START.repeat(3, 1, 1, 1)
    for index, t in enumerate(scheduler.timesteps):
        out = scheduler.step(branch_network(x, t), t, x, eta=0.5, variance_noise=NOISES[index])
        assert torch.equal(out.pred_original_sample[: len(SOURCE)], SOURCE)
        x = out.prev_sample
    assert not torch.allclose(x[len(SOURCE) : 2 * len(SOURCE)], SOURCE, atol=0.01)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_every_kind_of_prediction_gives_the_same_edit(prediction_type):
    outs = []
    for kind in ("epsilon", prediction_type):
        scheduler = make(prediction_type=kind)
        scheduler.set_timesteps(10)

        def network(x, t, scheduler=scheduler, kind=kind):
            eps, alpha = branch_network(x, t), scheduler.alphas_cumprod[t]
            x0 = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
            velocity = alpha.sqrt() * eps - (1 - alpha).sqrt() * x0
            return {"epsilon": eps, "sample": x0, "v_prediction": velocity}[kind]

        outs.append(run(scheduler, network, eta=0.5).prev_sample)
    assert relative_error(outs[1], outs[0]) < 1e-10


def test_a_start_without_any_signal_is_fine_for_a_velocity_and_refused_for_epsilon():
    scheduler = make(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    scheduler.set_timesteps(4)
    assert scheduler.alphas_cumprod[scheduler.timesteps[0]] == 0
    assert torch.isfinite(run(scheduler, branch_network, eta=0.5).prev_sample).all()
    with pytest.raises(ValueError, match="At the time 999 no signal is left"):
        make(rescale_betas_zero_snr=True).set_timesteps(4)


def test_samples_do_not_see_each_other():
    scheduler = make()
    scheduler.set_timesteps(6)
    together = run(scheduler, branch_network).prev_sample.unflatten(0, (3, len(SOURCE)))
    for k in range(len(SOURCE)):
        scheduler.set_source(SOURCE[k : k + 1])
        scheduler.set_timesteps(6)
        x = START[k : k + 1].repeat(3, 1, 1, 1)
        for index, t in enumerate(scheduler.timesteps):
            shift = torch.cat([0 * x[:1], 0.05 * x[1:2] + 0.02, 0.03 * torch.cos(x[2:])])
            z = NOISES[index, k : k + 1]
            x = scheduler.step(toy_network(x, t) + shift, t, x, variance_noise=z).prev_sample
        assert (x - together[:, k]).abs().max() < 1e-12


def test_half_precision_states_lose_nothing_between_steps():
    def network(x, t):  # sees nothing of the state, so that only the scheduler's precision counts
        return branch_network(START.repeat(3, 1, 1, 1), t).to(x.dtype)

    scheduler, outs = make(), []
    for dtype in (torch.float64, torch.bfloat16):
        scheduler.set_timesteps(12)
        outs.append(run(scheduler, lambda x, t: network(x, t).bfloat16(), dtype=dtype).prev_sample)
    assert relative_error(outs[1].double(), outs[0]) < 0.005  # one rounding, at the end


def test_values_that_the_caller_changed_are_taken_as_they_are():
    def edit(x):
        x = x.clone()
        x[len(SOURCE) : 2 * len(SOURCE), :, :4] = 0.25
        return x

    outs = []
    for dtype in (torch.float64, torch.float32):
        scheduler = make()
        scheduler.set_timesteps(3)
        scheduler.set_source(SOURCE)
        x = START.to(dtype).repeat(3, 1, 1, 1)
        for index, t in enumerate(scheduler.timesteps):
            eps = branch_network(START.repeat(3, 1, 1, 1), t)
            x = edit(scheduler.step(eps, t, x, variance_noise=NOISES[index]).prev_sample)
        outs.append(x.double())
    assert (outs[1] - outs[0]).abs().max() < 1e-6
    assert (outs[0][len(SOURCE) : 2 * len(SOURCE), :, :4] == 0.25).all()


def test_noise_is_shared_by_the_branches_and_comes_from_the_generator():
    outs, drawn = [], torch.Generator().manual_seed(3)
    noises = [torch.randn(SOURCE.shape, generator=drawn, dtype=torch.float64) for _ in range(4)]
    for generator in (torch.Generator().manual_seed(3), None):
        scheduler = make()
        scheduler.set_timesteps(5)
        scheduler.set_source(SOURCE)
        x = START.repeat(3, 1, 1, 1)
        for index, t in enumerate(scheduler.timesteps):
            z = noises[index] if generator is None and index < 4 else None
            x = scheduler.step(branch_network(x, t), t, x, generator=generator, variance_noise=z).prev_sample
        if generator is not None:
            assert torch.equal(generator.get_state(), drawn.get_state())  # nothing was drawn for the last step
        outs.append(x)
    assert torch.equal(outs[0], outs[1])


def test_a_generator_for_each_sample_makes_it_independent_of_its_batch():
    def draw(which):
        scheduler = make()
        scheduler.set_timesteps(5)
        scheduler.set_source(SOURCE[which])
        generators = [torch.Generator().manual_seed(k) for k in which]
        x = START[which].repeat(2, 1, 1, 1)
        for t in scheduler.timesteps:
            shift = torch.tensor([0.0, 0.1]).double().repeat_interleave(len(which)).reshape(-1, 1, 1, 1)
            eps = toy_network(x, t) + shift
            x = scheduler.step(eps, t, x, generator=generators).prev_sample
        return x[len(which) :]

    assert (draw([0, 2])[1] - draw([2])[0]).abs().max() < 1e-12


# ---------------------------------------------------------------- times


@pytest.mark.parametrize("original", [50, 37, 100])
def test_times_are_those_of_lcm(original):
    ours = make(original_inference_steps=original)
    stock = diffusers.LCMScheduler(original_inference_steps=original)
    for steps in range(1, original + 1):
        for scheduler in (ours, stock):
            scheduler.set_timesteps(steps)
        assert ours.timesteps.tolist() == stock.timesteps.tolist()
    ours.set_timesteps(12, original_inference_steps=60)
    stock.set_timesteps(12, original_inference_steps=60)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 7, 30, 333])
def test_without_lcm_s_grid_times_are_those_of_stock_schedulers(spacing, steps):
    ours = make(original_inference_steps=None, timestep_spacing=spacing, steps_offset=1)
    stock = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(steps)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()


def test_strength_drops_the_first_times():
    scheduler = make()
    scheduler.set_timesteps(15)
    full = scheduler.timesteps.tolist()
    for strength in (0.07, 0.5, 0.7, 1.0):
        scheduler.set_timesteps(15, strength=strength)
        assert scheduler.timesteps.tolist() == full[15 - int(15 * strength) :]
        assert scheduler.num_inference_steps == int(15 * strength)
    scheduler.set_timesteps(timesteps=[900, 500, 100, 0], strength=0.5)
    assert scheduler.timesteps.tolist() == [100, 0]


# ---------------------------------------------------------------- the contract with diffusers


@pytest.mark.parametrize("loaded", [False, True])
def test_the_config_survives_a_round_trip(loaded, tmp_path):
    config = {"beta_end": 0.02, "original_inference_steps": None, "timestep_spacing": "trailing", "steps_offset": 1}
    scheduler = make(prediction_type="v_prediction", **config)
    if loaded:
        scheduler.save_pretrained(tmp_path)
        scheduler = DDCMScheduler.from_pretrained(tmp_path)
    again = DDCMScheduler.from_config(scheduler.config)
    visible = {k: v for k, v in again.config.items() if not k.startswith("_")}
    assert visible == {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    assert {**visible, **config} == visible
    assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("name", ["DDIM", "LCM", "PNDM", "EulerDiscrete", "DPMSolverMultistep"])
def test_the_noise_schedule_of_a_stock_scheduler_survives_the_way_here_and_back(name, loaded, tmp_path):
    stock_class = getattr(diffusers, f"{name}Scheduler")
    stock = stock_class(beta_schedule="linear", beta_start=0.0002, beta_end=0.015, prediction_type="v_prediction")
    if loaded:
        stock.save_pretrained(tmp_path)
        stock = stock_class.from_pretrained(tmp_path)
    ours = DDCMScheduler.from_config(stock.config)
    back = stock_class.from_config(ours.config)
    for s in (ours, back):
        assert torch.allclose(s.alphas_cumprod.float(), stock.alphas_cumprod.float(), rtol=1e-4, atol=1e-7)
        assert s.config.prediction_type == "v_prediction"
    ours.set_timesteps(15)
    assert ours.timesteps[0] == 999  # whatever spacing the stock config brought along


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "PNDM", "EulerDiscrete", "DPMSolverMultistep"])
def test_a_stock_scheduler_s_default_schedule_is_taken_over_too(name):
    stock = getattr(diffusers, f"{name}Scheduler")()
    ours = DDCMScheduler.from_config(stock.config)
    assert torch.allclose(ours.alphas_cumprod.float(), stock.alphas_cumprod.float(), rtol=1e-4, atol=1e-7)


def test_runs_repeat_to_the_bit_even_after_an_interrupted_one():
    scheduler, outs = make(), []
    for stop in (12, 5, 12):
        scheduler.set_timesteps(12)
        outs.append(run(scheduler, branch_network, times=scheduler.timesteps[:stop], dtype=torch.float32).prev_sample)
        assert scheduler.step_index == stop
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(run(scheduler, branch_network, dtype=torch.float32).prev_sample, outs[0])  # without a reset


@pytest.mark.parametrize("give", ["views", "numbers", "tensors", "begin index"])
def test_a_run_may_begin_anywhere_and_be_given_its_times_in_any_form(give):
    scheduler = make()
    scheduler.set_timesteps(12, strength=0.5)
    expected = run(scheduler, branch_network).prev_sample
    scheduler.set_timesteps(12)
    if give == "begin index":
        scheduler.set_begin_index(6)
        assert scheduler.begin_index == 6
    times = scheduler.timesteps[6:]
    times = {"numbers": times.tolist(), "tensors": list(times.clone())}.get(give, times)
    assert torch.equal(run(scheduler, branch_network, times=times).prev_sample, expected)
    assert scheduler.step_index == 12


def test_a_time_off_the_schedule_is_stepped_to_the_next_time_below_it():
    scheduler = make()
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    scheduler.set_source(SOURCE)
    x = START.repeat(2, 1, 1, 1)
    eps = branch_network(x, 700)
    out = scheduler.step(eps, 700, x, variance_noise=NOISES[0])
    alpha, after = scheduler.alphas_cumprod[[700, 500]]
    target = SOURCE - ((1 - alpha) / alpha).sqrt() * (eps[len(SOURCE) :] - eps[: len(SOURCE)])
    expected = after.sqrt() * target + (1 - after).sqrt() * NOISES[0]
    assert relative_error(out.prev_sample[len(SOURCE) :], expected) < 1e-12
    assert scheduler.step_index == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_samples_keep_their_dtype_and_inputs_their_values(dtype):
    scheduler = make()
    scheduler.set_timesteps(10)
    x, eps = START.repeat(3, 1, 1, 1).to(dtype), noise(12, 3, 8, 8).to(dtype)
    source = SOURCE.to(dtype)
    scheduler.set_source(source)
    kept = [tensor.clone() for tensor in (x, eps, source)]
    for t in scheduler.timesteps[:3]:
        output = scheduler.step(eps, t, x, eta=0.5)
    assert isinstance(output, DDCMSchedulerOutput)
    assert output.prev_sample.dtype == output.pred_original_sample.dtype == dtype
    assert output.prev_sample.shape == x.shape
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, eps, source), strict=True))
    assert scheduler.add_noise(source, source, torch.tensor([5])).dtype == dtype


class CountReads(TorchDispatchMode):
    """Counts how often a tensor's value is brought to the host, which on an accelerator stalls the queue."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_no_step_reads_a_value_back_from_the_device():
    scheduler = make()
    scheduler.set_timesteps(5)
    x = START.repeat(3, 1, 1, 1)
    scheduler.set_source(SOURCE)
    for t in scheduler.timesteps:
        with CountReads() as counter:
            x = scheduler.step(0.5 * x, t, x).prev_sample
        assert counter.reads == 0


def test_add_noise_and_get_velocity_are_those_of_stock_ddim():
    ours, stock = make(), diffusers.DDIMScheduler.from_config(make().config)
    x, z, t = noise(3, 3, 8, 8).float(), noise(3, 3, 8, 8, seed=1).float(), torch.tensor([0, 500, 999])
    assert torch.allclose(ours.add_noise(x, z, t), stock.add_noise(x, z, t), atol=1e-5)
    assert torch.allclose(ours.get_velocity(x, z, t), stock.get_velocity(x, z, t), atol=1e-5)


def test_the_rest_of_the_interface_is_stock():
    scheduler = make()
    assert scheduler.scale_model_input(SOURCE, 0.0) is SOURCE
    assert len(scheduler) == 1000 and scheduler.order == 1 and scheduler.init_noise_sigma == 1.0
    assert {"eta", "generator"} <= set(inspect.signature(scheduler.step).parameters)
    assert {"timesteps", "device"} <= set(inspect.signature(scheduler.set_timesteps).parameters)
    x = START.repeat(2, 1, 1, 1)
    scheduler.set_source(SOURCE)
    scheduler.set_timesteps(1)
    as_tuple = scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)
    as_output = scheduler.step(x, scheduler.timesteps[0], x)
    assert all(torch.equal(a, b) for a, b in zip(as_tuple, as_output.to_tuple(), strict=True))


def test_the_file_needs_nothing_of_ours_but_its_sibling():
    tree = ast.parse(Path(scheduling_ddcm.__file__).read_text())
    relative = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
    assert relative == {"noise_schedule"}
    assert hasattr(scheduling_ddcm, "SchedulerMixin")  # diffusers looks it up to reload a saved pipeline


def test_a_repository_that_ships_the_file_loads_it_as_remote_code(tmp_path, monkeypatch):
    pixel = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    diffusers.DDPMPipeline(pixel, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "repo")
    make(steps_offset=1).save_pretrained(tmp_path / "repo" / "scheduler")
    for module in (scheduling_ddcm, noise_schedule):
        shutil.copy(module.__file__, tmp_path / "repo" / "scheduler")
    index = tmp_path / "repo" / "model_index.json"
    entry = ["scheduling_ddcm", "DDCMScheduler"]
    index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": entry}))
    modules = tmp_path / "modules"
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(modules)
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "repo", trust_remote_code=True)
    assert type(pipe.scheduler).__name__ == "DDCMScheduler" and pipe.scheduler.config.steps_offset == 1
    assert type(pipe.scheduler).__module__ != scheduling_ddcm.__name__
    pipe.scheduler.set_timesteps(4)
    assert torch.equal(run(pipe.scheduler, toy_network).prev_sample, SOURCE.repeat(3, 1, 1, 1))


def test_a_stock_pipeline_edits_once_the_source_is_set():
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), layers_per_block=1, cross_attention_dim=8, attention_head_dim=2,
        norm_num_groups=4,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    none = dict.fromkeys(["text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    pipe = diffusers.StableDiffusionPipeline(
        unet=unet, vae=vae, scheduler=diffusers.PNDMScheduler(steps_offset=1), **none, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDCMScheduler.from_config(pipe.scheduler.config)
    source, start = noise(1, 4, 8, 8).float(), noise(1, 4, 8, 8, seed=1).float().repeat(2, 1, 1, 1)
    pipe.scheduler.set_source(source)
    prompts = noise(2, 4, 8, seed=2).float()

    def edit(embeds):
        return pipe(
            prompt_embeds=embeds, negative_prompt_embeds=torch.zeros(2, 4, 8), latents=start, num_inference_steps=4,
            output_type="latent", eta=1.0, generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    assert torch.equal(edit(prompts[:1].repeat(2, 1, 1))[1:], source)
    edited = edit(prompts)
    assert torch.equal(edited[:1], source) and not torch.allclose(edited[1:], source, atol=1e-3)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "`beta_schedule` must be one of"),
        ({"prediction_type": "flow_prediction"}, "`prediction_type` must be one of"),
        ({"timestep_spacing": "lcm"}, "`timestep_spacing` must be one of 'leading', 'linspace', 'trailing'"),
        ({"original_inference_steps": 0}, r"`original_inference_steps` must lie in \[1, 1000\]"),
        ({"original_inference_steps": 1001}, r"`original_inference_steps` must lie in \[1, 1000\]"),
    ],
    ids=str,
)
def test_an_impossible_config_is_refused_with_the_reason(config, message):
    with pytest.raises(ValueError, match=message):
        DDCMScheduler(**config)


def test_a_flow_matching_config_is_refused():
    with pytest.raises(ValueError, match="flow-matching config"):
        DDCMScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler().config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, r"must lie in \[1, 50\]"),
        ({"num_inference_steps": 51}, r"must lie in \[1, 50\] \(`original_inference_steps`\), got 51: take fewer"),
        ({"num_inference_steps": 5, "original_inference_steps": 0}, r"`original_inference_steps` must lie in"),
        ({}, "pass exactly one"),
        ({"num_inference_steps": 2, "timesteps": [5, 3]}, "pass exactly one"),
        ({"timesteps": [100, 200]}, "fall strictly"),
        ({"timesteps": [1000, 100]}, r"Times must lie in \[0, 999\]"),
        ({"num_inference_steps": 15, "strength": 0.0}, r"`strength` must lie in \(0, 1\]"),
        ({"num_inference_steps": 15, "strength": 1.1}, r"`strength` must lie in \(0, 1\]"),
        ({"num_inference_steps": 15, "strength": 0.05}, "keep one of the 15 steps at least, got 0.05"),
        ({"num_inference_steps": 15, "strength": float("nan")}, r"`strength` must lie in \(0, 1\]"),
    ],
    ids=str,
)
def test_impossible_times_are_refused_with_the_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        make().set_timesteps(**arguments)


def test_an_impossible_step_is_refused_with_the_reason():
    scheduler, x = make(), START.repeat(2, 1, 1, 1)
    with pytest.raises(ValueError, match="`set_timesteps` before `step`"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="`set_source` before `step`"):
        scheduler.step(x, 999, x)
    scheduler.set_source(SOURCE)
    for eta in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"`eta` must lie in \[0, 1\]"):
            scheduler.step(x, 999, x, eta=eta)
    with pytest.raises(ValueError, match="either `generator` or `variance_noise`"):
        scheduler.step(x, 999, x, generator=torch.Generator(), variance_noise=START)
    with pytest.raises(ValueError, match="`variance_noise` is shared by the branches"):
        scheduler.step(x, 999, x, variance_noise=x)
    for wrong in (START, START.repeat(4, 1, 1, 1), x[:-1], x[..., :4]):
        with pytest.raises(ValueError, match="two or three branches"):
            scheduler.step(wrong, 999, wrong)
    scheduler.set_source(None)
    with pytest.raises(ValueError, match="`set_source` before `step`"):
        scheduler.step(x, 999, x)
