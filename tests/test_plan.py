"""Plans: pure, complete, and each row as the reference would have treated it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.coco_like import coco_like
from configs import finetune, shapes, yolos_s, yolos_ti
from yolos_jax.data import augment, sizes
from yolos_jax.data.index import Index
from yolos_jax.data.plan import (
    EvalRecipe,
    Recipe,
    choose_buckets,
    join,
    make_eval_plan,
    make_plan,
)
from yolos_jax.data.problems import Problems
from yolos_jax.labels import LabelMap

RECIPE = Recipe.from_config(yolos_s.get_config(), 16)
SMALL = Recipe(0.5, (32, 48, 64), 96, 0.5, (40, 56), (24, 48), 8)


def index_of(pictures, boxes=()):
    """An Index of pictures (height, width) and boxes (picture, x0, y0, x1, y1, label)."""
    boxes = sorted(boxes, key=lambda box: box[0])
    counts = np.bincount([box[0] for box in boxes], minlength=len(pictures)).astype(np.int64)
    return Index(
        root="/data",
        images_dir="train",
        annotations="/data/a.json",
        label_map=LabelMap((1, 2), ("a", "b")),
        image_ids=np.arange(len(pictures)) + 100,
        file_names=np.array([f"{i}.jpg".encode() for i in range(len(pictures))]),
        heights=np.array([height for height, _ in pictures], np.int32),
        widths=np.array([width for _, width in pictures], np.int32),
        orientation=np.ones(len(pictures), np.uint8),
        box_offsets=np.concatenate([[0], np.cumsum(counts)]),
        boxes_xyxy_px=np.array([box[1:5] for box in boxes], np.float32).reshape(-1, 4),
        labels=np.array([box[5] for box in boxes], np.int32),
        records=np.arange(len(pictures)),
        dropped=Problems("/data/a.json"),
    )


@pytest.fixture(scope="module")
def coco():
    return coco_like(3000, 20_000)


@pytest.fixture(scope="module")
def buckets(coco):
    return choose_buckets(coco, RECIPE, 8, 128, 101)


def plan_of(index, buckets, recipe=RECIPE, **changes):
    arguments = {"seed": 0, "epoch": 0, "batch_size": 16} | changes
    return make_plan(index, recipe, buckets, **arguments)


def by_row(plan):
    """What the plan does to each row of the index."""
    order = np.argsort(plan.rows, axis=None)
    columns = (plan.rows, plan.flip, plan.crop, plan.size, plan.grid)
    boxes = np.split(plan.boxes_cxcywh, plan.box_offsets[1:-1])
    columns = [column.reshape(plan.rows.size, -1)[order] for column in columns]
    return columns, [boxes[i] for i in order]


def test_a_plan_is_a_pure_function(coco, buckets):
    plan = plan_of(coco, buckets)
    assert plan.fingerprint() == plan_of(coco, buckets).fingerprint()
    others = [{"seed": 1}, {"epoch": 1}, {"batch_size": 8}, {"grouped": False}]
    prints = {plan_of(coco, buckets, **change).fingerprint() for change in others}
    assert len(prints | {plan.fingerprint()}) == 5
    assert choose_buckets(coco, RECIPE, 8, 128, 101) == buckets


def test_joined_plans_are_their_steps_one_after_the_other(coco, buckets):
    epochs = [plan_of(coco, buckets, epoch=epoch) for epoch in range(3)]
    joined = join(epochs)
    assert joined.steps == sum(plan.steps for plan in epochs)
    for name in ("rows", "flip", "crop", "size", "grid", "bucket", "boxes_cxcywh", "labels"):
        expected = np.concatenate([getattr(plan, name) for plan in epochs])
        np.testing.assert_array_equal(getattr(joined, name), expected)
    step = epochs[0].steps + 2  # the third step of the second epoch
    first, last = joined.box_offsets[[step * 16, step * 16 + 16]]
    own_first, own_last = epochs[1].box_offsets[[2 * 16, 3 * 16]]
    np.testing.assert_array_equal(
        joined.boxes_cxcywh[first:last], epochs[1].boxes_cxcywh[own_first:own_last]
    )
    assert join(epochs[:1]).fingerprint() == epochs[0].fingerprint()


def test_what_happens_to_a_picture_does_not_depend_on_the_batches(coco, buckets):
    columns, boxes = by_row(plan_of(coco, buckets, batch_size=8))
    for change in ({"batch_size": 24}, {"batch_size": 100, "grouped": False}):
        other_columns, other_boxes = by_row(plan_of(coco, buckets, **change))
        for column, other in zip(columns, other_columns, strict=True):
            np.testing.assert_array_equal(column, other)
        for ours, theirs in zip(boxes, other_boxes, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_what_happens_to_a_picture_does_not_depend_on_the_pictures_behind_it(coco):
    first = augment.draw(coco.subset(100), RECIPE, seed=5, epoch=2)
    whole = augment.draw(coco, RECIPE, seed=5, epoch=2)
    for ours, theirs in zip(first, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs[:100])


def test_every_row_once_and_the_tail_dropped_at_random():
    index = index_of([(64, 64)] * 23)
    buckets = choose_buckets(index, SMALL, 2, 8, 9)
    times = np.zeros(23, int)
    for epoch in range(60):
        rows = plan_of(index, buckets, SMALL, epoch=epoch, batch_size=5).rows
        assert rows.shape == (4, 5) and len(np.unique(rows)) == 20
        times[rows.ravel()] += 1
    assert times.min() >= 44 and times.max() <= 60  # 52 expected, 2.6 the standard deviation


def test_steps_fit_their_bucket_and_no_smaller_one(coco, buckets):
    for epoch in range(4):
        plan = plan_of(coco, buckets, epoch=epoch)
        assert (plan.grid * 16 == plan.size).all()
        need = np.concatenate([plan.grid.prod(-1, keepdims=True), plan.grid], axis=-1).max(axis=1)
        bounds = np.array(buckets)
        assert (need <= bounds[plan.bucket]).all()
        smaller = np.maximum(plan.bucket - 1, 0)
        assert ((need > bounds[smaller]).any(axis=1) | (plan.bucket == 0)).all()


def wasted(plan, num_prefix):
    """Share of all tokens that is padding, counted plainly."""
    computed = sum(plan.batch_size * (num_prefix + plan.buckets[i].patches) for i in plan.bucket)
    real = [num_prefix + h * w for (h, w) in plan.grid[plan.rows >= 0].tolist()]
    return 1 - sum(real) / computed


def test_grouping_by_bucket_saves_most_of_the_padding(coco, buckets):
    plan = plan_of(coco, buckets)
    assert plan.waste() < 0.1
    assert plan_of(coco, buckets, grouped=False).waste() > 0.3
    assert plan.waste(101) == pytest.approx(wasted(plan, 101))
    report = plan_of(coco, buckets).describe()
    assert report.count("\n") == len(buckets) + 1 and "187 steps of 16 pictures" in report


def test_published_crops_leave_nothing_out_and_cropless_recipes_work():
    index = index_of([(64, 64)] * 6, [(i, 8, 16, 24, 32, 1) for i in range(6)])
    recipe = Recipe.from_config(shapes.get_config(), 8)
    (bucket,) = choose_buckets(index, recipe, 8, 8, 9)
    assert bucket == (71, 8, 8)  # 1 + 8 + 71 is a multiple of 8
    plan = plan_of(index, (bucket,), recipe, batch_size=6)
    assert plan.max_boxes == 8 and plan.waste() == pytest.approx(1 - 64 / 71)
    np.testing.assert_array_equal(plan.crop, np.broadcast_to([0.0, 0, 64, 64], (1, 6, 4)))
    plain, mirrored = [0.25, 0.375, 0.25, 0.25], [0.75, 0.375, 0.25, 0.25]
    expected = np.where(plan.flip.reshape(-1, 1), mirrored, plain)
    np.testing.assert_allclose(plan.boxes_cxcywh, expected, rtol=1e-6)
    assert 0 < plan.flip.sum() < 6
    Recipe.from_config(finetune.get_config(), 16)
    Recipe.from_config(yolos_ti.get_config(), 16)


def test_boxes_and_rectangles_as_the_reference_computes_them(coco, buckets):
    """Row by row, in the plain float32 of the reference, from the integers drawn."""
    draws = augment.draw(coco, RECIPE, seed=1, epoch=0)
    plan = plan_of(coco, buckets, seed=1, batch_size=3000)
    cropped = flipped = 0
    for place, row in enumerate(plan.rows[0, :400]):
        height, width = np.float32(coco.heights[row]), np.float32(coco.widths[row])
        boxes = coco.boxes_xyxy_px[slice(*coco.box_offsets[row : row + 2])]
        (frame_h, frame_w), (top, left, h, w) = draws.frame[row], draws.rect[row]
        if draws.flip[row]:
            boxes = boxes[:, [2, 1, 0, 3]] * np.float32([-1, 1, -1, 1]) + [width, 0, width, 0]
        boxes = boxes.astype(np.float32)
        boxes *= np.tile(np.float32([frame_w / width, frame_h / height]), 2)
        boxes = np.minimum(boxes - np.float32([left, top, left, top]), np.float32([w, h, w, h]))
        boxes = np.maximum(boxes, 0)
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)]
        boxes *= np.tile(np.float32([draws.size[row, 1] / w, draws.size[row, 0] / h]), 2)
        centre, side = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        expected = np.concatenate([centre, side], axis=1)
        expected /= np.tile(draws.size[row, ::-1].astype(np.float32), 2)
        found = plan.boxes_cxcywh[slice(*plan.box_offsets[place : place + 2])]
        np.testing.assert_allclose(found, expected, rtol=1e-6)

        crop = plan.crop[0, place]
        x = np.array([crop[1], crop[1] + crop[3]]) * frame_w / width
        if plan.flip[0, place]:
            x = frame_w - x[::-1]
        y = np.array([crop[0], crop[0] + crop[2]]) * frame_h / height
        np.testing.assert_allclose([*x, *y], [left, left + w, top, top + h], atol=1e-9)
        cropped += tuple(draws.frame[row]) != (height, width)
        flipped += bool(draws.flip[row])
    assert 150 < cropped < 250 and 150 < flipped < 250


def test_pictures_smaller_than_the_least_crop_keep_the_whole_side():
    index = index_of([(30, 300), (300, 300)] * 200)
    recipe = SMALL._replace(crop=1.0, crop_resize=(40,), crop_range=(56, 80))
    draws = augment.draw(index, recipe, seed=0, epoch=0)
    assert (draws.frame[:, 0] == 40).all() and set(draws.frame[:, 1]) == {400, 40}
    narrow = draws.rect[1::2]
    np.testing.assert_array_equal(narrow, np.broadcast_to([0, 0, 40, 40], narrow.shape))
    wide = draws.rect[::2]
    assert (wide[:, 2] == 40).all() and wide[:, 3].min() == 56 and wide[:, 3].max() == 80
    assert (wide[:, 1] + wide[:, 3]).max() <= 400


def test_evaluation_has_every_image_once_by_length(coco):
    recipe = EvalRecipe(512, 853, 16)
    buckets = choose_buckets(coco, recipe, 4, 128, 101)
    plan = make_eval_plan(coco, recipe, buckets, batch_size=7)
    flat = plan.rows.ravel()
    assert plan.rows.shape == (429, 7) and (flat[3000:] == -1).all()
    np.testing.assert_array_equal(np.sort(flat[:3000]), np.arange(3000))
    assert (plan.grid.reshape(-1, 2)[3000:] == 1).all() and not plan.flip.any()
    few = make_eval_plan(coco.subset(9), recipe, buckets, batch_size=7)  # 5 of 14 rows are padding
    for num_prefix in (0, 101):
        assert few.waste(num_prefix) == pytest.approx(wasted(few, num_prefix))
    height, width = sizes.resized_size(coco.heights, coco.widths, 512, 853, 16)
    size = np.stack([height, width], axis=1)
    np.testing.assert_array_equal(plan.size.reshape(-1, 2)[:3000], size[flat[:3000]])
    assert (np.diff(plan.bucket) >= 0).all()
    assert plan.labels.shape == coco.labels.shape and plan.max_boxes == -(-coco.max_boxes // 8) * 8
    tiny = make_eval_plan(coco.subset(3), recipe, buckets, batch_size=7)
    assert tiny.rows.shape == (1, 7) and (tiny.rows >= 0).sum() == 3


def test_a_batch_without_boxes_and_a_dataset_without_boxes():
    index = index_of([(64, 64)] * 4)
    plan = plan_of(index, choose_buckets(index, SMALL, 1, 8, 9), SMALL, batch_size=2)
    assert plan.max_boxes == 8 and plan.boxes_cxcywh.shape == (0, 4)
    assert plan.box_offsets.tolist() == [0] * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 5}, r"batch_size is 5, but /data/a.json has only 4 pictures"),
        ({"batch_size": 4, "microbatches": 3}, "batch_size 4.*microbatches 3"),
    ],
)
def test_senseless_batches_are_refused(change, message):
    index = index_of([(64, 64)] * 4)
    buckets = choose_buckets(index, SMALL, 1, 8, 9)
    with pytest.raises(ValueError, match=message):
        plan_of(index, buckets, SMALL, **change)


def test_fingerprint_sees_every_column(coco, buckets):
    plan = plan_of(coco, buckets)
    boxes = plan.boxes_cxcywh.copy()
    boxes[3, 1] += 1e-6
    assert dataclasses.replace(plan, boxes_cxcywh=boxes).fingerprint() != plan.fingerprint()
