"""InfEditPipeline: edits of a real model, exactness, attention control by the equations, and what users get wrong."""

import json
import shutil
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

import sfumato
from sfumato.loading import assets_folder
from sfumato.pipelines import attention_control, pipeline_infedit
from sfumato.pipelines.attention_control import (
    AttentionControl,
    BlendWords,
    ThreeBranchAttnProcessor,
    align_tokens,
    find_word,
)
from sfumato.pipelines.pipeline_infedit import InfEditPipeline, InfEditPipelineOutput
from sfumato.randomness import generator_for
from sfumato.schedulers import noise_schedule, scheduling_ddcm
from sfumato.schedulers.scheduling_ddcm import DDCMScheduler

RED, BLUE = "a photo of a red sneaker", "a photo of a blue sneaker"


@pytest.fixture(scope="module")
def atelier():
    stock = sfumato.load("atelier")
    pipe = InfEditPipeline.from_pipe(stock)
    pipe.scheduler = DDCMScheduler.from_config(stock.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def render(number):
    (path,) = (assets_folder() / "renders").glob(f"{number:03d}-*.png")
    return Image.open(path)


def tensor_of(image):
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255).contiguous()


def text_encoder(model, **config):
    return model(
        CLIPTextConfig(
            vocab_size=639, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=24, bos_token_id=637, eos_token_id=638, pad_token_id=638, **config,
        )
    ).eval()  # fmt: skip


def tiny(kind, atelier, **unet_config):
    """A random pipeline of Stable Diffusion ("sd") or SDXL ("xl"), 16x16 pictures, 8x8 latents."""
    torch.manual_seed(0)
    parts = {"tokenizer": atelier.tokenizer, "text_encoder": text_encoder(CLIPTextModel)}
    width, extra = 8, {}
    if kind == "xl":
        second = text_encoder(CLIPTextModelWithProjection, projection_dim=6)
        parts |= {"tokenizer_2": atelier.tokenizer, "text_encoder_2": second}
        width, extra = 16, {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
        extra["projection_class_embeddings_input_dim"] = 6 * 4 + 6
    unet = diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8, "block_out_channels": (8, 16), "down_block_types": ("CrossAttnDownBlock2D",) * 2,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2, "layers_per_block": 1, "cross_attention_dim": width,
            "attention_head_dim": 2, "norm_num_groups": 4, **extra, **unet_config,
        }
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    stock = {"sd": diffusers.StableDiffusionPipeline, "xl": diffusers.StableDiffusionXLPipeline}[kind]
    none = dict.fromkeys(["safety_checker", "feature_extractor"]) if kind == "sd" else {}
    scheduler = diffusers.PNDMScheduler(steps_offset=1, skip_prk_steps=True, beta_schedule="scaled_linear")
    return stock(vae=vae, unet=unet, scheduler=scheduler, **parts, **none)


def infedit(stock):
    pipe = InfEditPipeline(**stock.components)
    pipe.scheduler = DDCMScheduler.from_config(stock.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=["sd", "xl"])
def pipe(request, atelier):
    return infedit(tiny(request.param, atelier))


