import json

import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from tqdm.auto import tqdm

import sfumato
from sfumato import storage
from sfumato.boundary import Boundary
from sfumato.cli import main
from sfumato.restoring import RestoringConfig, run_restore


def save_model(folder, scale=2, masked=False, seed=0):
    torch.manual_seed(seed)
    unet = UNet2DModel(
        in_channels=6 + masked, out_channels=3, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    scheduler = sfumato.ResShiftScheduler(4, 0.2, latent_space=False, clip_sample=True)
    sfumato.ResShiftPipeline(unet, scheduler, scale=scale, masked=masked).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def save_picture(path, size=(6, 4), mode="RGB", colour=0):
    path.parent.mkdir(exist_ok=True)
    picture = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(colour))
    Image.fromarray(picture.byte().numpy()).convert(mode).save(path)
    return str(path)


def run(model, images, output, **settings):
    settings = {"num_inference_steps": 2, "device": "cpu", **settings}
    return run_restore(RestoringConfig(images=images, output=str(output), model=model, **settings))


def test_a_folder_is_restored_beside_its_originals(model, tmp_path):
    for name, mode in (("a.png", "RGB"), ("b.jpg", "L"), ("c.png", "RGBA")):
        save_picture(tmp_path / "in" / name, mode=mode)
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    report = run(model, [str(tmp_path / "in")], tmp_path / "out", task="sr", scale=2)
    assert json.loads((tmp_path / "out" / "restored.json").read_text()) == report
    assert report["failures"] == [] and [one["file"] for one in report["pictures"]] == ["a.png", "b.png", "c.png"]
    for facts, mode in zip(report["pictures"], ("RGB", "L", "RGBA"), strict=True):
        restored = Image.open(tmp_path / "out" / facts["file"])
        assert (restored.size, restored.mode) == ((12, 8), mode) == ((facts["width"], facts["height"]), mode)
        assert facts["seconds"] > 0
        beside = Image.open(tmp_path / "out" / facts["comparison"])
        large = 256 // 12
        assert beside.size == (3 * 12 * large + 2 * 8, 8 * large)
    assert report["pipeline"] == "ResShiftPipeline" and set(report["fingerprints"]) == {"unet"}
    assert report["settings"]["seed"] == 0


def test_of_a_folder_those_files_are_taken_that_can_be_read(model, tmp_path):
    image = save_picture(tmp_path / "in" / "a.png")
    Image.open(image).save(tmp_path / "in" / "b.mpo")
    for name in ("report.pdf", "notes.palm"):  # which can only be written
        Image.open(image).convert("1").save(tmp_path / "in" / name)
    report = run(model, [str(tmp_path / "in")], tmp_path / "out", compare="none")
    assert [one["source"].rsplit("/", 1)[1] for one in report["pictures"]] == ["a.png", "b.mpo"]
    assert report["failures"] == []


def test_pictures_of_a_kind_that_is_not_known_are_listed(model, tmp_path):
    folder = tmp_path / "in"
    save_picture(folder / "b.png")
    for name in ("a.HEIC", "c.cr3", "notes.txt", ".hidden.heic"):
        (folder / name).write_bytes(b"what a camera writes")
    report = run(model, [str(folder)], tmp_path / "out")
    assert [one["file"] for one in report["pictures"]] == ["b.png"]
    said = [failure["error"] for failure in report["failures"]]
    assert len(said) == 2 and f"{folder / 'a.HEIC'} can't be read as a picture" in said[0] and "c.cr3" in said[1]
    (folder / "b.png").unlink()
    with pytest.raises(ValueError, match="in holds no pictures"):
        run(model, [str(folder)], tmp_path / "other")


@pytest.mark.parametrize("count", [1, 2])
def test_a_bar_counts_the_steps_of_one_picture_and_the_pictures_of_many(model, tmp_path, monkeypatch, count):
    bars = []

    class Bar(tqdm):
        def __init__(self, *given, **how):
            bars.append(how)
            super().__init__(*given, **how)

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.tqdm", Bar)
    images = [save_picture(tmp_path / f"{number}.png") for number in range(count)]
    run(model, images, tmp_path / "out", num_inference_steps=3)
    shown = [(how["desc"], how["total"]) for how in bars if not how.get("disable", True)]
    assert shown == [("restore", 3 if count == 1 else 2)]


