import dataclasses

import pytest
import torch
from diffusers import UNet2DModel

import sfumato
from sfumato.boundary import Boundary, mean_squared_error, rank_correlation
from sfumato.randomness import generator_for


class Offset(UNet2DModel):
    """Sees its state as the clean picture: the result is the degraded picture plus the initial noise, scaled."""

    def forward(self, sample, timestep, return_dict=True):
        state, degraded = sample.chunk(2, dim=1)
        return (torch.cat([degraded - state, torch.zeros_like(state)], dim=1),)


def make(kind, network=UNet2DModel, **settings):
    torch.manual_seed(0)
    heads = 2 if kind == "rddm" else 1
    unet = network(
        in_channels=6, out_channels=3 * heads, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    ).eval()  # fmt: skip
    if kind == "rddm":
        pipe = sfumato.RDDMPipeline(unet, sfumato.RDDMScheduler(**{"sum_scale": 0.01, **settings}))
    else:
        scheduler = sfumato.ResShiftScheduler(4, 0.2, latent_space=False, clip_sample=True)
        pipe = sfumato.ResShiftPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pairs_of(count, side=6, seed=0):
    pictures = 0.3 + 0.4 * torch.rand(count, 2, 3, side, side, generator=seeded(seed))
    return [(degraded, clean) for degraded, clean in pictures]


def search(pipe, pairs, **settings):
    return sfumato.find_boundary(pipe, pairs, **{"num_inference_steps": 2, "progress": False, **settings})


@pytest.mark.parametrize("halving", [False, True])
def test_the_known_optimum_is_found(halving):
    """Where the result is y + b z and the clean picture is y + c, the best noise is the nearest to c / b."""
    pipe = make("rddm", Offset)
    wanted = 0.1 * torch.randn(3, 6, 6, generator=seeded(104)).clamp(-2, 2)
    degraded = [degraded for degraded, _ in pairs_of(8)]
    pairs = [(one, one + 0.5 * wanted) for one in degraded]
    found = search(pipe, pairs, candidates=12, seed=100, halving=halving)
    noises = torch.stack([torch.randn(1, 3, 6, 6, generator=seeded(100 + k)) for k in range(12)])
    nearest = int((0.1 * noises[:, 0] - wanted).square().sum((1, 2, 3)).argmin())
    assert nearest == 4
    assert (found.candidate, found.seed) == (4, 104)
    assert torch.equal(found.noise, noises[4])
    assert found.beats_random
    if not halving:
        assert found.rank_correlation > 0.99


@pytest.mark.parametrize("kind", ["rddm", "resshift"])
def test_one_candidate_is_plain_sampling_with_its_seed(kind):
    pipe, pairs = make(kind), pairs_of(2)
    found = search(pipe, pairs, candidates=1, seed=7)
    plain = seeded(7)
    image = pipe(pairs[0][0], num_inference_steps=2, generator=plain, output_type="pt").images
    later = seeded(7)
    torch.randn(found.noise.shape, generator=later)
    again = pipe(
        pairs[0][0], num_inference_steps=2, latents=found.noise, generator=later, output_type="pt"
    ).images  # fmt: skip
    assert torch.equal(image, again)
    # the search itself: from that noise, and with later noise that is the pair's own, whatever the candidate
    for number, scores in enumerate((found.scores, found.held_out)):
        restored = pipe(
            pairs[number][0], num_inference_steps=2, latents=found.noise, generator=generator_for(7, number),
            output_type="pt",
        ).images  # fmt: skip
        assert float(scores) == pytest.approx(float(mean_squared_error(restored, pairs[number][1][None])), rel=1e-5)
    assert found.rank_correlation is None and found.random_score is None and not found.beats_random


def test_more_candidates_never_choose_worse():
    pipe, pairs = make("rddm"), pairs_of(4)
    searches = [search(pipe, pairs, candidates=count, seed=1) for count in (1, 3, 12)]
    best = [float(found.scores.min()) for found in searches]
    assert best[0] >= best[1] - 1e-7 >= best[2] - 2e-7 and best[0] > best[2] + 1e-4
    for found in searches:
        assert float(found.scores[found.candidate]) == float(found.scores.min())
    assert torch.allclose(searches[1].scores, searches[2].scores[:3], atol=1e-6)


@pytest.mark.parametrize("kind", ["rddm", "resshift"])
def test_a_search_repeats_and_does_not_depend_on_its_batches(kind):
    pipe, pairs = make(kind), pairs_of(4)
    first, again, batched = (search(pipe, pairs, candidates=5, batch_size=size) for size in (16, 16, 3))
    assert torch.equal(first.scores, again.scores) and torch.equal(first.held_out, again.held_out)
    assert torch.allclose(first.scores, batched.scores, rtol=1e-4)
    assert first.seed == again.seed == batched.seed
    other = search(pipe, pairs, candidates=5, seed=50)
    assert not torch.equal(first.noise, other.noise)


