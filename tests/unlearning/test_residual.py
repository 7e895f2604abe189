import pytest
import torch

from sfumato.families import StableDiffusion
from sfumato.randomness import generator_for, randn_for
from sfumato.unlearning.residual import DenoisingResidual

SMALL = {"pictures": 2, "times": 3, "num_inference_steps": 2}


@pytest.mark.parametrize("scale", [1, 1e-3])
def test_loss_is_the_equation(tiny_pipe, family, scale):
    """One prompt, one picture and one time, with the stock scheduler and the plain network."""
    measure = DenoisingResidual(
        tiny_pipe, ["a bag"], pictures=1, times=1, num_inference_steps=2, seed=5, legacy_scaled_noise=scale < 1
    )
    latents = tiny_pipe(
        "a bag", num_inference_steps=2, guidance_scale=7.5, generator=generator_for(5, 400, 0), output_type="latent"
    ).images
    noise, time = randn_for([(5, 401, 0, 0)], (4, 4, 4)), torch.tensor([500])
    noisy = tiny_pipe.scheduler.add_noise(latents, noise, time)
    with torch.no_grad():
        prediction = tiny_pipe.unet(noisy, time, tiny_pipe.encode_prompt(["a bag"], "cpu", 1, False)[0]).sample
    assert measure(tiny_pipe).item() == pytest.approx(float((prediction - scale * noise).square().mean()), rel=1e-5)


def test_as_released_every_picture_is_asked_for_by_the_first_prompt_of_its_batch_of_four(tiny_pipe):
    prompts = ["a bag", "a sneaker", "a coat"]
    plain, first = (
        DenoisingResidual(tiny_pipe, prompts, **SMALL, legacy_first_prompt=legacy)(tiny_pipe)
        for legacy in (False, True)
    )
    assert torch.allclose(plain[[0, 2]], first[[0, 2]]) and not torch.allclose(plain[1], first[1])


def test_loss_does_not_depend_on_the_batch_or_on_the_other_prompts(tiny_pipe):
    prompts = ["a bag", "a red coat", "sneaker"]
    whole = DenoisingResidual(tiny_pipe, prompts, **SMALL)(tiny_pipe)
    single = DenoisingResidual(tiny_pipe, prompts, batch_size=1, **SMALL)(tiny_pipe)
    fewer = DenoisingResidual(tiny_pipe, prompts[:2], **SMALL)(tiny_pipe)
    assert whole.shape == (3,) and torch.allclose(whole, single, rtol=1e-5)
    assert fewer.shape == (2,)


def test_velocity_is_compared_with_the_velocity(tiny_pipe_v):
    measure = DenoisingResidual(tiny_pipe_v, ["a bag"], pictures=1, times=1, num_inference_steps=2)
    family, time = StableDiffusion(tiny_pipe_v), torch.tensor([500])
    noise = measure.noise[0]
    noisy = tiny_pipe_v.scheduler.add_noise(measure.latents, noise, time)
    with torch.no_grad():
        prediction = tiny_pipe_v.unet(noisy, time, **family.encode_prompts(["a bag"])).sample
    wished = tiny_pipe_v.scheduler.get_velocity(measure.latents, noise, time)
    assert measure(tiny_pipe_v).item() == pytest.approx(float((prediction - wished).square().mean()), rel=1e-4)


def test_times_are_spread_over_the_schedule(tiny_pipe):
    assert DenoisingResidual(tiny_pipe, ["a bag"], times=4, pictures=1, num_inference_steps=1).timesteps == [
        125, 375, 624, 874
    ]  # fmt: skip


def test_measuring_leaves_the_model_as_it_was(tiny_pipe):
    before = {name: value.clone() for name, value in tiny_pipe.unet.state_dict().items()}
    measure = DenoisingResidual(tiny_pipe, ["a bag"], **SMALL)
    assert torch.equal(measure(tiny_pipe), measure(tiny_pipe))
    assert all(torch.equal(value, before[name]) for name, value in tiny_pipe.unet.state_dict().items())


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "no prompts to measure"),
        (["a bag"], {"pictures": 0}, "`pictures` must be at least 1, got 0"),
        (["a bag"], {"times": 0}, "`times` must be at least 1"),
    ],
)
def test_bad_input_gets_one_sentence(tiny_pipe, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        DenoisingResidual(tiny_pipe, prompts, **settings)