def test_the_comparison_shows_input_bicubic_and_result(model, tmp_path):
    image = save_picture(tmp_path / "a.png", size=(3, 3))
    run(model, [image], tmp_path / "out")
    beside = Image.open(tmp_path / "out" / "comparisons" / "a.png").convert("RGB")
    large = 256 // 6
    width = 6 * large + 8
    original, restored = Image.open(image), Image.open(tmp_path / "out" / "a.png")
    for x in range(6):
        assert beside.getpixel((x * large, 0)) == original.getpixel((x // 2, 0))
        assert beside.getpixel((2 * width + x * large, 0)) == restored.getpixel((x, 0))


def test_a_result_is_that_of_the_pipeline_whatever_is_restored_with_it(model, tmp_path):
    images = [save_picture(tmp_path / f"{n}.png", colour=n, size=size) for n, size in enumerate([(4, 4), (5, 4)] * 2)]
    run(model, images, tmp_path / "one", seed=3)
    run(model, images, tmp_path / "many", seed=3, batch_size=3, compare="none")
    pipe = sfumato.load(model)
    pipe.set_progress_bar_config(disable=True)
    for image in images:
        name = image.rsplit("/", 1)[1]
        expected = pipe(
            Image.open(image), num_inference_steps=2, generator=torch.Generator().manual_seed(3)
        ).images[0]  # fmt: skip
        one, many = (Image.open(tmp_path / run / name) for run in ("one", "many"))
        assert one.tobytes() == expected.tobytes()
        worst = max(abs(a - b) for a, b in zip(one.tobytes(), many.tobytes(), strict=True))
        assert worst <= 1  # rounding, which differs with the batch
    assert not (tmp_path / "many" / "comparisons").exists()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_broken_file_completes_the_rest_and_is_listed(model, tmp_path, capsys, batch_size):
    folder = tmp_path / "in"
    for name in ("a.png", "c.png"):
        save_picture(folder / name)
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "d.png").touch()
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main(
            ["restore", str(folder), "--model", model, "--output", str(out), "--num-inference-steps", "1",
             "--batch-size", str(batch_size), "--device", "cpu"]
        )  # fmt: skip
    message = str(stop.value.code)  # a text: printed, with exit status 1
    assert message.startswith("error: 2 of 4 could not be restored:")
    assert "b.png can't be read as a picture" in message and "d.png is empty" in message
    report = json.loads((out / "restored.json").read_text())
    assert [one["file"] for one in report["pictures"]] == ["a.png", "c.png"]
    assert [one["source"] for one in report["failures"]] == [str(folder / "b.png"), str(folder / "d.png")]
    assert (out / "a.png").is_file() and (out / "c.png").is_file()
    assert "2 restored" in capsys.readouterr().out


def test_pictures_that_are_refused_are_listed_by_their_path(model, tmp_path):
    folder = tmp_path / "in"
    save_picture(folder / "a.png")
    Image.new("F", (6, 4), 7.0).save(folder / "b.tif")
    Image.new("I", (6, 4), 70000).save(folder / "c.tif")
    report = run(model, [str(folder)], tmp_path / "out")
    for failure, name in zip(report["failures"], ("b.tif", "c.tif"), strict=True):
        assert failure["error"].startswith(f"{folder / name}: `image` must have values in [0, 1]")


def test_a_network_that_gives_no_numbers_restores_nothing(tmp_path):
    pipe = sfumato.load(save_model(tmp_path / "model"))
    torch.nn.init.constant_(pipe.unet.conv_out.bias, torch.nan)
    pipe.save_pretrained(tmp_path / "model")
    report = run(str(tmp_path / "model"), [save_picture(tmp_path / "a.png")], tmp_path / "out")
    assert report["pictures"] == [] and not (tmp_path / "out" / "a.png").exists()
    assert "a.png can't be restored (The result has values that are not finite" in report["failures"][0]["error"]


def test_names_that_are_too_long_are_cut_and_stay_apart(model, tmp_path):
    folder = tmp_path / "in"
    for ending in ("a", "b"):
        save_picture(folder / f"{'x' * 240}{ending}.png")
    save_picture(folder / f"{'ü' * 120}.png")
    report = run(model, [str(folder)], tmp_path / "out")
    names = [one["file"].removesuffix(".png") for one in report["pictures"]]
    assert names == ["x" * 200, f"{'x' * 200}-2", "ü" * 100]
    assert report["failures"] == []


def test_a_result_that_cant_be_written_is_listed_and_the_others_are_kept(model, tmp_path, monkeypatch):
    images = [save_picture(tmp_path / f"{name}.png") for name in "abc"]
    write, faults = storage.write_bytes, {"b.png": OSError(36, "File name too long"), "c.png": MemoryError()}

    def failing(path, content):
        if path.parent.name == "out" and path.name in faults:
            raise faults[path.name]
        return write(path, content)

    monkeypatch.setattr("sfumato.storage.write_bytes", failing)
    report = run(model, images, tmp_path / "out", batch_size=3)
    assert json.loads((tmp_path / "out" / "restored.json").read_text()) == report
    assert [one["file"] for one in report["pictures"]] == ["a.png"]
    said = [failure["error"] for failure in report["failures"]]
    assert "b.png was restored, but can't be written ([Errno 36] File name too long)" in said[0]
    assert "c.png was restored, but can't be written (MemoryError)" in said[1]


def test_a_comparison_that_fails_does_not_lose_the_result(model, tmp_path, monkeypatch, capsys):
    image, out = save_picture(tmp_path / "a.png"), tmp_path / "out"

    def failing(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr("sfumato.restoring.picture_grid", failing)
    main(["restore", image, "--model", model, "--output", str(out), "--device", "cpu"])
    (facts,) = json.loads((out / "restored.json").read_text())["pictures"]
    assert facts["comparison_error"] == "no room" and "comparison" not in facts
    assert Image.open(out / "a.png").size == (12, 8)
    assert "1 without a picture side by side: no room" in capsys.readouterr().out


def test_a_full_disk_ends_the_run_with_one_sentence(model, tmp_path, monkeypatch):
    images = [save_picture(tmp_path / f"{name}.png") for name in "ab"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sfumato.storage.write_bytes", full)
    with pytest.raises(OSError, match=r"The disk of .*out is full \(No space left on device\): free some space"):
        run(model, images, tmp_path / "out")


def test_pictures_of_one_name_get_files_of_their_own(model, tmp_path):
    images = [save_picture(tmp_path / folder / name) for folder, name in (("x", "a.png"), ("y", "A.bmp"))]
    images.append(images[0])  # named twice, restored once
    report = run(model, images, tmp_path / "out", compare="none")
    assert [one["file"] for one in report["pictures"]] == ["a.png", "A-2.png"]


def test_nothing_is_overwritten(model, tmp_path):
    image = save_picture(tmp_path / "a.png")
    run(model, [image], tmp_path / "out")
    before = (tmp_path / "out" / "a.png").read_bytes()
    with pytest.raises(FileExistsError, match="Choose an empty or new output folder"):
        run(model, [image], tmp_path / "out", seed=1)
    with pytest.raises(FileExistsError):
        run(model, [image], tmp_path)
    assert (tmp_path / "out" / "a.png").read_bytes() == before


def interrupt_after(monkeypatch, pictures):
    """Press Ctrl-C when the pipeline is called for the picture after these."""
    call, calls = sfumato.ResShiftPipeline.__call__, []

    def counted(self, *given, **how):
        calls.append(given)
        if len(calls) > pictures:
            raise KeyboardInterrupt
        return call(self, *given, **how)

    monkeypatch.setattr(sfumato.ResShiftPipeline, "__call__", counted)
    return calls


def test_a_run_that_was_interrupted_goes_on(model, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "in"
    for number in range(5):
        save_picture(folder / f"{number}.png", colour=number)
    (folder / "2.png").write_bytes(b"no picture")
    command = ["restore", str(folder), "--model", model, "--num-inference-steps", "2", "--device", "cpu"]
    begun = [*command, "--output", str(tmp_path / "out")]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        interrupt_after(patch, 2)
        main(begun)
    assert stop.value.code == 130
    assert f"what is done is kept in {tmp_path / 'out'}; go on with: sfumato restore " in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "restored.json").read_text())
    assert [one["file"] for one in report["pictures"]] == ["0.png", "1.png"] and report["remaining"] == 2
    with pytest.raises(SystemExit, match="holds an unfinished run. Continue it with --resume"):
        main(begun)
    first = (tmp_path / "out" / "0.png").stat().st_mtime_ns
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="1 of 5 could not be restored"):
        calls = interrupt_after(patch, 5)
        main([*begun, "--resume"])
    assert len(calls) == 2 and (tmp_path / "out" / "0.png").stat().st_mtime_ns == first
    with pytest.raises(SystemExit, match="1 of 5 could not be restored"):
        main([*command, "--output", str(tmp_path / "whole")])
    reports = [json.loads((tmp_path / name / "restored.json").read_text()) for name in ("out", "whole")]
    for found in reports:
        assert found["remaining"] == 0 and len(found["failures"]) == 1
        assert [one["file"] for one in found["pictures"]] == ["0.png", "1.png", "3.png", "4.png"]
    for file in (tmp_path / "whole").rglob("*.png"):
        assert file.read_bytes() == (tmp_path / "out" / file.relative_to(tmp_path / "whole")).read_bytes()
    save_picture(folder / "2.png")
    main([*begun, "--resume"])  # what failed is tried again
    assert "5 restored" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="already holds restored pictures"):
        main([*begun, "--resume"])


