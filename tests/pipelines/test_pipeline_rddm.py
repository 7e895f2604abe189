import pytest
import torch

import sfumato


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clean_pictures(*shape):
    return torch.randint(0, 256, shape, generator=seeded(9)).float() / 255


def near(clean):
    """A degraded picture so near that its residual is not clipped."""
    return (clean + 0.1 * torch.rand(clean.shape, generator=seeded(5))).clamp(0, 1)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("target", ["pred_x0_noise", "pred_res"])
def test_a_network_that_knows_the_clean_picture_gives_it_back(restorers, target, eta):
    pipe = restorers.pipe("rddm", network=restorers.oracle, prediction_type=target)
    clean = clean_pictures(2, 3, 8, 8)
    degraded, answer = near(clean), clean * 2 - 1
    noise = torch.randn(2, 3, 8, 8, generator=seeded(2))
    pipe.unet.answer = degraded * 2 - 1 - answer if target == "pred_res" else torch.cat([answer, noise], dim=1)
    found = pipe(degraded, eta=eta, generator=seeded(), latents=noise, output_type="pt").images
    assert torch.allclose(found, clean, atol=1e-6)


def test_two_sweeps_are_those_of_the_scheduler(restorers):
    pipe, image = restorers.pipe("rddm"), clean_pictures(1, 3, 8, 8)
    noise = torch.randn(1, 3, 8, 8, generator=seeded())
    found = pipe(image, num_inference_steps=3, two_phase=True, latents=noise, output_type="pt").images
    scheduler, y = pipe.scheduler, image * 2 - 1
    scheduler.set_timesteps(3)
    state = scheduler.initial_sample(y, noise)
    with torch.no_grad():
        for step in (scheduler.step_residual, scheduler.step_noise):
            for t in scheduler.timesteps:
                state = step(pipe.unet(torch.cat([state, y], 1), t).sample, t, state, y).prev_sample
    assert torch.equal(found, (state / 2 + 0.5).clamp(0, 1))
    assert not torch.equal(found, pipe(image, num_inference_steps=3, latents=noise, output_type="pt").images)


def test_two_networks_are_told_a_time_each(restorers):
    scheduler = sfumato.RDDMScheduler(sum_scale=0.01)
    unets = [restorers.unet(6, 3, restorers.oracle) for _ in range(2)]
    pipe = sfumato.RDDMPipeline(unets[0], scheduler, noise_unet=unets[1])
    pipe.set_progress_bar_config(disable=True)
    clean, noise = clean_pictures(1, 3, 8, 8), torch.randn(1, 3, 8, 8, generator=seeded(2))
    degraded = near(clean)
    unets[0].answer, unets[1].answer = (degraded - clean) * 2, noise
    found = pipe(degraded, num_inference_steps=5, latents=noise, output_type="pt").images
    assert torch.allclose(found, clean, atol=1e-6)
    last = torch.tensor([199])
    for unet, time in zip(unets, scheduler.network_times(last), strict=True):
        assert unet.seen[1] == pytest.approx(float(time))


def test_two_networks_survive_their_folder(restorers, tmp_path):
    pipe = sfumato.RDDMPipeline(restorers.unet(6, 3), sfumato.RDDMScheduler(), noise_unet=restorers.unet(6, 3, seed=1))
    pipe.save_pretrained(tmp_path)
    loaded = sfumato.load(tmp_path)
    results = []
    for one in (pipe, loaded):
        one.set_progress_bar_config(disable=True)
        results.append(one(clean_pictures(3, 4, 4), generator=seeded(), output_type="pt").images)
    assert torch.allclose(*results, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 11), (None, None)])
def test_pictures_are_drawn_at_every_size(restorers, height, width):
    pipe = restorers.pipe("rddm", conditioned=False, patch_size=2, size=4, sum_scale=1.0)
    images = pipe(batch_size=2, height=height, width=width, num_inference_steps=2, generator=seeded()).images
    assert [image.size for image in images] == [(width or 8, height or 8)] * 2


def test_drawn_pictures_do_not_depend_on_their_batch(restorers):
    pipe = restorers.pipe("rddm", conditioned=False, size=8, sum_scale=1.0)
    settings = {"num_inference_steps": 3, "eta": 1.0, "output_type": "pt"}
    both = pipe(batch_size=2, generator=[seeded(0), seeded(1)], **settings).images
    alone = pipe(generator=[seeded(1)], **settings).images
    assert torch.allclose(both[1], alone[0], atol=2e-5)


def test_a_model_of_ddpm_draws_what_ddim_draws(restorers):
    from diffusers import DDIMPipeline, DDIMScheduler

    unet, stock = restorers.unet(3, 3, size=8), DDIMScheduler(clip_sample=False)
    pipe = sfumato.RDDMPipeline(unet, sfumato.RDDMScheduler.from_config(stock.config), conditioned=False)
    plain = DDIMPipeline(unet, stock)
    for one in (pipe, plain):
        one.set_progress_bar_config(disable=True)
    found = pipe(num_inference_steps=4, generator=seeded(), output_type="np").images
    expected = plain(num_inference_steps=4, generator=seeded(), output_type="np").images
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_run_that_makes_no_sense_is_refused(restorers):
    restoring = restorers.pipe("rddm")
    drawing = restorers.pipe("rddm", conditioned=False)
    image = torch.rand(3, 4, 4)
    with pytest.raises(ValueError, match="This model restores pictures: give it `image`"):
        restoring()
    with pytest.raises(ValueError, match="This model restores pictures: give it `image`"):
        restorers.pipe("rddm", conditioned=False, masked=True)(height=8, width=8)
    with pytest.raises(ValueError, match="`mask_image` goes with `image`"):
        drawing(mask_image=image)
    with pytest.raises(ValueError, match="`height` must be a whole number from 1 on, got None"):
        drawing(width=8)
    with pytest.raises(ValueError, match="`batch_size` must be a whole number from 1 on, got 0"):
        drawing(height=8, width=8, batch_size=0)
    with pytest.raises(ValueError, match=r"`eta` must lie in \[0, 1\], got 2"):
        restoring(image, eta=2)
    with pytest.raises(ValueError, match="`two_phase` draws no noise: `eta` must be 0, got 0.5"):
        restoring(image, eta=0.5, two_phase=True)
    pictured = restorers.pipe("rddm", prediction_type="pred_x0_noise")
    with pytest.raises(ValueError, match="`two_phase` needs a head .* got 'pred_x0_noise'"):
        pictured(image, two_phase=True)
    single = restorers.pipe("rddm", prediction_type="pred_res")
    with pytest.raises(ValueError, match="`two_phase` needs a head .* got 'pred_res'"):
        single(image, two_phase=True)
    with pytest.raises(ValueError, match="`noise_unet` is for a prediction of two heads .* 'pred_res', of one"):
        sfumato.RDDMPipeline(single.unet, single.scheduler, noise_unet=single.unet)
    with pytest.raises(ValueError, match="`unet` takes 6 channels and puts out 6, but must take 6, .* put out 3"):
        sfumato.RDDMPipeline(restoring.unet, restoring.scheduler, noise_unet=restoring.unet)
