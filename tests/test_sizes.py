"""Resize and box arithmetic against numbers of the original implementation and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolos_jax import boxes as box_math
from yolos_jax.data import sizes

GOLDENS = Path(__file__).parent / "goldens"
GOLDEN = json.loads((GOLDENS / "transforms.json").read_text())
GOLDEN_DETR = json.loads((GOLDENS / "detr_sizes.json").read_text())  # nothing is rounded there


@pytest.mark.parametrize(
    ("golden", "multiple", "name"),
    [(GOLDEN, 16, name) for name in GOLDEN["specs"]]
    + [(GOLDEN_DETR, 1, name) for name in GOLDEN_DETR["specs"]],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_resized_sizes_are_the_originals(golden, multiple, name):
    spec = golden["specs"][name]
    width, height = np.array(golden["image_wh"]).T[:, :, None]
    max_size = spec["max_size"] or 0
    got = sizes.resized_size(height, width, np.array(spec["sizes"]), max_size, multiple)
    got, expected = np.stack(got, axis=-1), np.array(golden["table_hw"][name])
    possible = (expected > 0).all(axis=-1)  # otherwise the original fails, and ours keeps a patch
    np.testing.assert_array_equal(got[possible], expected[possible])
    assert possible.mean() > 0.95 and got.min() >= multiple


def apply(op, boxes, labels, area, height, width):
    """One golden operation; returns the same five things after it."""
    if op["op"] == "hflip":
        return sizes.flip_boxes(boxes, width), labels, area, height, width
    if op["op"] == "crop":
        boxes, keep = sizes.crop_boxes(boxes, *op["region"])
        return boxes[keep], labels[keep], box_math.area(boxes[keep]), *op["region"][2:]
    if op["op"] == "resize":
        new = sizes.resized_size(height, width, op["size"], op["max_size"] or 0, 16)
        area = area * np.float32(new[1] / width * (new[0] / height))
        return sizes.resize_boxes(boxes, height, width, *new), labels, area, *new
    assert op["op"] == "normalize"
    return sizes.normalise_boxes(boxes, height, width), labels, area, height, width


@pytest.mark.parametrize("case", GOLDEN["box_cases"], ids=lambda case: case["name"])
def test_box_operations_are_the_originals(case):
    width, height = case["image_wh"]
    boxes = np.array(case["input"]["boxes"], np.float32).reshape(-1, 4)
    labels = np.array(case["input"]["labels"])
    area = np.array(case["input"]["area"], np.float32)
    for op in case["ops"]:
        boxes, labels, area, height, width = apply(op, boxes, labels, area, height, width)
    assert boxes.dtype == area.dtype == np.float32
    wanted = case["output"]
    assert labels.tolist() == wanted["labels"]
    assert [int(width), int(height)] == case["output_image_wh"]
    expected_boxes = np.array(wanted["boxes"], np.float32).reshape(-1, 4)
    np.testing.assert_allclose(boxes, expected_boxes, rtol=1e-6)
    np.testing.assert_allclose(area, np.array(wanted["area"], np.float32), rtol=1e-6)


def test_sizes_by_hand():
    # 480/640 of 800 exceeds nothing: 800 x 1066.67 -> 800 x 1066 -> down to 16: 800 x 1056.
    assert [int(s) for s in sizes.resized_size(480, 640, 800, 1333, 16)] == [800, 1056]
    assert [int(s) for s in sizes.resized_size(640, 480, 800, 1333, 16)] == [1056, 800]
    # 1000 x 30 with 256: the cap leaves a shorter side of 13, less than a patch, which it keeps.
    assert [int(s) for s in sizes.resized_size(30, 1000, 256, 426, 16)] == [16, 416]
    for height, width in ((2000, 1), (5300, 2), (27000, 1)):  # of 1, 1 and 0 pixels
        assert [int(s) for s in sizes.resized_size(height, width, 800, 1333, 16)] == [1328, 16]
    assert [int(s) for s in sizes.resized_size(64, 64, 64, 64, 8)] == [64, 64]


def test_one_rectangle_per_box():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 10], [2, 3, 4, 5]], np.float32)
    top, left = np.array([5, 10, 0]), np.array([0, 0, 1])
    cropped, keep = sizes.crop_boxes(boxes, top, left, np.array([5, 5, 8]), np.array([4, 5, 8]))
    # The second ends exactly where its rectangle starts: nothing is left of it.
    assert keep.tolist() == [True, False, True]
    assert cropped[keep].tolist() == [[0, 0, 4, 5], [1, 3, 3, 5]]
    flipped = sizes.flip_boxes(boxes, np.array([10, 20, 30]))
    assert flipped.tolist() == [[0, 0, 10, 10], [10, 0, 20, 10], [26, 3, 28, 5]]
    assert sizes.normalise_boxes(boxes[:1], 20, 40).tolist() == [[0.125, 0.25, 0.25, 0.5]]


def test_no_boxes_stay_no_boxes():
    none = np.zeros((0, 4), np.float32)
    assert sizes.flip_boxes(none, 10).shape == (0, 4)
    assert sizes.crop_boxes(none, 0, 0, 5, 5)[0].shape == (0, 4)
    assert sizes.resize_boxes(none, 5, 5, 10, 10).shape == (0, 4)
    assert sizes.normalise_boxes(none, 5, 5).shape == (0, 4)


@given(st.integers(16, 3000), st.integers(16, 3000), st.integers(2, 60), st.integers(0, 2000))
def test_resized_sides_are_patches_within_the_cap(height, width, patches, max_size):
    size = patches * 16
    new_height, new_width = sizes.resized_size(height, width, size, max_size, 16)
    assert new_height % 16 == 0 and new_width % 16 == 0
    assert min(new_height, new_width) <= size
    if max_size >= size:
        # The cap is rounded to whole pixels of the shorter side, which may move the longer one
        # by half the aspect ratio.
        longer = max(height, width) / min(height, width)
        assert max(new_height, new_width) <= max_size + longer
    swapped = sizes.resized_size(width, height, size, max_size, 16)
    assert (new_height, new_width) == swapped[::-1]