def pictures(count=1, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def edit(pipe, image=None, source=RED, target=BLUE, **settings):
    settings = {"num_inference_steps": 3, "output_type": "latent", "generator": generator_for(0), **settings}
    return pipe(pictures() if image is None else image, source, target, **settings).images


def reconstruction(pipe, image):
    """What the autoencoder makes of pictures in [0, 1]: scaled latents, and pictures again."""
    scale = pipe.vae.config.scaling_factor
    with torch.no_grad():
        latents = scale * pipe.vae.encode(2 * image - 1).latent_dist.mode()
        return latents, (pipe.vae.decode(latents / scale).sample / 2 + 0.5).clamp(0, 1)


# ---------------------------------------------------------------- a real model


def test_colours_change_and_garments_and_styles_stay(atelier):
    judge = sfumato.Judge.load(assets_folder() / "judge")
    edits = [
        (168, RED, BLUE),
        (192, "a photo of a red bag", "a photo of a green bag"),
        (100, "a photo of a blue coat", "a photo of a red coat"),
        (186, "a mosaic of a red sneaker", "a mosaic of a cyan sneaker"),
        (78, "a sketch of a red dress", "a sketch of a magenta dress"),
        (37, "a silhouette of a yellow trouser", "a silhouette of a blue trouser"),
    ]
    images, sources, targets = zip(*edits, strict=True)
    out = atelier(
        [render(number) for number in images], list(sources), list(targets), num_inference_steps=8,
        generator=[generator_for(seed) for seed in range(6)], output_type="pt",
    ).images  # fmt: skip
    found = [" ".join(words[domain] for domain in ("style", "colour", "garment")) for words in judge.describe(out)]
    wanted = [" ".join(target.replace(" of a ", " ").split()[1:]) for target in targets]
    assert sum(a == b for a, b in zip(found, wanted, strict=True)) >= 5, found


@pytest.mark.parametrize(
    "settings",
    [
        {"source_guidance_scale": 2.0},
        {"target_guidance_scale": 1.0, "strength": 0.6},
        {"source_guidance_scale": 2.0, "eta": 0.3, "attention_control": False},
    ],
    ids=str,
)
def test_equal_prompts_give_the_autoencoder_s_reconstruction_to_the_bit(atelier, settings):
    image = render(168)
    out = atelier(image, RED, RED, num_inference_steps=5, output_type="pt", generator=generator_for(0), **settings)
    assert torch.equal(out.images, reconstruction(atelier, tensor_of(image))[1])


def test_the_words_to_blend_keep_the_rest_of_the_picture(atelier):
    """With no pixel above the threshold all is the mutual branch, with all of them above the source's it is kept."""
    pixels = tensor_of(render(168))
    source = reconstruction(atelier, pixels)[0]
    chunks = []

    def watch(pipe, index, timestep, tensors):
        chunks.append(tensors["latents"].chunk(3))
        return tensors

    settings = {"image": pixels, "callback_on_step_end": watch, "pipe": atelier}
    edit(**settings, target_blend_words="blue", target_blend_threshold=1.0)
    assert [torch.equal(target, mutual) for _, target, mutual in chunks] == [False, True, True]
    assert torch.equal(edit(**settings, source_blend_words="sneaker", source_blend_threshold=0.0), source)
    chunks.clear()
    edit(**settings, source_blend_words="sneaker", target_blend_words="sneaker", target_blend_threshold=0.0)
    assert torch.equal(chunks[-1][1], chunks[-1][2]) and not torch.equal(chunks[1][1], chunks[1][2])


# ---------------------------------------------------------------- any model


def test_equal_prompts_and_scales_give_the_latents_back_to_the_bit(pipe):
    source = reconstruction(pipe, pictures(2))[0]
    for settings in ({"source_guidance_scale": 2.0}, {"target_guidance_scale": 1.0}):
        assert torch.equal(edit(pipe, pictures(2), target=RED, eta=0.5, **settings), source)
    assert not torch.allclose(edit(pipe, pictures(2)), source, atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"target_guidance_scale": 1.0}, {"attention_control": False}], ids=str)
