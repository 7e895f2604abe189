import pytest
import torch

from sfumato.attacks.attack import Answer
from sfumato.attacks.simplex import project_to_simplex
from sfumato.attacks.unlearndiffatk import (
    NOISE_STREAM,
    TOKEN_STREAM,
    UnlearnDiffAtkConfig,
    attack,
    attacked_times,
)
from sfumato.randomness import generator_for

PROMPTS = ("a red sneaker", "sketch of a green sneaker")
SHORT = UnlearnDiffAtkConfig(tokens=2, times=3, iterations=4, learning_rate=0.05)


def rounds(batch, config, shown=lambda round_: [False] * len(round_.rows)):
    talk, found = attack(batch, config), []
    with torch.no_grad():
        try:
            asked = next(talk)
            while True:
                found.append(asked)
                asked = talk.send(Answer(tuple(shown(asked)), torch.zeros(len(asked.rows), 3, 32, 32)))
        except StopIteration:
            return found


def straightforward(batch, config, row):
    """One prompt at a time, with the equations as they stand; the words of each round."""
    victim = batch.setting.victim
    encoder, tokenizer, table = victim.pipe.text_encoder, victim.pipe.tokenizer, victim.token_table
    own = tokenizer(batch.prompts[row]).input_ids[1:-1]
    alphas = victim.pipe.scheduler.alphas_cumprod
    u = torch.full((config.tokens, len(table)), 1 / len(table), requires_grad=True)
    adam = torch.optim.Adam([u], lr=config.learning_rate, weight_decay=config.weight_decay)
    x0, spelled, taken = batch.latents[row], [], 0
    for time in attacked_times(1000, config.times):
        for _ in range(config.iterations):
            r = torch.rand(config.tokens, generator=generator_for(0, TOKEN_STREAM, batch.numbers[row], taken))
            noise = torch.randn(x0.shape, generator=generator_for(0, NOISE_STREAM, batch.numbers[row], taken))
            ids = [int((u[k].detach().cumsum(0) > r[k]).float().argmax()) for k in range(config.tokens)]
            hot = torch.nn.functional.one_hot(torch.tensor(ids), len(table)).float().requires_grad_()
            with torch.enable_grad():
                sequence = torch.cat([table[[tokenizer.bos_token_id]], hot @ table, table[own]])
                rest = tokenizer.model_max_length - len(sequence)
                sequence = torch.cat([sequence, table[[tokenizer.eos_token_id] * rest]])
                hook = encoder.get_input_embeddings().register_forward_hook(lambda *_, s=sequence: s[None])
                ids = torch.zeros(1, len(sequence), dtype=torch.long)
                ids[0, len(own) + config.tokens + 1 :] = tokenizer.eos_token_id
                told = encoder(ids)[0]
                hook.remove()
                noisy = alphas[time].sqrt() * x0 + (1 - alphas[time]).sqrt() * noise
                loss = (victim.denoiser(noisy[None], torch.tensor([time]), told).sample - noise).square().mean()
                u.grad = torch.autograd.grad(loss, hot)[0].clamp(-1, 1)
            adam.step()
            u.data = project_to_simplex(u.data)
            taken += 1
        words = [*u.argmax(1).tolist(), *own]
        spelled.append(tokenizer.decode(words, skip_special_tokens=True).strip())
    return spelled


def test_times_are_those_of_the_released_program():
    assert attacked_times(1000, 50) == list(range(10, 1000, 20))


def test_attack_is_the_equations_for_each_prompt_whatever_the_batch(batch_of):
    batch = batch_of(*PROMPTS)
    found = rounds(batch, SHORT)
    assert [one.iterations for one in found] == [4, 8, 12] and all(one.final for one in found)
    for row in range(2):
        assert [one.prompts[row] for one in found] == straightforward(batch, SHORT, row)
    alone = batch_of(PROMPTS[1], numbers=(1,))
    assert [one.prompts[0] for one in rounds(alone, SHORT)] == [one.prompts[1] for one in found]
    assert len({one.prompts for one in found}) > 1  # it moves


def test_prompts_that_succeed_are_left_alone(batch_of):
    found = rounds(batch_of(*PROMPTS), SHORT, lambda asked: [row == 0 for row in asked.rows])
    assert [one.rows for one in found] == [(0, 1), (1,), (1,)]
    others = rounds(batch_of(*PROMPTS), SHORT)
    assert [one.prompts[-1] for one in found] == [one.prompts[1] for one in others]
    assert len(rounds(batch_of(*PROMPTS), SHORT, lambda asked: [True] * len(asked.rows))) == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"tokens": 0}, "`tokens` must be at least 1"), ({"learning_rate": 0.0}, "`learning_rate` must be positive"),
     ({"place": "behind"}, "`place` must be one of prefix, suffix, middle, insert, per_words, replace")],
)  # fmt: skip
def test_settings_without_sense_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        UnlearnDiffAtkConfig(**setting)
