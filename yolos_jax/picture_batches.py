"""Pictures of any size as what models take, in few static shapes: sequences, or canvases.

What ``Detector`` does with pictures that nobody has planned; training and evaluation follow a plan.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from yolos_jax.batch import Batch, Bucket, Canvas, CanvasBucket
from yolos_jax.data import image as image_lib

Array = np.ndarray

_SIDE = 8  # patches: bounds of position tables are rounded up to it, for few compiled programs
_STRIDE = 32  # pixels of a canvas that the deepest features have one cell for


class Sequences(NamedTuple):
    """Pictures as sequences of patches, padded to few lengths."""

    model: Any
    multiple: int  # of a sequence's tokens

    def bucket(self, grid: tuple[int, int]) -> Bucket:
        """Static shape for a picture of so many rows and columns of patches."""
        prefix = 1 + self.model.config.num_queries
        length = _round_up(prefix + grid[0] * grid[1], self.multiple)
        return Bucket(length - prefix, _round_up(grid[0], _SIDE), _round_up(grid[1], _SIDE))

    def whole(self, pixels: Array) -> tuple[Batch, tuple[int, int]]:
        """Normalised pixels [B, H, W, 3], all of them picture, and the bounds of their grid."""
        unit = self.model.unit
        grid = pixels.shape[1] // unit, pixels.shape[2] // unit
        patches = np.stack([image_lib.patchify(image, unit) for image in pixels])
        grids = np.tile(np.asarray(grid, np.int32), (len(pixels), 1))
        return Batch(patches.astype(np.float32), grids, np.ones(len(pixels), bool)), grid


class Canvases(NamedTuple):
    """Pictures in the corners of canvases whose sides are multiples of the backbone's stride.

    Features have as many cells as those of the picture alone: none is masked, so that only
    convolutions at the last rows and columns see what is padded.
    """

    model: Any
    multiple: int  # of sequences

    def bucket(self, size: tuple[int, int]) -> CanvasBucket:
        """Static shape for a picture of this height and width in pixels."""
        height, width = (_round_up(side, _STRIDE) for side in size)
        return CanvasBucket(height * width, height, width)

    def whole(self, pixels: Array) -> tuple[Canvas, tuple[int, int]]:
        """Normalised pixels [B, H, W, 3], all of them picture, and their height and width."""
        size = pixels.shape[1:3]
        sizes = np.tile(np.asarray(size, np.int32), (len(pixels), 1))
        return Canvas(pixels.astype(np.float32), sizes, np.ones(len(pixels), bool)), size


def arrangement(model: Any, multiple: int) -> Sequences | Canvases:
    """How a model of ``models/build.py`` takes pictures.

    Args:
      model: says with ``takes`` what its batches are.
      multiple: of a sequence's tokens, for few compiled programs.
    """
    return {Batch: Sequences, Canvas: Canvases}[model.takes](model, multiple)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
