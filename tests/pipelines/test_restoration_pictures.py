import io

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.pipelines.restoration_pictures import finish_picture, join_pictures, read_masks, read_pictures

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (4, 5, 4), dtype=np.uint8)


def image_of(mode):
    image = Image.fromarray(BYTES)
    return (image.convert("RGB") if mode in ("P", "LAB") else image).convert(mode)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"]
)
def test_every_mode_is_read_as_three_channels_and_comes_back_in_its_kind(mode):
    image = image_of("L").convert(mode) if mode in ("I;16", "I", "F") else image_of(mode)
    if mode == "F":
        image = Image.fromarray(np.asarray(image) / np.float32(255))
    (picture,) = read_pictures(image)
    assert picture.pixels.shape == (3, 4, 5) and picture.pixels.dtype == torch.float32
    assert picture.grey == (mode in ("1", "L", "LA", "I;16", "I", "F"))
    assert (picture.alpha is not None) == mode.lower().endswith("a")
    expected = ("L" if picture.grey else "RGB") + "A" * (picture.alpha is not None)
    assert picture.deep == mode.startswith("I")
    (back,) = join_pictures([finish_picture(picture, picture.pixels, None, 1)], "pil", [picture])
    assert back.mode == ("I;16" if picture.deep else expected)
    if mode in ("L", "LA", "RGB", "RGBA"):
        assert back.tobytes() == image.tobytes()


@pytest.mark.parametrize("kind", ["P", "L", "RGB"])
def test_transparency_that_is_no_channel_is_found(kind):
    file = io.BytesIO()
    image = Image.new(kind, (2, 1))
    if kind == "P":
        image.putpalette([0, 0, 0, 9, 9, 9])
    clear = {"P": 1, "L": 9, "RGB": (9, 9, 9)}[kind]
    image.putpixel((0, 0), clear)
    image.save(file, "PNG", transparency=clear)
    (picture,) = read_pictures(Image.open(file))
    assert picture.alpha is not None and picture.alpha.tolist() == [[[0, 1]]]
    assert picture.grey == (kind == "L")


@pytest.mark.parametrize("order", ["I;16", "I;16B", "array", "big-endian array", "tensor", "I"])
def test_sixteen_bits_are_scaled_and_not_clipped(order):
    values = np.array([[0, 255, 256], [30000, 65534, 65535]], dtype=np.uint16)
    if order == "tensor":
        image = torch.from_numpy(values)
    elif order.endswith("array"):
        image = values.astype(">u2") if order.startswith("big") else values
    elif order == "I":
        image = Image.fromarray(values.astype(np.int32), "I")
    else:
        image = Image.frombytes(order, (3, 2), values.astype(">u2" if order.endswith("B") else "<u2").tobytes())
    (picture,) = read_pictures(image)
    assert picture.grey
    assert picture.pixels[0].numpy() == pytest.approx(values / 65535.0, abs=1e-7)


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_of_grey_come_back_to_the_bit(mode):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = Image.fromarray(values) if mode == "I;16" else Image.fromarray(values.astype(np.int32), "I")
    (picture,) = read_pictures(image)
    hole = torch.zeros(1, 256, 256, dtype=torch.bool)
    hole[:, :2] = True
    (back,) = join_pictures([finish_picture(picture, torch.rand(3, 256, 256), hole, 1)], "pil", [picture])
    assert back.mode == "I;16"
    assert (np.asarray(back)[2:] == values[2:]).all() and not (np.asarray(back)[:2] == values[:2]).all()
    (plain,) = read_pictures(values)  # an array says nothing of PIL
    assert join_pictures([plain.pixels[:1]], "pil", [plain])[0].mode == "L"


def test_sixteen_bits_of_colour_are_read():
    values = RNG.integers(0, 65536, (4, 5, 3), dtype=np.uint16)
    (picture,) = read_pictures(values)
    assert picture.pixels.permute(1, 2, 0).numpy() == pytest.approx(values / 65535.0, abs=1e-7)


def test_the_orientation_of_a_camera_is_applied():
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image_of("RGB").save(file, "PNG", exif=exif)
    (picture,) = read_pictures(Image.open(file))
    assert picture.size == (5, 4)
    turned = np.rot90(np.asarray(image_of("RGB")), -1)
    assert (picture.pixels.permute(1, 2, 0).numpy() * 255).round() == pytest.approx(turned)


