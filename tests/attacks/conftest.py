import pytest

import sfumato
from sfumato.attacks.attack import Batch, Setting
from sfumato.concepts import resolve
from sfumato.evaluation.judge import Judge
from sfumato.families import family_of
from sfumato.loading import assets_folder
from sfumato.randomness import generator_for


@pytest.fixture(scope="session")
def atelier():
    return sfumato.load("atelier")


@pytest.fixture(scope="session")
def unlearned(atelier):
    """UCE gives the word another meaning; the denoiser can draw a sneaker as before."""
    return sfumato.unlearn(atelier, "sneaker", "uce", verify=False)


@pytest.fixture(scope="session")
def batch_of(atelier, unlearned):
    """`batch_of(prompts)` gives a batch of them, whose numbers are their places."""
    judge = Judge.load(assets_folder() / "judge")
    victim, source = family_of(unlearned), family_of(atelier)
    setting = Setting(victim, source, resolve(atelier, "sneaker"), 0, 4, 3.0, judge.features)

    def make(*prompts, numbers=None):
        numbers = tuple(range(len(prompts))) if numbers is None else numbers
        drawn = source.generate(
            prompts, [generator_for(9, k) for k in numbers], num_inference_steps=4, guidance_scale=3.0
        )
        return Batch(setting, numbers, prompts, drawn.detach())

    return make
