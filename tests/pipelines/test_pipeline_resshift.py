import pytest
import torch

from sfumato.pipelines.restoration import degraded_start


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clean_pictures(*shape):
    return torch.randint(0, 256, shape, generator=seeded(9)).float() / 255


@pytest.mark.parametrize("steps", [15, 4])
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("target", ["sample", "residual"])
def test_a_network_that_knows_the_clean_picture_gives_it_back(restorers, steps, patch_size, target):
    pipe = restorers.pipe(
        scale=4, patch_size=patch_size, network=restorers.oracle, steps=steps, prediction_type=target
    )  # fmt: skip
    clean, degraded = clean_pictures(2, 3, 16, 16), torch.rand(2, 3, 4, 4, generator=seeded())
    answer = clean * 2 - 1
    pipe.unet.answer = answer if target == "sample" else degraded_start(degraded * 2 - 1, 4) - answer
    assert len(pipe.scheduler.timesteps) == steps
    found = pipe(degraded, generator=seeded(), output_type="pt").images
    assert torch.allclose(found, clean, atol=1e-6)
    shown = pipe(degraded, generator=seeded()).images[0]
    assert list(shown.get_flattened_data()) == [
        tuple(place) for place in (clean[0] * 255).round().int().flatten(1).T.tolist()
    ]


def test_the_chain_is_that_of_the_scheduler(restorers):
    """The pipeline's loop against the scheduler's own, with the network called by hand."""
    pipe = restorers.pipe(steps=4)
    degraded = clean_pictures(1, 3, 8, 8)
    found = pipe(degraded, generator=seeded(1), output_type="pt").images
    scheduler, y, generator = pipe.scheduler, degraded * 2 - 1, seeded(1)
    scheduler.set_timesteps()
    state = scheduler.initial_sample(y, torch.randn(1, 3, 8, 8, generator=generator))
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = pipe.unet(torch.cat([scheduler.scale_model_input(state, t), y], 1), t).sample
            state = scheduler.step(output, t, state, y, generator=generator).prev_sample
    assert torch.equal(found, (state / 2 + 0.5).clamp(0, 1))


def test_a_network_without_the_picture_sees_the_state_alone(restorers):
    pipe = restorers.pipe(conditioned=False, network=restorers.oracle)
    pipe.unet.answer = torch.zeros(1, 3, 4, 4)
    pipe(torch.rand(1, 3, 4, 4), num_inference_steps=1)
    assert pipe.unet.seen[0].shape == (1, 3, 4, 4)


def test_it_draws_by_its_seed(restorers):
    pipe, image = restorers.pipe(), clean_pictures(3, 8, 8)
    first, again, other = (
        pipe(image, generator=seeded(seed), output_type="pt", return_dict=False)[0] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
