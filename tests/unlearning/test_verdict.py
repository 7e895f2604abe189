"""What is said at the end of a run: of a model that did not change, of one that forgot, of one without a judge."""

import copy
import json

import pytest
import torch

import sfumato
from sfumato import concepts
from sfumato.families import StableDiffusion
from sfumato.unlearning import run, verdict

SMALL = {"forget_examples": 4, "retain_examples": 4, "example_steps": 2, "batch_size": 2, "steps": 3}


@pytest.fixture(scope="module")
def atelier():
    pipe = sfumato.load("atelier")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(verdict, "STEPS", 4)
    monkeypatch.setattr(verdict, "RETAINED", 9)


def test_a_model_that_did_not_change_still_shows_the_concept(atelier, few):
    concept = concepts.resolve(atelier, "sneaker")
    found = verdict.pronounce(atelier, atelier, concept, 0)
    assert found.moved == found.drifted == 0
    assert found.gone == 1 - found.shown_before and found.gone < 0.2
    assert all(before == after for before, after in found.neighbours.values()) and len(found.neighbours) == 9
    assert "'sneaker' is NOT gone" in found.sentence("sneaker")


def test_a_model_that_draws_something_else_has_forgotten(atelier, few):
    """The text encoder is told "bag" wherever it reads "sneaker"."""
    encoder = copy.deepcopy(atelier.text_encoder)
    ids = [atelier.tokenizer(word, add_special_tokens=False).input_ids for word in ("sneaker", "bag")]
    assert all(len(one) == 1 for one in ids)
    table = encoder.get_input_embeddings().weight
    table.data[ids[0]] = table.data[ids[1]]
    result = StableDiffusion(atelier).with_parts({"text_encoder": encoder})
    concept = concepts.resolve(atelier, "sneaker", anchor="bag")
    found = verdict.pronounce(atelier, result, concept, 0)
    assert found.moved == pytest.approx(1, abs=1e-3) and found.drifted == 0
    assert found.gone == 1 and found.shown_before > 0.8
    assert all(before == after for before, after in found.neighbours.values())
    assert "'sneaker' is gone: 100 %" in found.sentence("sneaker")


def test_several_concepts_are_judged_together(atelier, few):
    concept = concepts.resolve(atelier, ["sneaker", "boot"], anchor="bag")
    found = verdict.pronounce(atelier, atelier, concept, 0)
    assert len(found.neighbours) == 8 and "sneaker" not in found.neighbours


def test_the_verdict_is_in_the_manifest_and_on_the_screen(tiny_pipe, tmp_path, capsys):
    sfumato.unlearn(tiny_pipe, "a sneaker", output_dir=tmp_path, learning_rate=1e-2, **SMALL)
    stored = json.loads((tmp_path / "manifest.json").read_text())["verdict"]
    assert stored["moved"] > 0 and stored["drifted"] > 0 and stored["gone"] is None
    said = capsys.readouterr().err
    assert f"moved by {stored['moved']:.2f}" in said and "There is no judge that knows" in said


def test_a_run_may_do_without(tiny_pipe, tmp_path):
    sfumato.unlearn(tiny_pipe, "a sneaker", output_dir=tmp_path, verify=False, **SMALL)
    assert "verdict" not in json.loads((tmp_path / "manifest.json").read_text())


def test_a_concept_that_the_model_does_not_react_to_is_refused(tiny_pipe, tmp_path):
    for name, parameter in tiny_pipe.unet.named_parameters():
        if "attn2.to_v" in name or "attn2.to_out" in name:
            torch.nn.init.zeros_(parameter)
    with pytest.raises(ValueError, match="the same with and without 'a sneaker'"):
        sfumato.unlearn(tiny_pipe, "a sneaker", output_dir=tmp_path, **SMALL)
    assert not (tmp_path / "model_index.json").exists()


def test_a_check_that_fails_does_not_cost_the_result(tiny_pipe, tmp_path, capsys, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(run, "pronounce", fail)
    sfumato.unlearn(tiny_pipe, "sneaker", "uce", output_dir=tmp_path)
    assert "could not be checked (RuntimeError: out of memory)" in capsys.readouterr().err
    assert "verdict" not in json.loads((tmp_path / "manifest.json").read_text())


def test_every_phrase_must_be_known(tiny_pipe):
    """The word has the embedding of padding, so that asking for it is asking for nothing."""
    tokens = tiny_pipe.tokenizer("bag", add_special_tokens=False).input_ids
    table = tiny_pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[tokens] = table[tiny_pipe.tokenizer.eos_token_id].clone()
    for method, forget in ("uce", "bag"), ("uce", ["sneaker", "bag"]), ("esd", ["sneaker", "bag"]):
        with pytest.raises(ValueError, match="the same with and without 'bag'"):
            sfumato.unlearn(tiny_pipe, forget, method)
