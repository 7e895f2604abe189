import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel

import sfumato
from sfumato.randomness import generator_for


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=4,
    )  # fmt: skip
    made = sfumato.ClassConditionalPipeline(unet, DDPMScheduler())
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler])
def test_stock_schedulers_swap_in(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(DDPMScheduler().config)
    images = pipe([0, 2], num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images
    assert [image.size for image in images] == [(8, 8)] * 2


def test_guidance_of_one_is_the_conditional_model_and_others_differ(pipe):
    pipe.scheduler = DDIMScheduler.from_config(DDPMScheduler().config)

    def draw(label, scale):
        return pipe(
            label,
            num_inference_steps=4,
            guidance_scale=scale,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images

    assert torch.equal(draw(1, 1.0), draw([1], 1.0))
    assert torch.allclose(draw(1, 1.0), draw(1, 1.0 + 1e-6), atol=1e-4)
    assert not torch.allclose(draw(1, 1.0), draw(2, 1.0), atol=1e-4)


def test_picture_does_not_depend_on_its_batch(pipe):
    pipe.scheduler = DDPMScheduler()
    settings = {"num_inference_steps": 3, "output_type": "np"}
    together = pipe([0, 1], generator=[generator_for(0), generator_for(1)], **settings).images
    alone = pipe([1], generator=[generator_for(1)], **settings).images
    assert np.allclose(together[1], alone[0], atol=1e-5)


@pytest.mark.parametrize("labels", [[], 3, [0, -1]])
def test_labels_out_of_range_are_refused(pipe, labels):
    with pytest.raises(ValueError, match="must be between 0 and 2"):
        pipe(labels, num_inference_steps=2)


def test_latents_of_the_wrong_shape_are_refused(pipe):
    with pytest.raises(ValueError, match=r"must have the shape \(1, 1, 8, 8\)"):
        pipe(0, num_inference_steps=2, latents=torch.zeros(1, 3, 8, 8))


def test_pipeline_survives_its_folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = sfumato.ClassConditionalPipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded.unet.conv_in.weight, pipe.unet.conv_in.weight)


def test_embedded_pixel_model_loads_by_name():
    pipe = sfumato.load("atelier-pixel")
    pipe.set_progress_bar_config(disable=True)
    image = pipe(class_labels=7, num_inference_steps=2).images[0]
    assert image.size == (16, 16)
    assert pipe.scheduler.config.beta_schedule == "linear" and pipe.scheduler.config.prediction_type == "epsilon"