def test_a_picture_does_not_depend_on_its_batch(pipe, settings):
    prompts = [RED, "a sketch of a green boot"], [BLUE, "a small mosaic of a green bag"]
    together = edit(
        pipe, list(pictures(2)), *prompts, generator=[generator_for(0), generator_for(1)],
        negative_prompt=["a bag", None], **settings,
    )  # fmt: skip
    for k, negative in enumerate(["a bag", None]):
        alone = edit(
            pipe, pictures(2)[k], prompts[0][k], prompts[1][k], generator=[generator_for(k)], negative_prompt=negative,
            **settings,
        )  # fmt: skip
        assert torch.allclose(alone[0], together[k], atol=5e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_one_picture_serves_many_prompts_and_blend_words_go_by_the_picture(pipe):
    generators = [generator_for(0) for _ in range(3)]
    targets, words = [BLUE, "a photo of a green boot", BLUE], ["blue", None, None]
    plain = edit(pipe, target=targets, generator=[generator_for(0) for _ in range(3)])
    blended = edit(pipe, target=targets, target_blend_words=words, target_blend_threshold=1.0, generator=generators)
    assert torch.allclose(plain[1:], blended[1:], atol=1e-6) and not torch.allclose(plain[0], blended[0], atol=1e-4)
    assert torch.allclose(plain[0], plain[2], atol=1e-5)


def test_the_network_sees_the_branches_in_order_and_nothing_is_left_behind(pipe):
    before, seen = dict(pipe.unet.attn_processors), []
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0].shape[0], kwargs["encoder_hidden_states"])), with_kwargs=True
    )
    for settings in ({}, {"target_guidance_scale": 1.0}, {"attention_control": False}):
        edit(pipe, **settings)
    hook.remove()
    assert [count for count, _ in seen] == [6] * 3 + [3] * 3 + [4] * 3
    guided, plain = seen[0][1], seen[3][1]
    assert torch.equal(guided[3:], plain) and torch.equal(plain[0], plain[2]) and not torch.equal(plain[0], plain[1])
    assert torch.equal(guided[0], guided[1]) and torch.equal(guided[0], guided[2])
    assert pipe.unet.attn_processors == before
    with pytest.raises(RuntimeError, match="stop"):
        edit(pipe, callback_on_step_end=lambda *arguments: (_ for _ in ()).throw(RuntimeError("stop")))
    assert pipe.unet.attn_processors == before
    assert pipe.scheduler._source is None


def test_strength_starts_later_and_seeds_repeat(pipe):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    first, again = (edit(pipe, latents=noise, num_inference_steps=5, strength=0.6) for _ in range(2))
    assert torch.equal(first, again) and pipe.num_timesteps == 3
    assert not torch.allclose(edit(pipe, latents=noise, generator=generator_for(1)), edit(pipe, latents=noise))
    assert not torch.allclose(edit(pipe, latents=noise), edit(pipe))


def test_an_lcm_s_unet_edits_too(atelier):
    assert torch.isfinite(edit(infedit(tiny("sd", atelier, time_cond_proj_dim=8)))).all()


def test_a_velocity_model_without_terminal_signal_edits_too(atelier):
    pipe = infedit(tiny("sd", atelier))
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    pipe.scheduler = DDCMScheduler.from_config(pipe.scheduler.config, **config)
    source = reconstruction(pipe, pictures())[0]
    assert torch.equal(edit(pipe, target=RED, source_guidance_scale=2.0), source)
    assert torch.isfinite(edit(pipe)).all()


def test_half_precision_runs_and_a_vae_that_overflows_in_it_is_widened_and_put_back(atelier):
    pipe = infedit(tiny("sd", atelier)).to(torch.bfloat16)
    assert torch.isfinite(edit(pipe)).all()
    pipe.vae.to(torch.float16)
    images = edit(pipe, output_type="pt")
    assert torch.isfinite(images).all() and pipe.vae.dtype == torch.float16


@pytest.mark.parametrize(
    ("output_type", "kind", "shape"), [("np", np.ndarray, (2, 16, 16, 3)), ("pt", torch.Tensor, (2, 3, 16, 16))]
)
def test_pictures_come_as_asked(pipe, output_type, kind, shape):
    images = edit(pipe, pictures(2), output_type=output_type)
    assert isinstance(images, kind) and tuple(images.shape) == shape


def test_pil_pictures_and_tuples(pipe):
    image = Image.fromarray((pictures()[0].permute(1, 2, 0).numpy() * 255).astype("uint8"))
    output = pipe(image, RED, BLUE, num_inference_steps=1)
    assert isinstance(output, InfEditPipelineOutput) and output.images[0].size == (16, 16)
    images, nsfw = pipe(image.convert("RGBA"), RED, BLUE, num_inference_steps=1, return_dict=False)
    assert images[0].size == (16, 16) and nsfw is None


def test_pictures_need_not_be_square(pipe):
    image = torch.rand(1, 3, 10, 22)
    out = edit(pipe, image, target_blend_words="blue", source_blend_words="sneaker")
    assert out.shape == (1, 4, 5, 11)


