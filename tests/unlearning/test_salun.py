import copy
import json
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F

import sfumato
from sfumato import storage
from sfumato.concepts import Concept
from sfumato.families import StableDiffusion
from sfumato.randomness import randint_for, randn_for
from sfumato.trainer import NonFiniteLossError, Shard, TrainingConfig, make_accelerator, train
from sfumato.unlearning import gradient_ascent, noising, run, salun
from sfumato.unlearning.examples import Examples, PromptTable
from sfumato.unlearning.noising import noisy_batch
from sfumato.unlearning.saliency import load_mask, mask_density, top_mask
from sfumato.unlearning.salun import (
    FORGET_STREAM,
    MASK_STREAM,
    RETAIN_STREAM,
    SalUnConfig,
    SalUnObjective,
    saliency_mask,
)
from sfumato.unlearning.task import ExampleConfig, Task

PROMPTS = ["a sneaker", "a red sneaker", "a bag", "a red bag", "a coat", "a shirt", ""]
ANCHORS = {"a sneaker": "a bag", "a red sneaker": "a red bag"}
SMALL = {
    "forget_examples": 4, "retain_examples": 4, "example_steps": 2, "batch_size": 2, "steps": 3, "learning_rate": 1e-3,
}  # fmt: skip


def task_of(family):
    concept, training = Concept("sneaker", *map(tuple, (ANCHORS, ANCHORS.values(), ["a coat"]))), TrainingConfig()
    return Task(family, concept, family.denoiser, ExampleConfig(), training, {}, make_accelerator(training))


def objective(family, teacher, forget, retain, anchors=ANCHORS, **config):
    prompts = PromptTable(family, PROMPTS)
    return SalUnObjective(
        family, teacher, forget, retain, anchors, prompts, SalUnConfig(batch_size=4, **config), seed=0
    )  # fmt: skip


def test_relabelling_to_the_same_caption_without_retain_term_is_no_loss(family, forget, retain):
    same = {prompt: prompt for prompt in ANCHORS}
    losses = objective(family, family.denoiser, forget, retain, same, retain_weight=0.0).losses(
        family.denoiser, 0, Shard(0, 1)
    )
    assert losses["forget"].item() < 1e-12
    assert losses["retain"].item() == 0


def test_losses_are_the_equations(family, forget, retain):
    ours = objective(family, family.denoiser, forget, retain, retain_weight=0.3)
    losses = ours.losses(family.denoiser, 5, Shard(0, 1))
    told, kept = (
        noisy_batch(family, examples, 4, 5, Shard(0, 1), seed=0, stream=stream)
        for examples, stream in ((forget, FORGET_STREAM), (retain, RETAIN_STREAM))
    )

    def predict(noisy, timesteps, prompts):
        return family.pipe.unet(noisy, timesteps, family.pipe.encode_prompt(prompts, "cpu", 1, False)[0]).sample

    student = predict(told.noisy, told.timesteps, told.captions)
    teacher = predict(told.noisy, told.timesteps, [ANCHORS[caption] for caption in told.captions]).detach()
    assert torch.allclose(losses["forget"], F.mse_loss(student, teacher), rtol=1e-4)
    assert torch.allclose(
        losses["retain"],
        0.3 * F.mse_loss(predict(kept.noisy, kept.timesteps, kept.captions), kept.target),
        rtol=1e-4,
    )


