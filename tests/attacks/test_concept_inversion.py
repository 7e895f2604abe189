import torch

from sfumato.attacks.concept_inversion import ConceptInversionConfig, attack, learn_word
from sfumato.families import family_of

SHORT = ConceptInversionConfig(pictures=8, steps=60, batch=8, learning_rate=0.02, start="picture")


def test_a_learnt_word_brings_back_what_was_only_renamed(atelier, unlearned, batch_of):
    """The predictions for a prompt come nearer to what the original says of it."""
    prompt = "a red sneaker as a photo"
    batch = batch_of(prompt)
    told = next(attack(batch, SHORT)).conditioning
    victim, source = family_of(unlearned), family_of(atelier)
    noise = torch.randn(8, *victim.latent_shape, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(300, 900, 8).long()
    noisy = victim.add_noise(batch.latents.expand(8, -1, -1, -1), noise, times)
    with torch.no_grad():

        def said(family, conditioning):
            told = {name: values.expand(8, -1, -1) for name, values in conditioning.items()}
            return family.ask(family.denoiser, noisy, times, told)

        wanted = said(source, source.encode_prompts([prompt]))
        plain = (said(victim, victim.encode_prompts([prompt])) - wanted).square().mean()
        attacked = (said(victim, told) - wanted).square().mean()
    assert attacked < 0.7 * plain


def test_the_word_is_learnt_once_and_the_same_for_all(batch_of):
    quick = ConceptInversionConfig(pictures=2, steps=2, batch=2, start="picture")
    first, second = batch_of("a red sneaker"), batch_of("a blue sneaker", numbers=(1,))
    word = learn_word(first.setting, quick)
    shared = dict(first.setting.shared)
    first.setting.shared.clear()
    try:
        next(attack(first, quick))
        assert torch.equal(first.setting.shared["word"], word)
        made = first.setting.shared["word"]
        next(attack(second, quick))
        assert second.setting.shared["word"] is made
    finally:
        first.setting.shared.clear()
        first.setting.shared.update(shared)
