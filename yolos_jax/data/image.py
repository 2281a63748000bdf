"""Decode, orient, resize: the reference that predict uses. Pillow, no tensorflow.

Resizing is Pillow's bilinear on 8 bits, what the original trains and evaluates with.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from yolos_jax.data import files, sizes
from yolos_jax.data.patches import patchify

ORIENTATION_TAG = 0x0112
# What turns a picture stored with EXIF orientation 2..8 upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What pictures' files are called, as far as folders are looked through for them.
SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class Header(NamedTuple):
    """What a picture's file says before its pixels are decoded."""

    height: int  # pixels, as stored
    width: int
    mode: str  # Pillow's: 'RGB', 'L', 'CMYK', 'I;16', ...
    orientation: int  # EXIF's 1..8, 1 where absent

    @property
    def turned_size(self) -> tuple[int, int]:
        """(height, width) of the upright picture."""
        if self.orientation >= 5:
            return self.width, self.height
        return self.height, self.width


def read_header(source: bytes | str | os.PathLike, name: str = "") -> Header:
    """Reads a picture's size, mode and orientation without decoding it.

    Args:
      source: the file's bytes, or its path.
      name: what messages call the picture; its path by default.

    Raises:
      ValueError: no such file, or not a picture; the message names it.
    """
    with _open_file(source, name) as (file, name), _open_picture(file, name) as picture:
        return Header(picture.height, picture.width, picture.mode, _orientation(picture))


def decode(source: bytes | str | os.PathLike, exif: str = "ignore", name: str = "") -> np.ndarray:
    """Decodes a picture of any kind to three channels of eight bits.

    Grey becomes three equal channels, transparency is left out, CMYK is converted, of 16 bits the
    higher eight are kept (as for PNGs with three channels of 16 bits), of an animation the first
    picture.

    Args:
      source: the file's bytes, or its path.
      exif: 'ignore' leaves pixels as stored, 'apply' turns them as the EXIF tag says.
      name: what messages call the picture; its path by default.

    Returns:
      uint8 [height, width, 3].

    Raises:
      ValueError: no such file, not a picture, truncated; the message names it.
    """
    return np.array(open_rgb(source, exif, name))


def open_rgb(
    source: bytes | str | os.PathLike, exif: str = "ignore", name: str = ""
) -> Image.Image:
    """``decode`` as a Pillow picture of mode RGB, in memory: spares two copies before a resize."""
    if exif not in ("ignore", "apply"):
        raise ValueError(f"exif is {exif!r}, expected 'ignore' or 'apply'")
    with _open_file(source, name) as (file, name), _open_picture(file, name) as picture:
        return _decoded(picture, exif, name)


def to_rgb(picture: Image.Image, exif: str = "ignore", name: str = "picture") -> np.ndarray:
    """A Pillow picture of any mode as uint8 [height, width, 3]; see ``decode``.

    With exif='apply' it is turned where it has its tag still: Pillow takes the tag off when it
    turns a picture itself.
    """
    return np.array(_decoded(picture, exif, name))


def _decoded(picture: Image.Image, exif: str, name: str) -> Image.Image:
    turn = _TURNS.get(_orientation(picture)) if exif == "apply" else None
    try:
        rgb = _as_rgb(picture)
        return rgb if turn is None else rgb.transpose(turn)
    # Decoders raise whatever their format's code raises: OSError, SyntaxError, struct.error...
    except Exception as error:
        raise ValueError(f"{name}: cannot be decoded: {_reason(error)}") from error


def _as_rgb(picture: Image.Image) -> Image.Image:
    # Of these two they have 16 bits; elsewhere nothing says which number is white.
    if picture.mode == "I" and picture.format not in ("PPM", "PNG"):
        raise ValueError("pixels are signed or 32-bit integers, expected 8 or 16 bits")
    if picture.mode.startswith("I"):
        # Pillow's own conversion cuts everything above 255 to white.
        grey = np.clip(np.asarray(picture).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if picture.mode == "F":
        raise ValueError("pixels are floating-point numbers, expected 8 or 16 bits")
    if picture.mode == "P" and "transparency" in picture.info:
        # The palette's colours without their transparency: the same, and Pillow does not warn.
        picture = picture.convert("RGBA")
    if picture.mode == "RGB":
        picture.load()
        return picture
    return picture.convert("RGB")


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pillow's bilinear resize (antialiased when shrinking), uint8 [h, w, 3] -> [height, width, 3].

    Raises:
      ValueError: a side below one pixel.
    """
    if min(height, width) < 1:
        raise ValueError(f"cannot resize a picture to {height}x{width} pixels (height x width)")
    picture = Image.fromarray(image)
    return np.array(picture.resize((width, height), Image.Resampling.BILINEAR))


def preprocess(
    image: np.ndarray, preprocess_cfg: Mapping[str, Any], patch_size: int
) -> tuple[np.ndarray, tuple[int, int]]:
    """What evaluation and predict do to a picture; normalising is left to the compiled step.

    Args:
      image: uint8 [height, width, 3].
      preprocess_cfg: ``size`` and ``max_size`` of config.preprocess, pixels.
      patch_size: pixels.

    Returns:
      patches uint8 [rows * columns, P] and (rows, columns).
    """
    height, width = image.shape[:2]
    limits = preprocess_cfg["size"], preprocess_cfg["max_size"]
    new = tuple(int(side) for side in sizes.resized_size(height, width, *limits, patch_size))
    return patchify(resize(image, *new), patch_size), (new[0] // patch_size, new[1] // patch_size)


@contextlib.contextmanager
def _open_file(source: bytes | str | os.PathLike, name: str) -> Iterator[tuple[BinaryIO, str]]:
    """The source as an open file, and what messages call it."""
    if isinstance(source, bytes):
        yield io.BytesIO(source), name or f"picture of {len(source)} bytes"
        return
    name = name or os.fspath(source)
    try:
        file = files.open_binary(source)
    except OSError as error:
        raise ValueError(f"{name}: cannot be read: {files.reason(error)}") from None
    with file:
        yield file, name


def _open_picture(file: BinaryIO, name: str) -> Image.Image:
    try:
        return Image.open(file)
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name}: not a picture of a known kind") from None
    except Exception as error:  # a header that is cut or makes no sense, whatever the format
        raise ValueError(f"{name}: not a picture: {_reason(error)}") from error


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation 1..8; 1 where the tag is absent, damaged or means nothing.

    Also of a TIFF: Pillow turns those itself, and tells the upright size.
    """
    if picture.format == "TIFF":
        return 1
    try:
        value = picture.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF of an otherwise good picture is no reason to refuse it
        return 1
    return value if value in range(1, 9) else 1


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
