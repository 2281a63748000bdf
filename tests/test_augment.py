"""The augmentation as drawn, against a plain simulation of the reference's rules."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy import stats

from configs import yolos_s, yolos_ti
from tests.test_plan import index_of
from yolos_jax.data import augment
from yolos_jax.data.augment import Recipe

PICTURES = [(480, 640), (640, 480), (427, 640), (500, 333), (612, 612)]
BOXES = [(0.1, 0.2, 0.4, 0.5), (0.45, 0.4, 0.55, 0.6), (0.7, 0.75, 0.99, 0.95)]  # of each side


def resized(size, scale, max_size):
    """Shorter side to scale, longer at most max_size; both down to multiples of 16."""
    height, width = size
    if max_size is not None:
        ratio = float(max(size)) / float(min(size))
        if ratio * scale > max_size:
            scale = round(max_size * float(min(size)) / float(max(size)))
    if min(size) == scale:
        new = size
    elif width < height:
        new = int(scale * height / width), scale
    else:
        new = scale, int(scale * width / height)
    return new[0] // 16 * 16, new[1] // 16 * 16


def flip_box(box, width):
    return (width - box[2], box[1], width - box[0], box[3])


def resize_box(box, old, new):
    y, x = new[0] / old[0], new[1] / old[1]
    return (box[0] * x, box[1] * y, box[2] * x, box[3] * y)


def simulate(recipe, size, generator):
    """One training example as the reference makes it: a dictionary of numbers."""
    boxes = [resize_box(box, (1, 1), size) for box in BOXES]
    flip = generator.random() < 0.5
    if flip:
        boxes = [flip_box(box, size[1]) for box in boxes]
    if generator.random() < 0.5:
        final = resized(size, generator.choice(recipe.scales), recipe.max_size)
        boxes = [resize_box(box, size, final) for box in boxes]
        drawn = {}
    else:
        frame = resized(size, generator.choice(recipe.crop_resize), None)
        boxes = [resize_box(box, size, frame) for box in boxes]
        low, high = recipe.crop_range
        w = generator.randint(low, min(frame[1], high))
        h = generator.randint(low, min(frame[0], high))
        top, left = generator.randint(0, frame[0] - h), generator.randint(0, frame[1] - w)
        boxes = [(x0 - left, y0 - top, x1 - left, y1 - top) for x0, y0, x1, y1 in boxes]
        boxes = [tuple(map(min, box, (w, h, w, h))) for box in boxes]
        boxes = [tuple(max(side, 0) for side in box) for box in boxes]
        boxes = [box for box in boxes if box[0] < box[2] and box[1] < box[3]]
        final = resized((h, w), generator.choice(recipe.scales), recipe.max_size)
        boxes = [resize_box(box, (h, w), final) for box in boxes]
        drawn = {"frame": frame[0], "h": h, "w": w, "top": top, "left": left}
        drawn |= {"shape": h / w, "place": (left + w / 2) / frame[1]}
    x0, y0, x1, y1 = (sum(box[i] for box in boxes) for i in range(4))
    summary = {"boxes": len(boxes), "x": (x0 + x1) / final[1], "area": (x1 - x0) * (y1 - y0)}
    prefix = "cut " if drawn else "whole "
    summary |= {"height": final[0], "width": final[1], **drawn}
    return {"flip": flip, "crop": bool(drawn)} | {prefix + k: v for k, v in summary.items()}


def plan_columns(recipe, count, seed):
    """The same numbers from augment.draw, as columns of arrays."""
    boxes = [
        (i, *(np.array(box) * np.tile(picture[::-1], 2)), 0)
        for i, picture in enumerate(PICTURES)
        for box in BOXES
    ]
    index = index_of(PICTURES, boxes).select(np.arange(count) % len(PICTURES))
    pictures = np.stack([index.heights, index.widths], axis=1)
    draws = augment.draw(index, recipe, seed, 0)
    offsets, found, _ = augment.surviving_boxes(index, draws, np.arange(count))
    cut = (draws.frame != pictures).any(axis=1)
    top, left, h, w = draws.rect.T
    height, width = draws.size.T
    row = np.repeat(np.arange(count), np.diff(offsets))
    pixels = found * np.stack([width, height, width, height], axis=1)[row]
    x = np.bincount(row, 2 * found[:, 0], count)
    sides = [np.bincount(row, pixels[:, i], count) for i in (2, 3)]
    columns = {"boxes": np.diff(offsets), "x": x, "area": sides[0] * sides[1]}
    columns |= {"height": height, "width": width}
    result = {"flip": draws.flip, "crop": cut}
    result |= {f"whole {name}": column[~cut] for name, column in columns.items()}
    columns |= {"frame": draws.frame[:, 0], "h": h, "w": w, "top": top, "left": left}
    columns |= {"shape": h / w, "place": (left + w / 2) / draws.frame[:, 1]}
    return result | {f"cut {name}": column[cut] for name, column in columns.items()}


@pytest.mark.parametrize("config", [yolos_s, yolos_ti])
@pytest.mark.parametrize(
    "count", [10_000, pytest.param(100_000, marks=pytest.mark.slow)], ids=["1e4", "1e5"]
)
def test_drawn_as_the_reference_draws(config, count):
    recipe = Recipe.from_config(config.get_config(), 16)
    generator = random.Random(0)
    simulated = [simulate(recipe, PICTURES[i % len(PICTURES)], generator) for i in range(count)]
    ours = plan_columns(recipe, count, seed=0)
    for name, column in ours.items():
        theirs = [example[name] for example in simulated if name in example]
        if name in ("flip", "crop"):
            assert stats.binomtest(int(column.sum()), count, 0.5).pvalue > 0.01, name
        else:
            # Equal but for float32, values must tie: rounded to a step that no value lies between.
            step = 97.3 if name.endswith("area") else 1e-3
            result = stats.ks_2samp(np.rint(column / step), np.rint(np.array(theirs) / step))
            assert result.pvalue > 0.01, (name, result)


def test_a_wrong_rule_is_noticed():
    """The comparison above can fail: a crop whose largest side is excluded, or that never cuts."""
    recipe = Recipe.from_config(yolos_s.get_config(), 16)
    generator = random.Random(0)
    theirs = [simulate(recipe, PICTURES[i % len(PICTURES)], generator) for i in range(4000)]
    theirs = [example["cut h"] for example in theirs if example["crop"]]
    wrong = plan_columns(recipe._replace(crop_range=(384, 560)), 4000, seed=0)
    assert stats.ks_2samp(wrong["cut h"], theirs).pvalue < 1e-3


def test_every_integer_of_a_range_is_drawn_and_none_beyond():
    recipe = Recipe(0.5, (32, 48), 96, 1.0, (40,), (38, 40), 8)
    draws = augment.draw(index_of([(64, 64)] * 3000), recipe, seed=2, epoch=1)
    pairs = {tuple(rect) for rect in draws.rect[:, [0, 2]].tolist()}
    assert pairs == {(0, 38), (1, 38), (2, 38), (0, 39), (1, 39), (0, 40)}
    assert set(draws.size.ravel().tolist()) == {32, 48}


def test_streams_and_epochs_are_different_numbers():
    first = augment.uniforms(0, 0, augment.AUGMENTATION, 1000, 3)
    assert first.shape == (1000, 3) and first.min() >= 0 and first.max() < 1
    for other in [(1, 0, 0), (0, 1, 0), (0, 0, augment.ORDER), (0, 0, augment.STEPS)]:
        correlation = np.corrcoef(first.ravel(), augment.uniforms(*other, 1000, 3).ravel())
        assert abs(correlation[0, 1]) < 0.06


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("flip", 1.5, "augment.flip is 1.5"),
        ("scales", (), r"augment.scales is \(\)"),
        ("scales", (8, 64), "at least a patch, 16 pixels"),
        ("crop_resize", (4,), "augment.crop_resize"),
        ("crop_range", (600, 384), r"augment.crop_range is \(600, 384\)"),
    ],
)
def test_senseless_recipes_are_refused(key, value, message):
    config = yolos_s.get_config()
    config.augment.update({key: value})
    with pytest.raises(ValueError, match=message):
        Recipe.from_config(config, 16)
