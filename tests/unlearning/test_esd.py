import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

import sfumato
from sfumato import storage
from sfumato.concepts import Concept
from sfumato.families import StableDiffusion
from sfumato.trainer import Shard, TrainingConfig, make_accelerator, train
from sfumato.unlearning.esd import ESDConfig, ESDObjective
from sfumato.unlearning.examples import PromptTable
from sfumato.unlearning.task import ExampleConfig, Task
from sfumato.unlearning.trajectories import TrainedTrajectories, Walker

PROMPTS = ("a sneaker", "a red sneaker")
CONFIG = ESDConfig(trajectory_steps=4, batch_size=4, trajectories_per_prompt=2)
SMALL = {
    "trajectory_steps": 3, "trajectories_per_prompt": 1, "batch_size": 2, "steps": 3, "learning_rate": 1e-3,
}  # fmt: skip


def objective(family, config=CONFIG, trained=None):
    table = PromptTable(family, [*PROMPTS, "", "a shoe"])
    given = config.erase_from is not None
    asked = {p: config.erase_from if given else "a sneaker" for p in PROMPTS}
    asked = asked if given or config.direction == "name" else None
    walker = Walker(family, table, config, make_accelerator(TrainingConfig()), asked)
    bank = walker.walk(family.denoiser, PROMPTS * 2, [(0, 201, k) for k in range(4)], teach=True)
    if trained is not None:
        bank = TrainedTrajectories(walker, trained, bank)
    return ESDObjective(family, bank, table, config, 0, 10)


def other_model(family):
    torch.manual_seed(7)
    return type(family.denoiser).from_config(family.denoiser.config).eval()


def predict(unet, family, states, prompts):
    return unet(states.latents, states.timesteps, family.pipe.encode_prompt(prompts, "cpu", 1, False)[0]).sample


def weights(pipe):
    return storage.fingerprint(pipe.unet.named_parameters())


def test_loss_is_the_equation(family):
    ours, student = objective(family, replace(CONFIG, eta=0.7)), other_model(family)
    loss = ours.losses(student, 3, Shard(0, 1))["erase"]
    states = ours.bank.at(*ours._pick(3, Shard(0, 1)), ())
    empty, concept = (predict(family.pipe.unet, family, states, p).detach() for p in ([""] * 4, states.prompts))
    target = empty - 0.7 * (concept - empty)
    assert torch.allclose(loss, F.mse_loss(predict(student, family, states, states.prompts), target), rtol=1e-4)


def test_loss_with_a_source_prompt_is_the_second_equation(family):
    config = replace(CONFIG, erase_from="a shoe", eta=1.5, eta_convention="erase_from")
    ours, student = objective(family, config), other_model(family)
    loss = ours.losses(student, 0, Shard(0, 1))["erase"]
    states = ours.bank.at(*ours._pick(0, Shard(0, 1)), ())
    empty, concept, source = (
        predict(family.pipe.unet, family, states, p).detach() for p in ([""] * 4, states.prompts, ["a shoe"] * 4)
    )
    target = source - 1.5 * (concept - empty)
    assert torch.allclose(loss, F.mse_loss(predict(student, family, states, ["a shoe"] * 4), target), rtol=1e-4)


def test_away_from_the_name_leaves_the_rest_of_a_prompt(family):
    ours, student = objective(family, replace(CONFIG, direction="name", eta=0.7)), other_model(family)
    loss = ours.losses(student, 0, Shard(0, 1))["erase"]
    states = ours.bank.at(*ours._pick(0, Shard(0, 1)), ())
    assert "a red sneaker" in states.prompts
    empty, prompt, name = (
        predict(family.pipe.unet, family, states, p).detach() for p in ([""] * 4, states.prompts, ["a sneaker"] * 4)
    )
    target = prompt - 1.7 * (name - empty)
    assert torch.allclose(loss, F.mse_loss(predict(student, family, states, states.prompts), target), rtol=1e-4)


def test_new_eta_is_one_more_than_the_paper_s(family):
    paper = objective(family, replace(CONFIG, eta=1.0))
    new = objective(family, replace(CONFIG, eta=2.0, eta_convention="erase_from"))
    student = other_model(family)
    assert torch.equal(*(ours.losses(student, 0, Shard(0, 1))["erase"] for ours in (paper, new)))


def test_concept_erased_from_itself_is_the_first_equation(tiny_pipe):
    family = StableDiffusion(tiny_pipe)
    table = PromptTable(family, ["a sneaker", ""])
    student, found = other_model(family), []
    for source in (None, "a sneaker"):
        config = replace(CONFIG, erase_from=source)
        walker = Walker(family, table, config, make_accelerator(TrainingConfig()), source and {"a sneaker": source})
        bank = walker.walk(family.denoiser, ["a sneaker"], [(0, 1, 0)], teach=True)
        found.append(ESDObjective(family, bank, table, config, 0, 10).losses(student, 0, Shard(0, 1))["erase"])
    assert torch.allclose(*found, rtol=1e-4)


