"""What a family promises, of every family, against the stock pipelines."""

import copy
import inspect

import diffusers
import pytest
import torch

import sfumato
from sfumato.families import TextFamily, family_of
from sfumato.families.process import Flow
from sfumato.randomness import generator_for


@pytest.fixture
def family(pipe):
    return family_of(pipe)


def prompts_of(family):
    return ["a photo of a sneaker", "a red bag"] if isinstance(family, TextFamily) else family.names[:2]


def recorded(pipe, family, **call):
    """What the stock pipeline gives its denoiser in the first step of a call, and what it gets."""
    seen = []

    def record(module, args, kwargs, output):
        named = dict(zip(list(inspect.signature(module.forward).parameters), args, strict=False))
        seen.append(({**named, **kwargs}, output[0] if isinstance(output, tuple) else output.sample))

    hook = family.denoiser.register_forward_hook(record, with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe(**call, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    finally:
        hook.remove()
    return seen


def test_prediction_is_that_of_the_stock_pipeline(kind, pipe, family):
    """The same state, time and prompt, through the stock pipeline's call and through the family."""
    prompt = prompts_of(family)[0]
    text = isinstance(family, TextFamily)
    call = {"prompt": prompt, "output_type": "latent"} if text else {"class_labels": [0]}
    if kind == "pixart":
        call["use_resolution_binning"] = False
    if text:
        call |= {"height": family.image_size[0], "width": family.image_size[1]}
    guided = {"flux": {"true_cfg_scale": 1.0}, "flux-guided": {"guidance_scale": family_of(pipe).guidance}} if (
        kind.startswith("flux")) else {}  # fmt: skip
    given, stock = recorded(pipe, family, **call, **guided.get(kind, {"guidance_scale": 1.0}))[0]
    latents = given.get("sample", given.get("hidden_states"))
    time = torch.as_tensor(given["timestep"]).reshape(-1)[:1]
    if kind.startswith("flux"):
        latents, stock = family._grid(latents), family._grid(stock)
        time = time * 1000
    ours = family.predict(family.denoiser, latents, time, family.encode_prompts([prompt]))
    assert ours.shape == latents.shape
    assert torch.allclose(ours, stock[:, : latents.shape[1]], atol=1e-5)


def test_levels_are_those_of_the_scheduler(kind, pipe, family):
    times = family.inference_timesteps(4)
    assert times.shape == (4,) and (times.diff() < 0).all() and times.max() < family.num_train_timesteps
    latents, noise = torch.randn(4, *family.latent_shape), torch.randn(4, *family.latent_shape)
    noisy = family.add_noise(latents, noise, times)
    if family.flow:
        shift = {} if kind == "sd3" else {"mu": 0.5 + 0.65 * (16 - 256) / (4096 - 256)}
        pipe.scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], **shift)
        sigmas = pipe.scheduler.sigmas[:4].view(-1, 1, 1, 1)
        assert torch.allclose(noisy, (1 - sigmas) * latents + sigmas * noise, atol=1e-5)
        assert torch.allclose(family.process.model_times(times), pipe.scheduler.timesteps, atol=1e-2)
        assert torch.equal(family.target(latents, noise, times), noise - latents)
    else:
        alphas = pipe.scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
        assert torch.allclose(noisy, alphas.sqrt() * latents + (1 - alphas).sqrt() * noise, atol=1e-5)
    clean, again = family.split(family.target(latents, noise, times), noisy, times)
    assert torch.allclose(clean, latents, atol=1e-3) and torch.allclose(again, noise, atol=1e-3)


@pytest.mark.parametrize("name", ["BDIAScheduler", "BELMScheduler", "EDICTScheduler", "FixedPointScheduler"])
def test_a_sampler_of_ours_in_the_pipeline_leaves_the_process_as_it_is(name, pipe, family):
    swapped = copy.copy(pipe)
    swapped.register_modules(scheduler=getattr(sfumato, name).from_config(pipe.scheduler.config))
    process, times = family_of(swapped).process, torch.arange(family.process.levels)
    assert process.levels == family.process.levels and process.prediction_type == family.process.prediction_type
    for ours, stock in zip(process.scales(times), family.process.scales(times), strict=True):
        assert torch.allclose(ours, stock, atol=1e-6)
    assert torch.equal(process.inference_timesteps(5), family.process.inference_timesteps(5))


def test_pictures_go_to_latents_and_back(family):
    pictures = torch.rand(2, 3, *family.image_size)
    mean, std = family.encode_images(pictures)
    assert mean.shape == std.shape == (2, *family.latent_shape)
    shown = family.decode(mean)
    assert shown.shape == pictures.shape and shown.min() >= 0 and shown.max() <= 1


