"""One row of a plan turned into patches, inside tf.data and outside of it.

Inside, TensorFlow reads and decodes, and Pillow resizes: it is twice as fast at that as any of
TensorFlow's operations (docs/performance.md), releases Python's lock, and its pixels are those
that the reference trains on and ``predict`` sees. Where a picture is refused, it is read once more
by Pillow alone, which reads more kinds and says in words what is wrong with the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from yolos_jax.data import files
from yolos_jax.data import image as image_lib
from yolos_jax.data import patches as patches_lib
from yolos_jax.data.tensorflow_import import tf


class Row(NamedTuple):
    """What a plan says about a picture: one, or columns of many. Sizes are (height, width)."""

    path: np.ndarray  # bytes or str; with a store, what the picture is called
    record: np.ndarray  # int64: its number in the store
    stated: np.ndarray  # int32 [2]: size that the picture must have, turned upright
    orientation: np.ndarray  # int32: EXIF's 1..8; 1 where nothing is to be turned
    flip: np.ndarray  # bool
    crop: np.ndarray  # float32 [4]: top, left, height, width in pixels of the original
    size: np.ndarray  # int32 [2]: final size


class Needs(NamedTuple):
    """What any row of a plan needs: a graph without the rest costs a third for small pictures."""

    turn: bool
    resize: bool
    flip: bool

    @classmethod
    def of(cls, rows: Row) -> Needs:
        """What columns of rows need."""
        whole = (rows.crop[:, :2] == 0).all() and (rows.crop[:, 2:] == rows.stated).all()
        return cls(
            turn=bool((rows.orientation != 1).any()),
            resize=not whole or bool((rows.size != rows.stated).any()),
            flip=bool(rows.flip.any()),
        )


def read_row(row: Row, content: tf.Tensor, patch_size: int, needs: Needs) -> tf.Tensor:
    """Decodes, crops, resizes, flips and cuts a picture into patches, in a graph.

    Args:
      row: what the plan says.
      content: the picture's file, a string.
      patch_size: pixels.
      needs: of all rows.

    Returns:
      uint8 [rows * columns, P].

    Raises:
      tf.errors.OpError: when run, if the picture is broken or not of the stated size.
    """
    pixels = _decode(content, row, needs)
    # Nobody sees this message: ``read_row_with_pillow`` says it in words.
    tf.debugging.assert_equal(tf.shape(pixels)[:2], row.stated)
    if needs.resize:
        pixels = tf.numpy_function(resize_crop, [pixels, row.crop, row.size], tf.uint8)
    if needs.flip:
        pixels = tf.cond(row.flip, lambda: tf.reverse(pixels, [1]), lambda: pixels)
    rows, cols = row.size[0] // patch_size, row.size[1] // patch_size
    patches = tf.reshape(pixels, [rows, patch_size, cols, patch_size * 3])
    patches = tf.transpose(patches, [0, 2, 1, 3])
    return tf.reshape(patches, [rows * cols, patch_size * patch_size * 3])


def read_row_with_pillow(row: Row, patch_size: int, store: files.Store | None) -> np.ndarray:
    """The same without TensorFlow, reading included: the file, or the record of a store.

    Raises:
      ValueError: naming the picture and what is wrong with it.
    """
    path = row.path.decode() if isinstance(row.path, bytes) else str(row.path)
    source = path if store is None else store.read([row.record])[0]
    if isinstance(source, ValueError):
        raise source
    pixels = image_lib.decode(source, "apply" if row.orientation > 1 else "ignore", path)
    if pixels.shape[:2] != tuple(row.stated):
        raise ValueError(
            f"{path}: is {pixels.shape[0]} x {pixels.shape[1]} pixels (height x width), the "
            f"annotations say {row.stated[0]} x {row.stated[1]}"
        )
    pixels = resize_crop(pixels, row.crop, row.size)
    return patches_lib.patchify(pixels[:, ::-1] if row.flip else pixels, patch_size)


def resize_crop(pixels: np.ndarray, crop: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Resamples a fractional rectangle of a picture once: bilinear, antialiased where it shrinks.

    Args:
      pixels: uint8 [h, w, 3].
      crop: float [4]: top, left, height, width in pixels.
      size: int [2]: height and width wanted.

    Returns:
      uint8 [height, width, 3].
    """
    top, left, height, width = (float(value) for value in crop)
    # A sum that rounds to more than the side would be refused.
    bottom, right = min(top + height, pixels.shape[0]), min(left + width, pixels.shape[1])
    resized = Image.fromarray(pixels).resize(
        (int(size[1]), int(size[0])), Image.Resampling.BILINEAR, box=(left, top, right, bottom)
    )
    return np.asarray(resized)


def _decode(content: tf.Tensor, row: Row, needs: Needs) -> tf.Tensor:
    """Pixels of the whole picture, uint8 [h, w, 3]: JPEG and PNG in the graph, others by Pillow."""

    def jpeg():
        # The default transform is faster and a few grey levels off.
        return tf.io.decode_jpeg(content, channels=3, dct_method="INTEGER_ACCURATE")

    def png():
        return tf.io.decode_png(content, channels=3)

    def other():
        pixels = tf.numpy_function(_decode_with_pillow, [content, row.orientation], tf.uint8)
        return tf.ensure_shape(pixels, [None, None, 3])

    is_jpeg = tf.io.is_jpeg(content)
    is_png = tf.strings.substr(content, 0, 4) == b"\x89PNG"
    if needs.turn:
        upright = row.orientation == 1
        is_jpeg, is_png = is_jpeg & upright, is_png & upright
    return tf.cond(is_jpeg, jpeg, lambda: tf.cond(is_png, png, other))


def _decode_with_pillow(content: bytes, orientation: int) -> np.ndarray:
    return image_lib.decode(content, exif="apply" if orientation > 1 else "ignore")
