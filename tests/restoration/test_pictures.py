"""Sources of clean pictures: any size and mode, by position and key; what can't be used is named before the start."""

import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.restoration.job import JobConfig, _pictures
from sfumato.restoration.pictures import (
    Crops,
    Renders,
    Some,
    _of_row,
    folder_pictures,
    holds_rows,
    hub_pictures,
    split,
)

KEYS = [(1, 2, k) for k in range(5)]


def save(folder, name, array, mode=None, **how):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array, mode).save(folder / name, **how)


@pytest.fixture
def folder(tmp_path):
    """Five pictures of several sizes, one in a folder of its own."""
    rng = np.random.default_rng(0)
    for k, size in enumerate([(20, 40), (32, 16), (16, 16), (50, 50)]):
        save(tmp_path, f"{k}.png", rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    save(tmp_path / "inner", "4.png", rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_pictures_of_any_size_are_cropped_where_the_key_says(folder):
    source = folder_pictures(folder, 16, shown=False)
    found = source.take(range(5), KEYS)
    assert len(source) == 5 and found.shape == (5, 3, 16, 16) and found.abs().max() <= 1
    again = torch.cat([source.take([k], [KEYS[k]]) for k in reversed(range(5))]).flip(0)
    assert torch.equal(found, again)
    assert not torch.equal(found[3], source.take([3], [(7, 7, 7)])[0])
    whole = torch.from_numpy(np.array(Image.open(folder / "3.png"))).permute(2, 0, 1) / 127.5 - 1
    crops = whole.unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 16, 16)
    apart = torch.stack([(crops - crop).abs().amax((1, 2, 3)) for crop in (found[3], found[3].flip(2))])
    assert apart.min() < 1e-6


def test_crops_reach_every_corner_and_both_directions(tmp_path):
    ramp = np.tile(np.arange(18, dtype=np.uint8), (18, 1))
    save(tmp_path, "ramp.png", np.stack([ramp, ramp.T, 0 * ramp], 2))
    shades = folder_pictures(tmp_path, 16, shown=False).take([0] * 100, [(k,) for k in range(100)]) / 2 + 0.5
    starts = {tuple((255 * crop[:2].amin((1, 2))).round().int().tolist()) for crop in shades}
    assert starts == {(left, top) for left in range(3) for top in range(3)}
    assert 25 < sum(float(crop[0, 0, 0]) > float(crop[0, 0, -1]) for crop in shades) < 75


def test_without_keys_the_middle_is_taken_as_it_is(folder):
    whole = torch.from_numpy(np.array(Image.open(folder / "3.png"))).permute(2, 0, 1) / 127.5 - 1
    found = folder_pictures(folder, 16, shown=False).take([3])[0]
    assert torch.allclose(found, whole[:, 17:33, 17:33], atol=1e-6)


def test_grey_transparent_and_16_bit_pictures_keep_their_values(tmp_path):
    rng = np.random.default_rng(1)
    grey, deep = rng.integers(0, 256, (16, 16), dtype=np.uint8), rng.integers(0, 65536, (16, 16), dtype=np.uint16)
    coloured = rng.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    save(tmp_path, "a-grey.png", grey)
    save(tmp_path, "b-deep.png", deep)
    save(tmp_path, "c-alpha.png", coloured)
    found = folder_pictures(tmp_path, 16, shown=False).take(range(3)) / 2 + 0.5
    expected = [grey / 255, deep / 65535]
    for picture, values in zip(found, expected, strict=False):
        assert torch.allclose(picture, torch.from_numpy(values).float().expand(3, -1, -1), atol=1e-6)
    assert torch.allclose(found[2], torch.from_numpy(coloured[..., :3] / 255).float().permute(2, 0, 1), atol=1e-6)


def test_a_photo_is_turned_as_the_camera_was(tmp_path):
    top = np.zeros((16, 16, 3), np.uint8)
    top[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    save(tmp_path, "photo.png", top, exif=exif)
    found = folder_pictures(tmp_path, 16, shown=False).take([0])[0]
    assert found[:, :8].max() == -1 and found[:, 8:].min() == 1


def test_broken_and_small_pictures_are_named_or_left_out(folder, caplog):
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:200])
    (folder / "empty.jpg").write_bytes(b"")
    save(folder, "small.png", np.zeros((8, 30, 3), np.uint8))
    with pytest.raises(ValueError, match="3 of 8 pictures of .* can't be used") as refused:
        folder_pictures(folder, 16, shown=False)
    for said in ("broken.png: can't be read", "empty.jpg: can't be read", "small.png: 30x8, smaller than the crops"):
        assert said in str(refused.value)
    kept = folder_pictures(folder, 16, unfit="skip", shown=False)
    assert len(kept) == 5 and "broken.png" in caplog.text
    assert kept.take(range(5)).shape == (5, 3, 16, 16)


