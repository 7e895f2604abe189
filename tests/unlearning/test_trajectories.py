from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from sfumato.concepts import Concept
from sfumato.families import StableDiffusion
from sfumato.randomness import randn_for
from sfumato.trainer import TrainingConfig, make_accelerator
from sfumato.unlearning.examples import PromptTable
from sfumato.unlearning.task import ExampleConfig, Task
from sfumato.unlearning.trajectories import (
    TrainedTrajectories,
    TrajectoryConfig,
    Walker,
    find_trajectories,
    shuffled_states,
)

PROMPTS = ("a sneaker", "a red sneaker", "a bag")
KEYS = [(0, 9, k) for k in range(3)]
CONFIG = TrajectoryConfig(trajectory_steps=5, trajectory_batch_size=2)


def walker_of(family, config=CONFIG, source=None):
    return Walker(
        family,
        PromptTable(family, [*PROMPTS, "", "a shoe"]),
        config,
        make_accelerator(TrainingConfig()),
        source and dict.fromkeys(PROMPTS, source),
    )


def task_of(family, folder=None, seed=0):
    concept, training = Concept("sneaker", PROMPTS[:2], PROMPTS[1:], ("a coat",)), TrainingConfig(seed=seed)
    return Task(family, concept, family.denoiser, ExampleConfig(), training, {}, make_accelerator(training), folder)


def evaluations(module, action):
    counted = []
    hook = module.register_forward_pre_hook(lambda _, args: counted.append(len(args[0])))
    action()
    hook.remove()
    return sum(counted)


