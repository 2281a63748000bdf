"""Pictures as people give them to a detector: paths, PIL pictures, arrays; one, or several."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from yolos_jax.data import image as image_lib


def as_list(pictures: Any) -> list:
    """The pictures as a list; a single one becomes a list of one, whatever it is."""
    one = isinstance(pictures, str | bytes | os.PathLike | Image.Image)
    # Arrays of three axes are colours, of two grey: refused as one picture, not row by row.
    one = one or (isinstance(pictures, np.ndarray) and pictures.ndim in (2, 3))
    return [pictures] if one or not isinstance(pictures, Iterable) else list(pictures)


def name_of(number: int, picture: Any) -> str:
    """What to call a picture in messages: its path, or its place among those given, from 0."""
    return os.fspath(picture) if isinstance(picture, str | os.PathLike) else f"picture {number}"


def to_array(picture: Any, exif: str, name: str) -> np.ndarray:
    """A picture's pixels, uint8 [height, width, 3].

    Args:
      picture: a path, a PIL picture or an array.
      exif: 'apply' turns files, and PIL pictures that have their orientation tag still, as the tag
        says; 'ignore' does not. Arrays are taken as they are.
      name: of ``name_of``.

    Raises:
      ValueError: not a picture; the message begins with its name.
    """
    if isinstance(picture, str | os.PathLike):
        return image_lib.decode(picture, exif=exif)
    if isinstance(picture, Image.Image):
        return image_lib.to_rgb(picture, exif, name)
    try:
        array = np.asarray(picture)
    except Exception as error:  # lists of unequal length, tensors of another device, ...
        raise ValueError(f"{name}: {type(picture).__name__}, not an array: {error}") from error
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        found = f"{array.dtype} {array.shape}" if array.ndim else type(picture).__name__
        raise ValueError(
            f"{name}: {found}, expected uint8 [height, width, 3], a PIL picture or a path"
        )
    return array
