from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolos_jax import boxes

COORDINATE = st.floats(-100, 100, width=32)


@st.composite
def xyxy(draw) -> np.ndarray:
    """Six boxes, some without area, some alike."""
    corners = np.array(draw(st.lists(COORDINATE, min_size=24, max_size=24)), np.float32)
    corners = corners.reshape(6, 2, 2)
    return np.concatenate([corners.min(1), corners.max(1)], -1)


def test_corners_and_back_by_hand():
    centre = np.array([[0.5, 0.5, 0.2, 0.4], [10, 20, 4, 0]], np.float32)
    corners = np.array([[0.4, 0.3, 0.6, 0.7], [8, 20, 12, 20]], np.float32)
    np.testing.assert_allclose(boxes.cxcywh_to_xyxy(centre), corners, rtol=1e-6)
    np.testing.assert_allclose(boxes.xyxy_to_cxcywh(corners), centre, rtol=1e-6)
    np.testing.assert_allclose(boxes.area(corners), [0.08, 0], rtol=1e-6)


# Boxes of area 4 each unless said otherwise; (first, second, IoU, GIoU).
BY_HAND = [
    ([0, 0, 2, 2], [0, 0, 2, 2], 1, 1),
    ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7, 1 / 7 - 2 / 9),
    ([0, 0, 2, 2], [2, 0, 4, 2], 0, 0),  # a shared side: nothing between them
    ([0, 0, 2, 2], [2, 2, 4, 4], 0, -8 / 16),  # a shared corner
    ([0, 0, 2, 2], [4, 0, 6, 2], 0, -4 / 12),
    ([0, 0, 4, 4], [1, 1, 3, 3], 4 / 16, 4 / 16),  # inside
    ([0, 0, 2, 2], [1, 1, 1, 1], 0, 0),  # a point inside
    ([1, 1, 1, 1], [1, 1, 1, 1], 0, 0),  # the reference divides 0 by 0
    ([0, 0, 0, 2], [1, 0, 1, 2], 0, -1),  # two lines
    ([0, 0, 0, 2], [0, 5, 0, 7], 0, 0),  # on one line: even what encloses them has no area
]


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("a,b,iou,giou", BY_HAND)
def test_overlap_by_hand(array, a, b, iou, giou):
    a, b = array(np.float32(a)), array(np.float32(b))
    for function, expected in ((boxes.iou, iou), (boxes.giou, giou)):
        result = function(a, b)
        assert type(result) is type(a) or result.shape == ()
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-7)


def test_float64_stays_float64_for_numpy():
    box = np.array([0.0, 0.0, 1.0, 1.0])
    assert boxes.giou(box, box).dtype == np.float64
    assert boxes.cxcywh_to_xyxy(box).dtype == np.float64


@given(xyxy(), xyxy())
def test_overlap_properties(a, b):
    iou, giou = boxes.iou(a[:, None], b), boxes.pairwise_giou(a, b)
    assert iou.shape == giou.shape == (6, 6)
    assert np.isfinite(iou).all() and np.isfinite(giou).all()
    assert iou.min() >= 0 and iou.max() <= 1 + 1e-5
    assert giou.min() >= -1 - 1e-5 and (giou <= iou + 1e-5).all()
    np.testing.assert_array_equal(iou, boxes.iou(b[:, None], a).T)
    np.testing.assert_array_equal(giou, boxes.pairwise_giou(b, a).T)
    np.testing.assert_array_equal(np.diagonal(giou), boxes.giou(a, b))
    proper = boxes.area(a) > 1e-3
    np.testing.assert_allclose(boxes.giou(a, a)[proper], 1, atol=1e-5)


giou_gradient = jax.jit(jax.grad(lambda x, y: boxes.giou(x, y).sum(), argnums=(0, 1)))


@given(xyxy(), xyxy())
def test_gradients_are_finite(a, b):
    for part in giou_gradient(jnp.asarray(a), jnp.asarray(b)):
        assert np.isfinite(part).all()


def test_gradient_of_points_and_specks_is_finite():
    # At the origin, where corners so close together are different numbers.
    sides = np.float32([0, 1e-30, 1e-20, 1e-10, 1e-8, 1e-6])
    corners = np.stack([0 * sides, 0 * sides, sides, sides], -1)
    others = np.tile(np.float32([0.1, 0.1, 0.3, 0.3]), (6, 1))
    for second in (corners, others):
        for part in giou_gradient(corners, second):
            assert np.isfinite(part).all()


def test_gradient_of_touching_boxes_is_torch_s():
    torch = pytest.importorskip("torch")
    pairs = np.array([[a, b] for a, b, *_ in BY_HAND[:6]], np.float32)

    def reference(a, b):  # util/box_ops.py of facebookresearch/detr
        area = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1]), (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
        inner = (torch.min(a[:, 2:], b[:, 2:]) - torch.max(a[:, :2], b[:, :2])).clamp(min=0)
        outer = (torch.max(a[:, 2:], b[:, 2:]) - torch.min(a[:, :2], b[:, :2])).clamp(min=0)
        overlap, enclosing = inner.prod(1), outer.prod(1)
        union = area[0] + area[1] - overlap
        return overlap / union - (enclosing - union) / enclosing

    a = torch.tensor(pairs[:, 0], requires_grad=True)
    reference(a, torch.tensor(pairs[:, 1])).sum().backward()
    ours = jax.grad(lambda x: boxes.giou(x, jnp.asarray(pairs[:, 1])).sum())(
        jnp.asarray(pairs[:, 0])
    )
    np.testing.assert_allclose(ours, a.grad.numpy(), atol=1e-6)


def test_not_a_number_stays_visible():
    box = np.array([0, 0, np.nan, 1], np.float32)
    assert np.isnan(boxes.giou(box, np.array([0, 0, 1, 1], np.float32)))