def test_callbacks_may_change_the_latents_and_stop_the_run(pipe):
    seen = []

    def change(pipe, index, timestep, tensors):
        seen.append(index)
        pipe._interrupt = index == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    out = edit(pipe, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    assert seen == [0, 1] and (out == 0).all()


def test_a_safety_checker_is_run(atelier):
    torch.manual_seed(0)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 8, "patch_size": 4}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(projection_dim=4, vision_config=vision, text_config=small)
    ).eval()
    pipe = infedit(tiny("sd", atelier))
    size = {"height": 8, "width": 8}
    pipe.register_modules(safety_checker=checker, feature_extractor=CLIPImageProcessorPil(size=size, crop_size=size))
    for weight, verdict in ((2.0, False), (-2.0, True)):  # a cosine is never above 2, always above -2
        checker.concept_embeds_weights.data.fill_(weight)
        checker.special_care_embeds_weights.data.fill_(2.0)
        output = pipe(pictures(), RED, BLUE, num_inference_steps=1, output_type="pt")
        assert output.nsfw_content_detected == [verdict]
        assert bool((output.images == 0).all()) == verdict


# ---------------------------------------------------------------- attention control


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ([1, 5, 6, 2], [1, 5, 6, 2], [0, 1, 2, 3, 4, 5, 6, 7]),
        ([1, 5, 6, 2], [1, 5, 7, 2], [0, 1, -1, 3, 4, 5, 6, 7]),
        ([1, 5, 6, 2], [1, 5, 8, 6, 2], [0, 1, -1, 2, 3, 4, 5, 6]),  # one token less of padding
        ([1, 5, 8, 6, 2], [1, 5, 6, 2], [0, 1, 3, 4, 5, 6, 7, -1]),
        ([1, 2], [1, 5, 5, 5, 5, 5, 5, 2], [0, -1, -1, -1, -1, -1, -1, 1]),
    ],
)
def test_tokens_are_aligned_with_those_that_both_prompts_have(source, target, expected):
    assert align_tokens(source, target, 8) == expected


def test_words_are_found_wherever_they_occur():
    assert find_word([1, 5, 6, 7, 5, 6, 2], [5, 6]) == [1, 2, 4, 5]
    assert find_word([1, 5, 6], [6, 5]) == [] == find_word([1, 5], [])


def attend(query, key, value):
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value


@pytest.fixture
def layer():
    torch.manual_seed(0)
    made = diffusers.models.attention_processor.Attention(query_dim=8, heads=2, dim_head=4).double()
    made.requires_grad_(False)
    return made


def by_hand(layer, x, context):
    """Queries, keys and values `(halves, 3, B, heads, tokens, channels)`."""
    projected = layer.to_q(x), layer.to_k(context), layer.to_v(context)
    return [p.unflatten(-1, (2, 4)).transpose(1, 2).unflatten(0, (-1, 3, 2)) for p in projected]


def joined(layer, out):
    return layer.to_out[0](torch.cat(list(out.flatten(0, 2).transpose(1, 2).split(1, 2)), -1).squeeze(2))


ALIGNMENT = torch.tensor([[0, -1, 1, 2, 3], [0, 1, -1, 3, 4]])


@pytest.mark.parametrize("progress", [0.2, 0.3])
@pytest.mark.parametrize("halves", [1, 2])
def test_self_attention_mixes_the_branches_as_the_paper_says(layer, halves, progress):
    control = AttentionControl(ALIGNMENT, 0.3, 0.0, (3, 3))
    control.progress = progress
    x = torch.randn(halves * 6, 9, 8, dtype=torch.float64)
    (qs, qt, _), (ks, kt, _), (vs, vt, _) = (p.unbind(1) for p in by_hand(layer, x, x))
    if progress < 0.3:
        expected = [attend(qs, ks, vs), attend(qs, ks, vt), attend(qs, ks, vs)]
    else:
        expected = [attend(qs, ks, vs), attend(qt, kt, vt), attend(qt, ks, vs)]
    out = ThreeBranchAttnProcessor(control)(layer, x)
    assert torch.allclose(out, joined(layer, torch.stack(expected, 1)), atol=1e-12)