@pytest.fixture
def bank(family):
    return walker_of(family).walk(family.denoiser, PROMPTS, KEYS, teach=True)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_states_are_those_of_the_stock_pipeline_with_guidance(tiny_pipe, prediction_type):
    tiny_pipe.scheduler = DDIMScheduler.from_config(tiny_pipe.scheduler.config, prediction_type=prediction_type)
    family = StableDiffusion(tiny_pipe)
    bank = walker_of(family).walk(family.denoiser, PROMPTS, KEYS, teach=True)
    visited = []
    tiny_pipe(
        list(PROMPTS), latents=randn_for([(*key, 0) for key in KEYS], (4, 4, 4)), guidance_scale=3.0,
        num_inference_steps=5, output_type="latent",
        callback_on_step_end=lambda pipe, step, time, kept: visited.append((time, kept["latents"])) or kept,
    )  # fmt: skip
    assert bank.timesteps.tolist() == [[int(time) for time, _ in visited]] * 3
    for level in range(1, 5):
        assert torch.allclose(bank.latents[:, level], visited[level - 1][1], atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_states_come_with_what_the_original_predicts(tiny_pipe, prediction_type):
    tiny_pipe.scheduler = DDIMScheduler.from_config(tiny_pipe.scheduler.config, prediction_type=prediction_type)
    family = StableDiffusion(tiny_pipe)
    bank = walker_of(family).walk(family.denoiser, PROMPTS, KEYS, teach=True)
    states = bank.at(np.array([2, 0]), np.array([1, 3]), ("empty", "prompt"))
    assert states.prompts == ["a bag", "a sneaker"]
    for name, prompts in (("empty", ["", ""]), ("prompt", states.prompts)):
        embeddings = tiny_pipe.encode_prompt(prompts, "cpu", 1, False)[0]
        raw = tiny_pipe.unet(states.latents, states.timesteps, embeddings).sample.detach()
        assert torch.allclose(states.said[name], raw, atol=1e-5)


def test_clean_latents_and_noise_make_the_state_again(tiny_pipe):
    latents, raw, times = torch.randn(3, 4, 4, 4), torch.randn(3, 4, 4, 4), torch.tensor([0, 400, 999])
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        tiny_pipe.scheduler = DDIMScheduler.from_config(tiny_pipe.scheduler.config, prediction_type=prediction_type)
        family = StableDiffusion(tiny_pipe)
        clean, noise = family.split(raw, latents, times)
        assert torch.allclose(family.add_noise(clean, noise, times), latents, atol=1e-4)
        assert torch.allclose(family.target(clean, noise, times), raw, atol=1e-3)


def test_trajectory_does_not_depend_on_its_batch(family, bank):
    alone = walker_of(family).walk(family.denoiser, PROMPTS[2:], KEYS[2:], teach=True)
    assert torch.allclose(alone.latents[0], bank.latents[2], atol=1e-5)
    assert torch.allclose(alone.said["prompt"][0], bank.said["prompt"][2], atol=1e-5)


def test_source_prompt_is_asked_about_at_the_same_states(family, bank):
    with_source = walker_of(family, source="a shoe").walk(family.denoiser, PROMPTS, KEYS, teach=True)
    assert torch.allclose(with_source.latents, bank.latents, atol=1e-5)
    state = with_source.at(np.array([1]), np.array([2]), ("source",))
    raw = family.pipe.unet(state.latents, state.timesteps, family.pipe.encode_prompt("a shoe", "cpu", 1, False)[0])
    assert torch.allclose(state.said["source"], raw.sample, atol=1e-5)


def test_legacy_mismatch_pairs_a_state_with_a_time_two_levels_noisier(family):
    config = replace(CONFIG, legacy_level_mismatch=True)
    bank = walker_of(family, config).walk(family.denoiser, PROMPTS, KEYS, teach=True)
    segments = torch.arange(4, -1, -1) * 200
    assert ((bank.timesteps >= segments) & (bank.timesteps < segments + 200)).all()
    scheduler = DDIMScheduler.from_config(family.pipe.scheduler.config, set_alpha_to_one=False)
    scheduler.set_timesteps(5)
    latents = randn_for([(*key, 0) for key in KEYS], (4, 4, 4))
    embeddings = [family.pipe.encode_prompt(texts, "cpu", 1, False)[0] for texts in ([""] * 3, list(PROMPTS))]
    after = {}
    for time in scheduler.timesteps[1:]:  # the noisiest level is left out
        with torch.no_grad():
            empty, prompt = (family.pipe.unet(latents, time, text).sample for text in embeddings)
        latents = scheduler.step(empty + 3 * (prompt - empty), time, latents).prev_sample
        after[int(time)] = latents
    # segment j = 4 .. 0 has the state of level j - 2: 401, 201, 1, and the end of the run twice
    for level, time in enumerate((601, 401, 201, 1, 1)):
        assert torch.allclose(bank.latents[:, level], after[time], atol=1e-4)
    said = family.pipe.unet(bank.latents[:, 1], bank.timesteps[:, 1], embeddings[1]).sample
    assert torch.allclose(bank.said["prompt"][:, 1], said, atol=1e-5)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("source", [None, "a shoe"])
def test_evaluations_are_counted_as_they_happen(family, legacy, source):
    walker = walker_of(family, replace(CONFIG, legacy_level_mismatch=legacy), source)
    counted = evaluations(family.denoiser, lambda: walker.walk(family.denoiser, PROMPTS, KEYS, teach=True))
    assert counted == 3 * walker.evaluations


def test_passes_over_the_states_meet_each_once(bank):
    rows, levels = shuffled_states(bank, 3, 0, 15)
    assert sorted(zip(rows, levels, strict=True)) == [(row, level) for row in range(3) for level in range(5)]


def test_resumed_run_reads_the_bank_it_left_and_another_run_does_not(family, tmp_path):
    walker = walker_of(family)
    first = find_trajectories(task_of(family, tmp_path), walker, PROMPTS, "bank", 1)
    found = []
    again = evaluations(
        family.denoiser, lambda: found.append(find_trajectories(task_of(family, tmp_path), walker, PROMPTS, "bank", 1))
    )
    assert again == 0
    assert torch.equal(found[0].latents, first.latents) and torch.equal(found[0].timesteps, first.timesteps)
    assert all(torch.equal(found[0].said[name], first.said[name]) for name in ("empty", "prompt"))
    other = find_trajectories(task_of(family, tmp_path, seed=1), walker, PROMPTS, "bank", 1)
    assert not torch.equal(other.latents, first.latents)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_bank_of_another_model_is_walked_anew(family, tmp_path, part):
    walker = walker_of(family)
    find_trajectories(task_of(family, tmp_path), walker, PROMPTS, "bank", 1)
    with torch.no_grad():
        next(getattr(family.pipe, part).parameters()).add_(0.1)
    assert evaluations(
        family.denoiser, lambda: find_trajectories(task_of(family, tmp_path), walker, PROMPTS, "bank", 1)
    )


def test_damaged_bank_is_walked_anew(family, tmp_path):
    walker = walker_of(family)
    first = find_trajectories(task_of(family, tmp_path), walker, PROMPTS, "bank", 1)
    file = tmp_path / "examples" / "bank.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    assert torch.equal(find_trajectories(task_of(family, tmp_path), walker, PROMPTS, "bank", 1).latents, first.latents)


def test_trained_model_walks_the_rows_asked_for_and_the_original_is_asked_about_them(family, bank):
    walker, trained = walker_of(family), type(family.denoiser).from_config(family.denoiser.config).eval()
    live = TrainedTrajectories(walker, trained, replace(bank, latents=bank.latents.clone()))
    live.refresh(np.array([2, 0, 2]), (0, 5, 1))
    after = live.state()["latents"]
    assert torch.equal(after[1], bank.latents[1])
    expected = walker.walk(trained, ["a sneaker", "a bag"], [(0, 5, 1, 0), (0, 5, 1, 2)], teach=False)
    assert torch.equal(after[[0, 2]], expected.latents)
    states = live.at(np.array([0, 1]), np.array([4, 2]), ("prompt",))
    asked = family.pipe.encode_prompt(states.prompts, "cpu", 1, False)[0]
    assert torch.equal(states.said["prompt"], family.pipe.unet(states.latents, states.timesteps, asked).sample)


def test_half_precision_model_walks_in_float32_states(family):
    family.pipe.to(torch.bfloat16)
    bank = walker_of(family).walk(family.denoiser, PROMPTS, KEYS, teach=True)
    assert bank.latents.dtype == bank.said["empty"].dtype == torch.float32


def test_memory_is_what_is_stated(bank):
    assert bank.megabytes == pytest.approx((12 * 3 * 5 * 64 + 8 * 3 * 5) / 1e6)


def test_model_that_walks_to_nan_is_refused(family):
    with torch.no_grad():
        family.denoiser.conv_in.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite latents"):
        walker_of(family).walk(family.denoiser, PROMPTS, KEYS, teach=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trajectories_per_prompt": 0}, "`trajectories_per_prompt` must be at least 1, got 0"),
        ({"trajectory_batch_size": 0}, "`trajectory_batch_size` must be at least 1"),
        ({"refresh_every": 0}, "`refresh_every` must be at least 1"),
        ({"trajectory_steps": 1}, r"`trajectory_steps` must lie in \[2, 1000\], got 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrajectoryConfig(**settings)