def test_original_with_new_eta_zero_has_nothing_to_learn(family):
    ours = objective(family, replace(CONFIG, eta=0.0, eta_convention="erase_from"))
    assert ours.losses(family.denoiser, 0, Shard(0, 1))["erase"].item() < 1e-10


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_predictions_are_compared_as_they_are(tiny_pipe, prediction_type):
    tiny_pipe.scheduler = DDIMScheduler.from_config(tiny_pipe.scheduler.config, prediction_type=prediction_type)
    family = StableDiffusion(tiny_pipe)
    ours, student = objective(family), other_model(family)
    states = ours.bank.at(*ours._pick(0, Shard(0, 1)), ())
    empty, concept = (predict(tiny_pipe.unet, family, states, p).detach() for p in ([""] * 4, states.prompts))
    raw = predict(student, family, states, states.prompts) - (2 * empty - concept)  # eta = 1
    assert torch.allclose(ours.losses(student, 0, Shard(0, 1))["erase"], raw.square().mean(), rtol=1e-3)


def test_losses_of_shards_average_to_that_of_the_whole(family):
    ours, student = objective(family), other_model(family)
    whole = ours.losses(student, 2, Shard(0, 1))["erase"]
    halves = [ours.losses(student, 2, Shard(k, 2))["erase"] for k in range(2)]
    assert torch.allclose(whole, (halves[0] + halves[1]) / 2, rtol=1e-4)


def test_frozen_targets_are_those_computed_afresh(family):
    frozen, live = objective(family), objective(family, trained=family.denoiser)
    student = other_model(family)
    for step in range(3):
        assert torch.allclose(
            *(ours.losses(student, step, Shard(0, 1))["erase"] for ours in (frozen, live)), rtol=1e-5
        )


def test_trained_model_walks_what_the_next_steps_use(family):
    student = other_model(family)
    ours = objective(family, replace(CONFIG, trajectories="trained", refresh_every=2), trained=student)
    before = ours.bank.state()["latents"].clone()
    ours.after_step(student, 0, [Shard(0, 1)])
    assert torch.equal(ours.bank.state()["latents"], before)
    ours.after_step(student, 1, [Shard(0, 1)])
    used = {int(row) for step in (2, 3) for row in ours._pick(step, Shard(0, 1))[0]}
    for row in range(4):
        assert torch.equal(ours.bank.state()["latents"][row], before[row]) == (row not in used)


def test_losses_change_nothing(family):
    ours, student = objective(family, replace(CONFIG, trajectories="trained"), trained=family.denoiser), None
    student = other_model(family)
    first = ours.losses(student, 0, Shard(0, 1))["erase"]
    assert torch.equal(ours.losses(student, 0, Shard(0, 1))["erase"], first)


@pytest.mark.parametrize(
    ("parameters", "inside", "outside"),
    [
        ("xattn", "attn2.to_out", "attn1"), ("xattn-kv", "attn2.to_k", "attn2.to_q"), ("selfattn", "attn1", "attn2"),
        ("noxattn", "attn1", "attn2"), ("full", "time_embedding", "nothing"), ("notime", "attn2", "time_embedding"),
    ],
)  # fmt: skip
def test_variant_trains_its_weights_alone(tiny_pipe, parameters, inside, outside):
    result = sfumato.unlearn(tiny_pipe, "a sneaker", "esd", verify=False, parameters=parameters, **SMALL)
    before = dict(tiny_pipe.unet.named_parameters())
    moved = {name for name, value in result.unet.named_parameters() if not torch.equal(value, before[name])}
    assert any(inside in name for name in moved) and not any(outside in name for name in moved)
    assert moved <= set(StableDiffusion(tiny_pipe).trainable_parameters(parameters))


def test_several_concepts_are_erased_in_one_run(tiny_pipe, tmp_path):
    result = sfumato.unlearn(
        tiny_pipe, ["a sneaker", "a bag"], "esd", output_dir=tmp_path / "out", verify=False, **SMALL
    )
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["trajectory_count"] == 12  # six wordings of each
    assert weights(result) != weights(tiny_pipe)


def test_manifest_counts_the_denoiser_evaluations(tiny_pipe, tmp_path):
    sfumato.unlearn(tiny_pipe, "a sneaker", "esd", output_dir=tmp_path / "out", verify=False, **SMALL)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    bank, steps, last_check = 6 * 3 * 2, 3 * 2, 2
    assert manifest["trajectory_evaluations"] == bank
    assert manifest["denoiser_evaluations"] == bank + steps + last_check