def test_another_run_is_not_gone_on_with(model, tmp_path, monkeypatch):
    images, out = [save_picture(tmp_path / f"{number}.png") for number in range(3)], tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 1)
        run(model, images, out)
    kept = {file: file.read_bytes() for file in out.rglob("*.*")}
    with pytest.raises(ValueError, match="out holds another run: its num_inference_steps, seed differ. Resume with"):
        run(model, images, out, seed=1, num_inference_steps=3, resume=True)
    save_model(tmp_path / "model", seed=1)
    here = tmp_path / "here"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 1)
        run(str(tmp_path / "model"), images, here)
    save_model(tmp_path / "model", seed=2)
    with pytest.raises(ValueError, match="here holds another run: its model's weights differ"):
        run(str(tmp_path / "model"), images, here, resume=True)
    assert {file: file.read_bytes() for file in out.rglob("*.*")} == kept
    assert len(run(model, images, out, batch_size=2, resume=True)["pictures"]) == 3
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="holds files that are not this job's"):
        run(model, images, tmp_path / "other", resume=True)


def test_a_run_in_a_folder_that_does_not_exist_is_begun_by_resuming(model, tmp_path):
    assert len(run(model, [save_picture(tmp_path / "a.png")], tmp_path / "out", resume=True)["pictures"]) == 1


