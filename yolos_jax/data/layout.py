"""How a model wants its pictures: as sequences of patches, or on canvases.

A picture is rows and columns of patches either way; those of a canvas are pixels. What differs is
which static shapes batches have, and how a single picture becomes one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from yolos_jax.batch import Array, Batch, Bucket, Canvas, CanvasBucket
from yolos_jax.data.augment import EvalRecipe, Recipe
from yolos_jax.data.buckets import choose_buckets
from yolos_jax.data.canvases import choose_canvases
from yolos_jax.data.patches import patchify

if TYPE_CHECKING:  # Planning needs none of the libraries that read datasets.
    from yolos_jax.data.index import Index

# Of single pictures, for few compiled programs:
_SIDE = 8  # patches: bounds of position tables are rounded up to it
_STRIDE = 32  # pixels of a canvas that the deepest features have one cell for


class Sequences(NamedTuple):
    """One sequence of patches per picture, some tokens before them."""

    patch_size: int  # pixels; sides of pictures are rounded down to multiples of it
    num_prefix: int  # tokens before the patches: 1 + Q

    def buckets(
        self, index: Index, recipe: Recipe | EvalRecipe, count: int, multiple: int
    ) -> tuple[Bucket, ...]:
        """Static shapes for a dataset: see ``choose_buckets``."""
        return choose_buckets(index, recipe, count, multiple, self.num_prefix)

    def bucket_of(self, grid: tuple[int, int], multiple: int) -> Bucket:
        """The static shape for a picture of rows and columns; sequences are of ``multiple``."""
        length = _round_up(self.num_prefix + grid[0] * grid[1], multiple) - self.num_prefix
        return Bucket(length, *(_round_up(side, _SIDE) for side in grid))

    def whole(self, pixels: Array) -> tuple[Batch, Bucket]:
        """Normalised pictures float32 [B, H, W, 3] as a batch that sees all of them."""
        grid = pixels.shape[1] // self.patch_size, pixels.shape[2] // self.patch_size
        patches = np.stack([patchify(image, self.patch_size) for image in pixels])
        valid = np.ones(len(pixels), bool)
        grids = np.tile(np.asarray(grid, np.int32), (len(pixels), 1))
        return Batch(patches.astype(np.float32), grids, valid), Bucket(patches.shape[1], *grid)


class Canvases(NamedTuple):
    """Pictures in the corners of canvases, in pixels."""

    patch_size: int = 1
    most: int = 0  # pixels of a side, of which more have no position; 0: any number

    def buckets(
        self, index: Index, recipe: Recipe | EvalRecipe, count: int, multiple: int
    ) -> tuple[Bucket, ...]:
        """Static shapes for a dataset: see ``choose_canvases``.

        Those of evaluation have the very sizes of pictures, not multiples: what convolutions see
        beside a picture changes what they say of it, and many pictures of a set are of one size.
        """
        multiple = multiple if isinstance(recipe, Recipe) else 1
        chosen = choose_canvases(index, recipe, count, multiple)
        return tuple(self._checked(canvas) for canvas in chosen)

    def bucket_of(self, grid: tuple[int, int], multiple: int) -> Bucket:
        """The static shape for a picture of a height and width.

        Its features have as many cells as those of the picture alone: none is masked, and only
        convolutions at the last rows and columns see what is padded.
        """
        del multiple
        height, width = (_round_up(side, _STRIDE) for side in grid)
        return self._checked(CanvasBucket(height * width, height, width))

    def whole(self, pixels: Array) -> tuple[Canvas, Bucket]:
        """Normalised pictures float32 [B, H, W, 3] as a batch that sees all of them."""
        size = np.tile(np.asarray(pixels.shape[1:3], np.int32), (len(pixels), 1))
        canvas = Canvas(pixels.astype(np.float32), size, np.ones(len(pixels), bool))
        height, width = pixels.shape[1:3]
        return canvas, self._checked(CanvasBucket(height * width, height, width))

    def _checked(self, canvas: CanvasBucket) -> CanvasBucket:
        if self.most and max(canvas.rows, canvas.cols) > self.most:
            raise ValueError(
                f"a canvas of {canvas.rows}x{canvas.cols} pixels: learned positions reach "
                f"{self.most} pixels down and across; use smaller pictures (preprocess.size and "
                "max_size, augment.scales and max_size), a smaller buckets.multiple, or "
                "model.detr.position 'sine'"
            )
        return canvas


Layout = Sequences | Canvases


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
