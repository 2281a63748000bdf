"""One row of a plan turned into patches: by a TensorFlow graph, and by Pillow as the reference.

The graph is what runs, in parallel and without Python. Where it refuses a picture the reference
decides: it reads whatever Pillow reads, and says in words what is wrong with the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from yolos_jax.data import image as image_lib
from yolos_jax.data.tensorflow_import import tf

# Pixels that the filter may reach beyond a crop, besides its own width: rounding, either side.
MARGIN = 2


class Row(NamedTuple):
    """What a plan says about a picture: one, or columns of many. Sizes are (height, width)."""

    path: np.ndarray  # bytes or str
    stated: np.ndarray  # int32 [2]: size that the picture must have, turned upright
    orientation: np.ndarray  # int32: EXIF's 1..8; 1 where nothing is to be turned
    flip: np.ndarray  # bool
    crop: np.ndarray  # float32 [4]: top, left, height, width in pixels of the original
    size: np.ndarray  # int32 [2]: final size


class Needs(NamedTuple):
    """What any row of a plan needs: a graph without the rest costs a third for small pictures."""

    turn: bool
    crop: bool
    resize: bool
    flip: bool

    @classmethod
    def of(cls, rows: Row) -> Needs:
        """What columns of rows need."""
        return cls(
            turn=bool((rows.orientation != 1).any()),
            crop=bool((rows.crop[:, :2] != 0).any() or (rows.crop[:, 2:] != rows.stated).any()),
            resize=bool((rows.crop[:, 2:] != rows.size).any()),
            flip=bool(rows.flip.any()),
        )


def read_row(row: Row, patch_size: int, needs: Needs) -> tf.Tensor:
    """Reads, decodes, crops, resizes, flips and cuts a picture into patches, in a graph.

    JPEGs are decoded by the accurate transform, and no more of them than the crop needs; the crop
    is resampled once, from its fractional rectangle of the original.

    Returns:
      uint8 [rows * columns, P].

    Raises:
      tf.errors.OpError: when run, if the picture is missing, broken or not of the stated size.
    """
    content = tf.io.read_file(row.path)
    pixels, corner = _decode(content, row, needs)
    if needs.resize or needs.crop:
        pixels = _resample(pixels, row.crop[:2] - corner, row)
    if needs.flip:
        pixels = tf.cond(row.flip, lambda: tf.reverse(pixels, [1]), lambda: pixels)
    rows, cols = row.size[0] // patch_size, row.size[1] // patch_size
    patches = tf.reshape(pixels, [rows, patch_size, cols, patch_size * 3])
    patches = tf.transpose(patches, [0, 2, 1, 3])
    return tf.reshape(patches, [rows * cols, patch_size * patch_size * 3])


def read_row_reference(row: Row, patch_size: int) -> np.ndarray:
    """The same by Pillow, whose resize takes a fractional box.

    Raises:
      ValueError: naming the picture and what is wrong with it.
    """
    path = row.path.decode() if isinstance(row.path, bytes) else str(row.path)
    pixels = image_lib.decode(path, exif="apply" if row.orientation > 1 else "ignore")
    if pixels.shape[:2] != tuple(row.stated):
        raise ValueError(
            f"{path}: is {pixels.shape[0]} x {pixels.shape[1]} pixels (height x width), the "
            f"annotations say {row.stated[0]} x {row.stated[1]}"
        )
    top, left, height, width = (float(value) for value in row.crop)
    resized = Image.fromarray(pixels).resize(
        (int(row.size[1]), int(row.size[0])),
        Image.Resampling.BILINEAR,
        box=(left, top, left + width, top + height),
    )
    pixels = np.asarray(resized)
    return image_lib.patchify(pixels[:, ::-1] if row.flip else pixels, patch_size)


def _decode(content: tf.Tensor, row: Row, needs: Needs) -> tuple[tf.Tensor, tf.Tensor]:
    """Pixels uint8 [h, w, 3] that hold the crop, and their corner (top, left), float32 [2]."""
    origin = tf.zeros([2])

    def part_of_jpeg():
        shape = tf.io.extract_jpeg_shape(content)[:2]
        _check_size(shape, row)
        shrink = tf.maximum(row.crop[2:] / tf.cast(row.size, tf.float32), 1.0)
        reach = tf.math.ceil(shrink) + MARGIN
        low = tf.maximum(tf.cast(tf.floor(row.crop[:2] - reach), tf.int32), 0)
        high = tf.cast(tf.math.ceil(row.crop[:2] + row.crop[2:] + reach), tf.int32)
        window = tf.concat([low, tf.minimum(high, shape) - low], 0)
        pixels = tf.image.decode_and_crop_jpeg(
            content, window, channels=3, dct_method="INTEGER_ACCURATE"
        )
        return pixels, tf.cast(low, tf.float32)

    def jpeg():
        if needs.crop:
            return part_of_jpeg()
        pixels = tf.io.decode_jpeg(content, channels=3, dct_method="INTEGER_ACCURATE")
        _check_size(tf.shape(pixels)[:2], row)
        return pixels, origin

    def other():
        def png():
            return tf.io.decode_png(content, channels=3)

        def any_kind():
            pixels = tf.numpy_function(_decode_any, [content, row.orientation], tf.uint8)
            return tf.ensure_shape(pixels, [None, None, 3])

        is_png = tf.strings.substr(content, 0, 4) == b"\x89PNG"
        pixels = tf.cond(is_png & upright if needs.turn else is_png, png, any_kind)
        _check_size(tf.shape(pixels)[:2], row)
        return pixels, origin

    upright = row.orientation == 1
    is_jpeg = tf.io.is_jpeg(content)
    return tf.cond(is_jpeg & upright if needs.turn else is_jpeg, jpeg, other)


def _decode_any(content: bytes, orientation: int) -> np.ndarray:
    return image_lib.decode(content, exif="apply" if orientation > 1 else "ignore")


def _check_size(shape: tf.Tensor, row: Row) -> None:
    # Nobody sees this message: the reference says it in words.
    tf.debugging.assert_equal(shape, row.stated)


def _resample(pixels: tf.Tensor, corner: tf.Tensor, row: Row) -> tf.Tensor:
    """The crop, whose corner is given in these pixels, at the final size; uint8 [h, w, 3]."""
    scale = tf.cast(row.size, tf.float32) / row.crop[2:]
    whole = tf.reduce_all(tf.cast(tf.shape(pixels)[:2], tf.float32) == row.crop[2:])

    def filtered():
        return tf.raw_ops.ScaleAndTranslate(
            images=pixels[None],
            size=row.size,
            scale=scale,
            translation=-corner * scale,
            kernel_type="triangle",
            antialias=True,  # widens the filter along an axis that shrinks, as Pillow does
        )[0]

    def interpolated():
        # The same where nothing shrinks, in less than half of the time.
        return tf.raw_ops.ResizeBilinear(
            images=pixels[None], size=row.size, half_pixel_centers=True
        )[0]

    resized = tf.cond(whole & tf.reduce_all(scale >= 1.0), interpolated, filtered)
    return tf.cast(tf.clip_by_value(resized + 0.5, 0.0, 255.0), tf.uint8)