def test_holes_are_filled_and_the_rest_is_kept(tmp_path):
    model = save_model(tmp_path / "model", scale=1, masked=True)
    image = save_picture(tmp_path / "a.png")
    Image.frombytes("L", (6, 4), bytes([255, 255, 255, 0, 0, 0] * 4)).save(tmp_path / "mask.png")
    report = run(model, [image], tmp_path / "out", task="inpaint", mask=str(tmp_path / "mask.png"))
    before, after = Image.open(image), Image.open(tmp_path / "out" / "a.png")
    assert before.crop((3, 0, 6, 4)).tobytes() == after.crop((3, 0, 6, 4)).tobytes()
    assert before.crop((0, 0, 3, 4)).tobytes() != after.crop((0, 0, 3, 4)).tobytes()
    beside = Image.open(tmp_path / "out" / report["pictures"][0]["comparison"])
    assert beside.getpixel((0, 0)) == (0, 0, 0)  # the hole, as the network sees it
    assert beside.size == (2 * 6 * 42 + 8, 4 * 42)  # the size stays: no bicubic


def save_boundary(path, noise, **settings):
    scores = torch.zeros(1, dtype=torch.float64)
    return str(Boundary(noise, 0, scores, scores.clone(), None, {"seed": 0, **settings}).save(path))