@pytest.mark.parametrize("progress", [0.5, 0.6])
@pytest.mark.parametrize("halves", [1, 2])
def test_cross_attention_takes_the_source_s_maps_for_the_words_that_both_prompts_have(layer, halves, progress):
    control = AttentionControl(ALIGNMENT, 0.0, 0.5, (3, 3))
    control.progress = progress
    x, context = (torch.randn(halves * 6, n, 8, dtype=torch.float64) for n in (9, 5))
    query, key, value = by_hand(layer, x, context)
    maps = (query @ key.mT / 2).softmax(-1)  # (halves, 3, B, heads, 9, 5)
    if progress <= 0.5:
        for sample, row in enumerate(ALIGNMENT.tolist()):
            for token, position in enumerate(row):
                if position >= 0:  # in the conditional half alone
                    maps[-1, 1, sample, ..., token] = maps[-1, 0, sample, ..., position]
    out = ThreeBranchAttnProcessor(control)(layer, x, context)
    assert torch.allclose(out, joined(layer, maps @ value), atol=1e-12)


def test_masks_are_the_maps_of_the_words_relative_to_their_largest():
    source = torch.tensor([[False, True, True, False, False]])
    target = torch.tensor([[False, True, True, False, False]])
    alignment = torch.tensor([[0, -1, 2, 3, 4]])  # token 2 is in both prompts
    control = AttentionControl(alignment, 0.0, 0.0, (4, 4), BlendWords(source, target, 0.75, 0.75))
    control.progress = 1.0
    maps = torch.zeros(3, 1, 2, 4, 5)  # (3, B, heads, 2 x 2 queries, tokens)
    maps[0, ..., 1] = torch.tensor([1.0, 0.5, 0.0, 0.0])  # the source's own word
    maps[1, ..., 1] = torch.tensor([0.0, 0.0, 1.0, 0.0])  # the target's new word
    maps[2, ..., 2] = torch.tensor([0.0, 0.0, 0.0, 1.0])  # the common word, in the mutual branch
    assert torch.equal(control.replaced(maps), maps)  # too late to replace
    assert control.wants_maps(1024) and not control.wants_maps(1025)
    masks = control.masks()
    assert masks.shape == (3, 1, 1, 4, 4)
    assert [mask[0, 0][[0, 0, 3, 3], [0, 3, 0, 3]].tolist() for mask in masks] == [
        [True, False, False, False],
        [False, False, True, True],
        [False, False, False, True],
    ]
    assert control.masks(least=1.0)[0].any() and not control.masks(least=1.0)[1:].any()


# ---------------------------------------------------------------- where pipelines come from


def test_it_starts_from_a_stock_pipeline_and_shares_its_parts(pipe, atelier):
    kind = "xl" if pipe.text_encoder_2 is not None else "sd"
    stock = tiny(kind, atelier).to(torch.bfloat16)
    made = InfEditPipeline.from_pipe(stock, scheduler=DDCMScheduler.from_config(stock.scheduler.config))
    assert made.unet is stock.unet and made.text_encoder_2 is getattr(stock, "text_encoder_2", None)
    assert stock.unet.dtype == torch.bfloat16
    made.set_progress_bar_config(disable=True)
    assert torch.isfinite(edit(made)).all()


def test_it_survives_its_folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = InfEditPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.allclose(edit(loaded), edit(pipe), atol=5e-4)  # rounding goes by where weights lie in memory