def test_pictures_that_no_crop_can_be_read_from_are_named_or_left_out(folder):
    rng = np.random.default_rng(2)
    Image.fromarray((255 * rng.random((20, 20))).astype(np.float32)).save(folder / "float.tif")
    Image.fromarray(np.full((20, 20), 70000, np.int32)).save(folder / "wide.tif")
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72  # turned; then a resolution becomes a maker, which is no text
    broken = exif.tobytes().replace(b"\x01\x1a\0\x05", b"\x01\x0f\0\x05")
    save(folder, "turned.png", np.zeros((20, 20, 3), np.uint8), exif=broken)
    with pytest.raises(ValueError, match=r"3 of 8 pictures of .* can't be used") as refused:
        folder_pictures(folder, 16, shown=False)
    for name in ("float.tif", "wide.tif", "turned.png"):
        assert f"{name}: can't be read" in str(refused.value)
    kept = folder_pictures(folder, 16, unfit="skip", shown=False)
    assert kept.take(range(len(kept)), [(k,) for k in range(len(kept))]).isfinite().all()


def test_a_row_of_a_data_set_without_a_picture_is_named_or_left_out():
    rows = [{"image": Image.new("RGB", (20, 20))}, {"image": None}]
    opened = partial(_of_row, rows, "image")
    with pytest.raises(ValueError, match=r"1 of 2 pictures of set can't be used \(b: can't be read \(the row has"):
        Crops("set", "ab", opened, 16, shown=False)
    assert len(Crops("set", "ab", opened, 16, unfit="skip", shown=False)) == 1


def test_folders_without_a_usable_picture_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="There are no pictures"):
        folder_pictures(tmp_path, 16)
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ValueError, match="There is no picture in .* that can be used"):
        folder_pictures(tmp_path, 16, unfit="skip", shown=False)


def test_hidden_files_are_left_out(folder):
    before = folder_pictures(folder, 16, shown=False).facts()
    for hidden in (folder / "._0.png", folder / ".thumbnails" / "0.png", folder / "inner" / ".cache" / "a" / "0.png"):
        hidden.parent.mkdir(parents=True, exist_ok=True)
        hidden.write_bytes((folder / "0.png").read_bytes())
    assert folder_pictures(folder, 16, shown=False).facts() == before
    within = folder / ".thumbnails"  # whoever names a hidden folder means it
    assert len(folder_pictures(within, 16, shown=False)) == 1


def test_what_is_held_out_is_not_trained_on(folder):
    source = folder_pictures(folder, 16, shown=False)
    kept, held_out = split(source, 64, seed=0)
    assert len(held_out) == 2 and sorted([*kept.chosen, *held_out.chosen]) == list(range(5))
    assert split(source, 64, seed=0)[1].chosen == held_out.chosen
    assert kept.facts() != held_out.facts() != source.facts()
    assert torch.equal(held_out.take([1]), source.take([held_out.chosen[1]]))
    with pytest.raises(ValueError, match="There are 2 pictures only"):
        split(Some(source, [0, 1]), 64, seed=0)


