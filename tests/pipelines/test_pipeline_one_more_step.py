"""OneMoreStepPipeline: the authors' program, what the step does to a pipeline, folders, and what is refused."""

import json
import logging
import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file

import sfumato
from sfumato.pipelines.pipeline_one_more_step import OneMoreStepPipeline, initial_sample, load_timeless_unet

with np.load(Path(__file__).parent.parent / "golden" / "oms.npz") as archive:
    GOLDEN = {key: archive[key] for key in archive.files}
META = json.loads(str(GOLDEN["meta"]))
CASES = sorted({key.split("/")[0] for key in GOLDEN if "/" in key})
GUIDANCES = {"gNone": 1.0, "g1.0": 1.0, "g1.5": 1.5, "g2.0": 2.0}


def network(x, t):
    """What the reference runs were made with."""
    return 0.3 * x * math.cos(t / 5) + 0.1 * torch.sin(3 * x + t / 3)


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("case", CASES)
def test_the_step_is_that_of_the_authors_program(case, guidance):
    stored = {name: torch.from_numpy(GOLDEN[f"{case}/{guidance}/{name}"]) for name in ("official", "v", "ddim_final")}
    n, z = (torch.from_numpy(GOLDEN[name]) for name in ("init_latents", "step_noise"))
    with_it, without = network(n, 5), network(n, 11)
    velocity = without + GUIDANCES[guidance] * (with_it - without)
    assert torch.allclose(velocity, stored["v"], rtol=1e-12)
    alpha = float(GOLDEN[f"{case}/alpha_bar_T"])
    start = initial_sample(stored["v"], z, alpha, variance_as_std=True)
    assert (start - stored["official"]).abs().max() / stored["official"].abs().max() < 1e-9
    paper = torch.from_numpy(GOLDEN[f"{case}/{guidance}/paper_sqrt_variant"])
    assert (initial_sample(stored["v"], z, alpha) - paper).abs().max() / paper.abs().max() < 1e-9


def test_the_signal_at_the_first_time_is_that_of_the_reference():
    for case in CASES:
        settings = {k: v for k, v in META[case].items() if k in DDIMScheduler().config}
        scheduler = DDIMScheduler(**settings)
        scheduler.set_timesteps(META[case]["steps"])
        assert int(scheduler.timesteps[0]) == int(GOLDEN[f"{case}/t0"])
        alpha = float(scheduler.alphas_cumprod[scheduler.timesteps[0]])
        assert alpha == pytest.approx(float(GOLDEN[f"{case}/alpha_bar_T"]), rel=1e-6)


@pytest.fixture(scope="module")
def atelier():
    pipe = sfumato.load("atelier")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def step(atelier):
    """A network with random weights, of which the time has no part."""
    torch.manual_seed(0)
    config = atelier.unet.config
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), norm_num_groups=4,
        layers_per_block=1, attention_head_dim=8, cross_attention_dim=config.cross_attention_dim,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, value in unet.named_parameters():
            if "time_emb_proj" in name:
                value.zero_()
    return OneMoreStepPipeline(unet, atelier.text_encoder, atelier.tokenizer, base=atelier)


def draw(pipe, prompt="a photo of a red bag", seed=0, **call):
    call = {"num_inference_steps": 3, "output_type": "np", **call}
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images


def started(step, **call):
    """The latents that the pipeline is given."""
    seen = []

    class Stop(Exception):
        pass

    def keep(prompt, **kwargs):
        seen.append(kwargs["latents"])
        raise Stop

    other = OneMoreStepPipeline(step.unet, step.text_encoder, step.tokenizer)
    base = step.base

    class Base:
        scheduler, unet, vae_scale_factor = base.scheduler, base.unet, base.vae_scale_factor
        _execution_device = torch.device("cpu")

        def __call__(self, prompt, **kwargs):
            keep(prompt, **kwargs)

    other.base = Base()
    with pytest.raises(Stop):
        draw(other, **call)
    return seen[0]


def test_without_the_step_it_is_the_pipeline_itself(step, atelier):
    assert np.array_equal(draw(step, one_more_step=False), draw(atelier))
    assert not np.array_equal(draw(step), draw(atelier))
    assert np.array_equal(draw(step), draw(step))


