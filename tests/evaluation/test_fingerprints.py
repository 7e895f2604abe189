"""A fingerprint tells models apart by all that changes their pictures, and by nothing that does not."""

import json

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import sfumato
from sfumato.evaluation.fingerprints import model_fingerprint, scheduler_facts
from sfumato.evaluation.pictures import Request, draw_pictures


@pytest.fixture
def pipe():
    return sfumato.load("atelier")


@pytest.fixture(scope="module")
def before():
    return model_fingerprint(sfumato.load("atelier"))


class Weaker(AttnProcessor):
    """A processor that changes pictures."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.owner = factor, self  # as controllers of attention refer to themselves

    def __call__(self, *arguments, **options):
        return self.factor * super().__call__(*arguments, **options)


def test_the_scale_of_an_adapter_counts_and_so_does_whether_it_is_on(pipe, before):
    peft = pytest.importorskip("peft")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "a")
    found = [before]
    for scale in (1.0, 0.1):
        pipe.set_adapters(["a"], [scale])
        found.append(model_fingerprint(pipe))
        assert model_fingerprint(pipe) == found[-1]
    pipe.unet.disable_adapters()
    found.append(model_fingerprint(pipe))
    assert len(set(found)) == 4


def test_freeu_counts_until_it_is_off_again(pipe, before):
    found = [before]
    for scale in (1.6, 1.2):
        pipe.enable_freeu(s1=0.5, s2=0.1, b1=scale, b2=1.8)
        found.append(model_fingerprint(pipe))
    assert len(set(found)) == 3
    pipe.disable_freeu()
    assert model_fingerprint(pipe) == before


def test_attention_of_ones_own_counts_with_its_settings(pipe, before):
    found = [before]
    for factor in (0.5, 0.25):
        pipe.unet.set_attn_processor(Weaker(factor))
        found.append(model_fingerprint(pipe))
    assert len(set(found)) == 3


def test_kernels_of_attention_do_not_count(pipe, before):
    for processor in (AttnProcessor(), AttnProcessor2_0()):
        pipe.unet.set_attn_processor(processor)
        assert model_fingerprint(pipe) == before
    pipe.enable_attention_slicing(1)
    assert model_fingerprint(pipe) == before


@pytest.mark.parametrize("change", ["padding token", "padding side", "merges", "length"])
def test_a_tokenizer_is_more_than_its_words(pipe, before, tmp_path, change):
    tokenizer = pipe.tokenizer
    if change == "padding token":
        tokenizer.pad_token = "<|startoftext|>"
    if change == "padding side":
        tokenizer.padding_side = "left"
    if change == "length":
        tokenizer.model_max_length -= 1
    if change == "merges":
        tokenizer.save_pretrained(tmp_path)
        state = json.loads((tmp_path / "tokenizer.json").read_text())
        state["model"]["merges"] = state["model"]["merges"][:-60]
        (tmp_path / "tokenizer.json").write_text(json.dumps(state))
        pipe.tokenizer = type(tokenizer).from_pretrained(tmp_path)
        assert pipe.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert model_fingerprint(pipe) != before


def test_use_changes_nothing(pipe, before):
    pipe.tokenizer(["a bag"], padding="max_length", truncation=True, max_length=9)
    draw_pictures(pipe, [Request("a bag", (0,))], num_inference_steps=1, description=None)
    assert model_fingerprint(pipe) == before


def test_weights_in_half_precision_are_others(pipe, before):
    assert model_fingerprint(pipe.to(torch.bfloat16)) != before


def test_a_schedulers_config_is_told_without_where_it_came_from(pipe):
    facts = scheduler_facts(pipe)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="leading")
    other = scheduler_facts(pipe)
    assert facts["scheduler"] == type(pipe.scheduler).__name__ and facts != other
    assert other["config"] == facts["config"] | {"timestep_spacing": "leading"}
    assert not [name for name in facts["config"] if name.startswith("_")]
