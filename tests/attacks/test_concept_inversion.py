from dataclasses import replace

import pytest
import torch

from sfumato import storage
from sfumato.attacks import concept_inversion
from sfumato.attacks.attack import finite_gradient
from sfumato.attacks.concept_inversion import ConceptInversionConfig, attack, learn_word
from sfumato.attacks.methods import ATTACKS
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


def test_a_prompt_fits_if_it_does_once_the_word_stands_for_the_concept(batch_of):
    batch = batch_of("a red sneaker")
    room = batch.tokens.shape[1] - 2
    victim, words = batch.setting.victim, ["red"]
    while int(victim.tokenize([" ".join([*words, "red", "sneaker"])])[1]) < room:
        words.append("red")
    tokens, counts = victim.tokenize([" ".join([*words, "red", "sneaker"])])
    assert counts.tolist() == [room]
    ATTACKS["concept_inversion"].check(batch.setting, tokens, counts, SHORT)
    with pytest.raises(ValueError, match="shorten the prompt"):
        ATTACKS["concept_inversion"].check(batch.setting, *victim.tokenize(["red " * 60]), SHORT)


def test_a_word_that_was_cut_short_is_learnt_on_and_kept(batch_of, tmp_path, monkeypatch):
    config = ConceptInversionConfig(pictures=2, steps=5, batch=2, start="picture")
    setting = replace(batch_of("a red sneaker").setting, shared={})
    whole = learn_word(setting, config)
    kept = replace(setting, folder=tmp_path)
    monkeypatch.setattr(concept_inversion, "KEEP_EVERY", 2)
    taken = []

    def dying(*arguments):
        taken.append(arguments)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return finite_gradient(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(concept_inversion, "finite_gradient", dying)
        learn_word(kept, config)
    assert storage.read_metadata(tmp_path / "word.safetensors")["step"] == 2
    assert torch.equal(learn_word(kept, config), whole)
    assert torch.equal(storage.load_tensors(tmp_path / "word.safetensors")["word"], whole)
    with monkeypatch.context() as patch:
        patch.setattr(concept_inversion, "finite_gradient", None)  # nothing is left to learn
        assert torch.equal(learn_word(kept, config), whole)
    assert not torch.equal(learn_word(replace(kept, seed=1), config), whole)  # another word


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
