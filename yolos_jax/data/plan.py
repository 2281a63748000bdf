"""An epoch before its pixels: order, augmentation, boxes and buckets of every step, as columns.

COCO-format annotations state every picture's size, so all that is random about an epoch can be
decided before one is read. A plan is a pure function of index, recipe, buckets, seed and epoch:
every host computes the same one and takes its rows of each step, and to resume a run is to compute
the plan again and start at the step.

Order of training: rows are permuted, and the tail that fills no batch is dropped, as the
reference does; rows of one bucket are put together, in random order; and the steps are shuffled.
Only where one bucket's rows end and the next one's begin does a step hold rows of both.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from yolos_jax.batch import Bucket
from yolos_jax.data import augment
from yolos_jax.data.augment import Draws, EvalRecipe, Recipe
from yolos_jax.data.buckets import (
    choose_buckets,
    neighbours,
    smallest_bucket,
    smallest_for_all,
)

if TYPE_CHECKING:  # Planning needs none of the libraries that read datasets.
    from yolos_jax.data.index import Index

__all__ = [
    "EvalRecipe",
    "Plan",
    "Recipe",
    "choose_buckets",
    "join",
    "make_eval_plan",
    "make_plan",
]

TARGETS_MULTIPLE = 8  # of M, so that few sets differ in it


@dataclasses.dataclass(frozen=True)
class Plan:
    """S steps of B rows. A row that pads the last step is -1 and has the grid (1, 1)."""

    rows: np.ndarray  # int64 [S, B]: row of the index
    flip: np.ndarray  # bool [S, B]: mirrored left to right, after the crop
    crop: np.ndarray  # float64 [S, B, 4]: top, left, height, width in pixels of the original;
    # exactly (0, 0, its height, its width) where the whole picture is used.
    size: np.ndarray  # int32 [S, B, 2]: final height and width, pixels
    grid: np.ndarray  # int32 [S, B, 2]: rows and columns of patches; of pixels on canvases
    bucket: np.ndarray  # int32 [S]: number of the step's bucket
    buckets: tuple[Bucket, ...]
    box_offsets: np.ndarray  # int64 [S * B + 1]: where the boxes of each row start and end
    boxes_cxcywh: np.ndarray  # float32 [T, 4]: relative to the final picture
    labels: np.ndarray  # int32 [T]: slots of the label map
    patch_size: int  # pixels; 1 on canvases
    max_boxes: int  # M: the most boxes that a picture of the dataset has, rounded up

    @property
    def steps(self) -> int:
        """S."""
        return self.rows.shape[0]

    @property
    def batch_size(self) -> int:
        """B, over all hosts."""
        return self.rows.shape[1]

    def waste(self, num_prefix: int = 0) -> float:
        """Share of what the device computes that is padding, 0..1.

        Of the patches; of all tokens where ``num_prefix``, 1 + Q, of them come before the patches.
        """
        lengths = np.array([bucket.patches for bucket in self.buckets])[self.bucket]
        real = self.grid[self.rows >= 0].prod(axis=-1, dtype=np.int64)
        computed = self.batch_size * (lengths + num_prefix).sum()
        return 1 - (real + num_prefix).sum() / computed

    def describe(self) -> str:
        """A table of the buckets: their bounds, share of the steps, and padding."""
        unit = self.buckets[0].unit
        lines = [f"{unit:>7}  rows  cols  steps  padding"]
        for number, bucket in enumerate(self.buckets):
            steps = self.bucket == number
            real = self.grid[steps][self.rows[steps] >= 0].prod(axis=-1, dtype=np.int64).sum()
            computed = max(int(steps.sum()) * self.batch_size * bucket.patches, 1)
            lines.append(
                f"{bucket.patches:7d} {bucket.rows:5d} {bucket.cols:5d} {steps.mean():6.1%} "
                + (f"{1 - real / computed:8.1%}" if steps.any() else "        -")
            )
        lines.append(
            f"{self.steps} steps of {self.batch_size} pictures, {self.waste():.1%} of the {unit} "
            f"are padding, {len(np.unique(self.bucket))} of {len(self.buckets)} buckets in use"
        )
        return "\n".join(lines)

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that differ when anything in the plan does."""
        digest = hashlib.sha256(
            repr((self.buckets, self.patch_size, self.max_boxes, self.rows.shape)).encode()
        )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                digest.update(np.ascontiguousarray(value))
        return digest.hexdigest()[:16]


