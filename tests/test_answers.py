"""Whether a detector's answers depend on the picture: by hand, and what is said of it."""

from __future__ import annotations

import numpy as np
import pytest

from yolos_jax import answers
from yolos_jax.batch import Detections

SIZES = np.array([[100, 200]] * 4 + [[50, 100]] * 4)


def detections(boxes, scores=0.75):
    """[8, 2] detections of boxes in shares of the sides."""
    boxes = np.broadcast_to(np.asarray(boxes, np.float32), (8, 2, 4))
    pixels = boxes * SIZES[:, None, [1, 0, 1, 0]]
    return Detections(np.full((8, 2), scores, np.float32), np.zeros((8, 2), np.int32), pixels)


def test_boxes_that_never_move():
    """Large and small pictures: the pixels differ, the shares do not."""
    found = answers.describe(detections([[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]]), SIZES)
    assert found == {"best_score": 0.75, "box_spread": pytest.approx(0, abs=1e-7)}
    [note] = answers.notes(found)
    assert "the same on every picture (it varies by 0.0% of the sides)" in note


def test_boxes_that_move():
    """One query of two moves by 0.1 to either side in x: 0.1 in two of four numbers."""
    boxes = np.zeros((8, 2, 4))
    boxes[::2, 0] += (0.2, 0, 0.2, 0)
    found = answers.describe(detections(boxes), SIZES)
    assert found["box_spread"] == pytest.approx(0.1 * 2 / 8)
    assert not answers.notes(found)


def test_scores_that_nothing_is_drawn_of():
    boxes = np.random.default_rng(0).uniform(size=(8, 2, 4))
    [note] = answers.notes(answers.describe(detections(boxes, 0.25), SIZES))
    assert "no box scores 0.5 or more, the best 0.250" in note


def test_what_says_nothing():
    """Few pictures, or numbers that are none: the other pictures count."""
    nothing = {"best_score": -1.0, "box_spread": -1.0}
    whole = detections([0, 0, 1, 1])
    none = Detections(*(x[:0] for x in whole))
    assert answers.describe(none, SIZES[:0]) == nothing and not answers.notes(nothing)
    assert answers.describe(Detections(*(x[:7] for x in whole)), SIZES[:7])["box_spread"] == -1
    whole.boxes_xyxy_px[3, 1, 0] = np.nan
    assert answers.describe(whole, SIZES) == {"best_score": 0.75, "box_spread": -1}
    whole.scores[:] = np.nan
    assert answers.describe(whole, SIZES) == nothing
    assert not answers.notes({"AP": 0.5})  # of a run before there were these numbers


def test_ap_of_nothing_is_explained():
    assert "no box that counts" in answers.notes({"AP": -1.0})[0]
    assert not answers.notes({"AP": 0.0})
