import importlib.util
import logging
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import sfumato
from sfumato import storage
from sfumato.evaluation import pictures
from sfumato.evaluation.pictures import Request, draw_pictures, model_fingerprint, read_pictures

SMALL = {"num_inference_steps": 2, "batch_size": 4, "description": None}
REQUESTS = [
    Request(f"a photo of a {word}", (0, k)) for k, word in enumerate(("bag", "boot", "coat", "dress", "shirt"))
]
JOB = Path(__file__).with_name("drawing_job.py")


@pytest.fixture(scope="module")
def pipe():
    return sfumato.load("atelier")


@pytest.fixture(scope="module")
def fresh(pipe):
    return draw_pictures(pipe, REQUESTS, **SMALL)


class Counter:
    """Counts what the denoiser is asked."""

    def __init__(self, pipe):
        self.asked = 0
        self.hook = pipe.unet.register_forward_pre_hook(self.count)

    def count(self, *_):
        self.asked += 1


@pytest.fixture
def counter(pipe):
    counter = Counter(pipe)
    yield counter
    counter.hook.remove()


def files_in(folder):
    return sorted(folder.rglob("*.png"))


def test_pictures_are_eight_bit_and_in_the_order_of_the_requests(pipe, fresh):
    assert fresh.shape == (5, 3, 32, 32) and fresh.dtype == torch.float32
    assert torch.equal((255 * fresh).round() / 255, fresh)
    turned = draw_pictures(pipe, REQUESTS[::-1] + REQUESTS[:1], **SMALL)
    assert torch.allclose(turned, torch.cat([fresh.flip(0), fresh[:1]]), atol=1.01 / 255)
    assert not torch.allclose(fresh[0], fresh[1], atol=0.1)


def test_a_picture_does_not_depend_on_its_batch(pipe, fresh):
    alone = torch.cat([draw_pictures(pipe, [request], **SMALL) for request in REQUESTS])
    assert (alone - fresh).abs().max() <= 1.01 / 255


def test_cached_pictures_are_the_fresh_ones_and_are_not_drawn_again(pipe, fresh, counter, tmp_path):
    first = draw_pictures(pipe, REQUESTS, cache=tmp_path, **SMALL)
    asked = counter.asked
    again = draw_pictures(sfumato.load("atelier"), REQUESTS, cache=tmp_path, **SMALL)
    assert torch.equal(first, fresh) and torch.equal(again, fresh)
    assert asked and counter.asked == asked and len(files_in(tmp_path)) == 5
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("change", ["steps", "guidance", "scheduler", "seed", "weights"])
def test_a_picture_made_otherwise_is_another_file(pipe, tmp_path, change):
    draw_pictures(pipe, REQUESTS[:1], cache=tmp_path, **SMALL)
    other, settings, requests = sfumato.load("atelier"), dict(SMALL), REQUESTS[:1]
    if change == "steps":
        settings["num_inference_steps"] = 3
    if change == "guidance":
        settings["guidance_scale"] = 3.5
    if change == "scheduler":
        other.scheduler.register_to_config(steps_offset=0)
    if change == "seed":
        requests = [Request(requests[0].prompt, (0, 0, 0))]
    if change == "weights":
        next(other.vae.decoder.parameters()).data[0] += 1e-3
    draw_pictures(other, requests, cache=tmp_path, **settings)
    assert len(files_in(tmp_path)) == 2


def test_a_fingerprint_depends_on_every_part_that_draws(pipe):
    before = model_fingerprint(pipe)
    assert before == model_fingerprint(sfumato.load("atelier"))
    for name in ("unet", "text_encoder", "vae"):
        other = sfumato.load("atelier")
        next(getattr(other, name).parameters()).data.view(-1)[0] += 1e-3
        assert model_fingerprint(other) != before


@pytest.mark.parametrize("damage", ["cut", "empty", "other bytes", "another picture", "renamed"])
def test_a_damaged_file_is_drawn_again(pipe, fresh, counter, tmp_path, damage):
    draw_pictures(pipe, REQUESTS, cache=tmp_path, **SMALL)
    file, other = files_in(tmp_path)[:2]
    whole = file.read_bytes()
    if damage == "cut":
        file.write_bytes(whole[:-40])
    if damage == "empty":
        file.write_bytes(b"")
    if damage == "other bytes":
        middle = len(whole) // 2
        file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    if damage == "another picture":
        Image.new("RGB", (32, 32), "red").save(file)
    if damage == "renamed":
        other.replace(file)
    asked = counter.asked
    assert torch.allclose(draw_pictures(pipe, REQUESTS, cache=tmp_path, **SMALL), fresh, atol=1.01 / 255)
    assert counter.asked > asked
    assert len(files_in(tmp_path)) == 5


