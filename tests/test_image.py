"""Decoding pictures of every kind, and patches there and back."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from yolos_jax.data import image
from yolos_jax.data import patches as patches_lib

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 9, 3), np.uint8)


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def with_orientation(pixels: np.ndarray, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[image.ORIENTATION_TAG] = orientation
    return encoded(Image.fromarray(pixels), "PNG", exif=exif)


def test_rgb_is_as_stored():
    np.testing.assert_array_equal(image.decode(encoded(Image.fromarray(PIXELS))), PIXELS)


def test_grey_palette_and_transparency_become_rgb():
    grey = PIXELS[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(image.decode(encoded(Image.fromarray(grey))), expected)
    with_alpha = np.dstack([PIXELS, RNG.integers(0, 256, (6, 9), np.uint8)])
    np.testing.assert_array_equal(image.decode(encoded(Image.fromarray(with_alpha))), PIXELS)
    grey_alpha = Image.fromarray(grey).convert("LA")
    np.testing.assert_array_equal(image.decode(encoded(grey_alpha)), expected)
    palette = Image.fromarray(PIXELS).quantize(16)
    colours = np.array(palette.convert("RGB"))
    np.testing.assert_array_equal(image.decode(encoded(palette)), colours)
    np.testing.assert_array_equal(image.decode(encoded(palette, transparency=0)), colours)
    bits = Image.fromarray(grey > 127)
    assert set(np.unique(image.decode(encoded(bits)))) == {0, 255}


def test_of_sixteen_bits_the_higher_eight_are_kept():
    deep = np.array([[0, 255, 256, 0x1234, 0xFFFF]], np.uint16)
    for kind in ("PNG", "PPM", "TIFF"):
        decoded = image.decode(encoded(Image.fromarray(deep), kind))
        assert decoded[0, :, 0].tolist() == [0, 0, 1, 0x12, 255], kind
        assert (decoded == decoded[..., :1]).all()


def test_cmyk_becomes_rgb():
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    decoded = image.decode(encoded(red, "JPEG", quality=95))
    assert decoded.shape == (16, 16, 3)
    assert np.abs(decoded.astype(int) - [255, 0, 0]).max() < 20


# How a picture whose upright form is PIXELS is stored under each orientation, from the standard:
# which side of the upright picture the stored first row and first column are.
STORED = {
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.transpose(1, 0, 2),
    6: PIXELS.transpose(1, 0, 2)[::-1],
    7: PIXELS.transpose(1, 0, 2)[::-1, ::-1],
    8: PIXELS.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("orientation", STORED)
def test_orientation_is_ignored_or_applied(orientation, tmp_path):
    stored = np.ascontiguousarray(STORED[orientation])
    source = with_orientation(stored, orientation)
    np.testing.assert_array_equal(image.decode(source), stored)
    np.testing.assert_array_equal(image.decode(source, exif="apply"), PIXELS)
    path = tmp_path / "a.png"
    path.write_bytes(source)
    header = image.read_header(path)
    assert header == (*stored.shape[:2], "RGB", orientation)
    assert header.turned_size == PIXELS.shape[:2]


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_tiffs_are_upright_whatever_is_asked(orientation):
    exif = Image.Exif()
    exif[image.ORIENTATION_TAG] = orientation
    stored = Image.fromarray(PIXELS)
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}.get(orientation)
    source = encoded(stored.transpose(turn) if turn else stored, "TIFF", exif=exif)
    assert image.read_header(source)[:2] == PIXELS.shape[:2]
    assert image.read_header(source).orientation == 1
    for asked in ("ignore", "apply"):
        np.testing.assert_array_equal(image.decode(source, exif=asked), PIXELS)


def test_an_orientation_that_means_nothing_turns_nothing():
    source = with_orientation(PIXELS, 9)
    assert image.read_header(source).orientation == 1
    np.testing.assert_array_equal(image.decode(source, exif="apply"), PIXELS)


def test_what_cannot_be_decoded_is_named(tmp_path):
    jpeg = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")
    files = {"cut.jpg": jpeg[: len(jpeg) // 2], "text.jpg": b"not a picture", "none.jpg": b""}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            image.decode(tmp_path / name)
    with pytest.raises(ValueError, match=r"gone\.jpg: cannot be read: No such file"):
        image.decode(tmp_path / "gone.jpg")
    with pytest.raises(ValueError, match="cannot be read"):
        image.decode(tmp_path)
    with pytest.raises(ValueError, match="floating-point"):
        image.decode(encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))
    with pytest.raises(ValueError, match="32-bit integers, expected 8 or 16 bits"):
        image.decode(encoded(Image.fromarray(np.full((4, 4), 200, np.int32)), "TIFF"))
    with pytest.raises(ValueError, match="expected 8 or 16 bits"):
        image.to_rgb(Image.fromarray(np.full((4, 4), 200, np.int32)))
    with pytest.raises(ValueError, match="expected 'ignore' or 'apply'"):
        image.decode(jpeg, exif="yes")


def test_patches_by_hand():
    picture = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    patches = patches_lib.patchify(picture, 2)
    assert patches.shape == (2 * 3, 2 * 2 * 3) and patches.dtype == np.uint8
    # The second patch of the first row: y, x, channel; the last row and column are left out.
    np.testing.assert_array_equal(patches[1], picture[0:2, 2:4].reshape(-1))
    np.testing.assert_array_equal(patches[3], picture[2:4, 0:2].reshape(-1))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9))
def test_patches_there_and_back(height, width, patch_size):
    picture = np.random.default_rng(height * 41 + width).integers(0, 256, (height, width, 3))
    rows, cols = height // patch_size, width // patch_size
    patches = patches_lib.patchify(picture, patch_size)
    padded = np.concatenate([patches, np.zeros((2, patches.shape[1]), patches.dtype)])
    back = patches_lib.unpatchify(padded, (rows, cols), patch_size)
    np.testing.assert_array_equal(back, picture[: rows * patch_size, : cols * patch_size])


def test_resize_is_pillows_bilinear():
    small = image.resize(PIXELS, 3, 4)
    expected = Image.fromarray(PIXELS).resize((4, 3), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(small, np.array(expected))
    with pytest.raises(ValueError, match="0x4 pixels"):
        image.resize(PIXELS, 0, 4)


def test_preprocess_resizes_and_cuts():
    config = {"size": 32, "max_size": 48}
    patches, grid = image.preprocess(RNG.integers(0, 256, (50, 70, 3), np.uint8), config, 8)
    assert grid == (4, 5) and patches.shape == (20, 192) and patches.dtype == np.uint8
    patches, grid = image.preprocess(np.zeros((4, 900, 3), np.uint8), config, 8)
    assert grid == (1, 6) and patches.shape == (6, 192)
