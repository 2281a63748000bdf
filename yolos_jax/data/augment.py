"""What happens to each picture in an epoch, drawn for every row of the dataset before any is read.

The training recipe is DETR's and YOLOS' (their ``datasets/transforms.py`` and ``coco.py``): flip
with probability one half; then either resize to a random scale, or resize, crop at random, and
resize to a random scale. All integers are drawn in the frames in which the reference draws them,
its rounding down to multiples of the patch size included.

Numbers come from a counter-based generator keyed by seed and epoch and are drawn per row of the
dataset: what happens to a picture depends neither on the order, nor on the batch size, nor on the
number of hosts, nor on how many pictures the dataset has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from yolos_jax.data import sizes

if TYPE_CHECKING:  # Planning needs none of the libraries that read datasets.
    from yolos_jax.data.index import Index

AUGMENTATION, ORDER, STEPS = range(3)  # streams of random numbers within an epoch
ROWS_AT_ONCE = 8192


class Recipe(NamedTuple):
    """How pictures are resized and augmented for training. Lengths are pixels."""

    flip: float  # probability
    scales: tuple[int, ...]  # shorter sides
    max_size: int  # longer side at most; 0: no limit
    crop: float  # probability of resize, crop, resize
    crop_resize: tuple[int, ...]  # shorter sides before the crop
    crop_range: tuple[int, int]  # least and largest side of the crop, both possible
    multiple: int  # sides are rounded down to multiples of it: the layout's patch size

    @classmethod
    def from_config(cls, config: Mapping[str, Any], multiple: int) -> Recipe:
        """Takes ``config.augment``, and ``patch_size`` of a layout; ValueError if senseless."""
        augment = config["augment"]
        recipe = cls(
            flip=float(augment["flip"]),
            scales=tuple(augment["scales"]),
            max_size=int(augment["max_size"]),
            crop=float(augment["crop"]),
            crop_resize=tuple(augment["crop_resize"]),
            crop_range=tuple(augment["crop_range"]),
            multiple=multiple,
        )
        recipe.check()
        return recipe

    def check(self) -> None:
        """Raises ValueError, naming the key, where the recipe makes no sense."""
        for key, probability in (("flip", self.flip), ("crop", self.crop)):
            if not 0 <= probability <= 1:
                raise ValueError(f"augment.{key} is {probability}, expected a probability, 0 to 1")
        _check_sides("augment.scales", self.scales, self.multiple)
        if self.crop > 0:
            _check_sides("augment.crop_resize", self.crop_resize, self.multiple)
            low_high = self.crop_range
            if len(low_high) != 2 or not 1 <= low_high[0] <= low_high[1]:
                raise ValueError(
                    f"augment.crop_range is {low_high}, expected (least, largest) side in pixels"
                )


class EvalRecipe(NamedTuple):
    """How pictures are resized for evaluation. Lengths are pixels."""

    size: int  # shorter side
    max_size: int  # longer side at most; 0: no limit
    multiple: int  # the layout's patch size

    @classmethod
    def from_config(cls, config: Mapping[str, Any], multiple: int) -> EvalRecipe:
        """Takes ``config.preprocess``, and ``patch_size`` of a layout; ValueError if senseless."""
        preprocess = config["preprocess"]
        recipe = cls(int(preprocess["size"]), int(preprocess["max_size"]), multiple)
        _check_sides("preprocess.size", (recipe.size,), multiple)
        return recipe


def _check_sides(key: str, sides: tuple[int, ...], multiple: int) -> None:
    if not sides or min(sides) < multiple:
        raise ValueError(
            f"{key} is {sides}, expected one or more sides of at least a patch, {multiple} pixels"
        )


class Draws(NamedTuple):
    """What happens to each of I rows: flip, resize to frame, cut out rect, resize to size.

    A row that is not cropped has its original size as frame and all of it as rect.
    """

    flip: np.ndarray  # bool [I]
    frame: np.ndarray  # int32 [I, 2]: height, width before the crop
    rect: np.ndarray  # int32 [I, 4]: top, left, height, width in the (flipped) frame
    size: np.ndarray  # int32 [I, 2]: final height, width


def uniforms(seed: int, epoch: int, stream: int, rows: int, columns: int) -> np.ndarray:
    """Returns float64 [rows, columns] in [0, 1); row i is the same whatever ``rows`` is.

    Made from raw words, which numpy promises never to change, unlike its distributions.
    """
    generator = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, stream])
    words = generator.random_raw(rows * columns).reshape(rows, columns)
    return (words >> np.uint64(11)) * 2.0**-53


def draw(index: Index, recipe: Recipe, seed: int, epoch: int) -> Draws:
    """Draws one epoch of the training recipe for every row of the dataset.

    Where the side of a frame is smaller than the least side of a crop the reference stops with
    an error; here the crop keeps the whole of that side. Neither happens in published recipes.
    """
    original = np.stack([index.heights, index.widths], axis=1).astype(np.int32)
    u = uniforms(seed, epoch, AUGMENTATION, len(index), 8)
    flip = u[:, 0] < recipe.flip
    scale = _choice(recipe.scales, u[:, 2])
    frame, rect = original.copy(), np.concatenate([np.zeros_like(original), original], axis=1)
    crop = np.flatnonzero(u[:, 1] < recipe.crop)
    if len(crop):
        v = u[crop]
        side = _choice(recipe.crop_resize, v[:, 3])
        height, width = sizes.resized_size(*original[crop].T, side, 0, recipe.multiple)
        cut_width = _crop_side(width, recipe.crop_range, v[:, 4])
        cut_height = _crop_side(height, recipe.crop_range, v[:, 5])
        top = _randint(0, height - cut_height, v[:, 6])
        left = _randint(0, width - cut_width, v[:, 7])
        frame[crop] = np.stack([height, width], axis=1)
        rect[crop] = np.stack([top, left, cut_height, cut_width], axis=1)
    size = sizes.resized_size(rect[:, 2], rect[:, 3], scale, recipe.max_size, recipe.multiple)
    size = np.stack(size, axis=1).astype(np.int32)
    return Draws(flip, frame, rect, size)


def draw_eval(index: Index, recipe: EvalRecipe) -> Draws:
    """The same columns for evaluation, where nothing is random."""
    original = np.stack([index.heights, index.widths], axis=1).astype(np.int32)
    rect = np.concatenate([np.zeros_like(original), original], axis=1)
    size = sizes.resized_size(*original.T, recipe.size, recipe.max_size, recipe.multiple)
    size = np.stack(size, axis=1).astype(np.int32)
    return Draws(np.zeros(len(index), bool), original, rect, size)


def surviving_boxes(
    index: Index, draws: Draws, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes of the given rows after flip, crop and resizes, in the reference's arithmetic.

    Args:
      index: the dataset.
      draws: of every row of it.
      rows: int64 [R], rows of the dataset; -1 has no boxes.

    Returns:
      offsets int64 [R + 1], boxes float32 [T, 4] (cxcywh relative to the picture), labels int32
      [T]: those of the i-th row lie between offsets[i] and offsets[i + 1]. Boxes of which the
      crop leaves no area are gone.
    """
    # In parts that stay in the processor's cache: twice as fast on a large dataset.
    starts = range(0, max(len(rows), 1), ROWS_AT_ONCE)
    parts = [_survivors(index, draws, rows[start : start + ROWS_AT_ONCE]) for start in starts]
    counts, boxes, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    return np.concatenate([[0], np.cumsum(counts)]), boxes, labels


