"""Label maps: ids with holes, ids from zero, COCO's 91 slots, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from yolos_jax.labels import COCO_NAMES, UNUSED, LabelMap

HOLES = [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 90, "name": "bird"}]


def test_slots_are_sorted_by_category_id():
    label_map = LabelMap.from_categories(HOLES)
    assert label_map.category_ids == (2, 7, 90)
    assert label_map.names == ("cat", "dog", "bird")
    assert label_map.num_classes == label_map.no_object == 3


def test_slots_and_ids_are_inverse_and_unknown_is_minus_one():
    label_map = LabelMap((90, 2, 7), ("bird", "cat", "dog"))  # a checkpoint's, in any order
    slots = label_map.slots(np.array([[2, 7], [90, 3]]))
    assert slots.dtype == np.int32 and slots.tolist() == [[1, 2], [0, -1]]
    ids = label_map.ids(np.array([0, 1, 2]))
    assert ids.dtype == np.int64 and ids.tolist() == [90, 2, 7]
    assert label_map.slots(np.array([-1, 1000])).tolist() == [-1, -1]


def test_ids_from_zero_and_a_single_class():
    assert LabelMap.from_categories([{"id": 0, "name": "a"}]).slots([0, 1]).tolist() == [0, -1]


def test_coco91_slots_are_the_raw_ids():
    coco = LabelMap.coco91()
    assert coco.num_classes == 91 and len(COCO_NAMES) == 80
    assert coco.names[0] == coco.names[12] == coco.names[83] == UNUSED
    assert (coco.names[1], coco.names[18], coco.names[90]) == ("person", "dog", "toothbrush")
    assert sum(name != UNUSED for name in coco.names) == 80
    assert coco.slots([1, 90, 91]).tolist() == [1, 90, -1]


def test_coco91_takes_some_of_coco_and_nothing_else():
    assert LabelMap.build("coco91", [{"id": 18, "name": "dog"}]) == LabelMap.coco91()
    with pytest.raises(ValueError, match=r"id 17 is 'dog', here 'cat'.*data.labels='dataset'"):
        LabelMap.build("coco91", [{"id": 17, "name": "dog"}])
    with pytest.raises(ValueError, match="no such id"):
        LabelMap.build("coco91", [{"id": 300, "name": "platelet"}])
    with pytest.raises(ValueError, match="expected 'dataset' or 'coco91'"):
        LabelMap.build("coco", HOLES)


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([], "at least one"),
        (None, "at least one"),
        ([{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "id 1 is there twice"),
        ([{"id": 1, "name": "a"}, {"id": 2, "name": "a"}], "'a' is there twice, with ids 1 and 2"),
        ([{"id": "1", "name": "a"}], "id is '1', expected an integer"),
        ([{"id": 1.5, "name": "a"}], "expected an integer"),
        ([{"id": True, "name": "a"}], "expected an integer"),
        ([{"id": float("nan"), "name": "a"}], "expected an integer"),
        ([{"id": 1}], "expected a text"),
        ([{"id": 1, "name": "half \ud800"}], "expected a text"),
        ([{"id": 2**63, "name": "a"}], "more than 64 bits"),
        (["cat"], "expected an object"),
    ],
)
def test_categories_that_make_no_sense(categories, message):
    with pytest.raises(ValueError, match=message):
        LabelMap.from_categories(categories)


def test_json_round_trip():
    label_map = LabelMap.from_categories(HOLES)
    assert LabelMap.from_json(json.loads(json.dumps(label_map.to_json()))) == label_map
    with pytest.raises(ValueError, match="not a label map"):
        LabelMap.from_json({"names": ["a"]})
    with pytest.raises(ValueError, match="2 ids and 1 names"):
        LabelMap.from_json({"category_ids": [1, 2], "names": ["a"]})


def test_description_names_every_class_but_no_gap():
    text = LabelMap.from_categories(HOLES).describe()
    assert "no-object 3" in text and "0 cat (id 2), 1 dog (id 7), 2 bird (id 90)" in text
    text = LabelMap.coco91().describe()
    assert "80 classes in 91 slots" in text and UNUSED not in text
    assert max(len(line) for line in text.splitlines()) <= 100