def test_gradient_does_not_flow_into_the_teacher(family, forget, retain):
    teacher = copy.deepcopy(family.denoiser)
    objective(family, teacher, forget, retain).losses(family.denoiser, 0, Shard(0, 1))["forget"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_losses_of_shards_average_to_those_of_the_whole(family, forget, retain):
    ours = objective(family, family.denoiser, forget, retain)
    whole = ours.losses(family.denoiser, 2, Shard(0, 1))
    halves = [ours.losses(family.denoiser, 2, Shard(k, 2)) for k in range(2)]
    for name in whole:
        assert torch.allclose(whole[name], (halves[0][name] + halves[1][name]) / 2, rtol=1e-4)


def gradients_of_the_mask(family, forget, table, indices):
    """What a batch of the mask's pass asks of every weight of the network."""
    total = 0
    for i in indices:
        key, shape = (0, MASK_STREAM, i), forget.mean.shape[1:]
        latent = forget.mean[i] + forget.std[i] * randn_for([(*key, 0)], shape)
        noise, timestep = randn_for([(*key, 1)], shape), randint_for([(*key, 2)], 1000)
        noisy = family.pipe.scheduler.add_noise(latent, noise, timestep)
        conditional, unconditional = (
            family.pipe.unet(noisy, timestep, **table([prompt])).sample for prompt in (forget.prompts[i], "")
        )
        total = total - F.mse_loss(noise, 8.5 * conditional - 7.5 * unconditional)
    found = torch.autograd.grad(total, list(family.denoiser.parameters()), allow_unused=True)
    named = zip(family.denoiser.named_parameters(), found, strict=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in named}


def test_mask_ranks_the_absolute_sum_of_signed_gradients(family, forget):
    """Against plain autograd, one example at a time, with the guided prediction written out."""
    config, table = SalUnConfig(batch_size=4, mask_guidance=7.5, mask_ratio=0.3), PromptTable(family, PROMPTS)
    masks, _ = saliency_mask(task_of(family), forget, table, config)
    sums = gradients_of_the_mask(family, forget, table, range(len(forget)))
    expected, _ = top_mask({name: total.abs() for name, total in sums.items()}, 0.3)
    agreement = sum(int((masks[name] == expected[name]).sum()) for name in masks)
    assert agreement / sum(mask.numel() for mask in masks.values()) > 0.999
    assert all(parameter.grad is None for parameter in family.denoiser.parameters())


@pytest.mark.parametrize(
    "setting", [{"mask_scope": "network"}, {"mask_accumulate": "absolute"}, {"legacy_inverted_mask": True}]
)
def test_masks_of_the_released_code(family, forget, setting):
    table = PromptTable(family, PROMPTS)
    every = dict(family.denoiser.named_parameters())
    trained = family.trainable_parameters("xattn" if "mask_scope" in setting else "full")
    batches = [gradients_of_the_mask(family, forget, table, rows) for rows in ([0, 1, 2, 3], [4, 5])]
    for name, parameter in every.items():
        parameter.requires_grad_(name in trained)
    config = SalUnConfig(batch_size=4, mask_ratio=0.3, **setting)
    masks, _ = saliency_mask(task_of(family), forget, table, config)
    assert set(masks) == set(trained)
    assert {name for name, parameter in every.items() if parameter.requires_grad} == set(trained)
    if "mask_accumulate" in setting:
        saliency = {name: batches[0][name].abs() + batches[1][name].abs() for name in every}
    else:
        saliency = {name: (batches[0][name] + batches[1][name]).abs() for name in every}
    inverted = "legacy_inverted_mask" in setting
    expected, _ = top_mask(saliency, 0.7 if inverted else 0.3)
    agreement = sum(int((masks[name] == (expected[name] != inverted)).sum()) for name in masks)
    assert agreement / sum(mask.numel() for mask in masks.values()) > 0.999
    if "mask_scope" not in setting:
        assert mask_density(masks) == pytest.approx(0.3, abs=1e-4)
        plain, _ = saliency_mask(task_of(family), forget, table, SalUnConfig(batch_size=4, mask_ratio=0.3))
        assert any(not torch.equal(masks[name], plain[name]) for name in masks)


def test_teacher_may_see_another_posterior_sample(family, forget, retain):
    model = family.denoiser
    same = {prompt: prompt for prompt in ANCHORS}
    one, two = (
        objective(family, model, forget, retain, same, legacy_two_samples=two).losses(model, 0, Shard(0, 1))["forget"]
        for two in (False, True)
    )
    assert one.item() < 1e-12 < 1e-6 < two.item()
    drawn = Examples(forget.mean, torch.zeros_like(forget.std), forget.prompts)
    assert (
        objective(family, model, drawn, retain, same, legacy_two_samples=True)
        .losses(model, 0, Shard(0, 1))["forget"]
        .item()
        < 1e-12
    )


@pytest.mark.parametrize("method", ["salun", "proximal", "gradient_ascent"])
@pytest.mark.parametrize(("order", "rows"), [("first", [0, 1, 0, 1, 0, 1]), ("sequential", [0, 1, 2, 3, 0, 1])])
def test_forget_pictures_come_in_the_order_that_is_asked_for(tiny_pipe, method, order, rows, monkeypatch):
    seen, draw = [], noising.noised

    def watch(family, examples, index, keys, max_timestep=None):
        if keys[0][1] in (FORGET_STREAM, gradient_ascent.FORGET_STREAM):
            seen.extend(index)
        return draw(family, examples, index, keys, max_timestep)

    monkeypatch.setattr(noising, "noised", watch)
    sfumato.unlearn(tiny_pipe, "a sneaker", method, verify=False, forget_order=order, **SMALL)
    assert seen[:6] == rows  # two pictures in each of three steps


@pytest.mark.parametrize("leaky", [False, True])
def test_masking_gradients_alone_lets_weight_decay_through(tiny_pipe, leaky):
    settings = {**SMALL, "optimizer": "adamw", "weight_decay": 0.1, "mask_ratio": 0.0}
    result = sfumato.unlearn(tiny_pipe, "a sneaker", verify=False, legacy_gradient_mask=leaky, **settings)
    same = [torch.equal(a, b) for a, b in zip(result.unet.parameters(), tiny_pipe.unet.parameters(), strict=True)]
    assert all(same) != leaky


def test_mask_covers_only_the_weights_that_are_trained(family, forget):
    names = set(family.trainable_parameters("xattn"))
    for name, parameter in family.denoiser.named_parameters():
        parameter.requires_grad_(name in names)
    config = SalUnConfig(parameters="xattn", mask_ratio=0.5)
    masks, _ = saliency_mask(task_of(family), forget, PromptTable(family, PROMPTS), config)
    assert set(masks) == names
    assert mask_density(masks) == pytest.approx(0.5, abs=1e-3)


def test_zero_mask_changes_no_bit_under_weight_decay(tiny_pipe, tmp_path):
    result = sfumato.unlearn(
        tiny_pipe,
        "a sneaker",
        mask_ratio=0.0,
        optimizer="adamw",
        weight_decay=0.5,
        output_dir=tmp_path / "out",
        **SMALL,
    )
    before, after = tiny_pipe.unet.state_dict(), result.unet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_masked_out_weights_keep_their_bits_and_the_others_move(tiny_pipe, tmp_path):
    result = sfumato.unlearn(
        tiny_pipe, "a sneaker", optimizer="adamw", weight_decay=0.5, output_dir=tmp_path / "out", **SMALL
    )
    masks, provenance = load_mask(tmp_path / "out" / "saliency_mask.safetensors", tiny_pipe.unet)
    after = dict(result.unet.named_parameters())
    moved = 0
    for name, before in tiny_pipe.unet.named_parameters():
        assert torch.equal(before[~masks[name]], after[name][~masks[name]])
        moved += int((before[masks[name]] != after[name][masks[name]]).sum())
    assert moved > 0.95 * sum(int(mask.sum()) for mask in masks.values())
    assert provenance["base"] == storage.fingerprint(tiny_pipe.unet.named_parameters())
    assert provenance["forget"] == "a sneaker" and provenance["ratio"] == 0.5
    assert provenance["versions"] == {name: version(name) for name in ("sfumato", "torch", "diffusers")}


def test_given_pipeline_keeps_its_weights_and_shares_its_other_parts(tiny_pipe):
    before = storage.fingerprint(tiny_pipe.unet.named_parameters())
    result = sfumato.unlearn(tiny_pipe, "a sneaker", **SMALL)
    assert storage.fingerprint(tiny_pipe.unet.named_parameters()) == before
    assert storage.fingerprint(result.unet.named_parameters()) != before
    assert result.vae is tiny_pipe.vae and result.text_encoder is tiny_pipe.text_encoder
    assert all(parameter.requires_grad for parameter in tiny_pipe.unet.parameters())


def test_result_is_a_folder_that_stock_diffusers_loads_with_its_manifest(tiny_pipe, tmp_path):
    from diffusers import StableDiffusionPipeline

    result = sfumato.unlearn(tiny_pipe, "a sneaker", output_dir=tmp_path / "out", seed=3, **SMALL)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert storage.fingerprint(loaded.unet.named_parameters()) == storage.fingerprint(result.unet.named_parameters())
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["method"] == "salun" and manifest["settings"]["seed"] == 3
    assert manifest["result_fingerprint"] == storage.fingerprint(result.unet.named_parameters())
    assert len(json.loads((tmp_path / "out" / "history.json").read_text())) == 3
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_the_manifest_counts_what_passes_through_the_denoiser(tiny_pipe, tmp_path):
    sfumato.unlearn(tiny_pipe, "a sneaker", output_dir=tmp_path / "out", **SMALL, example_guidance=3.0)
    drawing, mask = 8 * 2 * 2, 4 * 2  # guided pictures of two steps, and one guided pass over the forget set
    training = 3 * (2 + 2 + 2) + (2 + 2 + 2)  # student, retain and teacher; the last for the check of the loss
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["denoiser_evaluations"] == drawing + mask + training


def test_finished_result_is_never_overwritten(tiny_pipe, tmp_path):
    sfumato.unlearn(tiny_pipe, "a sneaker", output_dir=tmp_path, **SMALL)
    before = (tmp_path / "manifest.json").read_text()
    with pytest.raises(FileExistsError, match="finished model"):
        sfumato.unlearn(tiny_pipe, "a sneaker", output_dir=tmp_path, resume=True, **SMALL)
    assert (tmp_path / "manifest.json").read_text() == before


def test_velocity_prediction_trains_on_the_velocity(tiny_pipe_v, forget, retain):
    family = StableDiffusion(tiny_pipe_v)
    batch = noisy_batch(family, retain, 4, 0, Shard(0, 1), seed=0, stream=RETAIN_STREAM)
    keys = [(0, RETAIN_STREAM, k) for k in range(4)]
    noise = randn_for([(*key, 1) for key in keys], (4, 4, 4))
    latents = retain.latents(batch.rows, randn_for([(*key, 0) for key in keys], (4, 4, 4)))
    velocity = tiny_pipe_v.scheduler.get_velocity(latents, noise, batch.timesteps)
    assert torch.allclose(batch.target, velocity, atol=1e-5)
    losses = objective(family, family.denoiser, forget, retain, retain_weight=1.0).losses(
        family.denoiser, 0, Shard(0, 1)
    )
    embeddings = tiny_pipe_v.encode_prompt(batch.captions, "cpu", 1, False)[0]
    predicted = tiny_pipe_v.unet(batch.noisy, batch.timesteps, embeddings).sample
    assert torch.allclose(losses["retain"], F.mse_loss(predicted, velocity), rtol=1e-4)


def test_gradient_checkpointing_changes_nothing_but_memory(tiny_pipe):
    plain = sfumato.unlearn(tiny_pipe, "a sneaker", **SMALL)
    checkpointed = sfumato.unlearn(tiny_pipe, "a sneaker", gradient_checkpointing=True, **SMALL)
    for a, b in zip(plain.unet.parameters(), checkpointed.unet.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_bf16_autocast_trains_float32_weights(tiny_pipe):
    result = sfumato.unlearn(tiny_pipe, "a sneaker", mixed_precision="bf16", **SMALL)
    assert result.unet.dtype == torch.float32
    assert all(torch.isfinite(parameter).all() for parameter in result.unet.parameters())


def test_half_precision_pipeline_comes_back_in_half_precision(tiny_pipe):
    tiny_pipe.to(torch.bfloat16)
    result = sfumato.unlearn(tiny_pipe, "a sneaker", mask_ratio=0.5, **SMALL)
    assert result.unet.dtype == torch.bfloat16


def test_weights_that_half_precision_can_not_hold_are_not_made_infinite():
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.weight, 70_000.0)
    run._cast(model, torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="weight has a weight of .* beyond what torch.float16 can hold"):
        run._cast(model, torch.float16)


def test_image_folders_replace_the_model_s_own_pictures(tiny_pipe, tmp_path):
    from PIL import Image

    for kind, blue in ("forget", 10), ("retain", 200):
        (tmp_path / kind).mkdir()
        for number in range(3):
            Image.new("RGB", (20 + number, 12), (40 * number, 90, blue)).save(tmp_path / kind / f"{number}.png")
    rows = [{"file_name": f"{number}.png", "text": "my shoe"} for number in range(2)]
    (tmp_path / "forget" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = sfumato.unlearn(
        tiny_pipe, "a sneaker", forget_images=str(tmp_path / "forget"), retain_images=str(tmp_path / "retain"), **SMALL
    )
    assert not torch.equal(result.unet.conv_in.weight, tiny_pipe.unet.conv_in.weight)


def folders_of(tmp_path, captions):
    """A picture in each of two folders, with captions of their own."""
    from PIL import Image

    for kind, caption in captions.items():
        (tmp_path / kind).mkdir()
        Image.new("RGB", (20, 12), (90, 90, 10 if kind == "forget" else 200)).save(tmp_path / kind / "a.png")
        if caption:
            row = {"file_name": "a.png", "text": caption}
            (tmp_path / kind / "metadata.jsonl").write_text(json.dumps(row))
    return {f"{kind}_images": str(tmp_path / kind) for kind in captions}


@pytest.mark.parametrize(
    ("captions", "settings", "message"),
    [
        ({"forget": "a boot"}, {"retain": ["a boot"]}, "'a boot', a caption of .* is to be forgotten and retained"),
        ({"forget": "a boot", "retain": "a boot"}, {}, "'a boot', a caption of .* is to be forgotten and retained"),
        (
            {"forget": "bag"},
            {"anchor": "bag", "retain": ["a coat"]},
            "'bag', a caption of .* is what the concept is to become",
        ),
        ({"forget": "", "retain": "a pink sneaker"}, {}, "is to be retained but names 'sneaker'"),
    ],
)
def test_captions_that_contradict_each_other_are_refused(tiny_pipe, tmp_path, captions, settings, message):
    with pytest.raises(ValueError, match=message):
        sfumato.unlearn(tiny_pipe, "sneaker", **folders_of(tmp_path, captions), **settings, **SMALL)


def test_pictures_in_both_folders_or_one_folder_in_the_other_are_refused(tiny_pipe, tmp_path):
    folders = folders_of(tmp_path, {"forget": "", "retain": ""})
    (tmp_path / "retain" / "b.png").write_bytes((tmp_path / "forget" / "a.png").read_bytes())
    with pytest.raises(ValueError, match="a.png is to be forgotten and is the same picture as .*b.png"):
        sfumato.unlearn(tiny_pipe, "sneaker", **folders, **SMALL)
    (tmp_path / "retain" / "b.png").unlink()
    (tmp_path / "forget" / "in").mkdir()
    with pytest.raises(ValueError, match="lies in the other; give two apart"):
        sfumato.unlearn(tiny_pipe, "sneaker", **{**folders, "retain_images": str(tmp_path / "forget" / "in")}, **SMALL)


def test_a_bad_picture_to_retain_is_named_before_any_is_drawn(tiny_pipe, tmp_path, capfd):
    (tmp_path / "retain").mkdir()
    (tmp_path / "retain" / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match="a.png is not a readable picture"):
        sfumato.unlearn(tiny_pipe, "a sneaker", retain_images=str(tmp_path / "retain"), **SMALL)
    assert "draw" not in capfd.readouterr().err


def test_posterior_is_sampled_anew_at_each_visit():
    examples = Examples(torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2), ("a", "b"))
    noise = torch.randn(2, 1, 2, 2)
    assert torch.equal(examples.latents([1, 0], noise), noise)


def test_seed_decides_the_result(tiny_pipe):
    first, again, other = (sfumato.unlearn(tiny_pipe, "a sneaker", seed=seed, **SMALL) for seed in (1, 1, 2))
    assert storage.fingerprint(first.unet.named_parameters()) == storage.fingerprint(again.unet.named_parameters())
    assert storage.fingerprint(first.unet.named_parameters()) != storage.fingerprint(other.unet.named_parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "salsa"}, "Unknown method 'salsa'; choose from salun"),
        ({"mask_ratio": 1.2}, r"`mask_ratio` must lie in \[0, 1\], got 1.2"),
        ({"learning_rat": 1.0}, "Unknown setting 'learning_rat'. Did you mean 'learning_rate'"),
        ({"parameters": "attn"}, "`parameters` must be one of full, xattn"),
        ({"retain": []}, "retain set is empty"),
        ({"retain": [""]}, "retain set has an empty prompt"),
        ({"retain": ["a photo of a sneaker"]}, "is to be retained but names 'sneaker'"),
        ({"anchor": "sneaker"}, "anchor of 'sneaker' is the concept itself"),
        ({"forget_examples": 0}, "`forget_examples` must be at least 1"),
        ({"forget_images": "nowhere"}, "no image folder nowhere"),
        ({"recipe": "nothing"}, "no recipe nothing"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"batch_size": "2"}, "`batch_size` must be a whole number, got '2'"),
        ({"steps": "3"}, "`steps` must be a whole number, got '3'"),
        ({"example_guidance": float("nan")}, "`example_guidance` must be a finite number, got nan"),
        ({"learning_rate": 1e38}, "`learning_rate` must be a positive number of at most"),
        ({"gradient_accumulation_steps": 3, "batch_size": 4}, "can't be shared equally"),
    ],
)
def test_bad_input_gets_one_sentence_and_changes_nothing(tiny_pipe, tmp_path, settings, message):
    with pytest.raises((ValueError, OSError), match=message):
        sfumato.unlearn(tiny_pipe, "sneaker", output_dir=tmp_path / "out", **{**SMALL, **settings})
    assert not (tmp_path / "out" / "model_index.json").exists()


