import io
import json
from contextlib import redirect_stderr

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sfumato
from sfumato.pipelines.restoration import (
    condition_channels,
    condition_on_grid,
    degraded_start,
    encode_pixels,
    network_input,
    network_output,
    pad_to_multiple,
)

KINDS = ("resshift", "rddm")
RESSHIFT_CHAINS = {"min_noise_level": 0.1, "kappa": 1.0, "power": 0.5, "etas_end": 0.9, "normalize_input": False}
RDDM_CHAINS = {"sum_scale": 1.0, "alpha_schedule": "average", "alpha_ratio": 2.0, "beta_schedule": "linear"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(*shape, seed=0):
    """Random pictures whose values a byte can hold."""
    return torch.randint(0, 256, shape, generator=seeded(seed)).float() / 255


def restore(pipe, image, seed=0, **call):
    return pipe(image, generator=seeded(seed), **{"output_type": "pt", **call}).images


# ------------------------------------------------------------ how a network sees a picture


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@pytest.mark.parametrize("heads", [1, 2])
def test_folding_is_undone_head_by_head(patch_size, heads):
    parts = [torch.randn(2, 3, 8, 8, generator=seeded(head)) for head in range(heads)]
    folded = [F.pixel_unshuffle(part, patch_size) for part in parts]
    unfolded = network_output(torch.cat(folded, dim=1), patch_size)
    assert torch.equal(unfolded, torch.cat(parts, dim=1))
    assert torch.equal(network_output(network_input(parts[0], None, patch_size), patch_size), parts[0])


def test_a_network_is_given_state_before_condition():
    state, condition = torch.randn(1, 3, 4, 4), torch.randn(1, 4, 4, 4, dtype=torch.float64)
    joined = network_input(state, condition, 1)
    assert joined.dtype == torch.float32
    assert torch.equal(joined[:, :3], state) and torch.equal(joined[:, 3:], condition.float())
    assert network_input(state, condition, 2).shape == (1, 28, 2, 2)


def test_a_start_of_the_same_size_is_the_picture_and_a_constant_stays_one():
    lq = torch.rand(1, 3, 5, 7)
    assert degraded_start(lq, 1) is lq
    assert degraded_start(lq, 3).shape == (1, 3, 15, 21)
    assert torch.allclose(degraded_start(torch.full((1, 3, 4, 4), 0.3), 4), torch.tensor(0.3), atol=1e-6)


@pytest.mark.parametrize(("side", "grid"), [(16, 16), (16, 4), (4, 16)])
def test_a_condition_comes_to_the_grid_of_the_chain_with_its_mask(side, grid):
    lq, mask = torch.rand(2, 3, side, side), torch.ones(2, 1, side, side)
    scale, shrink = (grid // side, 1) if grid > side else (1, side // grid)
    told = condition_on_grid(lq, mask, (grid, grid))
    assert told.shape == (2, condition_channels(scale, shrink, masked=True), grid, grid)
    assert told[:, -1].mean() == pytest.approx(1, abs=1e-6)  # of the mask
    if grid <= side:  # nothing is lost
        assert torch.equal(F.pixel_shuffle(told, shrink), torch.cat([lq, mask], dim=1))


def test_conditions_that_fit_no_grid_are_refused():
    with pytest.raises(ValueError, match="by a whole factor"):
        condition_on_grid(torch.rand(1, 3, 6, 6), None, (4, 4))
    with pytest.raises(ValueError, match="differ in size"):
        condition_on_grid(torch.rand(1, 3, 4, 4), torch.ones(1, 1, 2, 2), (4, 4))
    with pytest.raises(ValueError, match="`scale` 3 must divide"):
        condition_channels(3, 4, masked=False)


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (5, 3), (8, 8)])
def test_padding_keeps_the_picture_and_mirrors_it(size):
    picture = torch.rand(1, 3, *size)
    padded = pad_to_multiple(picture, 8)
    assert padded.shape[-2] % 8 == padded.shape[-1] % 8 == 0
    assert torch.equal(padded[..., : size[0], : size[1]], picture)
    if size[0] == 5:
        assert torch.equal(padded[..., 5, :3], picture[..., 3, :])
    if size == (8, 8):
        assert padded is picture