def test_a_repository_that_ships_the_files_loads_them_as_remote_code(atelier, tmp_path, monkeypatch):
    folder = tmp_path / "repo"
    infedit(tiny("sd", atelier)).save_pretrained(folder)
    for module in (scheduling_ddcm, noise_schedule):
        shutil.copy(module.__file__, folder / "scheduler")
    for module in (pipeline_infedit, attention_control):
        shutil.copy(module.__file__, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "_class_name": ["pipeline_infedit", "InfEditPipeline"],
        "scheduler": ["scheduling_ddcm", "DDCMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    modules = tmp_path / "modules"
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(modules)
    for module in [module for module in sys.modules if module.startswith("diffusers_modules")]:
        monkeypatch.delitem(sys.modules, module)  # what other tests brought
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert type(pipe).__module__ != pipeline_infedit.__name__ and type(pipe).__name__ == "InfEditPipeline"
    pipe.set_progress_bar_config(disable=True)
    assert torch.isfinite(edit(pipe)).all()


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 0.0}, r"`strength` must lie in \(0, 1\]"),
        ({"strength": 1.5}, r"`strength` must lie in \(0, 1\]"),
        ({"strength": 0.1}, "keep one of the 3 steps at least, got 0.1"),
        ({"num_inference_steps": 0}, r"`num_inference_steps` must lie in \[1, 50\]"),
        ({"eta": -0.1}, r"`eta` must lie in \[0, 1\], got -0.1"),
        ({"eta": 1.1}, r"`eta` must lie in \[0, 1\], got 1.1"),
        ({"cross_replace_steps": 2}, r"`cross_replace_steps` must lie in \[0, 1\]"),
        ({"self_replace_steps": float("nan")}, r"`self_replace_steps` must lie in \[0, 1\]"),
        ({"target_blend_threshold": -1}, r"`target_blend_threshold` must lie in \[0, 1\]"),
        ({"source": []}, "`source_prompt` must be a text or a list of at least one"),
        ({"target": []}, "`target_prompt` must be a text or a list of at least one"),
        ({"target": None}, "`target_prompt` must be a text or a list of at least one, got None"),
        ({"negative_prompt": [3]}, "`negative_prompt` must be a text"),
        ({"source": [RED] * 2, "target": [BLUE] * 3}, "got 2 of `source_prompt`, 3 of `target_prompt`"),
        ({"image": pictures(2), "target": [BLUE] * 3}, "got 2 of `image`, 3 of `target_prompt`"),
        ({"image": [pictures()[0], pictures(size=8)[0]]}, "one size, got 2 of 2 sizes"),
        ({"image": []}, "`image` must be pictures of one size, got 0"),
        ({"image": "a.png"}, "`image` must be PIL images, tensors or arrays, got str"),
        ({"image": torch.rand(1, 4, 8, 8)}, r"RGB pictures \(B, 3, H, W\), got the shape \(1, 4, 8, 8\)"),
        ({"generator": [generator_for(0)] * 2}, "`generator` must be one or a list of 1, one a picture, got 2"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"`latents` must have the shape \(1, 4, 4, 4\), got \(1, 4, 8, 8\)"),
        ({"output_type": "jpeg"}, "`output_type` must be"),
        (
            {"target_blend_words": "boot"},
            "The word 'boot' of `target_blend_words` is not in the prompt 'a photo of a b",
        ),
        ({"target_blend_words": "blue", "attention_control": False}, "Blending needs the maps"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"not \['noise'\]"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_what_cannot_work_is_refused_before_any_network_runs(atelier, settings, message):
    pipe, ran = atelier, []
    hooks = [
        m.register_forward_pre_hook(lambda *_: ran.append(1)) for m in (pipe.unet, pipe.text_encoder, pipe.vae.encoder)
    ]
    with pytest.raises(ValueError, match=message):
        edit(pipe, **settings)
    for hook in hooks:
        hook.remove()
    assert ran == []


def test_unsuited_pipelines_are_refused_with_the_reason(atelier):
    stock = tiny("sd", atelier)
    with pytest.raises(ValueError, match=r"has a PNDMScheduler: set `pipe.scheduler = DDCMScheduler.from_config"):
        edit(InfEditPipeline(**stock.components))
    with pytest.raises(ValueError, match="UNet of 4 channels, this one takes 9"):
        edit(infedit(tiny("sd", atelier, in_channels=9)))
    with pytest.raises(ValueError, match="SDXL needs two text encoders"):
        xl = infedit(tiny("xl", atelier))
        xl.text_encoder_2 = None
        edit(xl)
    pixel = diffusers.DDPMPipeline(diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        layers_per_block=1, norm_num_groups=4,
    ), diffusers.DDPMScheduler())  # fmt: skip
    with pytest.raises(ValueError, match="DDPMPipeline has no text_encoder, tokenizer, vae"):
        InfEditPipeline.from_pipe(pixel)


def test_attention_that_the_control_would_undo_is_refused(atelier):
    pipe = infedit(tiny("sd", atelier))
    pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnAddedKVProcessor())
    with pytest.raises(ValueError, match="this one has AttnAddedKVProcessor: unload adapters first"):
        edit(pipe)