def test_arrays_tensors_batches_and_lists_of_them_say_the_same():
    floats = BYTES[..., :3].astype(np.float64) / 255
    tensor = torch.from_numpy(floats).permute(2, 0, 1)
    same = [
        image_of("RGB"), BYTES[..., :3], floats, floats[None], tensor, tensor[None], [tensor], [floats[None], tensor],
        (BYTES[..., :3][:, ::1],), torch.from_numpy(BYTES[..., :3]).permute(2, 0, 1),
    ]  # fmt: skip
    for image in same:
        for picture in read_pictures(image):
            assert not picture.grey and picture.alpha is None
            assert picture.pixels.permute(1, 2, 0).numpy() == pytest.approx(floats, abs=1e-7)
    assert len(read_pictures([floats[None], tensor])) == 2
    for grey in (floats[..., 0], floats[..., :1], tensor[0], tensor[:1]):
        (picture,) = read_pictures(grey)
        assert picture.grey and torch.equal(picture.pixels[0], picture.pixels[2])
    (clear,) = read_pictures(BYTES)
    assert clear.alpha is not None and clear.alpha[0].numpy() == pytest.approx(BYTES[..., 3] / 255, abs=1e-6)


def test_reading_leaves_its_source_alone():
    array = BYTES[..., :3].copy()
    tensor = torch.rand(3, 4, 5)
    before = tensor.clone()
    for picture in read_pictures([array, tensor]):
        picture.pixels.zero_()
    assert (array == BYTES[..., :3]).all() and torch.equal(tensor, before)


def broken_file():
    file = io.BytesIO()
    image_of("RGB").resize((64, 64)).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[:-100]))


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        ([], "`image` holds no picture"),
        ("a.png", "`image` must be a PIL image, an array or a tensor, got str"),
        ([image_of("L"), None], "Picture 1 of `image` must be a PIL image, an array or a tensor, got NoneType"),
        (Image.new("RGB", (0, 4)), r"`image` is empty: its width and height are \(0, 4\)"),
        (np.zeros((0, 4, 3)), r"1 or 3 channels, .* got the shape \(3, 0, 4\)"),
        (np.zeros((4, 4, 5)), r"got the shape \(5, 4, 4\)"),
        (torch.zeros(2, 2, 3, 4, 4), "1 or 3 channels"),
        (torch.full((3, 4, 4), -0.5), r"must have values in \[0, 1\] .* got -0.5 to -0.5"),
        (np.full((4, 4), 255.0), r"must have values in \[0, 1\] .* got 255 to 255"),
        (torch.full((3, 4, 4), float("nan")), r"must have values in \[0, 1\]"),
        (np.zeros((4, 4), dtype=np.int64), "must hold floats .* got torch.int64"),
        (np.array([["a"]]), "must hold floats"),
        pytest.param(
            np.zeros((4, 4), dtype=np.longdouble),
            "must hold floats in .*, got ",
            marks=pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="it is no longer than a double"),
        ),
        (Image.new("I", (2, 2), 70000), r"must have values in \[0, 1\]"),
        (broken_file(), "`image` can't be read as a picture"),
    ],
)
def test_what_is_no_picture_is_refused(image, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_pictures(image)


def test_rounding_beyond_the_range_is_clipped():
    (picture,) = read_pictures(torch.tensor([[-1e-4, 1 + 1e-4]]))
    assert picture.pixels[0].tolist() == [[0, 1]]


def test_one_mask_serves_all_and_white_is_filled():
    pictures = read_pictures([torch.rand(3, 2, 2)] * 2)
    holes = read_masks(Image.frombytes("L", (2, 2), bytes([0, 127, 128, 255])), pictures)
    assert [hole.tolist() for hole in holes] == [[[[False, False], [True, True]]]] * 2
    assert torch.equal(read_masks(torch.eye(2), pictures[:1])[0][0], torch.eye(2).bool())


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_in_a_mask_is_not_filled(mode):
    picture = read_pictures(torch.rand(3, 2, 2))
    mask = Image.new(mode, (2, 2), "white")
    mask.putalpha(Image.frombytes("L", (2, 2), bytes([0, 127, 128, 255])))
    for given in (mask, np.asarray(mask)):
        assert read_masks(given, picture)[0].tolist() == [[[False, False], [True, True]]]
    mask.putalpha(0)
    with pytest.raises(ValueError, match="marks nothing: paint white"):
        read_masks(mask, picture)


def test_transparency_grows_with_the_picture():
    (picture,) = read_pictures(np.dstack([np.zeros((2, 2, 3)), np.array([[0.0, 1.0], [0.0, 1.0]])]))
    grown = finish_picture(picture, torch.rand(3, 8, 8), None, 4)
    assert grown.shape == (4, 8, 8)
    assert grown[3].min() >= 0 and grown[3].max() <= 1 and (grown[3, :, 0] < grown[3, :, -1]).all()


def test_results_of_one_shape_are_stacked_and_others_listed():
    one, other = torch.rand(3, 2, 2), torch.rand(1, 2, 2)
    assert join_pictures([one, one], "pt").shape == (2, 3, 2, 2)
    assert join_pictures([one, one], "np").shape == (2, 2, 2, 3)
    assert [array.shape for array in join_pictures([one, other], "np")] == [(2, 2, 3), (2, 2, 1)]
    assert [image.mode for image in join_pictures([one, other], "pil")] == ["RGB", "L"]