# ------------------------------------------------------------ sizes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1, 3, 4])
def test_pictures_of_every_size_come_back_at_theirs(restorers, kind, scale):
    pipe = restorers.pipe(kind, scale=scale, patch_size=2)
    for height, width in [(1, 1), (1, 9), (5, 3), (8, 8), (2, 23)]:
        image = Image.new("RGB", (width, height), (200, 30, 90))
        found = pipe(image, num_inference_steps=2, generator=seeded()).images[0]
        assert (found.size, found.mode) == ((scale * width, scale * height), "RGB")


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_many_sizes_come_back_in_the_order_of_the_call_and_as_if_alone(restorers, kind):
    pipe = restorers.pipe(kind, patch_size=2)
    images = [pictures(3, *size, seed=size[0]) for size in [(8, 8), (5, 3), (8, 8), (3, 5)]]
    steps = {"num_inference_steps": 3, "output_type": "pt"}
    together = pipe(images, generator=[seeded(index) for index in range(4)], **steps).images
    assert isinstance(together, list)
    for index, image in enumerate(images):
        alone = pipe(image, generator=[seeded(index)], **steps).images
        assert together[index].shape == image.shape
        assert torch.allclose(together[index], alone[0], atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_of_a_seed_is_the_one_that_latents_can_give(restorers, kind):
    pipe = restorers.pipe(kind, scale=2, patch_size=2)
    shape = pipe.latents_shape(5, 3)
    assert shape == (3, 12, 8)
    noise = torch.randn(1, *shape, generator=seeded(3))
    settings = {"eta": 0.0} if kind == "rddm" else {}
    if kind == "resshift":  # it draws later too: go on from where the seed's stream is then
        later = seeded(3)
        torch.randn(1, *shape, generator=later)
        settings["generator"] = later
    given = pipe(pictures(3, 5, 3), num_inference_steps=3, latents=noise, output_type="pt", **settings).images
    assert torch.equal(given, restore(pipe, pictures(3, 5, 3), seed=3, num_inference_steps=3))


def test_one_noise_serves_all_pictures_of_a_size(restorers):
    pipe = restorers.pipe("rddm")
    noise = torch.randn(1, 3, 4, 4, generator=seeded())
    same = pictures(3, 4, 4).expand(2, -1, -1, -1)
    found = pipe(same, num_inference_steps=2, latents=noise, output_type="pt").images
    assert torch.allclose(found[0], found[1], atol=1e-6)
    with pytest.raises(ValueError, match="fits pictures of one size, got 2 sizes"):
        pipe([pictures(3, 4, 4), pictures(3, 8, 4)], latents=noise)
    with pytest.raises(ValueError, match=r"must have the shape \(2, 3, 4, 4\), or \(1, 3, 4, 4\)"):
        pipe(same, latents=torch.zeros(1, 3, 8, 8))


def test_what_was_padded_at_the_right_and_the_bottom_is_cropped(restorers):
    pipe = restorers.pipe(scale=2, patch_size=2, network=restorers.oracle)
    answer = pictures(1, 3, 12, 8)
    pipe.unet.answer = answer * 2 - 1
    found = restore(pipe, pictures(3, 5, 3, seed=1))
    assert torch.allclose(found, answer[..., :10, :6], atol=1e-6)


# ------------------------------------------------------------ tiles


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", [{}, {"tile_overlap": 0}, {"tile_overlap": 7}, {"tile_batch_size": 3}])
def test_tiles_of_a_pointwise_network_give_what_the_whole_gives(restorers, kind, call):
    pipe = restorers.pipe(kind, scale=2, patch_size=2, network=restorers.pointwise)
    image = pictures(2, 3, 11, 17)
    whole = restore(pipe, image, num_inference_steps=3, tile_size=0)
    calls, pipe.unet.calls = pipe.unet.calls, 0
    tiled = restore(pipe, image, num_inference_steps=3, tile_size=8, **call)
    assert calls == 3 < pipe.unet.calls  # more tiles than it is given at once
    assert torch.allclose(tiled, whole, atol=1e-5)


def test_tiles_are_as_large_as_the_network_was_trained_on(restorers):
    seen = []
    pipe = restorers.pipe("resshift", patch_size=2, network=restorers.pointwise, size=4)
    pipe.unet.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))
    restore(pipe, pictures(3, 20, 6), num_inference_steps=1)
    # 8 pixels are 4 x 4 places of the network; tiles begin at 0, 4, 8, 12 of 20 rows, and the one column is all
    assert seen == [(4, 24, 4, 4)]
    restore(pipe, pictures(3, 5, 7), num_inference_steps=1)
    assert seen[1:] == [(1, 24, 4, 4)]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ({"tile_size": 6}, "`tile_size` must be a whole multiple of 4 pixels"),
        ({"tile_size": -4}, "`tile_size` must be a whole multiple of 4 pixels"),
        ({"tile_size": 8, "tile_overlap": 8}, "`tile_overlap` must be from 0 to below the tile's 8 pixels, got 8"),
        ({"tile_size": 8, "tile_overlap": -1}, "`tile_overlap` must be from 0"),
        ({"tile_batch_size": -1}, "`tile_batch_size` must be 0 or more, got -1"),
    ],
)
def test_impossible_tiles_are_refused(restorers, call, sentence):
    with pytest.raises(ValueError, match=sentence):
        restorers.pipe(patch_size=2)(pictures(3, 16, 16), **call)


