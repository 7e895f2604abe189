import pytest
import torch

import sfumato
from sfumato import BDIAScheduler, BELMScheduler, EDICTScheduler
from sfumato.gradients import guided_predictor, sample_with_gradients

FLOW = {"process": "flow", "shift": 3.0}
CASES = [
    (BDIAScheduler, {"timestep_spacing": "trailing"}),
    (BDIAScheduler, {"gamma": 0.9, "prediction_type": "v_prediction", "set_alpha_to_one": False}),
    (BDIAScheduler, FLOW),
    (BELMScheduler, {"timestep_spacing": "trailing"}),
    (BELMScheduler, FLOW),
    (EDICTScheduler, {"timestep_spacing": "trailing"}),
    (EDICTScheduler, {"leapfrog_steps": False, "prediction_type": "v_prediction"}),
    (EDICTScheduler, FLOW),
    (BDIAScheduler, {"process": "edm", "sigma_max": 5.0}),
]


class Toy(torch.nn.Module):
    """A smooth network of the sample, the time and an embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)
        self.evaluations = 0

    def forward(self, x, t, embedding):
        self.evaluations += 1
        return 0.3 * torch.tanh(self.mix(x) + embedding.view(-1, 2, 1, 1) * torch.cos(t / 300.0))


def plain(scheduler, network, x, embedding):
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t, embedding), t, x, return_dict=False)[0]
    return x


def start(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), torch.randn(2, 2, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("scheduler_class", "config"), CASES)
def test_gradients_are_those_of_plain_autograd(scheduler_class, config, inverse):
    scheduler = scheduler_class(**config, inverse=inverse)
    scheduler.set_timesteps(7)
    network, (x, embedding) = Toy(), start()
    made = sample_with_gradients(scheduler, network, x, embedding, parameters=network.parameters())
    leaves = [x, embedding, *network.parameters()]
    ours = torch.autograd.grad(made.square().sum(), leaves)
    wanted = plain(scheduler, network, x, embedding)
    theirs = torch.autograd.grad(wanted.square().sum(), leaves)
    torch.testing.assert_close(made, wanted, rtol=1e-12, atol=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-7 * b.norm()


@pytest.mark.parametrize("scheduler_class", [BDIAScheduler, BELMScheduler, EDICTScheduler])
def test_each_pass_calls_the_network_once_a_call_and_keeps_no_graph(scheduler_class):
    saved = []
    for steps in (4, 40):
        scheduler = scheduler_class(timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        network, (x, embedding) = Toy(), start()
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, held=held: held.append(t.numel()) or t, lambda t: t):
            made = sample_with_gradients(scheduler, network, x, embedding)
        assert network.evaluations == len(scheduler.timesteps)
        made.sum().backward()
        assert network.evaluations == 2 * len(scheduler.timesteps)
        saved.append(sum(held))
    assert saved[0] == saved[1]


def test_runs_whose_way_back_is_lost_are_warned_about(caplog):
    for gamma, steps, warned in ((0.5, 50, True), (0.5, 20, False), (1.0, 50, False)):
        caplog.clear()
        scheduler = BDIAScheduler(gamma=gamma)
        scheduler.set_timesteps(steps)
        sample_with_gradients(scheduler, lambda x, t: 0.1 * x, start()[0])
        assert any("gradients may be off" in r.getMessage() for r in caplog.records) == warned


def test_inputs_that_need_no_gradient_get_none():
    scheduler = BDIAScheduler()
    scheduler.set_timesteps(4)
    network, (x, embedding) = Toy(), start()
    sample_with_gradients(scheduler, network, x.detach(), embedding).sum().backward()
    assert x.grad is None and embedding.grad is not None and network.mix.weight.grad is None


def test_atelier_gradients_with_guidance_agree_with_plain_autograd_in_float32():
    pipe = sfumato.load("atelier")
    embeds, negative = pipe.encode_prompt("a photo of a red sneaker", "cpu", 1, True)
    scheduler = EDICTScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(5)
    predict = guided_predictor(pipe, guidance_scale=3.0)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    embeds = embeds.detach().requires_grad_()
    made = sample_with_gradients(scheduler, predict, latents, embeds, negative.detach())
    ours = torch.autograd.grad(made.square().sum(), [latents, embeds])
    x = latents
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t, embeds, negative.detach()), t, x, return_dict=False)[0]
    theirs = torch.autograd.grad(x.square().sum(), [latents, embeds])
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [(BDIAScheduler(gamma=0.0), "gamma=0 is DDIM"), (sfumato.TimeShiftScheduler(), "can't be walked")],
)
def test_what_cannot_be_walked_back_is_refused(scheduler, message):
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=message):
        sample_with_gradients(scheduler, Toy(), *start())


def test_times_must_be_set_first():
    with pytest.raises(ValueError, match="set_timesteps"):
        sample_with_gradients(BDIAScheduler(), Toy(), *start())