def test_noise_of_another_search_is_refused_once(model, tmp_path):
    image, file = save_picture(tmp_path / "a.png"), tmp_path / "boundary.safetensors"
    pipe = sfumato.load(model)
    pairs = [(torch.rand(3, 4, 6), torch.rand(3, 8, 12)) for _ in range(2)]
    found = sfumato.find_boundary(pipe, pairs, candidates=1, num_inference_steps=2, progress=False)
    boundary = str(found.save(file))
    with pytest.raises(ValueError, match="was searched in 2 steps, not in 4: take as many"):
        run(model, [image], tmp_path / "out", boundary=boundary, num_inference_steps=None)
    other = save_model(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="was searched with another network .*search one for this"):
        run(other, [image], tmp_path / "out", boundary=boundary)
    with pytest.raises(ValueError, match=r"boundary.safetensors has the shape \(1, 3, 8, 12\), .*a.png needs"):
        run(model, [save_picture(tmp_path / "a.png", size=(9, 9))], tmp_path / "out", boundary=boundary)
    for number, noise in enumerate((torch.zeros(3, 8, 12), torch.full((1, 3, 8, 12), torch.nan))):
        with pytest.raises(ValueError, match="holds no boundary; give a file written by Boundary.save"):
            run(model, [image], tmp_path / "out", boundary=save_boundary(tmp_path / f"{number}.safetensors", noise))
    assert not (tmp_path / "out").exists()
    image = save_picture(tmp_path / "a.png")
    assert len(run(model, [image], tmp_path / "out", boundary=boundary)["pictures"]) == 1


def test_a_task_is_held_against_the_one_that_the_model_was_trained_for(tmp_path):
    image, model = save_picture(tmp_path / "a.png"), save_model(tmp_path / "model", scale=1)
    run(model, [image], tmp_path / "free", task="deblur")  # nothing tells
    for content in ({}, {"settings": {"degradation": []}}, {"settings": []}):
        (tmp_path / "model" / "manifest.json").write_text(json.dumps(content))
        run(model, [image], tmp_path / f"free{len(str(content))}", task="deblur")
    (tmp_path / "model" / "manifest.json").write_text(json.dumps({"settings": {"degradation": {"task": "denoise"}}}))
    with pytest.raises(ValueError, match="is a model for denoise, not for deblur"):
        run(model, [image], tmp_path / "out", task="deblur")
    assert not (tmp_path / "out").exists()
    run(model, [image], tmp_path / "out", task="denoise")