def make_plan(
    index: Index,
    recipe: Recipe,
    buckets: tuple[Bucket, ...],
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    grouped: bool = True,
    microbatches: int = 1,
) -> Plan:
    """Plans an epoch of training.

    Args:
      index: the dataset, I images.
      recipe: of resizing and augmentation.
      buckets: what ``choose_buckets`` returned for this index and recipe.
      seed: not negative; of order and augmentation.
      epoch: counted from 0; every epoch is drawn anew.
      batch_size: B, images of a step over all hosts.
      grouped: whether pictures of one bucket share a step; otherwise steps are formed at random,
        and each has the bucket that its largest picture needs.
      microbatches: parts that a step is divided into; must divide the batch size.

    Returns:
      A plan of I // B steps.

    Raises:
      ValueError: when the batch is larger than the dataset or is not divisible into microbatches,
        or a number is out of range.
    """
    if batch_size > len(index):
        raise ValueError(
            f"batch_size is {batch_size}, but {index.annotations} has only {len(index)} pictures"
        )
    if batch_size < 1 or microbatches < 1 or batch_size % microbatches:
        raise ValueError(
            f"batch_size {batch_size} and microbatches {microbatches} must be at least 1, and "
            "batch_size divisible by microbatches"
        )
    draws = augment.draw(index, recipe, seed, epoch)
    grid = draws.size // recipe.multiple
    of_epoch, of_step = augment.uniforms(seed, epoch, augment.ORDER, len(index), 2).T
    rows = np.argsort(of_epoch)[: len(index) // batch_size * batch_size]
    if grouped:
        # Where two buckets share a step they are neighbours in this order: most alike.
        place = neighbours(buckets)[smallest_bucket(grid, buckets)]
        rows = rows[np.argsort(place[rows], kind="stable")]
    rows = rows.reshape(-1, batch_size)
    # In such a step, too, no host and no microbatch gets all the large pictures.
    rows = np.take_along_axis(rows, np.argsort(of_step[rows], axis=1), axis=1)
    shuffled = np.argsort(augment.uniforms(seed, epoch, augment.STEPS, len(rows), 1)[:, 0])
    return _columns(index, draws, rows[shuffled], buckets, recipe.multiple)


def make_eval_plan(
    index: Index, recipe: EvalRecipe, buckets: tuple[Bucket, ...], *, batch_size: int
) -> Plan:
    """Plans an evaluation: every image exactly once, by length; the last step is padded.

    Args and errors are those of ``make_plan``; a batch larger than the dataset is padded too.
    """
    if batch_size < 1 or not len(index):
        raise ValueError(
            f"batch_size is {batch_size} and {index.annotations} has {len(index)} pictures; "
            "expected at least one of each"
        )
    draws = augment.draw_eval(index, recipe)
    grid = draws.size // recipe.multiple
    place = neighbours(buckets)[smallest_bucket(grid, buckets)]
    order = np.lexsort([grid.prod(axis=1, dtype=np.int64), place])
    rows = np.full(-(-len(index) // batch_size) * batch_size, -1, np.int64)
    rows[: len(order)] = order
    rows = rows.reshape(-1, batch_size)
    return _columns(index, draws, rows, buckets, recipe.multiple)


def join(plans: Sequence[Plan]) -> Plan:
    """Makes one plan of several of the same dataset and buckets: their steps, one after the other.

    Of epochs of few steps: reading begins anew with every plan, which costs half a second.
    """
    first, *others = plans
    offsets = first.box_offsets
    for plan in others:
        offsets = np.concatenate([offsets, offsets[-1] + plan.box_offsets[1:]])
    shared = ("buckets", "patch_size", "max_boxes", "box_offsets")
    columns = {
        field.name: np.concatenate([getattr(plan, field.name) for plan in plans])
        for field in dataclasses.fields(Plan)
        if field.name not in shared
    }
    return dataclasses.replace(first, box_offsets=offsets, **columns)


def _columns(
    index: Index,
    draws: Draws,
    rows: np.ndarray,
    buckets: tuple[Bucket, ...],
    multiple: int,
) -> Plan:
    """Gathers what the rows [S, B] need."""
    real = rows >= 0
    offsets, boxes, labels = augment.surviving_boxes(index, draws, rows.ravel())
    size = np.where(real[..., None], draws.size[rows], np.int32(multiple))
    grid = size // np.int32(multiple)
    crop = _original_rectangles(index, draws)[rows]
    return Plan(
        rows=rows,
        flip=draws.flip[rows] & real,
        crop=np.where(real[..., None], crop, 0.0),
        size=size,
        grid=grid,
        bucket=smallest_for_all(grid, buckets),
        buckets=buckets,
        box_offsets=offsets,
        boxes_cxcywh=boxes,
        labels=labels,
        patch_size=multiple,
        max_boxes=max(-(-index.max_boxes // TARGETS_MULTIPLE), 1) * TARGETS_MULTIPLE,
    )


def _original_rectangles(index: Index, draws: Draws) -> np.ndarray:
    """The crops float64 [I, 4] as fractional rectangles of the original pictures, not flipped.

    What is not cropped is exactly (0, 0, height, width): products of integers are exact.
    """
    top, left, height, width = draws.rect.astype(np.float64).T
    left = np.where(draws.flip, draws.frame[:, 1] - left - width, left)
    frame_height, frame_width = draws.frame.T
    down, across = np.stack([top, height]), np.stack([left, width])
    top, height = down * index.heights / frame_height
    left, width = across * index.widths / frame_width
    return np.stack([top, left, height, width], axis=1)
