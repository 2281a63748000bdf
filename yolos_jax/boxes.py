"""Box arithmetic for numpy and jax arrays alike; float32 stays float32.

Boxes are ``cxcywh`` (centre, width, height) or ``xyxy`` (two corners, x0 <= x1 and y0 <= y1), in
any unit, along the last axis. After util/box_ops.py of facebookresearch/detr; different: boxes of
no area give 0 where the original divides zero by zero, and the order of corners is not asserted.

Gradients at ties are torch's: a clamp at exactly zero lets the gradient through, the maximum of two
equal numbers shares it between both.
"""

from __future__ import annotations

from typing import Any

Array = Any  # numpy.ndarray or jax.Array; the two boxes of one call are of the same kind.

# Areas below this count as zero: far below a pixel of any picture, in pixels or relative units, and
# its square, which the gradient of a quotient needs, is still an ordinary float32.
SMALLEST_AREA = 1e-16


def cxcywh_to_xyxy(boxes_cxcywh: Array) -> Array:
    """Turns centres and sizes into corners, [..., 4] -> [..., 4]."""
    xp = boxes_cxcywh.__array_namespace__()
    centre, half = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:] * 0.5
    return xp.concatenate([centre - half, centre + half], axis=-1)


def xyxy_to_cxcywh(boxes_xyxy: Array) -> Array:
    """Turns corners into centres and sizes, [..., 4] -> [..., 4]."""
    xp = boxes_xyxy.__array_namespace__()
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return xp.concatenate([(low + high) * 0.5, high - low], axis=-1)


def area(boxes_xyxy: Array) -> Array:
    """Areas of boxes, [..., 4] -> [...], in the square of their unit."""
    return (boxes_xyxy[..., 2] - boxes_xyxy[..., 0]) * (boxes_xyxy[..., 3] - boxes_xyxy[..., 1])


def iou(a_xyxy: Array, b_xyxy: Array) -> Array:
    """Intersection over union of pairs of boxes, 0 where neither has an area.

    Args:
      a_xyxy: [..., 4].
      b_xyxy: [..., 4], broadcast against ``a_xyxy``.

    Returns:
      [...], in 0..1.
    """
    overlap, union = _overlap_and_union(a_xyxy, b_xyxy)
    return _ratio(overlap, union)


def giou(a_xyxy: Array, b_xyxy: Array) -> Array:
    """Generalised intersection over union of pairs of boxes (https://arxiv.org/abs/1902.09630).

    Args:
      a_xyxy: [..., 4].
      b_xyxy: [..., 4], broadcast against ``a_xyxy``.

    Returns:
      [...], in -1..1: the IoU, minus the share of the smallest enclosing box that neither covers.
      0 where that enclosing box has no area.
    """
    xp = a_xyxy.__array_namespace__()
    overlap, union = _overlap_and_union(a_xyxy, b_xyxy)
    width = xp.maximum(a_xyxy[..., 2], b_xyxy[..., 2]) - xp.minimum(a_xyxy[..., 0], b_xyxy[..., 0])
    height = xp.maximum(a_xyxy[..., 3], b_xyxy[..., 3]) - xp.minimum(a_xyxy[..., 1], b_xyxy[..., 1])
    enclosing = _clamp(width) * _clamp(height)
    return _ratio(overlap, union) - _ratio(enclosing - union, enclosing)


def pairwise_giou(a_xyxy: Array, b_xyxy: Array) -> Array:
    """GIoU of every box with every other, [..., N, 4] and [..., M, 4] -> [..., N, M]."""
    return giou(a_xyxy[..., :, None, :], b_xyxy[..., None, :, :])


def _overlap_and_union(a: Array, b: Array) -> tuple[Array, Array]:
    # One coordinate at a time: an innermost axis of two or four numbers wastes an accelerator's
    # lanes, and this way nothing larger than the result is ever written.
    xp = a.__array_namespace__()
    width = xp.minimum(a[..., 2], b[..., 2]) - xp.maximum(a[..., 0], b[..., 0])
    height = xp.minimum(a[..., 3], b[..., 3]) - xp.maximum(a[..., 1], b[..., 1])
    overlap = _clamp(width) * _clamp(height)
    return overlap, area(a) + area(b) - overlap


def _clamp(x: Array) -> Array:
    """max(x, 0) that lets the gradient through at 0, and NaN too."""
    xp = x.__array_namespace__()
    return xp.where(x < 0, 0, x)


def _ratio(part: Array, whole: Array) -> Array:
    """part / whole, 0 where whole is not an area; neither value nor gradient is ever NaN for it."""
    xp = whole.__array_namespace__()
    empty = whole < SMALLEST_AREA
    return xp.where(empty, 0, part / xp.where(empty, 1, whole))
