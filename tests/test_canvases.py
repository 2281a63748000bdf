"""Canvases: few shapes, little padding, every picture in its corner as the reference resizes it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from benchmarks.coco_like import coco_like
from configs import detr_r50
from tests.test_pipeline import GOOD, host_batches, load, saver, smooth, write
from yolos_jax.batch import Canvas, CanvasBucket
from yolos_jax.data import buckets as buckets_lib
from yolos_jax.data import image as image_lib
from yolos_jax.data.canvases import choose_canvases
from yolos_jax.data.layout import Canvases
from yolos_jax.data.plan import EvalRecipe, Recipe, make_eval_plan, make_plan

RECIPE = Recipe.from_config(detr_r50.get_config(), 1)
EVAL = EvalRecipe(800, 1333, 1)
SMALL = Recipe(0.5, (48, 61, 80), 104, 0.5, (56, 72, 88), (40, 72), 1)


@pytest.fixture(scope="module")
def coco():
    return coco_like(20_000, 40_000)


@pytest.fixture(scope="module")
def plan(coco):
    config = detr_r50.get_config().buckets
    canvases = Canvases().buckets(coco, RECIPE, config.count, config.multiple)
    return make_plan(coco, RECIPE, canvases, seed=0, epoch=0, batch_size=64)


def test_few_canvases_waste_little(plan):
    """What the recipe promises, of an epoch of COCO's sizes."""
    assert len(plan.buckets) <= 20
    assert plan.waste() < 0.15
    assert all(b.rows % 32 == 0 and b.cols % 32 == 0 for b in plan.buckets)
    assert "pixels" in plan.describe()


def test_every_row_fits_and_no_smaller_canvas_holds_the_step(plan):
    shapes = np.array([(bucket.rows, bucket.cols) for bucket in plan.buckets])
    most = plan.size.max(axis=1)
    assert (most <= shapes[plan.bucket]).all()
    smaller = (most[:, None] <= shapes).all(axis=-1) & (
        np.arange(len(shapes)) < plan.bucket[:, None]
    )
    assert not smaller.any()
    assert len(np.unique(plan.rows)) == plan.rows.size == 20_000 // 64 * 64
    np.testing.assert_array_equal(plan.size, plan.grid)


def test_wide_and_high_canvases_meet_where_they_are_small(plan):
    places = buckets_lib.neighbours(plan.buckets)
    in_order = [plan.buckets[i] for i in np.argsort(places)]
    high = [bucket.rows > bucket.cols for bucket in in_order]
    assert high == sorted(high)
    of_wide = [
        bucket.patches for bucket, is_high in zip(in_order, high, strict=True) if not is_high
    ]
    of_high = [bucket.patches for bucket, is_high in zip(in_order, high, strict=True) if is_high]
    assert of_wide == sorted(of_wide, reverse=True) and of_high == sorted(of_high)


def test_the_same_on_every_host_and_one_for_one_size(coco):
    assert choose_canvases(coco, RECIPE, 6, 32) == choose_canvases(coco, RECIPE, 6, 32)
    (whole,) = choose_canvases(coco, RECIPE, 1, 32)
    assert whole == CanvasBucket(1344 * 1344, 1344, 1344)
    same = coco.select(np.flatnonzero((coco.heights == 480) & (coco.widths == 640)))
    assert choose_canvases(same, EVAL, 8, 1) == (CanvasBucket(800 * 1066, 800, 1066),)
    with pytest.raises(ValueError, match=r"buckets\.count 0"):
        choose_canvases(coco, RECIPE, 0, 32)


def test_evaluation_groups_equal_shapes(coco):
    canvases = Canvases().buckets(coco, EVAL, 16, 32)
    plan = make_eval_plan(coco, EVAL, canvases, batch_size=8)
    shapes = np.array([(bucket.rows, bucket.cols) for bucket in plan.buckets])
    real = plan.rows >= 0
    exact = (plan.size == shapes[plan.bucket][:, None]).all(axis=-1)[real]
    assert exact.mean() > 0.75 and plan.waste() < 0.02
    np.testing.assert_array_equal(np.sort(plan.rows[real]), np.arange(len(coco)))


def test_canvases_end_where_learned_positions_do(coco):
    """The longest side of the recipe is 1333 pixels, which 1344 hold."""
    reached = Canvases(most=1344)
    assert reached.buckets(coco, RECIPE, 2, 32) == Canvases().buckets(coco, RECIPE, 2, 32)
    with pytest.raises(ValueError, match="1344 pixels: learned positions reach 1343 pixels"):
        Canvases(most=1343).buckets(coco, RECIPE, 2, 32)
    with pytest.raises(ValueError, match="800x1376 pixels: learned"):
        reached.bucket_of((800, 1345), 1)
    with pytest.raises(ValueError, match="32x1345 pixels: learned"):
        reached.whole(np.zeros((1, 32, 1345, 3)))


def test_every_kind_of_picture_in_its_corner_as_predict_sees_it(tmp_path):
    write(tmp_path, GOOD | {"missing.jpg": (None, 60, 80)})
    index = load(tmp_path)
    recipe = EvalRecipe(50, 90, 1)
    plan = make_eval_plan(index, recipe, choose_canvases(index, recipe, 3, 1), batch_size=4)
    seen = 0
    for host_batch in host_batches(index, plan, workers=2):
        batch, bucket = host_batch.batch, host_batch.bucket
        assert isinstance(batch, Canvas) and batch.pixels.dtype == np.uint8
        assert batch.pixels.shape == (4, bucket.rows, bucket.cols, 3)
        for row in np.flatnonzero(~batch.image_valid):
            assert tuple(batch.size[row]) == (1, 1) and not batch.pixels[row].any()
        for row in np.flatnonzero(batch.image_valid):
            place = index.image_ids.tolist().index(host_batch.image_ids[row])
            pixels = image_lib.decode(index.path(place))
            cells, (height, width) = image_lib.preprocess(pixels, {"size": 50, "max_size": 90}, 1)
            assert tuple(batch.size[row]) == (height, width)
            expected = cells.reshape(height, width, 3)
            difference = batch.pixels[row, :height, :width].astype(int) - expected
            assert np.abs(difference).max() <= 1, index.path(place)
            assert not batch.pixels[row, height:].any() and not batch.pixels[row, :, width:].any()
            seen += 1
    assert seen == len(GOOD)


def test_training_pictures_are_cut_resized_and_mirrored_as_planned(tmp_path):
    write(tmp_path, {f"{i}.png": (saver(smooth(60 + i, 80, i)), 60 + i, 80) for i in range(8)})
    index = load(tmp_path)
    plan = make_plan(
        index,
        SMALL,
        choose_canvases(index, SMALL, 3, 8),
        seed=1,
        epoch=0,
        batch_size=4,
        grouped=False,
    )
    for step, host_batch in enumerate(host_batches(index, plan, workers=2)):
        for row in range(4):
            height, width = plan.size[step, row]
            pixels = image_lib.decode(index.path(int(plan.rows[step, row])))
            top, left, rows, cols = plan.crop[step, row]
            corners = (left, top, min(left + cols, 80), min(top + rows, pixels.shape[0]))
            expected = np.asarray(
                Image.fromarray(pixels).resize(
                    (int(width), int(height)), Image.Resampling.BILINEAR, box=corners
                )
            )
            expected = expected[:, ::-1] if plan.flip[step, row] else expected
            found = host_batch.batch.pixels[row, :height, :width].astype(int)
            assert np.abs(found - expected).max() <= 1
