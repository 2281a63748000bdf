"""A real annotation file with 29 kinds of defects: what the original makes of it, and what we do.

instances_dirty.json describes 24 pictures of BCCD, with defects; dirty_prepare.json holds the boxes
and labels of the original's dataset class for each. Where we differ, we mean to: DELIBERATE.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from yolos_jax.data.index import load_coco

GOLDENS = Path(__file__).parent / "goldens"
ORIGINAL = {e["image_id"]: e for e in json.loads((GOLDENS / "dirty_prepare.json").read_text())}
TRUTH = json.loads((GOLDENS / "instances_dirty.json").read_text())
DELIBERATE = {
    317: "the picture is missing: found when it is read, its boxes are kept here",
    325: "unknown categories are left out, not passed through as labels",
    327: "its box under an id that image 331 uses too stays, not the other image's box",
    332: "two boxes under one id stay two, not the last one twice",
    339: "an annotation without an area is fine",
    341: "boxes are cut to the stated size, the original looks at the picture's",
}
PICTURE_SIZE = (480, 640)  # height, width of the picture of image 341; the file has them swapped


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    root = tmp_path_factory.mktemp("bccd")
    (root / "pictures").mkdir()
    shutil.copy(GOLDENS / "instances_dirty.json", root / "a.json")
    return load_coco(root, "a.json", "pictures", on_error="skip")


def ours(index, image_id):
    """Boxes float32 [N, 4] and category ids of an image."""
    (row,) = np.flatnonzero(index.image_ids == image_id)
    cut = slice(*index.box_offsets[row : row + 2])
    return index.boxes_xyxy_px[cut], index.label_map.ids(index.labels[cut]).tolist()


def original(image_id):
    entry = ORIGINAL[image_id]
    return np.array(entry["boxes"]).reshape(-1, 4), entry["labels"]


def stated(image_id):
    """Boxes (xyxy) and category ids as the file has them, for images whose boxes all fit."""
    entries = [a for a in TRUTH["annotations"] if a["image_id"] == image_id]
    boxes = np.array([a["bbox"] for a in entries], np.float64)
    boxes[:, 2:] += boxes[:, :2]
    return boxes, [a["category_id"] for a in entries]


def assert_same(got, expected):
    assert got[1] == expected[1] and got[0].shape == expected[0].shape
    np.testing.assert_allclose(got[0], expected[0], atol=1e-3, rtol=0)


def test_every_image_is_there(index):
    assert index.image_ids.tolist() == [i["id"] for i in TRUTH["images"]]
    assert len(index) == 24 and set(ORIGINAL) == set(index.image_ids.tolist())
    assert ORIGINAL.keys() >= DELIBERATE.keys()
    assert index.dropped.errors == 5  # one unknown image, two unknown categories, two ids twice


@pytest.mark.parametrize("image_id", sorted(ORIGINAL.keys() - DELIBERATE.keys()))
def test_what_the_original_makes_of_it(image_id, index):
    assert_same(ours(index, image_id), original(image_id))


def test_a_missing_picture_keeps_its_boxes(index):
    assert ORIGINAL[317]["raises"] == "FileNotFoundError"
    assert_same(ours(index, 317), stated(317))
    assert len(ours(index, 317)[1]) == 9


def test_unknown_categories_are_left_out(index):
    boxes, labels = original(325)
    assert labels[-2:] == [99, 0]
    assert_same(ours(index, 325), (boxes[:-2], labels[:-2]))


@pytest.mark.parametrize("image_id", (327, 332))
def test_boxes_under_one_id_stay_themselves(image_id, index):
    got = ours(index, image_id)
    assert_same(got, stated(image_id))
    # The original puts the id's last box in the place of this one, and only of this one.
    theirs, labels = original(image_id)
    assert got[1] == labels
    assert np.flatnonzero((got[0] != theirs).any(axis=1)).tolist() == [0]
    own, replaced = {
        327: ([110, 213, 230, 332], [157, 140, 250, 245]),
        332: ([96, 279, 198, 377], [143, 1, 254, 108]),
    }[image_id]
    assert got[0][0].tolist() == own and theirs[0].tolist() == replaced


def test_an_area_is_not_needed(index):
    assert ORIGINAL[339]["raises"] == "KeyError: 'area'"
    assert_same(ours(index, 339), stated(339))
    without = [n for n, a in enumerate(TRUTH["annotations"]) if "area" not in a]
    assert [TRUTH["annotations"][n]["image_id"] for n in without] == [339]


def test_boxes_are_cut_to_the_stated_size(index):
    entry = next(i for i in TRUTH["images"] if i["id"] == 341)
    height, width = entry["height"], entry["width"]
    assert (width, height) == PICTURE_SIZE == tuple(ORIGINAL[341]["size"])
    boxes, labels = original(341)
    boxes = np.minimum(boxes, [width, height, width, height])
    keep = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    assert len(keep) == 10 and keep.sum() == 8
    expected = [label for label, kept in zip(labels, keep, strict=True) if kept]
    assert_same(ours(index, 341), (boxes[keep], expected))