@pytest.mark.parametrize("phrase", ["", "  ", [], ["sneaker", ""]])
def test_empty_concept_is_refused(tiny_pipe, phrase):
    with pytest.raises(ValueError, match="nothing to forget"):
        sfumato.unlearn(tiny_pipe, phrase)


def test_mask_of_another_base_is_refused(tiny_pipe, tmp_path):
    sfumato.unlearn(tiny_pipe, "a sneaker", output_dir=tmp_path, **SMALL)
    with torch.no_grad():
        tiny_pipe.unet.conv_in.bias += 1
    with pytest.raises(ValueError, match="another base model"):
        sfumato.unlearn(tiny_pipe, "a sneaker", mask_path=str(tmp_path / "saliency_mask.safetensors"), **SMALL)


@pytest.mark.parametrize(("made", "used"), [("full", "xattn"), ("xattn", "full")])
def test_mask_of_other_parameters_is_refused_before_the_work(tiny_pipe, tmp_path, made, used):
    sfumato.unlearn(tiny_pipe, "a sneaker", output_dir=tmp_path / "one", parameters=made, **SMALL)
    mask = str(tmp_path / "one" / "saliency_mask.safetensors")
    with pytest.raises(ValueError, match="is a mask of other parameters: it has "):
        sfumato.unlearn(tiny_pipe, "a sneaker", output_dir=tmp_path / "two", parameters=used, mask_path=mask, **SMALL)
    assert not (tmp_path / "two" / "examples").exists()


