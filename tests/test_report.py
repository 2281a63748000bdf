"""Notes about a run that a person should read before its first step."""

from __future__ import annotations

import types

import numpy as np

from configs import common
from yolos_jax import report


class Index(types.SimpleNamespace):
    """The columns of a ``data.index.Index`` that notes are made of."""

    def __len__(self):
        return len(self.box_offsets) - 1


def make(*boxes_per_picture, **dropped):
    return Index(
        annotations="a.json",
        dropped=types.SimpleNamespace(counts=dropped),
        box_offsets=np.cumsum([0, *(len(boxes) for boxes in boxes_per_picture)]),
        boxes_xyxy_px=np.concatenate([np.reshape(b, (-1, 4)) for b in boxes_per_picture]),
    )


LARGE, SMALL = [10, 10, 40, 30], [0.1, 0.2, 0.5, 0.9]


def test_more_boxes_than_queries():
    index = make([LARGE] * 5, [], [LARGE] * 3, [LARGE] * 4)
    (note,) = report.box_notes(index, 3)
    assert note.startswith("note: 2 of 4 pictures of a.json have more boxes")
    assert "model.num_queries=3: 3 boxes too many" in note
    assert report.box_notes(index, 5) == []


def test_boxes_in_shares_of_the_picture():
    (note,) = report.box_notes(make([SMALL, SMALL], [LARGE]), 100)
    assert note.startswith("note: 2 of 3 boxes of a.json are less than a pixel")
    assert report.box_notes(make([SMALL, LARGE]), 100) == []
    assert report.box_notes(make([], []), 100) == []


def test_corners_instead_of_sizes():
    (note,) = report.box_notes(make([LARGE] * 4, outside=3), 100)
    assert note.startswith("note: 3 boxes of a.json reach out of their pictures")
    (note,) = report.box_notes(make([LARGE], **{"outside": 1, "no area": 2}), 100)
    assert "3 boxes" in note
    assert report.box_notes(make([LARGE] * 4, outside=2), 100) == []


def test_a_start_that_saw_pictures_otherwise():
    config = common.get_config()
    start = config.preprocess.to_dict() | {"exif": "ignore"}
    assert report.preprocess_notes(config, start) == []
    config.preprocess.mean = (0.5, 0.5, 0.5)
    (note,) = report.preprocess_notes(config, start)
    assert note.startswith("note: preprocess.mean is (0.5, 0.5, 0.5), the start was trained with (")
    config = common.get_config()
    (note,) = report.preprocess_notes(config, start | {"exif": "apply"})
    assert "data.exif is 'ignore', the start was trained on pictures that were turned" in note
    config.data.exif = "apply"
    assert report.preprocess_notes(config, start | {"exif": "apply"}) == []
    assert report.preprocess_notes(config, start) == []
