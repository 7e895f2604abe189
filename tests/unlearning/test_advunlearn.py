import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import sfumato
from sfumato import storage
from sfumato.concepts import Concept
from sfumato.families import StableDiffusion
from sfumato.trainer import Shard, TrainingConfig, make_accelerator, train
from sfumato.unlearning.advunlearn import AdvUnlearnConfig, AdvUnlearnObjective
from sfumato.unlearning.examples import PromptTable
from sfumato.unlearning.task import ExampleConfig, Task
from sfumato.unlearning.trajectories import TrainedTrajectories, Walker

PROMPTS, RETAIN = ("a sneaker", "a red t-shirt"), ("a coat", "a bag", "a shirt")
CONFIG = AdvUnlearnConfig(
    trajectory_steps=4, batch_size=2, retain_batch_size=2, warmup_rounds=0, attack_steps=2, attack_learning_rate=0.1
)
SMALL = {
    "trajectory_steps": 3, "trajectories_per_prompt": 1, "retain_trajectories": 3, "batch_size": 2,
    "retain_batch_size": 2, "warmup_rounds": 1, "attack_steps": 2, "attack_learning_rate": 0.1, "steps": 3,
    "learning_rate": 1e-3,
}  # fmt: skip


def objective(family, config=CONFIG, steps=10, live=None, walk=True):
    """An objective on a copy of the part that is trained; `live` walks afresh, by default if it is the denoiser."""
    model, training = copy.deepcopy(family.parts[config.train]), TrainingConfig(steps=steps)
    concept = Concept("sneaker", PROMPTS, RETAIN[:2], RETAIN)
    task = Task(family, concept, model, ExampleConfig(), training, {}, make_accelerator(training))
    names = dict.fromkeys(PROMPTS, "a sneaker") if config.direction == "name" else None
    table = PromptTable(family, [*PROMPTS, *RETAIN, ""])
    walkers = [Walker(family, table, config, task.accelerator, source) for source in (names, None)]
    banks = [
        walker.walk(family.denoiser, prompts, [(0, stream, k) for k in range(len(prompts))], teach=True)
        for walker, stream, prompts in ((walkers[0], 211, PROMPTS * 2), (walkers[1], 212, RETAIN))
    ]
    if live or (live is None and config.train == "denoiser"):
        banks = [
            TrainedTrajectories(walker, family.denoiser if live else model, bank)
            for walker, bank in zip(walkers, banks, strict=True)
        ]
    return AdvUnlearnObjective(task, config, *banks)


