"""Pictures that share a canvas, as the published Ti was evaluated, against a direct computation."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image

from configs import shapes
from yolos_jax import mesh
from yolos_jax.batch import Batch, HostBatch, Targets, normalise
from yolos_jax.data import image, index, plan
from yolos_jax.data import patches as patches_lib
from yolos_jax.data.layout import Sequences
from yolos_jax.labels import LabelMap
from yolos_jax.losses import postprocess
from yolos_jax.models.build import build_model
from yolos_jax.reference_padding import make_canvas_plan, make_predict_step, on_canvases

RECIPE = plan.EvalRecipe(32, 64, 8)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
# Heights and widths in the order of the file; ids run the other way.
SIZES = [(40, 60), (64, 32), (33, 33), (30, 90), (48, 48)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """An index of five pictures of noise."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i, (height, width) in enumerate(SIZES):
        pixels = random.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    heights, widths = np.array(SIZES, np.int32).T
    return index.Index(
        root=str(folder),
        images_dir="",
        annotations="",
        label_map=LabelMap((1, 2), ("a", "b")),
        image_ids=np.array([50, 40, 30, 20, 10]),
        file_names=np.array([f"{i}.png".encode() for i in range(len(SIZES))]),
        heights=heights,
        widths=widths,
        orientation=np.ones(len(SIZES), np.uint8),
        records=np.arange(len(SIZES)),
        box_offsets=np.array([0, 1, 1, 1, 1, 1]),
        boxes_xyxy_px=np.array([[1, 1, 9, 9]], np.float32),
        labels=np.zeros(1, np.int32),
        dropped=None,
    )


def canvas_plan(pictures, batch_size=4, group=2, buckets=2):
    return make_canvas_plan(
        pictures,
        RECIPE,
        group=group,
        batch_size=batch_size,
        bucket_count=buckets,
        multiple=8,
        layout=Sequences(8, 9),
    )


def test_pairs_are_neighbours_by_id_and_share_the_larger_sides(pictures):
    canvases, canvas = canvas_plan(pictures)
    sizes = {row: tuple(int(s) for s in size) for row, size in grids(pictures).items()}
    # 32 pixels high or wide, at most 64; patches of 8.
    assert sizes == {0: (4, 6), 1: (8, 4), 2: (4, 4), 3: (2, 7), 4: (4, 4)}
    pairs = {tuple(pair) for pair in canvases.rows.reshape(-1, 2).tolist()}
    assert pairs == {(4, 3), (2, 1), (0, -1), (-1, -1)}
    expected = {4: (4, 7), 3: (4, 7), 2: (8, 4), 1: (8, 4), 0: (4, 6)}
    for row, size in zip(canvases.rows.ravel(), canvas.reshape(-1, 2), strict=True):
        assert tuple(size) == expected.get(int(row), (1, 1))
    for step, bucket in enumerate(canvases.bucket):
        rows, cols = canvas[step].max(0)
        bucket = canvases.buckets[bucket]
        assert canvas[step].prod(-1).max() <= bucket.patches
        assert rows <= bucket.rows and cols <= bucket.cols
        assert (bucket.patches + 9) % 8 == 0
    own = {
        row: tuple(grid)
        for row, grid in zip(canvases.rows.ravel(), canvases.grid.reshape(-1, 2), strict=True)
    }
    assert {row: own[row] for row in range(5)} == sizes


def grids(pictures):
    (bucket,) = plan.choose_buckets(pictures, RECIPE, 1, 8, 9)
    whole = plan.make_eval_plan(pictures, RECIPE, (bucket,), batch_size=5)
    return dict(zip(whole.rows[0].tolist(), whole.grid[0].tolist(), strict=True))


@pytest.mark.parametrize("batch_size, group", [(2, 2), (8, 2), (3, 3), (4, 1)])
def test_every_picture_is_there_once(pictures, batch_size, group):
    canvases, canvas = canvas_plan(pictures, batch_size, group, buckets=3)
    assert canvases.rows.shape[1] == batch_size and canvas.shape == (*canvases.rows.shape, 2)
    assert sorted(canvases.rows[canvases.rows >= 0]) == [0, 1, 2, 3, 4]
    assert (canvases.crop[canvases.rows < 0] == 0).all()


def test_batches_hold_whole_groups(pictures):
    with pytest.raises(ValueError, match="batches of 3 images do not divide into groups of 2"):
        canvas_plan(pictures, batch_size=3)


