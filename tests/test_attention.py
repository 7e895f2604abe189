import copy
from types import SimpleNamespace

import pytest
import torch

from sfumato.attention import ATTENTION, attention, check_attention
from sfumato.trainer import TrainingConfig, train

CPU = torch.device("cpu")


class Regression:
    batch_size = 2

    def __init__(self, unet):
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(2, 4, unet.config.sample_size, unet.config.sample_size, generator=generator)
        self.text = torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator)

    def losses(self, model, step, shard):
        return {"loss": model(self.latents, torch.tensor([3, 700]), self.text).sample.square().mean()}


def weights(unet, kind):
    model = copy.deepcopy(unet).requires_grad_(True)
    history = train(model, Regression(unet), TrainingConfig(steps=2, learning_rate=1e-3, attention=kind))
    return [row["loss"] for row in history], torch.cat([p.detach().flatten() for p in model.parameters()])


def test_kernels_agree(tiny_unet):
    losses, expected = weights(tiny_unet, "sdpa")
    for kind in ("math", "flash"):
        found, trained = weights(tiny_unet, kind)
        assert found == pytest.approx(losses, rel=1e-5)
        assert (trained - expected).norm() <= 1e-4 * expected.norm()


def test_a_kernel_is_used_while_the_context_lasts_only(tiny_unet, monkeypatch):
    def allowed():
        return torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()

    before = allowed()
    with attention("math", tiny_unet):
        assert allowed() == (True, False)
    assert allowed() == before


def test_xformers_is_switched_on_and_off_again():
    calls = []
    model = SimpleNamespace(
        enable_xformers_memory_efficient_attention=lambda: calls.append("on"),
        disable_xformers_memory_efficient_attention=lambda: calls.append("off"),
    )
    with pytest.raises(KeyError), attention("xformers", model):
        raise KeyError
    assert calls == ["on", "off"]


def test_attention_that_can_not_be_had_is_refused_before_the_long_work(tiny_unet, monkeypatch):
    with pytest.raises(ValueError, match="attention='efficient' needs an accelerator"):
        check_attention("efficient", tiny_unet, CPU)
    monkeypatch.setattr("sfumato.attention.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install xformers"):
        check_attention("xformers", tiny_unet, CPU)
    monkeypatch.setattr("sfumato.attention.find_spec", lambda name: name)
    with pytest.raises(ValueError, match="needs a CUDA device, not cpu"):
        check_attention("xformers", tiny_unet, CPU)
    with pytest.raises(ValueError, match="Linear has no attention by xFormers"):
        check_attention("xformers", torch.nn.Linear(1, 1), torch.device("cuda"))
    with pytest.raises(ValueError, match=f"`attention` must be one of {', '.join(ATTENTION)}, got 'eager'"):
        TrainingConfig(attention="eager")