def shaken(module):
    """A part that is no longer the original, but for its embeddings, which are never trained."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (value for name, value in module.named_parameters() if "embeddings" not in name):
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module


def encode(pipe, encoder, prompts):
    tokens = pipe.tokenizer(prompts, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
    return encoder(tokens.input_ids)[0]


def encode_attacked(pipe, encoder, prompts, delta):
    """Prefix attack, one prompt at a time and by hand: start, attack, words and end, padding."""
    rows, width = [], delta.shape[1]
    for prompt, added in zip(prompts, delta, strict=True):
        ids = pipe.tokenizer(prompt, padding="max_length", max_length=24, return_tensors="pt").input_ids
        embedded = pipe.text_encoder.get_input_embeddings()(ids)[0]
        rows.append(torch.cat([embedded[:1], added, embedded[1 : 24 - width]]))
    positions = encoder.embeddings.position_embedding(torch.arange(24))
    causal = torch.full((24, 24), -torch.inf).triu(1)[None, None]
    return encoder.final_layer_norm(
        encoder.encoder(torch.stack(rows) + positions, attention_mask=causal).last_hidden_state
    )


def fingerprint(pipe, part="text_encoder"):
    return storage.fingerprint(getattr(pipe, part).named_parameters())


@pytest.mark.parametrize("train_part", ["text_encoder", "denoiser"])
@pytest.mark.parametrize("direction", ["prompt", "name"])
def test_losses_are_the_equations(family, train_part, direction):
    """With everything asked afresh of the stock modules, one kind of state at a time."""
    config = replace(CONFIG, train=train_part, eta=0.7, retain_weight=0.4, attack_tokens=2, direction=direction)
    ours, pipe = objective(family, config), family.pipe
    model = shaken(ours.model)
    ours.prepare(3, [0, 1])
    losses = ours.losses(model, 3, Shard(0, 1))
    encoder, unet = (model, pipe.unet) if train_part == "text_encoder" else (pipe.text_encoder, model)
    states = ours.forget.at(*ours._forget_states(3, [0, 1]), ())
    kept = ours.retain.at(*ours._retain_states(3, Shard(0, 1)), ())

    def original(found, prompts):
        embeddings = encode(pipe, pipe.text_encoder, prompts)
        return pipe.unet(found.latents, found.timesteps, embeddings).sample.detach()

    empty, concept = original(states, ["", ""]), original(states, states.prompts)
    attacked = encode_attacked(pipe, encoder, states.prompts, ours.delta)
    away = concept if direction == "prompt" else original(states, ["a sneaker"] * 2)
    target = concept - 1.7 * (away - empty)
    forget = F.mse_loss(unet(states.latents, states.timesteps, attacked).sample, target)
    said = unet(kept.latents, kept.timesteps, encode(pipe, encoder, kept.prompts)).sample
    assert ours.delta.abs().sum() > 0
    assert torch.allclose(losses["forget"], forget, rtol=1e-3)
    assert torch.allclose(losses["retain"], 0.4 * F.mse_loss(said, original(kept, kept.prompts)), rtol=1e-3)


def test_precomputed_states_and_targets_are_exactly_those_computed_afresh(family):
    """On fixed trajectories: the loss, its gradient and the attack have the same bits."""
    banked = objective(family, replace(CONFIG, trajectory_batch_size=2))
    afresh = objective(family, replace(CONFIG, trajectory_batch_size=2))
    walker = Walker(
        family, PromptTable(family, [*PROMPTS, *RETAIN, ""]), banked.config, make_accelerator(TrainingConfig())
    )

    class Afresh:
        """Walks, from the same noise, whatever trajectories are asked for, at the moment they are asked for."""

        def __init__(self, prompts, stream):
            self.prompts, self.levels, self.stream = prompts, 4, stream

        def at(self, rows, levels, wanted):
            found = []
            for row, level in zip(rows, levels, strict=True):
                pair = [int(row) - int(row) % 2 + k for k in range(2)]  # walked two at a time, as the bank was
                pair = [k for k in pair if k < len(self.prompts)]
                walked = walker.walk(
                    family.denoiser, [self.prompts[k] for k in pair], [(0, self.stream, k) for k in pair], teach=True
                )
                found.append(walked.at([pair.index(int(row))], [level], wanted))
            return type(found[0])(
                torch.cat([one.latents for one in found]), torch.cat([one.timesteps for one in found]),
                [one.prompts[0] for one in found],
                {name: torch.cat([one.said[name] for one in found]) for name in wanted},
            )  # fmt: skip

    afresh.forget, afresh.retain = Afresh(banked.forget.prompts, 211), Afresh(banked.retain.prompts, 212)
    results = []
    for ours in (banked, afresh):
        model = shaken(ours.model)
        ours.prepare(1, [0, 1])
        loss = sum(ours.losses(model, 1, Shard(0, 1)).values())
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        results.append([ours.delta, loss, *(g for g in gradients if g is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][0].abs().sum() > 0


@pytest.mark.parametrize("train_part", ["text_encoder", "denoiser"])
def test_losses_of_shards_average_to_those_of_the_whole(family, train_part):
    ours = objective(family, replace(CONFIG, train=train_part))
    model = shaken(ours.model)
    ours.prepare(2, [0, 1])
    whole = ours.losses(model, 2, Shard(0, 1))
    halves = [ours.losses(model, 2, Shard(k, 2)) for k in range(2)]
    for name in ("forget", "retain"):
        assert torch.allclose(whole[name], (halves[0][name] + halves[1][name]) / 2, rtol=1e-4)


def test_attack_on_a_position_does_not_depend_on_who_shares_the_batch(family):
    together, apart = objective(family), objective(family)
    together.prepare(1, [0, 1])
    for position in (0, 1):
        apart.prepare(1, [position])
        assert torch.allclose(apart.delta[position], together.delta[position], atol=1e-4)


@pytest.mark.parametrize("attack", ["released", "projected"])
@pytest.mark.parametrize("insertion", ["prefix", "suffix", "replace", "add"])
def test_attack_makes_the_model_say_what_the_original_says(family, attack, insertion):
    config = replace(
        CONFIG, attack=attack, insertion=insertion, attack_steps=30, attack_tokens=2, trajectory_steps=2, batch_size=1,
        attack_learning_rate=0.1,
    )  # fmt: skip
    ours = objective(family, config)
    shaken(ours.model)

    def distance(delta):
        total = 0
        for row in range(len(ours.forget.prompts)):
            states = ours.forget.at([row] * 2, [0, 1], ("prompt",))
            said = ours._predict(ours.model, *states[:2], *ours._embed(states.prompts, delta.expand(2, -1, -1)))
            total += F.mse_loss(said, states.said["prompt"]).item() * (states.prompts[0] == prompt)
        return total

    prompt = ours.forget.prompts[ours._forget_states(0, [0])[0][0]]
    before = distance(ours._start(0, [0]))
    ours.prepare(0, [0])
    assert distance(ours.delta) < before


def test_latest_attack_is_where_the_next_begins(family):
    ours = objective(family, replace(CONFIG, attack_start="latest"))
    random = objective(family)._start(1, [0, 1])
    assert torch.equal(ours._start(1, [0, 1]), random)
    ours.prepare(0, [0, 1])
    assert torch.equal(ours._start(1, [0, 1]), ours.delta)


def test_random_start_is_the_embeddings_of_tokens(family):
    start = objective(family, replace(CONFIG, attack_tokens=3))._start(4, [0, 1]).flatten(0, 1)
    assert all((family.token_table == row).all(1).any() for row in start) and len(start) == 6


def test_projected_attack_is_no_longer_than_the_vocabulary_or_the_radius(family):
    for radius, bound in ((None, family.token_table.norm(dim=1).max()), (0.01, 0.01)):
        ours = objective(family, replace(CONFIG, attack="projected", attack_radius=radius, attack_learning_rate=1.0))
        ours.prepare(0, [0, 1])
        assert ours.delta.norm(dim=2).max() <= bound * 1.0001


def test_warm_up_is_without_attack(family):
    ours = objective(family, replace(CONFIG, warmup_rounds=2))
    model = shaken(ours.model)
    plain = ours.losses(model, 1, Shard(0, 1))["forget"]
    ours.after_step(model, 0, [Shard(0, 1)])
    assert ours.attacks == 0 and torch.equal(ours.delta, torch.zeros_like(ours.delta))
    ours.delta += 1
    assert torch.equal(ours.losses(model, 1, Shard(0, 1))["forget"], plain)
    ours.after_step(model, 1, [Shard(0, 1)])
    assert ours.attacks == 1


@pytest.mark.parametrize("unweighted", [False, True])
def test_turns_erase_then_retain_with_their_weight_or_as_released_without(family, unweighted):
    config = replace(CONFIG, retention="iter", retain_steps=2, retain_weight=0.1, legacy_unweighted_turns=unweighted)
    ours = objective(family, config)
    regular = objective(family, replace(CONFIG, retain_weight=1.0 if unweighted else 0.1))
    model = shaken(ours.model)
    turns = [ours.losses(model, step, Shard(0, 1)) for step in range(4)]
    assert [bool(turn["forget"] > 0) for turn in turns] == [True, False, False, True]
    assert [bool(turn["retain"] > 0) for turn in turns] == [False, True, True, False]
    assert torch.allclose(turns[1]["retain"], regular.losses(model, 1, Shard(0, 1))["retain"], rtol=1e-4)
    for step in range(3):
        ours.after_step(model, step, [Shard(0, 1)])
    assert ours.attacks == 1  # only before the turn that erases


@pytest.mark.parametrize("shared", [False, True])
def test_states_of_a_step_have_times_of_their_own_or_as_released_one(family, shared):
    ours = objective(family, replace(CONFIG, batch_size=4, legacy_shared_time=shared))
    times = []
    for step in range(6):
        erased, kept = ours._erasing(step, range(4))[1], ours._retaining(step, Shard(0, 1))[1]
        times.append({*erased.tolist(), *kept.tolist()})
        halves = torch.cat([ours._erasing(step, half)[1] for half in (range(2), range(2, 4))])
        assert torch.equal(erased, halves)  # whatever the processes
    assert all(len(found) == 1 for found in times) == shared
    assert len(set.union(*times)) > 1


def test_counting_words_as_released_displaces_tokens_of_the_prompt(family):
    ours, legacy = objective(family), objective(family, replace(CONFIG, legacy_word_count=True))
    delta, prompt = torch.ones(1, 1, 16), ["a red t-shirt"]
    count = int(ours._counts["a red t-shirt"])
    assert count > 3 == int(legacy._counts["a red t-shirt"])
    right, released = (one._embed(prompt, delta)[1][0] for one in (ours, legacy))
    words = family.token_table[family.tokenize(prompt)[0][0]][1 : 1 + count]
    assert torch.equal(right[2 : 2 + count], words)
    assert torch.equal(released[2:5], words[:3]) and torch.equal(
        released[5:-1], family.token_table[family.tokenize(prompt)[0][0]][5:-1]
    )  # the fourth token is gone


def test_denoiser_walks_every_trajectory_that_the_coming_steps_use(family):
    ours = objective(family, replace(CONFIG, train="denoiser", refresh_every=2))
    before = ours.state()["forget.latents"].clone()
    ours.after_step(ours.model, 0, [Shard(0, 1)])
    assert torch.equal(ours.state()["forget.latents"], before)
    ours.after_step(ours.model, 1, [Shard(0, 1)])
    used = set()
    for round_ in (2, 3):
        rows = ours._forget_states(round_, [0, 1])[0]
        used |= set(rows)
        for number in range(2):
            used |= set(ours._attack_states(round_, number, [0, 1], [ours.forget.prompts[row] for row in rows])[0])
    for row in range(4):
        assert torch.equal(ours.state()["forget.latents"][row], before[row]) == (row not in used)


def test_no_gradient_is_left_in_the_original(tiny_pipe):
    for part in ("text_encoder", "denoiser"):
        sfumato.unlearn(tiny_pipe, "a sneaker", "advunlearn", train=part, verify=False, **SMALL)
        for module in (tiny_pipe.unet, tiny_pipe.text_encoder):
            assert all(p.grad is None and p.requires_grad for p in module.parameters())


@pytest.mark.parametrize(("train_part", "other"), [("text_encoder", "unet"), ("denoiser", "text_encoder")])
def test_result_shares_all_but_the_part_that_was_trained(tiny_pipe, tmp_path, train_part, other):
    result = sfumato.unlearn(
        tiny_pipe, "a sneaker", "advunlearn", train=train_part, output_dir=tmp_path / "out", verify=False, **SMALL
    )
    trained = "unet" if train_part == "denoiser" else "text_encoder"
    assert getattr(result, other) is getattr(tiny_pipe, other)
    assert fingerprint(result, trained) != fingerprint(tiny_pipe, trained)
    loaded = type(tiny_pipe).from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert fingerprint(loaded, trained) == fingerprint(result, trained)


def test_token_and_position_embeddings_stay(tiny_pipe):
    result = sfumato.unlearn(tiny_pipe, "a sneaker", "advunlearn", verify=False, **SMALL)
    for name, value in tiny_pipe.text_encoder.named_parameters():
        assert torch.equal(value, result.text_encoder.get_parameter(name)) == ("embeddings" in name)


def test_manifest_counts_the_denoiser_evaluations(tiny_pipe, tmp_path):
    sfumato.unlearn(tiny_pipe, "a sneaker", "advunlearn", output_dir=tmp_path / "out", verify=False, **SMALL)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    bank, losses, attacks = (6 + 3) * 3 * 2, (3 + 1) * (2 + 2), 2 * 2 * 2  # the last loss is checked once more
    assert manifest["trajectory_evaluations"] == bank and manifest["attacks"] == 2
    assert manifest["denoiser_evaluations"] == bank + losses + attacks


@pytest.mark.parametrize(
    "settings",
    [{"attack_start": "latest"}, {"train": "denoiser", "refresh_every": 2}, {"retention": "iter", "warmup_rounds": 0}],
)
def test_interrupted_run_resumes_to_the_same_bits(tiny_pipe, tmp_path, settings, monkeypatch):
    options = {**SMALL, "steps": 4, "checkpoint_every": 1, "verify": False, **settings}
    part = "unet" if settings.get("train") == "denoiser" else "text_encoder"
    whole = sfumato.unlearn(tiny_pipe, "a sneaker", "advunlearn", output_dir=tmp_path / "whole", **options)
    losses = AdvUnlearnObjective.losses

    def interrupted(self, model, step, shard):
        if step == 3:
            raise KeyboardInterrupt
        return losses(self, model, step, shard)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AdvUnlearnObjective, "losses", interrupted)
        sfumato.unlearn(tiny_pipe, "a sneaker", "advunlearn", output_dir=tmp_path / "cut", **options)
    assert all(p.requires_grad for p in tiny_pipe.unet.parameters())
    resumed = sfumato.unlearn(
        tiny_pipe, "a sneaker", "advunlearn", output_dir=tmp_path / "cut", resume=True, **options
    )
    assert fingerprint(resumed, part) == fingerprint(whole, part)


@pytest.mark.parametrize(
    "settings",
    [
        {"attack": "projected"}, {"fast_attack": True}, {"insertion": "suffix"}, {"insertion": "replace"},
        {"insertion": "add"}, {"attack_tokens": 3}, {"legacy_level_mismatch": True}, {"legacy_word_count": True},
        {"train": "denoiser", "parameters": "xattn"}, {"retention": "iter"}, {"legacy_shared_time": True},
        {"legacy_latent_scale": 2},
    ],
)  # fmt: skip
def test_switches_run_to_the_end_and_make_another_result(tiny_pipe, settings):
    options = {**SMALL, "verify": False, "warmup_rounds": 0}
    plain, other = (
        sfumato.unlearn(tiny_pipe, "a sneaker", "advunlearn", **{**options, **extra}) for extra in ({}, settings)
    )
    assert any(fingerprint(plain, part) != fingerprint(other, part) for part in ("unet", "text_encoder"))


def test_gamma_weighs_the_turns_unless_it_is_told_not_to(tiny_pipe):
    options = {**SMALL, "verify": False, "warmup_rounds": 0, "retention": "iter", "retain_weight": 9.0, "steps": 4}
    plain, other = (
        sfumato.unlearn(tiny_pipe, "a sneaker", "advunlearn", **options, legacy_unweighted_turns=unweighted)
        for unweighted in (False, True)
    )
    assert fingerprint(plain, "text_encoder") != fingerprint(other, "text_encoder")


def test_shared_times_are_one_even_where_states_and_times_do_not_match(family):
    config = replace(CONFIG, legacy_level_mismatch=True, legacy_shared_time=True)
    prompts = PromptTable(family, ["", "a sneaker", "a bag"])
    walker = Walker(family, prompts, config, make_accelerator(TrainingConfig()), None, True)
    walked = walker.walk(family.denoiser, ["a sneaker", "a bag"], [(0, 1, 0), (0, 1, 1)], teach=True)
    assert torch.equal(walked.timesteps[0], walked.timesteps[1])
    assert not torch.equal(walked.timesteps[0], walker.grid)


def test_checkpointing_recomputes_the_frozen_denoiser_and_changes_nothing(tiny_pipe):
    calls = []
    enable = tiny_pipe.unet.enable_gradient_checkpointing
    tiny_pipe.unet.enable_gradient_checkpointing = lambda: (calls.append(1), enable())
    plain, other = (
        sfumato.unlearn(tiny_pipe, "a sneaker", "advunlearn", verify=False, gradient_checkpointing=wanted, **SMALL)
        for wanted in (False, True)
    )
    assert calls == [1] and not tiny_pipe.unet.is_gradient_checkpointing
    for one, same in zip(plain.text_encoder.parameters(), other.text_encoder.parameters(), strict=True):
        assert torch.allclose(one, same, atol=1e-5)


def test_velocity_prediction_and_half_precision_are_trained(tiny_pipe_v):
    tiny_pipe_v.to(torch.bfloat16)
    result = sfumato.unlearn(tiny_pipe_v, "a sneaker", "advunlearn", verify=False, **SMALL)
    assert result.text_encoder.dtype == torch.bfloat16
    assert all(torch.isfinite(parameter).all() for parameter in result.text_encoder.parameters())


def test_several_concepts_are_erased_in_one_run(tiny_pipe, tmp_path):
    sfumato.unlearn(
        tiny_pipe, ["a sneaker", "a bag"], "advunlearn", output_dir=tmp_path / "out", verify=False, **SMALL
    )
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["trajectory_count"] == 12 + 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "unet"}, "`train` must be one of text_encoder, denoiser, got 'unet'"),
        ({"retention": "both"}, "`retention` must be one of reg, iter"),
        ({"attack": "pgd"}, "`attack` must be one of released, projected"),
        ({"attack_start": "zero"}, "`attack_start` must be one of random, latest"),
        ({"insertion": "mid"}, "`insertion` must be one of prefix, suffix, replace, add, got 'mid'"),
        ({"attack_tokens": 0}, "`attack_tokens` must be at least 1, got 0"),
        ({"attack_steps": 0}, "`attack_steps` must be at least 1"),
        ({"attack_tokens": 21}, "leaves no room in the text encoder's 24 tokens"),
        ({"attack_radius": -1.0}, "`attack_radius` must be positive, got -1.0"),
        ({"attack_learning_rate": 0.0}, "`attack_learning_rate` must be positive"),
        ({"retain_weight": -1.0}, "`retain_weight` must not be negative, got -1.0"),
        ({"warmup_rounds": -1}, "`warmup_rounds` must not be negative"),
        ({"retain_trajectories": 0}, "`retain_trajectories` must be at least 1"),
        ({"retain_batch_size": 3, "gradient_accumulation_steps": 2}, "`retain_batch_size`=3 can't be shared equally"),
        ({"parameters": "xattn"}, "Unknown parameter subset 'xattn' of the text_encoder"),
        ({"retain": []}, "retain set is empty"),
    ],
)
def test_bad_input_gets_one_sentence_and_changes_nothing(tiny_pipe, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        sfumato.unlearn(tiny_pipe, "a sneaker", "advunlearn", output_dir=tmp_path / "out", **{**SMALL, **settings})
    assert not (tmp_path / "out" / "model_index.json").exists() and not (tmp_path / "out" / "examples").exists()


def test_training_moves_the_prediction_away_from_the_concept_under_attack(tiny_pipe):
    family = StableDiffusion(tiny_pipe)
    ours = objective(family, replace(CONFIG, eta=5.0, retain_weight=0.0, batch_size=4), steps=40)
    names = set(family.trainable_parameters("full", "text_encoder"))
    for name, parameter in ours.model.named_parameters():
        parameter.requires_grad_(name in names)
    history = train(ours.model, ours, TrainingConfig(steps=40, learning_rate=2e-2))
    first, last = (sum(row["forget"] for row in rows) for rows in (history[:10], history[-10:]))
    assert last < 0.8 * first