# ------------------------------------------------------------ masks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "I;16"])
def test_what_is_not_masked_stays_to_the_bit(restorers, kind, mode):
    pipe = restorers.pipe(kind, masked=True)
    values = (pictures(len(Image.new(mode, (1, 1)).getbands()), 6, 5) * 255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(values if mode in ("RGB", "RGBA") else values[..., 0])
    if mode == "I;16":
        image = Image.fromarray(values[..., 0].astype("uint16") * 256 + values[::-1, ..., 0])
    mask = torch.zeros(6, 5)
    mask[1:4, 2:4] = 1
    found = pipe(image, mask, num_inference_steps=2, generator=seeded()).images[0]
    assert found.mode == mode
    before, after = (torch.tensor(list(one.get_flattened_data())).reshape(6, 5, -1) for one in (image, found))
    assert torch.equal(before[mask == 0], after[mask == 0])
    assert not torch.equal(before[mask == 1], after[mask == 1])


def test_what_is_not_masked_stays_to_the_last_bit_of_floats(restorers):
    image, mask = pictures(1, 3, 6, 5), torch.zeros(6, 5)
    mask[:2] = 1
    found = restore(restorers.pipe(masked=True), image, mask_image=mask, num_inference_steps=2)
    assert torch.equal(found[..., 2:, :], image[..., 2:, :])
    assert not torch.equal(found[..., :2, :], image[..., :2, :])


def test_a_network_is_told_where_holes_are(restorers):
    pipe = restorers.pipe(masked=True, network=restorers.oracle)
    pipe.unet.answer = torch.zeros(1, 3, 4, 6)
    image, mask = pictures(1, 3, 4, 6), torch.zeros(4, 6)
    mask[1, 2:] = 1
    restore(pipe, image, mask_image=mask, num_inference_steps=1)
    told = pipe.unet.seen[0][0, 3:]
    assert torch.equal(told[3], mask * 2 - 1)
    assert torch.equal(told[:3], torch.where(mask > 0, -1, image[0] * 2 - 1))


def test_what_is_masked_is_not_seen(restorers):
    pipe = restorers.pipe(masked=True)
    image, mask = pictures(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)
    mask[..., 2:5, 3:7] = 1
    other = torch.where(mask > 0, 1 - image, image)
    results = [restore(pipe, one, mask_image=mask, num_inference_steps=2) for one in (image, other)]
    assert torch.equal(*results)


def test_a_mask_that_does_not_fit_is_refused(restorers):
    filling, plain = restorers.pipe(masked=True), restorers.pipe()
    image = pictures(2, 3, 8, 8)
    with pytest.raises(ValueError, match="This model fills holes: pass `mask_image`"):
        filling(image)
    with pytest.raises(ValueError, match="This model is not given masks"):
        plain(image, torch.ones(8, 8))
    with pytest.raises(ValueError, match=r"height and width are \(4, 8\), the picture's \(8, 8\)"):
        filling(image, torch.ones(4, 8))
    with pytest.raises(ValueError, match="marks nothing: paint white"):
        filling(image, torch.zeros(8, 8))
    with pytest.raises(ValueError, match="must be one or 2, one a picture, got 3"):
        filling(image, torch.ones(3, 1, 8, 8))


# ------------------------------------------------------------ autoencoders, precision, files


@pytest.mark.parametrize("vae", ["kl", "vq"])
@pytest.mark.parametrize(("scale", "masked"), [(4, False), (1, True), (2, False), (8, False)])
def test_chains_run_in_the_latents_of_both_autoencoders(restorers, vae, scale, masked):
    pipe = restorers.pipe(scale=scale, masked=masked, vae=restorers.vae(vae, 3), patch_size=1)
    mask = {"mask_image": torch.ones(5, 9)} if masked else {}
    found = restore(pipe, pictures(3, 5, 9), num_inference_steps=2, **mask)
    assert found.shape == (1, 3, scale * 5, scale * 9) and found.isfinite().all()
    assert pipe.latents_shape(8, 16) == (3, 8 * scale // 4, 16 * scale // 4)


@pytest.mark.parametrize("vae", ["kl", "vq"])
def test_a_network_that_knows_the_clean_latents_gives_what_they_decode_to(restorers, vae):
    pipe = restorers.pipe(scale=4, vae=restorers.vae(vae, 4), network=restorers.oracle)
    clean = pictures(1, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        chain = encode_pixels(pipe.vae, clean)
        encoded = pipe.vae.encode(clean)
        latents = encoded.latents if vae == "vq" else encoded.latent_dist.mode()
        decoded = pipe.vae.decode(latents).sample  # which quantises, in the one that does
    pipe.unet.answer = latents * pipe.vae.config.scaling_factor
    assert torch.equal(chain, pipe.unet.answer)
    found = restore(pipe, pictures(3, 4, 6, seed=1))
    assert torch.allclose(found, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-5)


def test_a_pipeline_is_made_from_another(restorers):
    pipe = restorers.pipe("rddm", scale=2, patch_size=2)
    other = sfumato.RDDMPipeline.from_pipe(pipe)
    assert other.unet is pipe.unet and other.config.scale == other.config.patch_size == 2


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading_changes_no_weight_and_no_setting(restorers, kind, tmp_path):
    pipe = restorers.pipe(kind, scale=2, patch_size=2)
    pipe.save_pretrained(tmp_path)
    image = pictures(3, 5, 3)
    for load in (type(pipe).from_pretrained, sfumato.load):
        loaded = load(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is type(pipe) and loaded.vae is None
        assert loaded.config.scale == loaded.config.patch_size == 2
        assert all(map(torch.equal, loaded.unet.state_dict().values(), pipe.unet.state_dict().values()))
        again, first = (restore(one, image, num_inference_steps=3) for one in (loaded, pipe))
        assert torch.allclose(again, first, atol=1e-5)  # where weights lie in memory changes the order of sums


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_in_half_precision_run_in_a_chain_of_full(restorers, dtype):
    pipe = restorers.pipe("resshift")
    full = restore(pipe, pictures(3, 8, 8), num_inference_steps=4)
    half = restore(pipe.to(dtype), pictures(3, 8, 8), num_inference_steps=4)
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.05


def test_an_autoencoder_that_overflows_in_half_precision_is_widened_for_its_part(restorers):
    seen = []
    pipe = restorers.pipe(scale=4, vae=restorers.vae("kl", 3))
    pipe.to(torch.float16)
    pipe.vae.encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    assert restore(pipe, pictures(3, 4, 4), num_inference_steps=1).isfinite().all()
    assert seen == [torch.float32] and pipe.vae.dtype == torch.float16


def test_one_bar_counts_the_steps_of_all_sizes(restorers):
    pipe = restorers.pipe("rddm")
    pipe.set_progress_bar_config(disable=False, mininterval=0)
    bar = io.StringIO()
    with redirect_stderr(bar):
        pipe([pictures(3, 4, 4), pictures(3, 8, 4)], num_inference_steps=3, two_phase=True)
    assert "12/12" in bar.getvalue()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_is_no_picture(restorers, kind, wrong):
    pipe = restorers.pipe(kind, network=restorers.oracle, clip_sample=False)
    heads = pipe.unet.config.out_channels
    pipe.unet.answer = torch.zeros(2, heads, 4, 4)
    assert len(pipe(pictures(2, 3, 4, 4), num_inference_steps=2).images) == 2
    pipe.unet.answer[1, 0, 2, 3] = wrong
    with pytest.raises(ValueError, match="values that are not finite: check the weights, or run it in float32"):
        pipe(pictures(2, 3, 4, 4), num_inference_steps=2)


def test_a_drawn_picture_that_is_not_finite_is_none(restorers):
    pipe = restorers.pipe("rddm", conditioned=False, size=4, network=restorers.oracle)
    pipe.unet.answer = torch.full((1, 6, 4, 4), torch.nan)
    with pytest.raises(ValueError, match="values that are not finite"):
        pipe(num_inference_steps=2)


# ------------------------------------------------------------ what does not fit together


@pytest.mark.parametrize("kind", KINDS)
def test_networks_and_samplers_that_do_not_fit_are_refused(restorers, kind):
    from diffusers import DDIMScheduler

    pipe = restorers.pipe(kind, scale=2)
    other = sfumato.RDDMScheduler() if kind == "resshift" else sfumato.ResShiftScheduler()
    for scheduler in (DDIMScheduler(), other):
        with pytest.raises(ValueError, match=f"this one has a {type(scheduler).__name__}: a restoration network"):
            type(pipe)(pipe.unet, scheduler, scale=2)
    with pytest.raises(ValueError, match="`unet` takes 6 channels .* must take 7"):
        type(pipe)(pipe.unet, pipe.scheduler, masked=True)
    with pytest.raises(ValueError, match=r"must take 24, \(3 of the chain \+ 3 of the condition\) \* patch_size\^2"):
        type(pipe)(pipe.unet, pipe.scheduler, patch_size=2)
    with pytest.raises(ValueError, match="must take 3, "):
        type(pipe)(pipe.unet, pipe.scheduler, conditioned=False)
    with pytest.raises(ValueError, match="keeps the picture's size: `scale` must be 1, got 2"):
        type(pipe)(pipe.unet, pipe.scheduler, scale=2, masked=True)
    with pytest.raises(ValueError, match="`scale` must be a whole number from 1 on, got 0"):
        type(pipe)(pipe.unet, pipe.scheduler, scale=0)
    with pytest.raises(ValueError, match="`patch_size` must be a whole number from 1 on, got 1.5"):
        type(pipe)(pipe.unet, pipe.scheduler, patch_size=1.5)


def test_a_sampler_that_is_exchanged_later_is_checked_by_the_call(restorers):
    pipe = restorers.pipe("rddm")
    own, pipe.scheduler = pipe.scheduler, sfumato.RDDMScheduler(prediction_type="pred_res")
    with pytest.raises(ValueError, match="of `prediction_type` 'pred_res_noise', this one has 'pred_res': keep the"):
        pipe(pictures(3, 4, 4))
    with pytest.raises(ValueError, match="must .*put out 3, 1 \\* 3 .* prediction_type 'pred_res'"):
        type(pipe)(pipe.unet, pipe.scheduler)
    pipe.scheduler = type(own).from_config(own.config)  # one like it
    pipe(pictures(3, 4, 4))


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("resshift", {"prediction_type": "residual"}), ("resshift", {"num_train_timesteps": 15}),
        ("rddm", {"prediction_type": "pred_x0_noise"}), ("rddm", {"num_train_timesteps": 500}),
        *[("resshift", {name: value}) for name, value in RESSHIFT_CHAINS.items()],
        *[("rddm", {name: value}) for name, value in RDDM_CHAINS.items()],
    ],
)  # fmt: skip
def test_a_folder_is_not_loaded_with_the_sampler_of_another_model(restorers, kind, changed, tmp_path):
    pipe = restorers.pipe(kind)
    pipe.save_pretrained(tmp_path)
    other = type(pipe.scheduler).from_config(pipe.scheduler.config, **changed)
    ((name, value),) = changed.items()
    config = sfumato.load(tmp_path).config
    assert {**config, **config.chain}[name] == pipe.scheduler.config[name]
    with pytest.raises(ValueError, match=f"trained with a scheduler of `{name}` .* this one has {value!r}: keep"):
        type(pipe).from_pretrained(tmp_path, scheduler=other)
    with pytest.raises(ValueError, match=f"trained with a scheduler of `{name}`"):
        type(pipe).from_pipe(pipe, scheduler=other)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for known in ("chain", "prediction_type", "num_train_timesteps"):
        del index[known]
        (tmp_path / "model_index.json").write_text(json.dumps(index))  # as earlier releases wrote it
        config = type(pipe).from_pretrained(tmp_path).config
        assert {**config, **config.chain}[name] == pipe.scheduler.config[name]


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("resshift", {"clip_sample": False}), ("rddm", {"clip_sample": False, "clip_sample_range": 2.0}),
        ("rddm", {"timestep_spacing": "trailing"}), ("rddm", {"beta_start": 0.1}),  # there are no betas
    ],
    ids=["resshift-clip", "rddm-clip", "rddm-spacing", "rddm-betas"],
)  # fmt: skip
def test_what_is_not_of_the_chain_may_be_chosen_and_so_may_the_steps(restorers, kind, changed, tmp_path):
    pipe = restorers.pipe(kind)
    pipe.save_pretrained(tmp_path)
    other = type(pipe.scheduler).from_config(pipe.scheduler.config, **changed)
    loaded = type(pipe).from_pretrained(tmp_path, scheduler=other)
    for steps in (1, 3):
        assert restore(loaded, pictures(3, 4, 4), num_inference_steps=steps).shape == (1, 3, 4, 4)


