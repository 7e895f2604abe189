"""MinorityClassifier: what it takes and gives, that it steers, and that it loads wherever diffusers is."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from sfumato import MinorityClassifier, MinorityGuidanceScheduler
from sfumato.releasing.custom_code import ship_model_code

SMALL = {
    "num_classes": 5, "in_channels": 2, "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1,
    "attention_head_dim": 8, "norm_num_groups": 4,
}  # fmt: skip
X = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def make(**config):
    torch.manual_seed(0)
    return MinorityClassifier(**{**SMALL, **config}).eval()


@pytest.mark.parametrize("pool", ["attention", "average"])
def test_logits_depend_on_the_sample_and_its_own_time_alone(pool):
    model = make(pool=pool)
    logits = model(X, torch.tensor([5, 500, 900]))
    assert logits.shape == (3, 5) and logits.dtype == torch.float32
    for row, time in enumerate((5, 500, 900)):
        assert torch.allclose(model(X[row : row + 1], time), logits[row : row + 1], atol=1e-5)
    assert not torch.allclose(model(X, 5), model(X, 900), atol=1e-3)


def test_half_precision_takes_samples_of_any_dtype():
    found = make().bfloat16()(X.double(), torch.tensor([5, 500, 900]))
    assert found.dtype == torch.float32 and torch.allclose(found, make()(X, torch.tensor([5, 500, 900])), atol=0.1)


def test_the_average_takes_any_size_and_the_attention_its_own():
    assert make(pool="average")(torch.randn(1, 2, 16, 12), 3).shape == (1, 5)
    with pytest.raises(ValueError, match=r"takes samples \(batch, 2, 8, 8\), got \(1, 2, 16, 12\)"):
        make()(torch.randn(1, 2, 16, 12), 3)
    with pytest.raises(ValueError, match="it is of another model"):
        make(pool="average")(torch.randn(1, 3, 8, 8), 3)
    assert make(sample_size=(8, 4))(torch.randn(1, 2, 8, 4), 3).shape == (1, 5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_classes": 1}, "`num_classes` must be at least 2, got 1"),
        ({"pool": "max"}, "`pool` must be one of attention, average"),
        ({"thresholds": [1.0, 2.0]}, "`thresholds` must be 4 ascending scores"),
        ({"thresholds": [1.0, 3.0, 2.0, 4.0]}, "`thresholds` must be 4 ascending scores"),
    ],
)
def test_configs_without_a_meaning_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make(**config)


def gradients(model):
    x = X.clone().requires_grad_()
    model(x, 100).square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in model.parameters())]


def test_gradient_checkpointing_changes_nothing():
    plain, saving = make().train(), make().train()
    saving.enable_gradient_checkpointing()
    assert saving.is_gradient_checkpointing
    for a, b in zip(gradients(plain), gradients(saving), strict=True):
        assert a is not None and torch.allclose(a, b, atol=1e-6)


def test_a_saved_classifier_comes_back_with_its_record(tmp_path):
    model = make(thresholds=[1.0, 2.0, 2.0, 4.5])
    model.save_pretrained(tmp_path)
    again = MinorityClassifier.from_pretrained(tmp_path)
    assert again.config.thresholds == [1.0, 2.0, 2.0, 4.5] and not again.training
    assert torch.equal(again(X, 7), model(X, 7))


@pytest.fixture(scope="module")
def taught():
    """One that has learned to tell bright samples, of class 1, from dark ones at all times."""
    model = make(num_classes=2).train()
    optimizer, random = torch.optim.Adam(model.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    for _ in range(40):
        labels = torch.randint(2, (32,), generator=random)
        x = (labels - 0.5)[:, None, None, None] + torch.randn(32, 2, 8, 8, generator=random)
        loss = torch.nn.functional.cross_entropy(model(x, torch.randint(1000, (32,), generator=random)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_its_gradient_leads_samples_to_the_class(taught, sampler):
    starts = torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(2))

    def drawn(scale, label=None):
        scheduler = MinorityGuidanceScheduler(sampler=sampler, guidance_scale=scale, clip_sample=False)
        scheduler.set_classifier(taught, label)
        scheduler.set_timesteps(10)
        x, generator = starts, torch.Generator().manual_seed(3)
        for t in scheduler.timesteps:  # with the noise that is in standard normal samples
            x = scheduler.step((1 - scheduler.alphas_cumprod[t]) ** 0.5 * x, t, x, generator=generator).prev_sample
        with torch.no_grad():
            logits = taught(x.float(), 0)
        return (logits[:, 1] - logits[:, 0]).mean().item(), x.mean().item()

    dark, bright = drawn(5.0, 0), drawn(5.0)  # without a label: the last class
    assert bright[0] > dark[0] + 1 and bright[1] > dark[1] + 0.1
    assert dark[0] < drawn(0.0)[0] + 1e-6 and bright[0] > drawn(0.0)[0]


ELSEWHERE = """
import sys
sys.modules["sfumato"] = None  # importing it fails
import torch
from diffusers import AutoModel
from safetensors.torch import save_file
torch.set_num_threads(1)
model = AutoModel.from_pretrained("model", trust_remote_code=True)
save_file({"logits": model(torch.ones(1, 2, 8, 8), 7).detach()}, "found.safetensors")
"""


@pytest.mark.slow
def test_it_loads_where_this_package_is_not_installed(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "model")
    ship_model_code(MinorityClassifier, tmp_path / "model")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "found.safetensors")["logits"]
    assert torch.allclose(found, model(torch.ones(1, 2, 8, 8), 7), atol=1e-5)
    assert torch.equal(MinorityClassifier.from_pretrained(tmp_path / "model")(X, 7), model(X, 7))
