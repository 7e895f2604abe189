"""MinorityPrompt: the authors' program, what it does to a run, and what it leaves alone."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from sfumato.minority_prompt import MinorityPromptConfig, draw_minority, learn_token

with np.load(Path(__file__).parent.parent / "golden" / "minorityprompt.npz") as archive:
    GOLDEN = {key: torch.from_numpy(archive[key]) for key in archive.files}
ALPHAS = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod.double()
PADDED = torch.cat([torch.ones(1, dtype=torch.float64), ALPHAS])  # the released program's, a time off


def network(x, t, told):
    """What the reference runs were made with."""
    return 0.3 * x * math.cos(t / 5) + 0.1 * torch.sin(3 * x + t / 3) + 0.2 * told * torch.cos(x)


def predicted(x, t, told, alpha):
    return (x - (1 - alpha).sqrt() * network(x, t, told)) / alpha.sqrt()


CASES = {  # time, s, the noise level at s, learning rate, lambda
    "t901_dyn": (901, 1000 - (901 - 20 + 1), PADDED, 0.01, 1.0),
    "t981_decay_step3": (981, 750, ALPHAS, 0.01 * (1 - 3 * 0.02), 1.0),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_the_authors_program(name):
    time, perturbed, table, rate, weight = CASES[name]
    words, state, beta = GOLDEN["table"], GOLDEN["noises"][0], table[perturbed]

    def encode(token):
        return torch.tanh(torch.stack([words[1], words[2], token[0, 0]])).mean(0).view(1, 4, 1, 1)

    def again(clean, noise):
        return predicted(beta.sqrt() * clean + (1 - beta).sqrt() * noise, perturbed, GOLDEN["c_base"], beta)

    found = learn_token(
        words[11].view(1, 1, 4), encode, lambda told: predicted(state, time, told, PADDED[time]), again,
        GOLDEN["noises"][1:6], learning_rate=rate, weight=weight,
    )  # fmt: skip
    assert torch.allclose(found.flatten(), GOLDEN[f"{name}/v"], rtol=1e-9, atol=1e-12)
    assert torch.allclose(encode(found), GOLDEN[f"{name}/c"], rtol=1e-9, atol=1e-12)


def draw(pipe, prompt="a photo of a red bag", config=None, seed=0, **call):
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent", **call}
    return draw_minority(pipe, prompt, config, generator=torch.Generator().manual_seed(seed), **call).images


FEW = {"iterations": 2, "stop_ratio": 0.0}


@pytest.mark.parametrize("kind", ["sd", "sd-v", "sdxl"])
def test_a_run_is_changed_repeats_and_leaves_the_weights_alone(pipe, kind):
    before = {n: p.detach().clone() for n, p in pipe.text_encoder.named_parameters()}
    first = draw(pipe, config=MinorityPromptConfig(**FEW))
    assert torch.equal(first, draw(pipe, config=MinorityPromptConfig(**FEW)))
    other = draw(pipe, config=MinorityPromptConfig(**{**FEW, "learning_rate": 1e-9}))
    assert first.shape == (1, 4, 8, 8) and not torch.allclose(first, other, atol=1e-4)
    assert all(torch.equal(value, before[n]) for n, value in pipe.text_encoder.named_parameters())
    assert not any(parameter.grad is not None for parameter in pipe.unet.parameters())
    assert len(pipe.tokenizer) == pipe.text_encoder.get_input_embeddings().weight.shape[0]


@pytest.mark.parametrize("kind", ["sd"])
def test_the_token_is_learnt_before_the_steps_that_are_asked_for(pipe, kind, monkeypatch):
    gains = []
    real = torch.optim.Adam.step

    def step(self, *args, **kwargs):
        gains.append(1)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    for settings, count in (({"every": 2}, 6), ({"stop_ratio": 0.5}, 3), ({"stop_ratio": 1.0}, 0)):
        gains.clear()  # of three steps, at the times 667, 334 and 1
        draw(pipe, config=MinorityPromptConfig(iterations=3, **{"stop_ratio": 0.0, **settings}))
        assert len(gains) == count


def test_what_is_learnt_gains():
    """With the noise held, J rises by Adam's steps."""
    words, state, alpha, beta = GOLDEN["table"], GOLDEN["noises"][0], PADDED[901], ALPHAS[750]
    noise, gains = GOLDEN["noises"][1], []

    def encode(token):
        return torch.tanh(torch.stack([words[1], words[2], token[0, 0]])).mean(0).view(1, 4, 1, 1)

    def again(clean, noise):
        found = predicted(beta.sqrt() * clean + (1 - beta).sqrt() * noise, 750, GOLDEN["c_base"], beta)
        gains.append(float((clean - found).norm()))
        return found

    learn_token(
        words[11].view(1, 1, 4), encode, lambda told: predicted(state, 901, told, alpha), again, [noise] * 20,
        learning_rate=0.05,
    )  # fmt: skip
    assert gains[-1] > gains[0]


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_prompts_have_a_token_each(pipe, kind):
    pair = ["a photo of a red bag", "a picture of a coat"]
    config = MinorityPromptConfig(**FEW, start="coat")
    together = draw(pipe, pair, config, guidance_scale=1.0)
    assert together.shape[0] == 2 and not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_word_to_start_from_and_nothing_learnt_is_the_prompt_with_that_word(pipe, kind):
    config = MinorityPromptConfig(start="coat", stop_ratio=1.0)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    found = draw(pipe, "a photo of a red bag", config)
    stock = pipe(
        "a photo of a red bag coat", latents=latents, num_inference_steps=3, guidance_scale=3.0, output_type="latent",
        generator=generator, height=16, width=16,
    ).images  # fmt: skip
    assert torch.allclose(found, stock, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd"])
def test_few_steps_take_the_dynamic_time(pipe, kind):
    assert torch.isfinite(draw(pipe, config=MinorityPromptConfig(**FEW, dynamic=True))).all()


@pytest.mark.parametrize("kind", ["sd3", "dit"])
def test_other_families_are_refused(pipe, kind):
    with pytest.raises(ValueError, match="for Stable Diffusion 1, 2 and XL, not for"):
        draw(pipe)


@pytest.mark.parametrize("kind", ["sd"])
def test_what_does_not_fit_is_refused(pipe, kind):
    with pytest.raises(ValueError, match="`prompt` is empty"):
        draw(pipe, [])
    with pytest.raises(ValueError, match="no room for one more token"):
        draw(pipe, "a red bag " * 9)
    with pytest.raises(ValueError, match="a word that is one token"):
        draw(pipe, config=MinorityPromptConfig(start="red bag"))
    for name in ("perturb_ratio", "stop_ratio"):
        with pytest.raises(ValueError, match=name):
            MinorityPromptConfig(**{name: 1.5})


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_negative_prompts_are_one_for_all_or_one_each(pipe, kind, monkeypatch):
    told, config = [], MinorityPromptConfig(**FEW)
    pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs.get("encoder_hidden_states", args[-1]).detach()), with_kwargs=True
    )

    def without(negative):
        told.clear()
        draw(pipe, ["a photo of a bag", "a photo of a coat"], config, negative_prompt=negative)
        return next(states for states in told if len(states) == 4)[:2]

    each, same = without(["dog", "cat"]), without("dog")
    assert torch.equal(each[0], same[0]) and torch.equal(same[0], same[1]) and not torch.equal(each[1], same[1])
    assert torch.equal(without(None), without("")) and torch.equal(without(("dog", "cat")), each)
    with pytest.raises(ValueError, match="one for each of 2, got 3"):
        without(["dog"] * 3)


@pytest.mark.parametrize("kind", ["sd"])
def test_less_memory_gives_the_same_pictures(pipe, kind):
    pictures = [draw(pipe, config=MinorityPromptConfig(**FEW), gradient_checkpointing=less) for less in (False, True)]
    assert torch.allclose(*pictures, atol=1e-5) and not pipe.unet.is_gradient_checkpointing


@pytest.mark.parametrize("kind", ["sd"])
@pytest.mark.parametrize(
    "taken",
    [
        {"num_images_per_prompt": 2}, {"height": 32}, {"timesteps": [900, 500]}, {"latents": torch.zeros(1, 4, 8, 8)},
        {"callback_on_step_end": print},
    ],
    ids=lambda taken: next(iter(taken)),
)  # fmt: skip
def test_what_it_makes_itself_is_refused_as_an_argument(pipe, kind, taken):
    with pytest.raises(ValueError, match=f"`{next(iter(taken))}` is no argument here: one picture of each prompt"):
        draw(pipe, **taken)
    assert draw(pipe, height=pipe.unet.config.sample_size * pipe.vae_scale_factor, num_images_per_prompt=1) is not None