def _survivors(
    index: Index, draws: Draws, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``surviving_boxes`` of some rows; counts int64 [R] instead of offsets."""
    counts = np.where(rows < 0, 0, index.box_offsets[rows + 1] - index.box_offsets[rows])
    starts = np.cumsum(counts) - counts
    box = np.arange(counts.sum()) + np.repeat(index.box_offsets[rows] - starts, counts)
    boxes = index.boxes_xyxy_px[box]
    # Columns of these rows first, then of their boxes: gathered from all rows they miss the cache.
    original = np.stack([index.heights[rows], index.widths[rows]])
    flip, size = draws.flip[rows], draws.size[rows].T
    frame, rect = draws.frame[rows].T, draws.rect[rows].T
    row = np.repeat(np.arange(len(rows)), counts)
    boxes = np.where(flip[row, None], sizes.flip_boxes(boxes, original[1, row]), boxes)
    cropped = (frame != original).any(axis=0) | (rect[2:] != original).any(axis=0)
    of_cropped = np.flatnonzero(cropped[row])
    keep = np.ones(len(row), bool)
    if len(of_cropped):
        its = row[of_cropped]
        framed = sizes.resize_boxes(boxes[of_cropped], *original[:, its], *frame[:, its])
        boxes[of_cropped], keep[of_cropped] = sizes.crop_boxes(framed, *rect[:, its])
    row, box = row[keep], box[keep]
    boxes = sizes.resize_boxes(boxes[keep], *rect[2:, row], *size[:, row])
    boxes = sizes.normalise_boxes(boxes, *size[:, row])
    return np.bincount(row, minlength=len(rows)), boxes, index.labels[box]


def _choice(options: tuple[int, ...], u: np.ndarray) -> np.ndarray:
    """One of the options for each uniform number, int64."""
    return np.asarray(options)[_randint(0, len(options) - 1, u)]


def _randint(low: int | np.ndarray, high: int | np.ndarray, u: np.ndarray) -> np.ndarray:
    """Integers between low and high, both possible, from uniform numbers: int64."""
    return low + np.floor(u * (high - low + 1)).astype(np.int64)


def _crop_side(side: np.ndarray, crop_range: tuple[int, int], u: np.ndarray) -> np.ndarray:
    """A side of the crop for each side of the frame, int64."""
    return _randint(np.minimum(crop_range[0], side), np.minimum(crop_range[1], side), u)