def test_a_network_that_knows_the_picture_gives_the_noised_picture(step, monkeypatch):
    """E[x_T] = sqrt(A) x0 and Var[x_T] = 1 - A, if the network says v = -x0."""
    picture = torch.full((1, 4, 8, 8), 0.7)
    monkeypatch.setattr(OneMoreStepPipeline, "predict", lambda self, noise, told, scale: -picture.expand_as(noise))
    starts = started(step, prompt=["a photo of a red bag"] * 64, num_inference_steps=20)
    scheduler = step.base.scheduler
    scheduler.set_timesteps(20)
    alpha = float(scheduler.alphas_cumprod[scheduler.timesteps[0]])
    assert starts.mean().item() == pytest.approx(0.7 * alpha**0.5, abs=0.02)
    assert starts.var().item() == pytest.approx(1 - alpha, rel=0.03)


def test_schedulers_in_units_of_sigma_start_from_the_same_picture(step, atelier):
    usual = atelier.scheduler
    starts = {}
    for spacing in ("leading", "trailing"):
        for kind in (diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler):
            atelier.scheduler = kind.from_config(usual.config, timestep_spacing=spacing)
            latents = started(step)
            scheduler = atelier.scheduler
            scheduler.set_timesteps(3)
            scaled = latents * float(scheduler.init_noise_sigma)
            alpha = float(scheduler.alphas_cumprod[int(scheduler.timesteps[0])])
            starts[spacing, kind] = scaled * (alpha**0.5 if kind is diffusers.EulerDiscreteScheduler else 1)
        assert torch.allclose(
            starts[spacing, diffusers.DDIMScheduler], starts[spacing, diffusers.EulerDiscreteScheduler], atol=1e-4
        )
    atelier.scheduler = usual


def test_the_step_has_its_own_prompt_and_scale(step):
    told = []
    handle = step.unet.register_forward_pre_hook(
        lambda _, args, kwargs: told.append((len(args[0]), kwargs["encoder_hidden_states"])), with_kwargs=True
    )
    draw(step, oms_prompt="a photo of a blue coat")
    draw(step, oms_prompt="a photo of a blue coat", oms_guidance_scale=2.0)
    draw(step, "a photo of a blue coat")
    handle.remove()
    assert [count for count, _ in told] == [1, 2, 1]
    assert torch.equal(told[0][1], told[2][1]) and torch.equal(told[1][1][1:], told[0][1])
    assert torch.allclose(
        step.predict(torch.ones(1, 4, 8, 8), ["a photo of a red bag"], 1.0),
        step.predict(torch.ones(1, 4, 8, 8), ["a photo of a red bag"], 1.0 + 1e-12), atol=1e-5,
    )  # fmt: skip


def test_several_pictures_and_prompts(step):
    assert len(draw(step, ["a photo of a red bag", "a photo of a blue coat"], num_images_per_prompt=2)) == 4
    pair = draw(step, ["a photo of a red bag"] * 2, oms_prompt=["a photo of a bag", "a photo of a coat"])
    assert len(pair) == 2


def test_the_time_is_without_effect(step):
    noise, told = torch.randn(1, 4, 8, 8), torch.randn(1, 5, step.unet.config.cross_attention_dim)
    outs = [step.unet(noise, t, encoder_hidden_states=told).sample for t in (0, 500, 999)]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


# ---------------------------------------------------------------- folders


def test_a_step_is_saved_without_the_pipeline_that_draws(step, atelier, tmp_path):
    step.save_pretrained(tmp_path)
    assert not (tmp_path / "base").exists()
    again = OneMoreStepPipeline.from_pretrained(tmp_path, base=atelier)
    assert np.allclose(draw(again), draw(step), atol=1e-5)


def published(step, folder, lose=None, add=None):
    """The layout of the authors' repositories: a network without any time, and where the text encoder is."""
    weights = {
        name: value.contiguous() for name, value in step.unet.state_dict().items()
        if not name.startswith("time_embedding.") and ".time_emb_proj." not in name and name != lose
    }  # fmt: skip
    (folder / "oms_module").mkdir(parents=True)
    save_file({**weights, **(add or {})}, folder / "oms_module" / "diffusion_pytorch_model.safetensors")
    config = {**step.unet.config, "_class_name": "UNet2DConditionWoCTModel"}
    (folder / "oms_module" / "config.json").write_text(json.dumps(config))
    for part in ("text_encoder", "tokenizer"):
        (folder / f"oms_{part}").mkdir()
        place = {"_name_or_path": str(folder / "elsewhere"), "subfolder": part}
        (folder / f"oms_{part}" / "config.json").write_text(json.dumps(place))
    step.base.text_encoder.save_pretrained(folder / "elsewhere" / "text_encoder")
    step.base.tokenizer.save_pretrained(folder / "elsewhere" / "tokenizer")
    return folder


