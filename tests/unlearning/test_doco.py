import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

import sfumato
from sfumato import storage
from sfumato.concepts import Concept
from sfumato.families import StableDiffusion
from sfumato.trainer import Shard, TrainingConfig, make_accelerator, train
from sfumato.unlearning import doco
from sfumato.unlearning.discriminator import new_adam, patch_discriminator
from sfumato.unlearning.doco import ANCHOR_STREAM, PRIOR_STREAM, DoCoConfig, DoCoObjective
from sfumato.unlearning.examples import Examples
from sfumato.unlearning.noising import noisy_batch
from sfumato.unlearning.task import ExampleConfig, Task

PROMPTS = ("a sneaker", "a red sneaker")
ANCHORS = ("a bag", "a red bag")
SMALL = {
    "anchor_examples": 4, "retain_examples": 4, "example_steps": 2, "batch_size": 2, "steps": 3,
    "learning_rate": 1e-3, "discriminator_warmup": 2, "verify": False,
}  # fmt: skip
WHOLE = Shard(0, 1)


@pytest.fixture
def anchor(forget):
    return Examples(forget.mean, forget.std, tuple(ANCHORS[k % 2] for k in range(len(forget))))


def task_of(family, **training):
    concept = Concept("sneaker", PROMPTS, ANCHORS, ("a coat",))
    training = TrainingConfig(**training)
    return Task(family, concept, copy.deepcopy(family.denoiser), ExampleConfig(), training, {},
                make_accelerator(training))  # fmt: skip


def objective(family, anchor, prior=None, task=None, **config):
    targets = [PROMPTS[k % 2] for k in range(len(anchor))]
    return DoCoObjective(task or task_of(family), anchor, targets, prior or anchor, DoCoConfig(batch_size=4, **config))


