"""Whatever people give a detector: seen as files are, or refused with its place in the list."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests import tiny_checkpoint
from yolos_jax import detector
from yolos_jax.labels import LabelMap


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    labels = LabelMap((10, 20), ("apple", "bean"))
    return detector.load(tiny_checkpoint.write(tmp_path_factory.mktemp("m") / "c", labels))


def pixels(height=64, width=64):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def stored(path: Path, kind: str, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels(64, 96)).save(path, kind, exif=exif)
    return path


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_a_pil_picture_is_turned_as_its_file_is(loaded, tmp_path, monkeypatch, kind, exif):
    monkeypatch.setattr(loaded, "exif", exif)
    path = stored(tmp_path / "picture", kind, 6)
    (of_path,) = loaded.predict(path, threshold=0)
    (of_picture,) = loaded.predict(Image.open(path), threshold=0)
    np.testing.assert_array_equal(of_picture.boxes_xyxy_px, of_path.boxes_xyxy_px)
    # Upright already, and said so; and an array, which says nothing.
    upright = ImageOps.exif_transpose(Image.open(path))
    (of_upright,) = loaded.predict(upright, threshold=0)
    (of_array,) = loaded.predict(np.asarray(upright), threshold=0)
    np.testing.assert_array_equal(of_upright.boxes_xyxy_px, of_array.boxes_xyxy_px)
    # Pillow turns a TIFF whatever is asked for.
    same = np.array_equal(of_path.boxes_xyxy_px, of_upright.boxes_xyxy_px)
    assert same == (exif == "apply" or kind == "TIFF")


def cut():
    file = io.BytesIO()
    Image.fromarray(pixels()).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[: len(file.getvalue()) // 2]))


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (cut(), "picture 1: cannot be decoded: .*truncated"),
        (Image.new("F", (64, 64)), "picture 1: cannot be decoded: .*floating-point"),
        (pixels().astype(np.float32), r"picture 1: float32 \(64, 64, 3\), expected uint8"),
        (3, "picture 1: int, expected uint8"),
        (None, "picture 1: NoneType, expected uint8"),
        (b"bytes", "picture 1: bytes, expected uint8"),
        ([[1], [2, 3]], "picture 1: list, not an array"),
    ],
)
def test_what_is_no_picture_is_named_by_its_place(loaded, thing, message):
    with pytest.raises(ValueError, match=message):
        loaded.predict([pixels(), thing])


@pytest.mark.parametrize(
    ("thing", "found"),
    [(3, "int"), (None, "NoneType"), (b"x", "bytes"), (pixels()[..., 0], r"uint8 \(64, 64\)")],
)
def test_one_thing_that_is_no_picture(loaded, thing, found):
    with pytest.raises(ValueError, match=f"picture 0: {found}, expected uint8"):
        loaded.predict(thing)


def test_no_pictures_have_no_predictions(loaded):
    assert loaded.predict([]) == loaded.predict(iter([])) == []