def test_the_published_layout_is_loaded(step, atelier, tmp_path):
    again = OneMoreStepPipeline.from_pretrained(published(step, tmp_path / "oms"), base=atelier)
    assert again.text_encoder is not atelier.text_encoder
    assert np.allclose(draw(again), draw(step), atol=1e-5)


def test_a_published_network_that_is_damaged_is_refused(step, tmp_path):
    lost = published(step, tmp_path / "lost", lose="conv_in.weight") / "oms_module"
    more = published(step, tmp_path / "more", add={"conv_new.weight": torch.zeros(1)}) / "oms_module"
    for folder, name in ((lost, "conv_in.weight"), (more, "conv_new.weight")):
        with pytest.raises(ValueError, match=f"does not fit its config.json: {name}"):
            load_timeless_unet(folder)
    with pytest.raises(FileNotFoundError, match="fp16"):
        load_timeless_unet(lost, variant="fp16")


# ---------------------------------------------------------------- what is left out or refused


ZERO_SIGNAL = ["DDIM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep"]


@pytest.mark.parametrize("kind", ZERO_SIGNAL)
def test_a_schedule_without_signal_needs_no_step(step, atelier, kind, caplog, monkeypatch):
    """Those in units of sigma can't have 0, and have 2^-24."""
    scheduler = getattr(diffusers, f"{kind}Scheduler").from_config(
        atelier.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing",
        prediction_type="v_prediction",
    )  # fmt: skip
    monkeypatch.setattr(atelier, "scheduler", scheduler)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(draw(step), draw(atelier))
    assert "nothing to mend" in caplog.text


@pytest.mark.parametrize("kind", ["DDPM", "EulerDiscrete", "DPMSolverMultistep"])
def test_times_of_ones_own_are_heeded(step, atelier, kind, monkeypatch):
    alphas = []
    monkeypatch.setattr(
        "sfumato.pipelines.pipeline_one_more_step.initial_sample",
        lambda velocity, noise, alpha, **_: alphas.append(alpha) or noise,
    )
    made = getattr(diffusers, f"{kind}Scheduler").from_config(atelier.scheduler.config, timestep_spacing="leading")
    monkeypatch.setattr(atelier, "scheduler", made)
    draw(step, timesteps=[950, 600, 200])
    assert alphas == [pytest.approx(float(made.alphas_cumprod[950]), rel=1e-4)]


def test_embedded_prompts_go_with_a_prompt_of_the_step(step, atelier):
    told, _ = atelier.encode_prompt("a photo of a red bag", "cpu", 1, False)
    call = {"guidance_scale": 1.0, "oms_prompt": "a photo of a bag"}
    assert np.allclose(draw(step, None, prompt_embeds=told, **call), draw(step, **call), atol=1e-5)


def test_what_makes_no_sense_is_refused(step, atelier, monkeypatch):
    with pytest.raises(ValueError, match="load the step with `base`"):
        OneMoreStepPipeline(step.unet, step.text_encoder, step.tokenizer)("a bag")
    with pytest.raises(ValueError, match="drop `latents`"):
        draw(step, latents=torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match="one for each of 2 prompts, got 3"):
        draw(step, ["a bag", "a coat"], oms_prompt=["a"] * 3)
    monkeypatch.setattr(atelier, "scheduler", diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="flow, which starts from pure noise"):
        draw(step)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
            "set up for a flow",
        ),
        (diffusers.EDMEulerScheduler(), "no schedule of betas"),
        (sfumato.MinorityGuidanceScheduler(guidance_scale=0.0, boost=2.0), "of the deviation 2,"),
    ],
)
def test_schedulers_that_it_can_not_begin_for_are_refused(step, atelier, scheduler, message, monkeypatch):
    monkeypatch.setattr(atelier, "scheduler", scheduler)
    with pytest.raises(ValueError, match=message):
        draw(step)


def test_other_pipelines_and_no_prompts_are_refused(step):
    other = OneMoreStepPipeline(step.unet, step.text_encoder, step.tokenizer, base=sfumato.load("atelier-pixel"))
    with pytest.raises(ValueError, match="is for Stable Diffusion 1, 2 and XL, and `base` is a ClassCond"):
        other("a bag")
    for call in ({}, {"oms_prompt": "a bag"}, {"prompt_embeds": torch.zeros(1, 5, 8)}):
        with pytest.raises(ValueError, match="Pass `prompt`; or `prompt_embeds`, and `oms_prompt`"):
            draw(step, None, **call)