class Recording(sfumato.ResShiftPipeline):
    """Notes with which start and which later noise each picture is restored."""

    def __call__(self, image, **call):
        starts = [tuple(noise.flatten()[:2].tolist()) for noise in call["latents"]]
        self.seen |= {
            (start, float(one.sum()), source.initial_seed())
            for start, one, source in zip(starts, image, call["generator"], strict=True)
        }
        return super().__call__(image, **call)


def test_candidates_of_a_stochastic_sampler_differ_in_their_start_alone():
    plain = make("resshift")
    pipe = Recording(plain.unet, plain.scheduler)
    pipe.seen = set()
    search(pipe, pairs_of(4), candidates=3, num_inference_steps=4)
    starts, pictures, later = (set(column) for column in zip(*pipe.seen, strict=True))
    assert len(pipe.seen) == 12 and len(starts) == 3 and len(pictures) == 4
    assert len(later) == len({(picture, seed) for _, picture, seed in pipe.seen}) == 4


def test_halving_tries_the_worse_on_fewer_pairs():
    pipe, pairs = make("rddm", Offset), pairs_of(16)
    calls = []

    def counted(restored, clean):
        calls.append(len(restored))
        return mean_squared_error(restored, clean)

    full = search(pipe, pairs, candidates=16, metric=counted)
    everything = sum(calls)
    calls.clear()
    halved = search(pipe, pairs, candidates=16, metric=counted, halving=True)
    assert everything == 16 * 16 and sum(calls) < everything / 2
    assert halved.held_out.isnan().sum() >= 16 - 9 and not halved.scores.isnan().any()
    assert halved.held_out_score == pytest.approx(float(full.held_out[halved.candidate]), rel=1e-4)