def test_what_a_killed_run_has_drawn_stays(pipe, fresh, counter, tmp_path):
    def die(*_):
        if counter.asked > 3:  # in the second batch
            raise KeyboardInterrupt

    hook = pipe.unet.register_forward_pre_hook(die)
    counter.asked = 0
    with pytest.raises(KeyboardInterrupt):
        draw_pictures(pipe, REQUESTS, cache=tmp_path, **{**SMALL, "batch_size": 2})
    hook.remove()
    kept = {file: file.stat().st_mtime_ns for file in files_in(tmp_path)}
    assert len(kept) == 2
    time.sleep(0.01)
    assert torch.allclose(draw_pictures(pipe, REQUESTS, cache=tmp_path, **SMALL), fresh, atol=1.01 / 255)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


def test_pictures_that_are_not_finite_are_refused_and_not_kept(tmp_path):
    broken = sfumato.load("atelier")
    next(broken.unet.parameters()).data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"'a photo of a bag'.*not finite"):
        draw_pictures(broken, REQUESTS, cache=tmp_path, **SMALL)
    assert files_in(tmp_path) == []


def test_a_prompt_that_is_cut_is_named_once(pipe, caplog):
    long = "a photo of a bag " * 20
    with caplog.at_level(logging.WARNING, "sfumato.evaluation.pictures"):
        draw_pictures(pipe, REQUESTS, **SMALL)
        assert not [record for record in caplog.records if record.name == "sfumato.evaluation.pictures"]
        draw_pictures(pipe, [Request(long, (0,)), Request(long, (1,)), Request("a bag", (0,))], **SMALL)
    (message,) = [r.getMessage() for r in caplog.records if r.name == "sfumato.evaluation.pictures"]
    assert repr(long) in message and "is cut" in message


def test_models_of_grey_pictures_give_three_channels(tmp_path):
    pixel = sfumato.load("atelier-pixel")
    request = [Request("class 3", (0,))]
    pictures = draw_pictures(pixel, request, cache=tmp_path, guidance_scale=1.0, **{**SMALL, "batch_size": 1})
    assert pictures.shape[:2] == (1, 3)
    assert torch.equal(pictures, draw_pictures(pixel, request, cache=tmp_path, guidance_scale=1.0, **SMALL))


def test_nothing_to_draw_is_refused(pipe):
    with pytest.raises(ValueError, match="at least one picture"):
        draw_pictures(pipe, [], **SMALL)


def test_two_processes_draw_what_one_draws(launch, tmp_path):
    spec = importlib.util.spec_from_file_location("drawing_job", JOB)
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    expected = job.drawn()
    cache = tmp_path / "cache"
    done = launch(JOB, tmp_path / "out", cache, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(files_in(cache)) == 5
    for rank in (0, 1):
        assert torch.equal(storage.load_tensors(tmp_path / f"out-{rank}.safetensors")["pictures"], expected)
    assert torch.equal(job.drawn(cache), expected)


def test_two_processes_need_no_cache_folder(launch, tmp_path):
    done = launch(JOB, tmp_path / "out", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (storage.load_tensors(tmp_path / f"out-{rank}.safetensors")["pictures"] for rank in (0, 1))
    assert torch.equal(first, second) and len(first) == 5


def test_pictures_that_another_run_drew_while_processes_agreed_are_read(pipe, fresh, tmp_path, monkeypatch):
    """The second of two processes looks into an empty cache; the first looks when another run has filled it."""

    def agreed(_):
        monkeypatch.setattr(pictures, "process_group", lambda: None)
        draw_pictures(pipe, REQUESTS, cache=tmp_path, **SMALL)  # the other run
        return [[]]

    second = SimpleNamespace(process_index=1, num_processes=2, is_main_process=False, wait_for_everyone=lambda: None)
    monkeypatch.setattr(pictures, "process_group", lambda: second)
    monkeypatch.setattr(pictures, "broadcast_object_list", agreed)
    assert torch.equal(draw_pictures(pipe, REQUESTS, cache=tmp_path, **SMALL), fresh)


def test_a_users_pictures_are_cut_to_the_middle_and_scaled(tmp_path):
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste((0, 0, 255), (10, 0, 30, 20))
    wide.save(tmp_path / "b.png")
    (tmp_path / "in").mkdir()
    Image.new("L", (8, 8), 255).save(tmp_path / "in" / "c.jpg")
    (tmp_path / "notes.txt").write_text("not a picture")
    pictures = read_pictures(tmp_path, (16, 16))
    assert pictures.shape == (2, 3, 16, 16)
    assert torch.equal(pictures[0, :, 8, 8], torch.tensor([0.0, 0.0, 1.0])) and pictures[1].min() > 0.99
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.png can't be read"):
        read_pictures(tmp_path, (16, 16))
    with pytest.raises(FileNotFoundError, match="no pictures"):
        read_pictures(tmp_path / "nowhere", (16, 16))