def test_a_model_of_ddpm_is_bound_to_its_betas_and_free_in_the_residual(restorers):
    from diffusers import DDIMScheduler

    unet, stock = restorers.unet(3, 3, size=8), DDIMScheduler()
    pipe = sfumato.RDDMPipeline(unet, sfumato.RDDMScheduler.from_config(stock.config), conditioned=False)
    pipe.set_progress_bar_config(disable=True)
    same = sfumato.RDDMScheduler.from_alphas_cumprod(stock.alphas_cumprod)
    for scheduler in (same, sfumato.RDDMScheduler.from_config(pipe.scheduler.config, alpha_schedule="average")):
        pipe.scheduler = scheduler
        assert pipe(num_inference_steps=2, output_type="pt").images.isfinite().all()
    pipe.scheduler = sfumato.RDDMScheduler.from_config(DDIMScheduler(beta_end=0.01).config)
    with pytest.raises(ValueError, match="trained with a scheduler of `beta_end` 0.02, this one has 0.01: keep"):
        pipe(num_inference_steps=2)


def test_a_sampler_that_scales_for_latents_is_refused_in_pixels_and_the_other_way_round(restorers):
    with pytest.raises(ValueError, match="runs in pixels, .* `latent_space` is True, .*with latent_space=False"):
        restorers.pipe(latent_space=True)
    with pytest.raises(ValueError, match="runs in latents, .* `latent_space` is False, .*with latent_space=True"):
        restorers.pipe(scale=4, vae=restorers.vae("kl", 3), latent_space=False)
    assert restorers.pipe(latent_space=True, normalize_input=False).vae is None  # nothing is scaled


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ({"output_type": "latent"}, "`output_type` must be 'pil', 'np' or 'pt', got 'latent'"),
        ({"generator": [seeded()] * 3}, "`generator` must be one or a list of 1, one a picture, got 3"),
        ({"generator": 3}, "`generator` must be a torch.Generator or a list of such, got 3"),
        ({"generator": ["a"]}, "`generator` must be a torch.Generator or a list of such, got 'a'"),
        ({"num_inference_steps": 5}, r"`num_inference_steps` must be a whole number in \[1, 4\] .*, got 5"),
    ],
)
def test_other_arguments_out_of_range_are_refused(restorers, call, sentence):
    with pytest.raises(ValueError, match=sentence):
        restorers.pipe()(pictures(3, 4, 4), **call)
