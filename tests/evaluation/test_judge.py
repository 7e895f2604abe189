import torch

from sfumato.evaluation.judge import Judge
from sfumato.loading import assets_folder


def test_description_is_the_predicted_words():
    judge = Judge.load(assets_folder() / "judge")
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = judge.predict(pictures)
    for k, words in enumerate(judge.describe(pictures)):
        assert words == {domain: judge.domains[domain][seen[domain][k]] for domain in judge.domains}
