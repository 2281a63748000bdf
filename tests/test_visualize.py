"""Boxes end where they belong, in their class's colour, and names stay legible."""

from __future__ import annotations

import numpy as np
import pytest

from yolos_jax import pictures, visualize
from yolos_jax.data.index import load_coco
from yolos_jax.data.shapes import write as write_shapes

GREY = np.full((64, 64, 3), 128, np.uint8)


def boxes(*corners, labels=None, scores=None):
    labels = range(len(corners)) if labels is None else labels
    array = np.array(corners, np.float64).reshape(-1, 4)
    return visualize.Boxes(array, list(labels), [f"name{i}" for i in labels], scores)


def coloured(picture, label):
    """Where a picture has the colour of a class: bool [h, w]."""
    return (np.asarray(picture) == visualize.colour(label)).all(-1)


def test_small_pictures_grow_by_a_whole_number():
    picture = visualize.draw(GREY, boxes([10, 20, 30, 50]))
    assert picture.size == (320, 320) and picture.mode == "RGB"
    rows, cols = np.nonzero(coloured(picture, 0)[102:])  # below the name
    assert (cols.min(), cols.max()) == (50, 150)
    assert rows.max() + 102 == 250
    assert (np.asarray(picture)[200, 100] == 128).all()  # boxes are not filled


def test_pictures_of_usual_size_keep_it():
    photo = np.zeros((480, 640, 3), np.uint8)
    assert visualize.draw(photo, boxes()).size == (640, 480)
    assert (np.asarray(visualize.draw(photo, boxes())) == photo).all()
    assert visualize.draw(np.zeros((1, 5000, 3), np.uint8), boxes()).size == (5000, 1)


def test_boxes_outside_or_turned_around_are_no_error():
    picture = visualize.draw(
        GREY, boxes([-50, -50, 20, 20], [40, 40, 900, 900], [200, 200, 300, 300], [30, 30, 10, 10])
    )
    for label in range(4):
        assert coloured(picture, label).any()


def test_names_stay_inside_the_picture():
    # At the top edge there is no room above, at the right edge none to the right.
    picture = visualize.draw(GREY, boxes([50, 0, 64, 12], scores=[0.5]))
    plain = visualize.draw(GREY, visualize.Boxes(np.array([[50, 0, 64, 12]]), [0], [""]))
    tag = coloured(picture, 0) & ~coloured(plain, 0)
    assert tag[:, :250].any() and tag[:30].any() and not tag[:, :150].any()


def test_the_best_score_is_on_top():
    both = [[10, 10, 50, 50], [10, 10, 50, 50]]
    assert not coloured(visualize.draw(GREY, boxes(*both, scores=[0.9, 0.1])), 1).any()
    assert not coloured(visualize.draw(GREY, boxes(*both, scores=[0.1, 0.9])), 0).any()


def test_colours_are_fixed_and_differ():
    colours = np.array([visualize.colour(label) for label in range(20)], np.int64)
    assert visualize.colour(3) == visualize.colour(3)
    distance = np.abs(colours[:, None] - colours[None]).sum(-1) + 999 * np.eye(20, dtype=int)
    assert distance.min() > 20 and distance[:6, :6].min() > 100


def test_sheets_show_truth_beside_predictions():
    panel = visualize.Panel(
        GREY, boxes([5, 5, 20, 20]), boxes([30, 30, 60, 60], labels=[1]), "a.png"
    )
    page = visualize.sheet([panel] * 3, columns=2, side=100)
    assert page.size[0] > 4 * 100 and page.size[1] > 2 * 100
    half = page.size[0] // 2
    first = np.s_[: page.size[1] // 2, :half]
    truth, found = coloured(page, 0)[first], coloured(page, 1)[first]
    assert truth.any() and found.any()
    assert np.nonzero(truth)[1].max() < np.nonzero(found)[1].min()
    assert not coloured(page, 0)[page.size[1] // 2 + 20 :, half:].any()  # three pictures, not four
    with pytest.raises(ValueError, match="at least one"):
        visualize.sheet([])


def test_a_split_with_its_results(tmp_path):
    write_shapes(tmp_path, seed=0, train=1, val=5, size=64)
    index = load_coco(tmp_path, "annotations/instances_val2017.json", "val2017")
    results = [
        {
            "image_id": int(index.image_ids[row]),
            "category_id": index.label_map.category_ids[2],
            "bbox": [8, 8, 40, 40],
            "score": score,
        }
        for row, score in ((0, 0.9), (0, 0.2), (4, 0.7))
    ]
    page = visualize.split_sheet(index, results, count=2)
    assert coloured(page, 2).any()
    # Another takes the place of a picture that is gone; that it is gone has been said before.
    pictures = [tmp_path / "val2017" / name.decode() for name in index.file_names]
    pictures[0].unlink()
    other = visualize.split_sheet(index, results, count=2)
    assert other.size == page.size and other.tobytes() != page.tobytes()
    for gone in pictures[1:3]:
        gone.unlink()
    assert visualize.split_sheet(index, results, count=1).size[0] < page.size[0]
    assert visualize.split_sheet(index, results, count=5).size == page.size  # two are left
    for gone in pictures[3:]:
        gone.unlink()
    assert visualize.split_sheet(index, results, count=2).size == (420, visualize.TITLE)


def test_half_a_sheet_is_none(tmp_path, monkeypatch):
    class Full:
        def save(self, path, format):
            path.write_bytes(b"half")
            raise OSError("no space left")

    monkeypatch.setattr(visualize, "split_sheet", lambda *given: Full())
    sheet = pictures.Sheet(tmp_path, step=3, count=2)
    with pytest.raises(OSError, match="no space"):
        sheet.draw(None, [])
    assert sheet.missing() and not list((tmp_path / "pictures").iterdir())