def test_picture_depends_on_its_prompt_and_seed_and_not_on_its_batch(family):
    def draw(prompts, numbers, **kwargs):
        generators = [generator_for(0, k) for k in numbers]
        return family.generate(prompts, generators, num_inference_steps=2, guidance_scale=3.0, **kwargs)

    prompts = prompts_of(family)
    both = draw(prompts, [0, 1], latents_only=True)
    assert both.shape == (2, *family.latent_shape)
    alone = draw(prompts[1:], [1], latents_only=True)
    assert torch.allclose(alone[0], both[1], atol=1e-4)
    assert not torch.allclose(draw(prompts[:1], [1], latents_only=True)[0], both[1], atol=1e-4)
    told = draw(["", ""], [0, 1], latents_only=True, conditioning=family.encode_prompts(prompts))
    assert torch.allclose(told, both, atol=1e-4)
    assert draw(prompts, [0, 1]).shape == (2, 3, *family.image_size)


def test_conditioning_has_a_row_for_each_prompt(family):
    prompts = prompts_of(family)
    together = family.encode_prompts([*prompts, ""])
    for name, values in together.items():
        assert len(values) == 3, name
        for k, prompt in enumerate([*prompts, ""]):
            alone = family.encode_prompts([prompt])[name][0]
            assert torch.allclose(values[k].float(), alone.float(), atol=1e-5), name


def test_a_part_is_replaced_and_all_others_are_shared(pipe, family):
    for name, part in family.parts.items():
        other = copy.deepcopy(part)
        made = family.with_parts({name: other})
        assert type(made) is type(pipe)
        changed = [key for key, value in made.components.items() if value is not pipe.components[key]]
        assert changed == ([family.denoiser_name] if name == "denoiser" else list(family.encoders))


def test_subsets_split_the_denoiser(family):
    everything = set(family.trainable_parameters("full"))
    for subset in family.subsets["denoiser"]:
        names = set(family.trainable_parameters(subset))
        assert names and names <= everything
    if "noxattn" in family.subsets["denoiser"]:
        parts = [set(family.trainable_parameters(subset)) for subset in ("xattn", "noxattn", "notime")]
        assert parts[0] | parts[1] == parts[2] and not parts[0] & parts[1]
        assert set(family.trainable_parameters("xattn-kv")) < parts[0]
    with pytest.raises(ValueError, match=f"subset 'half' of the denoiser of {family.label}"):
        family.trainable_parameters("half")


def test_the_layers_that_read_a_text_take_what_the_encoder_gives(family):
    if not isinstance(family, TextFamily):
        pytest.skip("reads no text")
    width = family.encode_prompts([""])["encoder_hidden_states"].shape[-1]
    parameters = dict(family.denoiser.named_parameters())
    matrices = [parameters[name] for name in family.trainable_parameters("text") if parameters[name].ndim == 2]
    assert matrices and all(matrix.shape[1] == width for matrix in matrices)


def test_a_prompts_tokens_stand_where_the_encoder_puts_them(family):
    """Another last word changes the states from its place on (everywhere, for T5, which looks both ways)."""
    if not isinstance(family, TextFamily):
        pytest.skip("reads no text")
    prompts = ["a red bag", "a red coat"]
    states = family.encode_prompts(prompts)["encoder_hidden_states"]
    for segment in family.segments(prompts):
        assert segment.end <= states.shape[1] and len(segment.tokens[0]) == len(segment.tokens[1])
        differ = [k for k, (x, y) in enumerate(zip(*segment.tokens, strict=True)) if x != y]
        place = segment.begin + segment.marks + differ[0]
        assert segment.last(0) >= place
        moved = (states[0] - states[1])[segment.begin : segment.end].norm(dim=1) > 1e-6
        assert moved[place - segment.begin]
        if segment.marks:  # CLIP looks back alone
            assert not moved[: place - segment.begin].any()


def test_a_prompt_is_cut_where_more_words_change_nothing(family):
    if not isinstance(family, TextFamily):
        assert not family.is_cut(family.names[0])
        return
    for prompt, cut in (("a red bag", False), ("a red bag " * 400, True)):
        one, more = (family.encode_prompts([words]) for words in (prompt, prompt + " sneaker"))
        assert family.is_cut(prompt) == cut
        assert all(torch.equal(one[name], more[name]) for name in one) == cut


def test_times_of_a_flow_are_those_of_flux_and_end_above_those_of_sd3():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    process = Flow(scheduler, tokens=1024)
    times = process.model_times(process.inference_timesteps(4))
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 4, 4).tolist())  # as FluxPipeline does
    assert torch.allclose(times, scheduler.timesteps) and times[-1] == pytest.approx(500)
    scheduler.set_timesteps(4)  # as StableDiffusion3Pipeline does
    assert scheduler.timesteps[-1] == pytest.approx(8.93, abs=0.01)