def test_a_folder_to_validate_with_is_left_out_of_the_folder_around_it(folder, tmp_path_factory):
    before, kept = (folder_pictures(folder, 16, without=w, shown=False) for w in (None, folder / "inner"))
    assert len(before) == 5 and len(kept) == 4
    assert torch.equal(kept.take(range(4)), before.take(range(4))) and kept.facts() != before.facts()
    linked = tmp_path_factory.mktemp("links") / "link"
    linked.symlink_to(folder, target_is_directory=True)
    for data, held_out in ((folder, folder), (folder / "inner", folder), (linked, folder)):
        with pytest.raises(ValueError, match="All pictures of .* are in .* too: hold out a folder of other pictures"):
            folder_pictures(data, 16, without=held_out, shown=False)


def test_facts_tell_other_pictures_but_not_another_place(folder, tmp_path_factory):
    moved = tmp_path_factory.mktemp("moved")
    for file in folder.rglob("*.png"):
        target = moved / file.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    before = folder_pictures(folder, 16, shown=False).facts()
    assert folder_pictures(moved, 16, shown=False).facts() == before
    same, seen = moved / "same.bmp", []
    for shade in (0, 200):  # of one size and name
        save(moved, "same.bmp", np.full((16, 16, 3), shade, np.uint8))
        seen.append((same.stat().st_size, folder_pictures(moved, 16, shown=False).facts()["digest"]))
    assert seen[0][0] == seen[1][0] and seen[0][1] != seen[1][1]
    same.unlink()
    save(moved, "4.png", np.zeros((20, 20, 3), np.uint8))
    assert folder_pictures(moved, 16, shown=False).facts() != before


def test_renders_depend_on_position_and_key(fashion_mnist):
    source = Renders(fashion_mnist)
    found = source.take([3, 8], [(1, 1), (1, 2)])
    assert found.shape == (2, 3, 32, 32) and found.abs().max() <= 1
    assert torch.equal(found[1:], source.take([8], [(1, 2)]))
    looks = source.take([3] * 60, [(k,) for k in range(60)])
    assert len({tuple(look.flatten().tolist()) for look in looks}) > 15  # of 24
    assert Renders(fashion_mnist, "test").facts() != source.facts()


def test_a_name_that_is_nothing_is_refused_in_one_sentence():
    with pytest.raises((ImportError, ValueError), match="no folder nothing/here|neither 'atelier', nor a folder"):
        hub_pictures("nothing/here", 16)


def test_a_data_set_gives_what_its_files_hold(folder):
    pytest.importorskip("datasets")
    source = hub_pictures(str(folder), 16, shown=False)
    assert len(source) == 5 and source.take([0, 4], KEYS[:2]).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("kind", ["parquet", "saved", "saved-splits"])
def test_a_folder_of_rows_is_read_as_a_data_set(folder, tmp_path_factory, kind):
    datasets = pytest.importorskip("datasets")
    place = tmp_path_factory.mktemp("rows") / kind
    pictures = [str(file) for file in sorted(folder.rglob("*.png"))]
    rows = datasets.Dataset.from_dict({"picture": pictures}).cast_column("picture", datasets.Image())
    if kind == "parquet":
        place.mkdir()
        rows.to_parquet(place / "train-0.parquet")
    else:
        (rows if kind == "saved" else datasets.DatasetDict(train=rows)).save_to_disk(place)
    assert holds_rows(place) and not holds_rows(folder)
    whole, held_out = _pictures(JobConfig("out", str(place), size=16, unfit="skip"), 0, False)
    assert sorted([*whole.chosen, *held_out.chosen]) == list(range(5))
    expected = folder_pictures(folder, 16, shown=False)
    assert torch.equal(whole.whole.take(range(5)), expected.take(range(5)))


def test_a_folder_of_rows_without_datasets_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it fails
    (tmp_path / "train.parquet").touch()
    with pytest.raises(ImportError, match=f"^{tmp_path} holds no pictures but a data set, which needs datasets: pip"):
        _pictures(JobConfig("out", str(tmp_path), size=16), 0, False)
    with pytest.raises(ImportError, match="^There is no folder nothing/here; a data set, which needs datasets: pip"):
        hub_pictures("nothing/here", 16)