def test_a_model_that_draws_pictures_restores_none(tmp_path):
    image, model = save_picture(tmp_path / "a.png"), save_model(tmp_path / "model", scale=1)
    (tmp_path / "model" / "manifest.json").write_text(json.dumps({"settings": {"degradation": None}}))
    with pytest.raises(ValueError, match="model was trained to draw pictures, not to restore any"):
        run(model, [image], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_noise_that_was_searched_is_started_from(model, tmp_path):
    image = save_picture(tmp_path / "a.png")
    other = save_picture(tmp_path / "b.png", size=(9, 4))
    noise = torch.randn(1, 3, 8, 12, generator=torch.Generator().manual_seed(5))
    file = save_boundary(tmp_path / "boundary.safetensors", noise)
    report = run(model, [image, other], tmp_path / "out", boundary=file)
    assert [one["file"] for one in report["pictures"]] == ["a.png"]
    assert "`latents` must have the shape (1, 3, 8, 18)" in report["failures"][0]["error"]
    pipe = sfumato.load(model)
    expected = pipe(
        Image.open(image), num_inference_steps=2, latents=noise, generator=torch.Generator().manual_seed(0)
    ).images[0]  # fmt: skip
    assert Image.open(tmp_path / "out" / "a.png").tobytes() == expected.tobytes()


def test_grey_pictures_of_sixteen_bits_keep_them(tmp_path):
    values = torch.randint(0, 65536, (4, 6), generator=torch.Generator().manual_seed(0)).numpy().astype("uint16")
    Image.fromarray(values).save(tmp_path / "a.png")
    model, mask = save_model(tmp_path / "model", scale=1, masked=True), tmp_path / "mask.png"
    Image.frombytes("L", (6, 4), bytes([255, 255, 255, 0, 0, 0] * 4)).save(mask)
    run(model, [str(tmp_path / "a.png")], tmp_path / "out", mask=str(mask))
    restored = Image.open(tmp_path / "out" / "a.png")
    assert restored.mode == "I;16"
    kept = restored.crop((3, 0, 6, 4))
    assert kept.tobytes() == values[:, 3:].tobytes()


def test_the_profile_of_colours_is_kept(model, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path, icc_profile=b"a profile")
    run(model, [str(path)], tmp_path / "out")
    assert Image.open(tmp_path / "out" / "a.png").info["icc_profile"] == b"a profile"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"task": "inpaint"}, "is a model for sr, not for inpaint"),
        ({"task": "colourise"}, "`task` must be one of sr, inpaint, denoise, deblur, got 'colourise'"),
        ({"scale": 4}, "gives 2 times the size, not 4 times: drop --scale"),
        ({"compare": "grid"}, "`compare` must be row or none, got 'grid'"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"seed": 10**22}, r"`seed` must be a whole number from 0 to 2\^63 - 1, got 10000000000000000000000"),
        ({"mask": "a.png"}, "is not given masks: drop --mask"),
        ({"model": "atelier-pixel"}, "is a ClassConditionalPipeline, which restores no pictures"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_any_file_is_written(
    model, tmp_path, monkeypatch, settings, sentence
):
    save_picture(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        run(**{"model": model, "images": ["a.png"], "output": "out", **settings})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_inference_steps": 9}, r"`num_inference_steps` must be a whole number in \[1, 4\] .* got 9"),
        ({"tile_size": -3}, "`tile_size` must be a whole multiple of 1 pixels .* got -3"),
        ({"tile_size": 8, "tile_overlap": 8}, "`tile_overlap` must be from 0 to below the tile's 8 pixels, got 8"),
        ({"tile_overlap": -1}, "`tile_overlap` must be 0 or more, got -1"),
    ],
)
def test_settings_of_the_run_are_wrong_once_and_not_for_every_picture(model, tmp_path, settings, sentence):
    image = save_picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=sentence):
        run(model, [image], tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def save_mask(path, size=(6, 4), value=255):
    Image.new("L", size, value).save(path)
    return str(path)


def test_a_mask_that_fits_no_picture_is_refused_once(tmp_path):
    model = save_model(tmp_path / "model", scale=1, masked=True)
    image, other = save_picture(tmp_path / "a.png"), save_picture(tmp_path / "b.png", size=(5, 4))
    wrong = {
        "black.png": ({"value": 0}, "black.png: `mask_image` marks nothing"),
        "small.png": ({"size": (3, 3)}, r"small.png: `mask_image` must have the picture's size: .*\(3, 3\)"),
    }
    for name, (how, sentence) in wrong.items():
        with pytest.raises(ValueError, match=sentence):
            run(model, [image, other], tmp_path / "out", mask=save_mask(tmp_path / name, **how))
    Image.new("I", (6, 4), 70000).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match="deep.tif: `image` must have values in"):
        run(model, [image], tmp_path / "out", mask=str(tmp_path / "deep.tif"))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="broken.png can't be read as a picture"):
        run(model, [image], tmp_path / "out", mask=str(tmp_path / "broken.png"))
    assert not (tmp_path / "out").exists()
    report = run(model, [other, image], tmp_path / "out", mask=save_mask(tmp_path / "mask.png"))
    assert [one["file"] for one in report["pictures"]] == ["a.png"]  # the other's size is its own failure
    assert "must have the picture's size" in report["failures"][0]["error"]


def test_what_is_missing_is_named(model, tmp_path):
    image = save_picture(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="There is no picture .*none.png"):
        run(model, [image, str(tmp_path / "none.png")], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="There is no model folder someone/model. One on the Hub"):
        run("someone/model", [image], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no pictures"):
        run(model, [str(tmp_path / "empty")], tmp_path / "out")
    filling = save_model(tmp_path / "model", scale=1, masked=True)
    with pytest.raises(ValueError, match="fills holes: give --mask"):
        run(filling, [image], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="There is no picture .*mask.png"):
        run(filling, [image], tmp_path / "out", mask=str(tmp_path / "mask.png"))
    other = storage.save_tensors(tmp_path / "other.safetensors", {"scores": torch.zeros(1)})
    with pytest.raises(ValueError, match="holds no boundary"):
        run(model, [image], tmp_path / "out", boundary=str(other))
