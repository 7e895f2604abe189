import json

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.concepts import Vocabulary
from sfumato.evaluation.judge import Judge
from sfumato.evaluation.unlearning import Protocol, score
from sfumato.loading import assets_folder


@pytest.fixture(scope="module")
def words():
    return Vocabulary.load(assets_folder() / "atelier" / "concepts.json")


class Oracle:
    """Sees what it is told to see."""

    def __init__(self, words, verdicts):
        self.domains, self.verdicts = words.domains, verdicts

    def describe(self, pictures):
        return self.verdicts


def test_protocol_is_balanced(words):
    protocol = Protocol.for_concept(words, "sneaker", forget_repeats=3, retain_repeats=2)
    assert len(protocol.prompts) == 24 * 3 + 216 * 2
    assert sum("sneaker" in prompt for prompt in protocol.prompts) == 72
    assert len(set(protocol.prompts)) == 240


def test_perfect_model_scores_nothing_forgotten_and_all_kept(words):
    protocol = Protocol.for_concept(words, "sneaker", forget_repeats=1, retain_repeats=1)
    scores = score(protocol, Oracle(words, protocol.attributes), torch.zeros(240, 3, 32, 32))
    assert (scores.ua.value, scores.ira.value, scores.cra.value) == (0, 1, 1)
    assert (scores.ua.total, scores.ira.total) == (24, 216)


def test_relabelled_concept_is_forgotten_and_costs_nothing_else(words):
    protocol = Protocol.for_concept(words, "sneaker", forget_repeats=1, retain_repeats=1)
    seen = [{**row, "garment": "bag"} if row["garment"] == "sneaker" else row for row in protocol.attributes]
    scores = score(protocol, Oracle(words, seen), torch.zeros(240, 3, 32, 32))
    assert (scores.ua.value, scores.ira.value, scores.cra.value) == (1, 1, 1)


def test_cross_domain_accuracy_wants_every_other_domain_right(words):
    protocol = Protocol.for_concept(words, "mosaic", forget_repeats=1, retain_repeats=1)
    seen = [dict(row) for row in protocol.attributes]
    wrong = [k for k, row in enumerate(protocol.attributes) if row["style"] == "photo" and row["colour"] == "red"]
    for k in wrong:
        seen[k]["colour"] = "blue"
    scores = score(protocol, Oracle(words, seen), torch.zeros(240, 3, 32, 32))
    assert scores.ira.value == 1
    assert scores.cra.successes == scores.cra.total - len(wrong)


def test_concepts_forgotten_together_are_scored_as_one(words):
    protocol = Protocol.for_concept(words, ["sneaker", "red boot"], forget_repeats=1, retain_repeats=1)
    named = [row["garment"] == "sneaker" or (row["garment"], row["colour"]) == ("boot", "red") for row in
             protocol.attributes]  # fmt: skip
    assert sum(named) == 24 + 4 and named == sorted(named, reverse=True) and len(set(protocol.prompts)) == 240
    seen = [dict(row) for row in protocol.attributes]
    seen[0]["garment"] = "bag"  # one sneaker is gone
    seen[1] |= {"garment": "boot", "colour": "red"}  # another shows the other concept
    seen[-1]["colour"] = next(word for word in words.domains["colour"] if word != seen[-1]["colour"])
    scores = score(protocol, Oracle(words, seen), torch.zeros(240, 3, 32, 32))
    assert (scores.ua.successes, scores.ua.total) == (1, 28)
    assert (scores.ira.successes, scores.ira.total) == (211, 212)  # garment and colour are both of the concepts
    assert (scores.cra.successes, scores.cra.total) == (212, 212)  # the style alone


def test_judge_knows_the_real_renders_that_ship():
    folder = assets_folder() / "renders"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) >= 300
    pictures = torch.stack([torch.from_numpy(np.array(Image.open(folder / row["file_name"]))) for row in rows])
    judge = Judge.load(assets_folder() / "judge")
    seen = judge.predict(pictures.permute(0, 3, 1, 2) / 255)
    for domain, least in (("garment", 0.82), ("style", 0.98), ("colour", 0.98)):
        truth = torch.tensor([judge.domains[domain].index(row[domain]) for row in rows])
        assert (seen[domain] == truth).float().mean() >= least


def test_judge_survives_its_folder(tmp_path):
    judge = Judge({"shape": ("round", "square"), "tone": ("dark", "light", "grey")}, width=8).half().float().eval()
    judge.save(tmp_path)
    loaded = Judge.load(tmp_path)
    pictures = torch.rand(5, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(judge(pictures).values(), loaded(pictures).values(), strict=True))
    assert loaded.domains == judge.domains
