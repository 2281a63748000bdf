"""Resize and box arithmetic: pure numbers, vectorised, no pixels.

Everything follows datasets/transforms.py of hustvl/YOLOS to the last bit of float32, because which
boxes survive a crop depends on it. Sizes are (height, width) in pixels; boxes are float32
``xyxy`` in pixels, one row per box; a size or rectangle is one number for all boxes or one per box.
"""

from __future__ import annotations

import numpy as np

from yolos_jax import boxes as box_math

Number = np.ndarray | int | float


def resized_size(
    height: Number, width: Number, size: Number, max_size: Number, multiple: int
) -> tuple[np.ndarray, np.ndarray]:
    """The size a picture is resized to: shorter side ``size``, sides a multiple of the patch.

    The shorter side becomes ``size``, or less where the longer one would exceed ``max_size``; the
    other side keeps the aspect ratio; then both are rounded down to ``multiple``. Of a picture so
    thin that nothing would be left of it, where the reference fails, the shorter side is a patch.

    Args:
      height: int [...], pixels.
      width: int [...], pixels.
      size: int [...], pixels of the shorter side.
      max_size: int [...], most pixels of the longer side; 0: no limit.
      multiple: pixels, the side of a patch.

    Returns:
      (height, width), int64 [...].
    """
    height, width, size, max_size = np.broadcast_arrays(
        *(np.asarray(x, np.float64) for x in (height, width, size, max_size))
    )
    shorter, longer = np.minimum(height, width), np.maximum(height, width)
    capped = (max_size > 0) & (longer / shorter * size > max_size)
    # rint rounds halves to even, as Python's round does; truncation is the reference's int().
    side = np.where(capped, np.rint(max_size * shorter / longer), size)
    other = np.where(shorter == side, longer, np.trunc(side * longer / shorter))
    other = np.where(capped & (side < multiple), max_size, other)
    portrait = width < height
    new_height, new_width = np.where(portrait, other, side), np.where(portrait, side, other)
    patches = (np.maximum(x // multiple, 1) for x in (new_height, new_width))
    return tuple((x * multiple).astype(np.int64) for x in patches)


def clip_boxes(boxes_xyxy_px: np.ndarray, height: Number, width: Number) -> np.ndarray:
    """Boxes cut at the borders of a picture, float32 [T, 4]; may leave boxes of no area."""
    limit = _wh(height, width)
    return np.clip(boxes_xyxy_px, np.float32(0), limit).astype(np.float32, copy=False)


def has_area(boxes_xyxy_px: np.ndarray) -> np.ndarray:
    """bool [T]: whether a box is wider and higher than nothing."""
    return (boxes_xyxy_px[:, 2:] > boxes_xyxy_px[:, :2]).all(axis=1)


def flip_boxes(boxes_xyxy_px: np.ndarray, width: Number) -> np.ndarray:
    """Boxes of the picture mirrored left to right, float32 [T, 4]; ``width`` of the picture."""
    width = np.asarray(width, np.float32)
    x0, y0, x1, y1 = boxes_xyxy_px.T
    return np.stack([width - x1, y0, width - x0, y1], axis=1)


def crop_boxes(
    boxes_xyxy_px: np.ndarray, top: Number, left: Number, height: Number, width: Number
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes as seen in a rectangle cut out of the picture.

    Args:
      boxes_xyxy_px: float32 [T, 4] in the picture.
      top: int, [] or [T], pixels, of the rectangle; likewise the next three.
      left: likewise.
      height: likewise.
      width: likewise.

    Returns:
      boxes float32 [T, 4] in the rectangle, cut at its borders, and keep bool [T]: whether any
      area is left. The caller selects, because it selects labels too. Areas are those of the
      clipped boxes (``boxes.area``): the annotation's own area does not survive a crop.
    """
    left, top = np.asarray(left, np.float32), np.asarray(top, np.float32)
    shift = np.stack(np.broadcast_arrays(left, top, left, top), axis=-1)
    cropped = clip_boxes(boxes_xyxy_px - shift, height, width)
    return cropped, has_area(cropped)


def resize_boxes(
    boxes_xyxy_px: np.ndarray,
    height: Number,
    width: Number,
    new_height: Number,
    new_width: Number,
) -> np.ndarray:
    """Boxes of a picture of (height, width) in that of (new_height, new_width), float32 [T, 4].

    The two ratios differ a little, since sizes are rounded to patches.
    """
    return boxes_xyxy_px * _resize_ratios(height, width, new_height, new_width)


def normalise_boxes(boxes_xyxy_px: np.ndarray, height: Number, width: Number) -> np.ndarray:
    """Boxes as models learn them: cxcywh relative to a picture of that size, float32 [T, 4]."""
    return box_math.xyxy_to_cxcywh(boxes_xyxy_px) / _wh(height, width)


def _wh(height: Number, width: Number) -> np.ndarray:
    """float32 [4] or [T, 4]: width, height, width, height."""
    height, width = np.asarray(height, np.float32), np.asarray(width, np.float32)
    return np.stack(np.broadcast_arrays(width, height, width, height), axis=-1)


def _resize_ratios(
    height: Number, width: Number, new_height: Number, new_width: Number
) -> np.ndarray:
    """float32 [4] or [T, 4]: ratios of widths, heights, widths, heights; divided in float64."""
    return _wh(
        np.asarray(new_height, np.float64) / height, np.asarray(new_width, np.float64) / width
    )