@pytest.mark.parametrize("steps", [1, 5])
def test_run_that_ruins_the_weights_writes_neither_checkpoint_nor_result(tiny_pipe, tmp_path, steps):
    with pytest.raises(NonFiniteLossError, match="nothing of it was saved"):
        sfumato.unlearn(
            tiny_pipe,
            "a sneaker",
            output_dir=tmp_path,
            checkpoint_every=1,
            **{**SMALL, "steps": steps, "learning_rate": 1e30},
        )
    assert not list(tmp_path.glob("checkpoints/*"))
    assert not (tmp_path / "model_index.json").exists() and not (tmp_path / "result").exists()


def test_training_moves_the_concept_towards_its_anchor(family, forget, retain):
    """The property that matters, on a network small enough to fit: the student learns to see the anchor."""
    denoiser = copy.deepcopy(family.denoiser)
    ours = objective(family, denoiser, forget, retain, retain_weight=0.1)
    history = train(denoiser, ours, replace(TrainingConfig(), steps=150, learning_rate=3e-3))
    first, last = (sum(row["forget"] for row in rows) for rows in (history[:20], history[-20:]))
    assert last < 0.6 * first


def test_a_resumed_run_keeps_the_mask_that_its_weights_moved_under(tiny_pipe, tmp_path, monkeypatch):
    settings = {**SMALL, "steps": 4, "checkpoint_every": 2, "mask_ratio": 0.5, "verify": False}
    whole = sfumato.unlearn(tiny_pipe, "a sneaker", **settings)
    cast = run._cast
    monkeypatch.setattr(run, "_cast", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sfumato.unlearn(tiny_pipe, "a sneaker", output_dir=tmp_path / "out", **settings)
    monkeypatch.setattr(run, "_cast", cast)
    monkeypatch.setattr(salun, "saliency_mask", None)  # not made once more
    resumed = sfumato.unlearn(tiny_pipe, "a sneaker", output_dir=tmp_path / "out", resume=True, **settings)
    assert storage.fingerprint(resumed.unet.named_parameters()) == storage.fingerprint(whole.unet.named_parameters())


def test_mask_that_is_empty_leaves_a_manifest_that_is_json(tiny_pipe, tmp_path):
    sfumato.unlearn(tiny_pipe, "a sneaker", output_dir=tmp_path / "out", mask_ratio=0.0, verify=False, **SMALL)

    def refuse(constant):
        raise ValueError(constant)

    assert json.loads((tmp_path / "out" / "manifest.json").read_text(), parse_constant=refuse)["mask_density"] == 0


def test_masks_pictures_and_checkpoints_are_of_the_whole_model(tiny_pipe, tmp_path, monkeypatch):
    """Another text encoder draws other pictures and gives other gradients, whatever the denoiser."""
    settings = {**SMALL, "steps": 4, "checkpoint_every": 2, "mask_ratio": 0.5, "verify": False}
    sfumato.unlearn(tiny_pipe, "a sneaker", output_dir=tmp_path / "first", **settings)
    other = copy.deepcopy(tiny_pipe)
    with torch.no_grad():
        next(other.text_encoder.parameters()).add_(0.1)
    mask = str(tmp_path / "first" / "saliency_mask.safetensors")
    with pytest.raises(ValueError, match="computed for another base model"):
        sfumato.unlearn(other, "a sneaker", mask_path=mask, **settings)
    monkeypatch.setattr(run, "_cast", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sfumato.unlearn(tiny_pipe, "a sneaker", output_dir=tmp_path / "out", **settings)
    with pytest.raises(ValueError, match="checkpoint of another run: beside differ"):
        sfumato.unlearn(other, "a sneaker", output_dir=tmp_path / "out", resume=True, **settings)


def test_captions_to_retain_are_read_as_the_model_reads_them(tmp_path):
    from PIL import Image

    (tmp_path / "kept").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "kept" / "a.png")
    for caption in ("a trainer", "sneaker, red"):
        row = json.dumps({"file_name": "a.png", "text": caption})
        (tmp_path / "kept" / "metadata.jsonl").write_text(row)
        with pytest.raises(ValueError, match="is to be retained but"):
            sfumato.unlearn(
                sfumato.load("atelier"), "red sneaker" if "red" in caption else "sneaker",
                retain_images=str(tmp_path / "kept"), verify=False, forget_examples=2, example_steps=1, steps=1,
            )  # fmt: skip


@pytest.mark.parametrize("method", ["concept_ablation", "doco"])
def test_what_a_method_never_looks_at_is_said(tiny_pipe, tmp_path, caplog, method):
    from PIL import Image

    (tmp_path / "shoes").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "shoes" / "a.png")
    small = {
        "anchor_examples": 2, "retain_examples": 2, "example_steps": 1, "batch_size": 2, "steps": 1, "verify": False,
        **({"discriminator_warmup": 1} if method == "doco" else {}),
    }  # fmt: skip
    sfumato.unlearn(
        tiny_pipe,
        "a sneaker",
        method,
        retain=["a bag"],
        forget_images=str(tmp_path / "shoes"),
        prior="anchor",
        **small,
    )
    assert f"{method} has no use for `forget_images`" in caplog.text
    assert f"{method} has no use for what is to be retained with prior='anchor'" in caplog.text