def host_batches(pictures, canvases):
    for step, rows in enumerate(canvases.rows):
        bucket = canvases.buckets[canvases.bucket[step]]
        patches = np.full((len(rows), bucket.patches, 192), 77, np.uint8)  # padding is no zero
        for i, row in enumerate(rows):
            if row >= 0:
                own, _ = image.preprocess(
                    image.decode(pictures.path(row)), {"size": 32, "max_size": 64}, 8
                )
                patches[i, : len(own)] = own
        yield HostBatch(
            Batch(patches, canvases.grid[step], rows >= 0),
            Targets(None, None, None),
            np.where(rows >= 0, pictures.image_ids[rows], -1),
            np.stack([pictures.heights[rows], pictures.widths[rows]], -1),
            bucket,
        )


def test_predictions_are_those_of_padded_pairs(pictures):
    config = shapes.get_config().model
    config.depth, config.width, config.mlp_width, config.scan = 1, 24, 48, False
    model = build_model(config, 2)
    # Large weights, so that what a patch holds matters.
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32),
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    canvases, canvas = canvas_plan(pictures, buckets=1)
    one_device = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), mesh.ROWS)
    predict_step = make_predict_step(model, one_device)
    found = {}
    with jax.default_matmul_precision("highest"):
        batches = on_canvases(host_batches(pictures, canvases), canvas, np.arange(4), MEAN, STD)
        for batch in batches:
            detections = predict_step(params, batch.batch, batch.original_size, batch.bucket)
            for i, image_id in enumerate(batch.image_ids):
                found[int(image_id)] = jax.tree.map(lambda x, i=i: np.asarray(x[i]), detections)
        for image_id, expected in directly(pictures, model, params, [10, 20]).items():
            got = found[image_id]
            np.testing.assert_allclose(got.scores, expected.scores, rtol=0, atol=1e-5)
            np.testing.assert_array_equal(got.labels, expected.labels)
            np.testing.assert_allclose(got.boxes_xyxy_px, expected.boxes_xyxy_px, rtol=0, atol=2e-3)
        alone = directly(pictures, model, params, [20])[20]
    # Padding does make a difference: without it the test above would prove nothing.
    assert np.abs(alone.boxes_xyxy_px - found[20].boxes_xyxy_px).max() > 0.1


def directly(pictures, model, params, image_ids):
    """The reference's way: normalise, zero-pad to the largest, the canvas is the picture."""
    rows = [pictures.image_ids.tolist().index(image_id) for image_id in image_ids]
    normalised = []
    for row in rows:
        resized = image.resize(
            image.decode(pictures.path(row)), *(8 * side for side in grids(pictures)[row])
        )
        normalised.append(normalise(resized.reshape(*resized.shape[:2], 3), MEAN, STD))
    height, width = np.max([picture.shape[:2] for picture in normalised], axis=0)
    patches = []
    for picture in normalised:
        padded = np.zeros((height, width, 3), np.float32)
        padded[: picture.shape[0], : picture.shape[1]] = picture
        patches.append(patches_lib.patchify(padded, 8))
    grid = np.array([[height // 8, width // 8]] * len(rows), np.int32)
    batch = Batch(np.stack(patches), grid, np.ones(len(rows), bool))
    bounds = (height // 8, width // 8)
    outputs = jax.jit(lambda p, b: model.apply(p, b, bounds=bounds))(params, batch)
    sizes = np.stack([pictures.heights[rows], pictures.widths[rows]], -1)
    detections = postprocess(outputs, sizes)
    return {
        image_id: jax.tree.map(lambda x, i=i: np.asarray(x[i]), detections)
        for i, image_id in enumerate(image_ids)
    }


def test_a_picture_that_cannot_be_read_has_no_canvas(pictures):
    canvases, canvas = canvas_plan(pictures)
    batch = next(host_batches(pictures, canvases))
    valid = batch.batch.image_valid.copy()
    valid[0] = False
    grid = np.where(valid[:, None], batch.batch.grid, 1)
    batch = batch._replace(batch=batch.batch._replace(image_valid=valid, grid=grid))
    single = dataclasses.replace(canvases, rows=canvases.rows[:1])
    (padded,) = on_canvases([batch], canvas[: single.steps], slice(None), MEAN, STD)
    assert padded.batch.grid[0].tolist() == [1, 1]
    assert padded.batch.grid[1].tolist() == canvas[0, 1].tolist()