@pytest.mark.parametrize("settings", [{}, {"trajectories": "trained", "refresh_every": 2}])
def test_interrupted_run_resumes_to_the_same_bits(tiny_pipe, tmp_path, settings, monkeypatch):
    options = {**SMALL, **settings, "steps": 5, "checkpoint_every": 1, "verify": False}
    whole = sfumato.unlearn(tiny_pipe, "a sneaker", "esd", output_dir=tmp_path / "whole", **options)
    losses = ESDObjective.losses

    def interrupted(self, model, step, shard):
        if step == 3:
            raise KeyboardInterrupt
        return losses(self, model, step, shard)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ESDObjective, "losses", interrupted)
        sfumato.unlearn(tiny_pipe, "a sneaker", "esd", output_dir=tmp_path / "cut", **options)
    assert (tmp_path / "cut" / "examples" / "trajectories.safetensors").exists()
    resumed = sfumato.unlearn(tiny_pipe, "a sneaker", "esd", output_dir=tmp_path / "cut", resume=True, **options)
    assert weights(resumed) == weights(whole)
    assert not (tmp_path / "cut" / "examples").exists()
    counted = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("whole", "cut")]
    assert counted[0]["denoiser_evaluations"] == counted[1]["denoiser_evaluations"]
    assert counted[1]["seconds"] > 0


@pytest.mark.parametrize(
    "settings",
    [{"trajectories": "trained"}, {"legacy_level_mismatch": True}, {"erase_from": "a shoe"}, {"prune_ratio": 0.3}],
)
def test_switches_run_to_the_end_and_make_another_result(tiny_pipe, settings):
    plain = sfumato.unlearn(tiny_pipe, "a sneaker", "esd", verify=False, **SMALL)
    other = sfumato.unlearn(tiny_pipe, "a sneaker", "esd", verify=False, **SMALL, **settings)
    assert weights(other) != weights(plain)
    assert all(torch.isfinite(parameter).all() for parameter in other.unet.parameters())


def test_seed_decides_the_result(tiny_pipe):
    first, again, other = (
        weights(sfumato.unlearn(tiny_pipe, "a sneaker", "esd", verify=False, seed=seed, **SMALL)) for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta_convention": "new"}, "`eta_convention` must be one of paper, erase_from, got 'new'"),
        ({"direction": "up"}, "`direction` must be one of prompt, name, got 'up'"),
        ({"direction": "name", "erase_from": "a shoe"}, "leave out `erase_from`"),
        ({"trajectories": "none"}, "`trajectories` must be one of frozen, trained, got 'none'"),
        ({"eta": "1"}, "`eta` must be a finite number, got '1'"),
        ({"trajectory_steps": 0}, r"`trajectory_steps` must lie in \[2, 1000\]"),
        ({"parameters": "attn"}, "`parameters` must be one of full, xattn"),
        ({"forget_examples": 3}, "Unknown setting 'forget_examples'"),
    ],
)
def test_bad_input_gets_one_sentence_and_changes_nothing(tiny_pipe, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        sfumato.unlearn(tiny_pipe, "a sneaker", "esd", output_dir=tmp_path / "out", **{**SMALL, **settings})
    assert not (tmp_path / "out").exists()


def test_training_moves_the_prediction_away_from_the_concept(family):
    concept, training = Concept("sneaker", PROMPTS, PROMPTS[::-1], ("a coat",)), TrainingConfig()
    student = type(family.denoiser).from_config(family.denoiser.config).eval()
    student.load_state_dict(family.denoiser.state_dict())
    task = Task(family, concept, student, ExampleConfig(), training, {}, make_accelerator(training))
    ours = objective(family, replace(CONFIG, eta=3.0))
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("attn2" in name)
    history = train(task.model, ours, replace(training, steps=60, learning_rate=5e-3))
    first, last = (sum(row["erase"] for row in rows) for rows in (history[:15], history[-15:]))
    assert last < 0.5 * first


def test_eta_towards_the_concept_is_refused():
    with pytest.raises(ValueError, match="must not train towards the concept"):
        ESDConfig(eta=-3.0)
    ESDConfig(eta=0.0, eta_convention="erase_from")  # -1 in the paper's: nothing to learn, which is no harm


def test_erasing_from_the_empty_prompt_asks_the_student_for_it(family):
    config = replace(CONFIG, erase_from="")
    asked = []
    ours = objective(family, config)
    ours.prompts = lambda prompts: (asked.extend(prompts), PromptTable(family, [""])([""] * len(prompts)))[1]
    ours.losses(family.denoiser, 0, Shard(0, 1))
    assert set(asked) == {""}