def clean_by_hand(family, batch, prediction):
    """What each kind of prediction says x_0 is."""
    if family.prediction_type == "sample":
        return prediction
    alpha = family.process.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1).float()
    if family.prediction_type == "epsilon":
        return (batch.noisy - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
    return alpha.sqrt() * batch.noisy - (1 - alpha).sqrt() * prediction


def by_hand(family, batch, captions, model=None):
    hidden_states = family.pipe.encode_prompt(captions, "cpu", 1, False)[0]
    return (model or family.pipe.unet)(batch.noisy, batch.timesteps, hidden_states).sample


def anchor_batch(family, anchor, step, **kwargs):
    return noisy_batch(family, anchor, 4, step, WHOLE, seed=0, stream=ANCHOR_STREAM, **kwargs)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_losses_are_the_equations(tiny_pipe, anchor, retain, kind):
    tiny_pipe.scheduler = DDIMScheduler.from_config(tiny_pipe.scheduler.config, prediction_type=kind)
    family = StableDiffusion(tiny_pipe)
    ours = objective(family, anchor, retain)
    losses = ours.losses(family.denoiser, 5, WHOLE)
    batch = anchor_batch(family, anchor, 5)
    fake = clean_by_hand(family, batch, by_hand(family, batch, [PROMPTS[row % 2] for row in batch.rows]))
    called = torch.sigmoid(ours.discriminator(fake))
    assert torch.allclose(losses["generator"], -(1 - called).log().mean(), rtol=1e-4)
    kept = noisy_batch(family, retain, 4, 5, WHOLE, seed=0, stream=PRIOR_STREAM)
    assert torch.allclose(losses["prior"], F.mse_loss(by_hand(family, kept, kept.captions), kept.target), rtol=1e-4)


@pytest.mark.parametrize("leak", [False, True])
def test_discriminator_steps_on_its_equation_by_an_adam_of_its_own(family, anchor, leak):
    task = task_of(family)
    ours = objective(family, anchor, task=task, leak_generator_gradient=leak, discriminator_learning_rate=0.01)
    with torch.no_grad():
        task.model.conv_out.bias += 0.5  # the model has moved, the original has not
    expected = copy.deepcopy(ours.discriminator)
    optimizer = torch.optim.Adam(expected.parameters(), lr=0.01, betas=(0.5, 0.999))
    for step in range(2):
        batch = anchor_batch(family, anchor, step)
        fake = clean_by_hand(family, batch, by_hand(family, batch, [PROMPTS[r % 2] for r in batch.rows], task.model))
        real = clean_by_hand(family, batch, by_hand(family, batch, batch.captions))
        target, shown = (torch.sigmoid(expected(latents.detach())) for latents in (fake, real))
        loss = -target.log().mean() - (1 - shown).log().mean() - leak * (1 - target).log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ours.after_step(task.model, step, [WHOLE])
    for a, b in zip(ours.discriminator.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-5)
    assert not torch.allclose(ours.discriminator[0].weight, objective(family, anchor).discriminator[0].weight)


def test_losses_and_steps_of_the_discriminator_do_not_depend_on_the_shards(family, anchor):
    whole, split = objective(family, anchor), objective(family, anchor)
    model = family.denoiser
    losses = [split.losses(model, 2, Shard(k, 2)) for k in range(2)]
    for name, value in whole.losses(model, 2, WHOLE).items():
        assert torch.allclose(value, (losses[0][name] + losses[1][name]) / 2, rtol=1e-4)
    whole.after_step(model, 2, [WHOLE])
    split.after_step(model, 2, [Shard(0, 2), Shard(1, 2)])
    for (name, one), other in zip(whole.state().items(), split.state().values(), strict=True):
        if name.endswith("exp_avg"):
            assert torch.allclose(one, other, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_losses_change_nothing(family, anchor, norm):
    ours = objective(family, anchor, discriminator_norm=norm)
    before = {name: value.detach().clone() for name, value in ours.state().items()}
    ours.losses(family.denoiser, 0, WHOLE)
    assert all(torch.equal(value, before[name]) for name, value in ours.state().items())


def test_surgery_is_that_of_the_config(family, anchor):
    gradients = {"generator": [torch.tensor([1.0]), torch.tensor([2.0])],
                 "prior": [torch.tensor([1.0]), torch.tensor([-1.0])]}  # fmt: skip
    made = {
        surgery: [part.item() for part in objective(family, anchor, surgery=surgery).combine(gradients)]
        for surgery in ("projection", "official")
    }
    assert made["projection"] == [1.5, 1.5]
    length = 5**0.5  # to 1 of which the released code clips first; then 2 / length - 1 * (-1) * (-1)
    assert made["official"] == pytest.approx([1 / length, 2 / length - 1])


@pytest.mark.parametrize("stale", [False, True])
def test_discriminator_sees_the_model_as_updated_or_as_it_was(family, anchor, stale):
    task = task_of(family)
    ours = objective(family, anchor, task=task, legacy_stale_pictures=stale)
    seen = []
    ours.discriminator.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    ours.losses(task.model, 0, WHOLE)
    with torch.no_grad():
        task.model.conv_out.bias += 0.5  # the step
    ours.after_step(task.model, 0, [WHOLE])
    made, shown = seen[:2]
    assert torch.allclose(made, shown, atol=1e-5) == stale
    ours.after_step(task.model, 0, [WHOLE])  # nothing of it is left for another time
    assert not torch.allclose(made, seen[3], atol=1e-5)


def test_step_is_taken_with_the_generator_s_gradient_without_its_conflicts(family, anchor, retain):
    """Through the trainer, with plain gradient descent; nothing of the prior's gradient is added."""
    task = task_of(family)
    ours = objective(family, anchor, retain, task=task)
    with torch.no_grad():
        for parameter in ours.discriminator.parameters():
            parameter.mul_(20)  # else the generator's gradient would be hard to see
    parameters = list(task.model.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    terms = ours.losses(task.model, 0, WHOLE)
    generator, prior = (torch.autograd.grad(terms[name], parameters, retain_graph=True) for name in terms)
    along = sum((a * b).sum() for a, b in zip(generator, prior, strict=True))
    share = min(float(along), 0.0) / sum(float(b.pow(2).sum()) for b in prior)
    train(task.model, ours, TrainingConfig(steps=1, learning_rate=0.1, optimizer="sgd"))
    for after, start, g, r in zip(parameters, before, generator, prior, strict=True):
        assert torch.allclose(after, start - 0.1 * (g - share * r), atol=1e-6)


def test_warm_up_teaches_the_discriminator_to_tell_concept_from_anchor(family, anchor):
    with torch.no_grad():  # make prompts matter to the random network
        for name in family.trainable_parameters("xattn"):
            family.denoiser.get_parameter(name).mul_(20)
    task = task_of(family)
    ours = objective(
        family, anchor, task=task, discriminator_warmup=30, discriminator_learning_rate=5e-3, max_timestep=200
    )

    def loss():
        fake, real = ours._clean(task.model, 0, WHOLE, ANCHOR_STREAM)
        return (ours._called(fake, 1.0) + ours._called(real, 0.0)).item()

    before = loss()
    ours.warm_up(WHOLE)
    assert loss() < 0.92 * before
    assert ours.state()["0.weight.step"].item() == 30


def test_max_timestep_bounds_the_times_that_the_discriminator_sees(family, anchor):
    times = torch.cat([anchor_batch(family, anchor, step, max_timestep=300).timesteps for step in range(20)])
    assert times.max() < 300 and times.max() > 200
    batch, _ = objective(family, anchor, max_timestep=300)._pictures(3, WHOLE, ANCHOR_STREAM)
    assert torch.equal(batch.timesteps, anchor_batch(family, anchor, 3, max_timestep=300).timesteps)


@pytest.mark.parametrize(("side", "logits", "layers"), [(64, 3, 5), (32, 1, 5), (16, 1, 4), (8, 1, 3), (4, 1, 2)])
def test_discriminator_is_as_deep_as_the_latents_allow(side, logits, layers):
    made = patch_discriminator((4, side, side), "batch", (0,))
    convolutions = [module for module in made if isinstance(module, torch.nn.Conv2d)]
    assert made(torch.randn(2, 4, side, side)).shape == (2, 1, logits, logits)
    assert len(convolutions) == layers
    assert [conv.out_channels for conv in convolutions] == [64, 128, 256, 512][: layers - 1] + [1]
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in made[:3])


def test_group_norm_judges_each_latent_alone_and_batch_norm_does_not():
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for norm, alone in (("group", True), ("batch", False)):
        made = patch_discriminator((4, 16, 16), norm, (0,))
        halves = torch.cat([made(latents[:2]), made(latents[2:])])
        assert torch.allclose(made(latents), halves, atol=1e-5) == alone


def test_weights_of_the_discriminator_depend_on_the_key_alone():
    first, again, other = (patch_discriminator((4, 8, 8), "group", (seed, 324)) for seed in (0, 0, 1))
    torch.manual_seed(7)
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)


def test_adam_with_its_state_laid_out_is_that_of_torch():
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    second.load_state_dict(first.state_dict())
    ours, state = new_adam(first, 0.1)
    theirs = torch.optim.Adam(second.parameters(), lr=0.1, betas=(0.5, 0.999))
    for _ in range(3):
        for module, optimizer in ((first, ours), (second, theirs)):
            optimizer.zero_grad()
            module(torch.ones(1, 3)).pow(2).sum().backward()
            optimizer.step()
    assert torch.equal(first.weight, second.weight)
    assert state["weight.step"].item() == 3
    assert torch.equal(state["weight.exp_avg_sq"], theirs.state[second.weight]["exp_avg_sq"])


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_run_cut_short_resumes_to_the_same_bits(tiny_pipe, tmp_path, monkeypatch, norm):
    settings = {**SMALL, "steps": 4, "checkpoint_every": 2, "optimizer": "adamw", "discriminator_norm": norm}
    made, plain = [], DoCoObjective.losses

    def spy(self, model, step, shard):
        made.append(self)
        if dying and step == 3:
            raise KeyboardInterrupt
        return plain(self, model, step, shard)

    monkeypatch.setattr(DoCoObjective, "losses", spy)
    dying = False
    whole = sfumato.unlearn(tiny_pipe, "a sneaker", "doco", **settings)
    expected = {name: value.detach().clone() for name, value in made[-1].state().items()}
    dying = True
    with pytest.raises(KeyboardInterrupt):
        sfumato.unlearn(tiny_pipe, "a sneaker", "doco", output_dir=tmp_path, **settings)
    dying = False
    resumed = sfumato.unlearn(tiny_pipe, "a sneaker", "doco", output_dir=tmp_path, resume=True, **settings)
    assert storage.fingerprint(resumed.unet.named_parameters()) == storage.fingerprint(whole.unet.named_parameters())
    state = made[-1].state()
    assert set(state) == set(expected) and all(torch.equal(state[name], expected[name]) for name in expected)
    assert expected["0.weight.step"].item() == 6  # two of the warm-up, four of the run


@pytest.mark.parametrize(
    "settings",
    [
        {"surgery": "official"}, {"prior": "retain"}, {"max_timestep": 300},
        {"leak_generator_gradient": True}, {"train_start_token": True}, {"legacy_stale_pictures": True},
    ],
)  # fmt: skip
def test_each_switch_changes_the_result(tiny_pipe, settings):
    settings = {**SMALL, "discriminator_learning_rate": 0.01, **settings}
    plain = {**SMALL, "discriminator_learning_rate": 0.01}
    one, other = (sfumato.unlearn(tiny_pipe, "a sneaker", "doco", **chosen) for chosen in (plain, settings))
    assert storage.fingerprint(one.unet.named_parameters()) != storage.fingerprint(other.unet.named_parameters())


def test_training_fools_a_discriminator(family, anchor):
    """With the discriminator held still, the generator's loss falls."""
    task = task_of(family)
    ours = objective(family, anchor, task=task, surgery_weight=0.0, max_timestep=300)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.discriminator.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    ours.after_step = lambda *_: None
    history = train(task.model, ours, TrainingConfig(steps=20, learning_rate=1e-2))
    first, last = (sum(row["generator"] for row in rows) for rows in (history[:5], history[-5:]))
    assert last < 0.8 * first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"surgery": "knife"}, "`surgery` must be one of projection, official, got 'knife'"),
        ({"surgery_weight": -1.0}, "`surgery_weight` must not be negative, got -1.0"),
        ({"prior": "none"}, "`prior` must be one of anchor, retain, got 'none'"),
        ({"discriminator_norm": "layer"}, "`discriminator_norm` must be one of group, batch, got 'layer'"),
        ({"discriminator_learning_rate": 0.0}, "`discriminator_learning_rate` must be positive, got 0.0"),
        ({"discriminator_warmup": -1}, "`discriminator_warmup` must not be negative, got -1"),
        ({"max_timestep": 0}, "`max_timestep` must be at least 1, or None for all, got 0"),
        ({"max_timestep": 2000}, "`max_timestep` must be at most 1000, got 2000"),
        ({"discriminator_norm": "batch", "gradient_accumulation_steps": 2}, "needs the whole batch at once"),
        ({"retain": []}, "retain set is empty"),
        ({"anchor_examples": 0}, "`anchor_examples` must be at least 1"),
    ],
)
def test_bad_input_gets_one_sentence_before_the_long_work(tiny_pipe, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        sfumato.unlearn(tiny_pipe, "a sneaker", "doco", output_dir=tmp_path / "out", **{**SMALL, **settings})
    assert not (tmp_path / "out" / "model_index.json").exists()


def test_fp16_is_refused_before_the_long_work(family):
    task = task_of(family)
    task.training.mixed_precision = "fp16"
    with pytest.raises(ValueError, match="'fp16' scales: use bf16"):
        doco.check(task, DoCoConfig())


def test_latents_too_small_to_judge_are_refused():
    with pytest.raises(ValueError, match="at least 4x4, got 2x8"):
        patch_discriminator((4, 2, 8), "group", (0,))
