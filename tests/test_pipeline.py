"""Rows of a plan as pixels: every kind of picture as predict sees it, and every kind of damage."""

from __future__ import annotations

import gc
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from yolos_jax.data import augment, pipeline, shapes
from yolos_jax.data import image as image_lib
from yolos_jax.data import patches as patches_lib
from yolos_jax.data.augment import EvalRecipe, Recipe
from yolos_jax.data.index import load_coco
from yolos_jax.data.plan import choose_buckets, make_eval_plan, make_plan

EVAL = EvalRecipe(48, 80, 8)
TRAIN = Recipe(0.5, (48, 64, 80), 104, 0.5, (56, 72, 88), (40, 72), 8)


def smooth(height, width, seed=0):
    """A picture that shows shifts and mirrors, without single pixels that filters ring on."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    waves = [np.sin(x / a + y / b + c) for a, b, c in random.uniform(6, 20, (3, 3))]
    ramps = [x / width, y / height, (x + y) / (height + width)]
    pixels = [128 + 60 * wave + 60 * (ramp - 0.5) for wave, ramp in zip(waves, ramps, strict=True)]
    return np.clip(np.stack(pixels, axis=-1), 0, 255).astype(np.uint8)


def write(folder, pictures, boxes=1):
    """A COCO folder; pictures: name -> (writer of the file or None, stated height, width)."""
    (folder / "pictures").mkdir(exist_ok=True)
    images, annotations = [], []
    for number, (name, (writer, height, width)) in enumerate(pictures.items(), start=1):
        if writer is not None:
            writer(folder / "pictures" / name)
        images.append({"id": 10 * number, "file_name": name, "height": height, "width": width})
        for k in range(boxes):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": 10 * number, "category_id": 1}
                | {"bbox": [2 + k, 4, 20, 10], "area": 200, "iscrowd": 0}
            )
    coco = {"images": images, "annotations": annotations}
    coco["categories"] = [{"id": 1, "name": "thing"}]
    (folder / "a.json").write_text(json.dumps(coco))


def saver(pixels, **options):
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    return lambda path: picture.save(path, **options)


def exif(orientation):
    tags = Image.Exif()
    tags[image_lib.ORIENTATION_TAG] = orientation
    return tags


def truncated(path):
    saver(smooth(60, 80), quality=95)(path)
    path.write_bytes(path.read_bytes()[:700])


def truncated_png(path):
    saver(smooth(60, 80))(path)
    path.write_bytes(path.read_bytes()[:-900])


SIZE = (60, 80)
GOOD = {
    "rgb.jpg": (saver(smooth(*SIZE), quality=90), *SIZE),
    "grey.jpg": (saver(smooth(*SIZE)[..., 0], quality=90), *SIZE),
    "cmyk.jpg": (saver(Image.fromarray(smooth(*SIZE)).convert("CMYK"), quality=90), *SIZE),
    "rgba.png": (saver(Image.fromarray(smooth(*SIZE)).convert("RGBA")), *SIZE),
    "deep.png": (saver(smooth(*SIZE)[..., 0].astype(np.uint16) * 257), *SIZE),
    "palette.png": (saver(Image.fromarray(smooth(*SIZE)).convert("P")), *SIZE),
    "portrait.jpg": (saver(smooth(90, 50), quality=90), 90, 50),
    "turned.jpg": (saver(smooth(*SIZE), quality=90, exif=exif(6)), *SIZE),
}
BAD = {
    "truncated.jpg": (truncated, *SIZE, "cannot be decoded"),
    "truncated.png": (truncated_png, *SIZE, "cannot be decoded"),
    "text.jpg": (lambda path: path.write_text("not a picture"), *SIZE, "not a picture"),
    "empty.jpg": (lambda path: path.write_bytes(b""), *SIZE, "not a picture"),
    "gone.jpg": (None, *SIZE, "cannot be read: No such file"),
    "swapped.jpg": (
        saver(smooth(*SIZE)),
        80,
        60,
        "is 60 x 80 .* say 80 x 60",
    ),
}


def host_batches(index, plan, **options):
    """The whole step, unless ``host_rows`` says otherwise."""
    options = {"host_rows": np.arange(plan.batch_size)} | options
    return pipeline.host_batches(index, plan, **options)


def load(folder, **options):
    return load_coco(folder, "a.json", "pictures", **options)


def eval_plan(index, batch_size):
    return make_eval_plan(index, EVAL, choose_buckets(index, EVAL, 2, 8, 9), batch_size=batch_size)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    shapes.write(root, seed=0, train=60, val=1, size=64)
    return load_coco(root, "annotations/instances_train2017.json", "train2017")


@pytest.fixture(scope="module")
def demo_plan(demo):
    buckets = choose_buckets(demo, TRAIN, 3, 8, 9)
    return make_plan(demo, TRAIN, buckets, seed=0, epoch=0, batch_size=8)


@pytest.mark.parametrize("option", ["ignore", "apply"])
def test_every_kind_of_picture_as_predict_sees_it(tmp_path, option):
    write(tmp_path, GOOD)
    index = load(tmp_path, exif=option)
    plan = eval_plan(index, 3)
    seen = set()
    for host_batch in host_batches(index, plan, workers=2):
        batch = host_batch.batch
        assert host_batch.unreadable == () and batch.patches.dtype == np.uint8
        assert batch.patches.shape == (3, host_batch.bucket.patches, 192)
        for i, image_id in enumerate(host_batch.image_ids):
            assert batch.image_valid[i] == (image_id >= 0)
            if image_id >= 0:
                row = index.image_ids.tolist().index(image_id)
                pixels = image_lib.decode(index.path(row), exif=option)
                patches, grid = image_lib.preprocess(pixels, {"size": 48, "max_size": 80}, 8)
                assert tuple(batch.grid[i]) == grid
                difference = batch.patches[i, : len(patches)].astype(int) - patches
                assert np.abs(difference).max() <= 1, index.path(row)
                assert not batch.patches[i, len(patches) :].any()
                assert tuple(host_batch.original_size[i]) == pixels.shape[:2]
                assert host_batch.targets.target_valid[i].sum() == 1
                seen.add(image_id)
    assert len(seen) == len(GOOD)


def test_damaged_pictures_keep_their_rows(tmp_path):
    bad = {name: values[:3] for name, values in BAD.items()}
    write(tmp_path, GOOD | bad)
    index = load(tmp_path)
    plan = eval_plan(index, 5)
    messages, valid, names = [], [], []
    for host_batch in host_batches(index, plan, workers=2):
        batch, targets = host_batch.batch, host_batch.targets
        messages += host_batch.unreadable
        for i, image_id in enumerate(host_batch.image_ids):
            names.append(index.file_names[image_id // 10 - 1].decode() if image_id >= 0 else "")
            valid.append(batch.image_valid[i])
            assert batch.patches[i].any() == valid[-1]
            assert targets.target_valid[i].any() == valid[-1]
            if not valid[-1]:
                assert tuple(batch.grid[i]) == (1, 1) and not targets.boxes_cxcywh[i].any()
    assert dict(zip(names, valid, strict=True)) == {n: n in GOOD for n in [*GOOD, *BAD, ""]}
    assert len(messages) == len(BAD)
    for name, (*_, reason) in BAD.items():
        (message,) = (message for message in messages if name in message)
        with pytest.raises(ValueError, match=reason):
            raise ValueError(message)


def reference_pixels(index, recipe, draws, row):
    """What the reference makes of a row: mirrored, resized, cut, resized; each to 8 bits."""
    picture = Image.fromarray(image_lib.decode(index.path(row)))
    if draws.flip[row]:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    height, width = draws.frame[row].tolist()
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    top, left, high, wide = draws.rect[row].tolist()
    picture = picture.crop((left, top, left + wide, top + high))
    height, width = draws.size[row].tolist()
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR)).astype(int)


def test_crops_are_those_of_the_reference_resampled_once(tmp_path):
    sizes = [(96, 128), (128, 96), (70, 180), (200, 150)]
    write(
        tmp_path,
        {f"{i}.png": (saver(smooth(*sizes[i % 4], seed=i)), *sizes[i % 4]) for i in range(24)},
    )
    index = load(tmp_path)
    buckets = choose_buckets(index, TRAIN, 3, 8, 9)
    plan = make_plan(index, TRAIN, buckets, seed=3, epoch=0, batch_size=24, grouped=False)
    draws = augment.draw(index, TRAIN, 3, 0)
    (host_batch,) = host_batches(index, plan, workers=2)
    kinds = set()
    for i, row in enumerate(plan.rows[0]):
        ours = patches_lib.unpatchify(host_batch.batch.patches[i], host_batch.batch.grid[i], 8)
        difference = np.abs(ours - reference_pixels(index, TRAIN, draws, row))
        cropped = tuple(draws.rect[row, 2:]) != (index.heights[row], index.widths[row])
        if not cropped:
            assert difference.max() <= 1
        # One filter instead of two: small everywhere, largest at the borders of the crop.
        assert difference.mean() < 1 and difference.max() < 12
        kinds.add((bool(cropped), bool(draws.flip[row])))
    assert len(kinds) == 4


def flatten(host_batch):
    return jax.tree.leaves((host_batch.batch, host_batch.targets, host_batch.image_ids))


def assert_same(ours, theirs):
    for one, other in zip(flatten(ours), flatten(theirs), strict=True):
        np.testing.assert_array_equal(one, other)


def test_hosts_workers_and_resuming_change_nothing(demo, demo_plan):
    whole = list(host_batches(demo, demo_plan, workers=1, prefetch=1))
    assert len(whole) == demo_plan.steps == 7
    resumed = list(host_batches(demo, demo_plan, start_step=5, workers=3, prefetch=4))
    assert len(resumed) == 2
    for ours, theirs in zip(resumed, whole[5:], strict=True):
        assert_same(ours, theirs)
    for rows in (np.arange(4, 8), np.array([0, 3, 6])):
        parts = list(host_batches(demo, demo_plan, host_rows=rows))
        for part, all_rows in zip(parts, whole, strict=True):
            for ours, theirs in zip(flatten(part), flatten(all_rows), strict=True):
                np.testing.assert_array_equal(ours, theirs[rows])
    assert list(host_batches(demo, demo_plan, start_step=7)) == []


def test_targets_are_the_plans(demo, demo_plan):
    for step, host_batch in enumerate(host_batches(demo, demo_plan)):
        assert host_batch.bucket == demo_plan.buckets[demo_plan.bucket[step]]
        assert host_batch.targets.labels.shape == (8, 8)
        np.testing.assert_array_equal(host_batch.batch.grid, demo_plan.grid[step])
        for i in range(8):
            own = slice(*demo_plan.box_offsets[step * 8 + i : step * 8 + i + 2])
            valid = host_batch.targets.target_valid[i]
            assert valid[: valid.sum()].all()
            np.testing.assert_array_equal(
                host_batch.targets.boxes_cxcywh[i, valid], demo_plan.boxes_cxcywh[own]
            )
            np.testing.assert_array_equal(
                host_batch.targets.labels[i, valid], demo_plan.labels[own]
            )


def test_threads_end_with_the_consumer(demo, demo_plan):
    before = set(threading.enumerate())
    batches = host_batches(demo, demo_plan, workers=3)
    next(batches)
    assert set(threading.enumerate()) - before
    batches.close()
    assert not set(threading.enumerate()) - before
    batches = host_batches(demo, demo_plan, workers=3)
    next(batches)
    del batches
    gc.collect()
    assert not set(threading.enumerate()) - before


def test_errors_that_are_not_the_pictures_reach_the_consumer(demo, demo_plan, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("out of luck")

    before = set(threading.enumerate())
    monkeypatch.setattr(type(demo), "paths", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        next(host_batches(demo, demo_plan))
    assert not set(threading.enumerate()) - before


def test_a_step_past_the_end_is_refused_at_once(demo, demo_plan):
    with pytest.raises(ValueError, match="start_step is 8, the plan has 7 steps"):
        host_batches(demo, demo_plan, start_step=8)


def test_pictures_are_read_while_jax_computes(demo, demo_plan):
    step = jax.jit(lambda x, w: jnp.tanh(x @ w))
    state = jnp.ones((256, 256))
    expected = list(host_batches(demo, demo_plan))
    for ours, theirs in zip(host_batches(demo, demo_plan), expected, strict=True):
        for _ in range(20):
            state = step(state, state)
        assert_same(ours, theirs)
    assert np.isfinite(state).all()