def test_a_model_that_fills_holes_is_searched_with_its_masks():
    torch.manual_seed(0)
    unet = UNet2DModel(
        in_channels=7, out_channels=3, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    scheduler = sfumato.ResShiftScheduler(4, 0.2, latent_space=False, clip_sample=True)
    pipe = sfumato.ResShiftPipeline(unet, scheduler, masked=True)
    mask = torch.zeros(6, 6)
    mask[2:4] = 1
    clean = [clean for _, clean in pairs_of(4)]
    found = search(pipe, [(one, one, mask) for one in clean], candidates=3)
    # two thirds of each picture are known, and count nothing
    assert (found.scores > 0).all() and (found.scores < 1 / 3).all()


def test_pairs_may_be_a_zip():
    pipe, pairs = make("rddm"), pairs_of(4)
    whole = search(pipe, pairs, candidates=3)
    assert torch.equal(search(pipe, zip(*zip(*pairs, strict=True), strict=True), candidates=3).scores, whole.scores)


def test_saving_and_loading_keeps_everything(tmp_path):
    found = search(make("rddm"), pairs_of(4), candidates=4, eta=0.0, halving=True)
    loaded = Boundary.load(found.save(tmp_path / "boundary.safetensors"))
    assert torch.equal(loaded.noise, found.noise) and torch.equal(loaded.scores, found.scores)
    assert torch.equal(loaded.held_out.nan_to_num(), found.held_out.nan_to_num())
    assert (loaded.seed, loaded.settings, loaded.rank_correlation) == (
        found.seed, found.settings, found.rank_correlation,
    )  # fmt: skip
    assert loaded.settings["metric"] == "mean_squared_error" and loaded.settings["eta"] == 0.0


@pytest.mark.parametrize(("kind", "steps"), [("rddm", 5), ("resshift", 4)])
def test_noise_is_for_the_network_and_the_steps_that_it_was_searched_with(kind, steps):
    pipe = make(kind)
    found = search(pipe, pairs_of(2), candidates=1, num_inference_steps=None)
    assert found.settings["num_inference_steps"] == steps
    assert torch.equal(found.noise_for(pipe), found.noise) and torch.equal(found.noise_for(pipe, steps), found.noise)
    with pytest.raises(ValueError, match=f"was searched in {steps} steps, not in 3: take as many, or search another"):
        found.noise_for(pipe, 3)
    with torch.no_grad():
        pipe.unet.conv_out.bias[0] += 1
    with pytest.raises(ValueError, match="was searched with another network .* than this .*: search one for this"):
        found.noise_for(pipe)
    older = Boundary(found.noise, 0, found.scores, found.held_out, None, {"seed": 0})
    assert torch.equal(older.noise_for(pipe, 3), found.noise)  # which did not note them


def test_noise_is_for_both_networks_and_the_scheduler_that_it_was_searched_with(tmp_path):
    torch.manual_seed(0)
    shape = {
        "in_channels": 6, "out_channels": 3, "block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False,
    }  # fmt: skip
    unets = UNet2DModel(**shape), UNet2DModel(**shape)
    pipe = sfumato.RDDMPipeline(unets[0], sfumato.RDDMScheduler(sum_scale=0.01), noise_unet=unets[1])
    found = Boundary.load(search(pipe, pairs_of(2), candidates=1).save(tmp_path / "boundary.safetensors"))
    pipe.save_pretrained(tmp_path / "pipe")
    assert torch.equal(found.noise_for(sfumato.load(tmp_path / "pipe"), 2), found.noise)
    own = pipe.scheduler
    pipe.scheduler = sfumato.RDDMScheduler.from_config(own.config, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="of `timestep_spacing` 'truncated', this one has 'trailing': take that one"):
        found.noise_for(pipe, 2)
    pipe.scheduler = own
    with torch.no_grad():
        pipe.noise_unet.conv_out.bias[0] += 1
    with pytest.raises(ValueError, match="was searched with another network `noise_unet` .*: search one for this"):
        found.noise_for(pipe, 2)
    older = {name: value for name, value in found.settings.items() if name not in ("noise_unet", "scheduler")}
    assert torch.equal(dataclasses.replace(found, settings=older).noise_for(pipe, 2), found.noise)


def test_a_file_of_something_else_is_refused(tmp_path):
    from sfumato import storage

    with pytest.raises(ValueError, match="holds no boundary"):
        Boundary.load(storage.save_tensors(tmp_path / "other.safetensors", {"noise": torch.zeros(1)}))
    with pytest.raises(FileNotFoundError):
        Boundary.load(tmp_path / "none.safetensors")


def test_the_bar_of_the_pipeline_is_left_as_it_was():
    pipe = make("rddm")
    pipe.set_progress_bar_config(desc="mine", disable=True)
    search(pipe, pairs_of(2), candidates=1)
    assert pipe._progress_bar_config == {"desc": "mine", "disable": True}


def test_ranks_agree_as_spearman_says():
    values = torch.tensor([3.0, 1.0, 2.0, 2.0])
    assert rank_correlation(values, values.exp()) == pytest.approx(1)
    assert rank_correlation(values, -values) == pytest.approx(-1)
    assert rank_correlation(values, torch.ones(4)) == 0
    # by hand: ranks 0, 1, 2, 3 and 1, 0, 3, 2: 1 - 6 * 4 / (4 * 15)
    assert rank_correlation(torch.arange(4.0), torch.tensor([1.0, 0.0, 3.0, 2.0])) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("pairs", "settings", "sentence"),
    [
        (pairs_of(1), {}, "`pairs` must be at least two, .* got 1"),
        ([*pairs_of(1), (torch.rand(3, 6, 6),)], {}, r"Pair 1 of `pairs` must be \(degraded, clean\)"),
        ([*pairs_of(1), *pairs_of(1, side=5)], {}, r"must be of one size, .* got \[\(5, 5\), \(6, 6\)\]"),
        ([(torch.rand(3, 6, 6), torch.rand(3, 8, 8))] * 2, {}, "1 times the size of degraded ones"),
        ([(torch.rand(2, 3, 6, 6), torch.rand(3, 6, 6))] * 2, {}, "must be one picture, not a batch"),
        (pairs_of(2), {"candidates": 0}, "`candidates` must be a whole number from 1 on, got 0"),
        (pairs_of(2), {"seed": -1}, "`seed` must be a whole number from 0 on, got -1"),
        (pairs_of(2), {"batch_size": 0}, "`batch_size` must be a whole number from 1 on"),
        (pairs_of(2), {"seed": 2**63}, r"`seed` must be a whole number from 0 to 2\^63 - 1, got 9223372036854775808"),
        (pairs_of(2), {"tile_sizes": 3}, "RDDMPipeline takes no `tile_sizes`: .* it takes .*tile_overlap, tile_size"),
        (pairs_of(2), {"metric": "lpips"}, "`metric` must be a function of restored and clean pictures, got 'lpips'"),
        (None, {}, "`pairs` must be at least two"),
        (pairs_of(2), {"latents": None}, "`latents` is set by the search"),
        (pairs_of(2), {"metric": lambda a, b: (a - b).mean()}, r"must give 16 finite numbers .* the shape \(\)"),
        (pairs_of(2), {"metric": lambda a, b: a.flatten(1).mean(1) / 0}, "not all finite"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(pairs, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        search(make("rddm"), pairs, **{"candidates": 8, **settings})


def test_a_pipeline_that_restores_nothing_is_refused():
    from diffusers import DDIMPipeline, DDIMScheduler

    pipe = DDIMPipeline(make("rddm").unet, DDIMScheduler())
    with pytest.raises(ValueError, match="must restore pictures, .* got a DDIMPipeline"):
        search(pipe, pairs_of(2))
