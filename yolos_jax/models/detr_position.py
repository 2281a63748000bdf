"""Where a cell of the features is in its image: DETR's position encodings, and which are real.

Carion et al., "End-to-End Object Detection with Transformers" (2020); facebookresearch/detr,
models/position_encoding.py.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from yolos_jax.models.repeat import repeat

Array = jax.Array

POSITIONS = ("sine", "learned")
LEARNED_SIDE = 50  # rows and columns of the learned tables
_TEMPERATURE = 10000.0
_EPSILON = 1e-6


def real_cells(size: Array, canvas: tuple[int, int], cells: tuple[int, int]) -> Array:
    """Which cells of a canvas's features look at the image, by the pixel that nearest finds.

    Args:
      size: int32 [B, 2], of the images in pixels.
      canvas: height and width in pixels.
      cells: rows and columns (h, w) that the canvas is shrunk to; (H, W) for the pixels.

    Returns:
      bool [B, h, w].
    """
    rows, cols = (
        np.arange(count) * pixels // count for count, pixels in zip(cells, canvas, strict=True)
    )
    return (rows < size[:, :1])[:, :, None] & (cols < size[:, 1:])[:, None, :]


def sine(real: Array, width: int) -> Array:
    """Sines and cosines of a cell's row and column, as fractions of its own image's.

    Args:
      real: bool [B, h, w].
      width: D, divisible by 4.

    Returns:
      float32 [B, h, w, D]: the row in the first half, the column in the second; sines at even
      places, cosines at odd ones. Cells that are not real get something finite.
    """
    half = width // 2
    periods = _TEMPERATURE ** (2 * (np.arange(half) // 2) / half)

    def encode(axis: int) -> Array:
        count = jnp.cumsum(real.astype(jnp.float32), axis=axis)
        last = jax.lax.slice_in_dim(count, count.shape[axis] - 1, None, axis=axis)
        fraction = count / (last + np.float32(_EPSILON)) * np.float32(2 * math.pi)
        angles = fraction[..., None] / periods.astype(np.float32)
        waves = jnp.stack([jnp.sin(angles[..., 0::2]), jnp.cos(angles[..., 1::2])], axis=-1)
        return waves.reshape(angles.shape)

    return jnp.concatenate([encode(1), encode(2)], axis=-1)


class LearnedPosition(nn.Module):
    """A table of rows and one of columns, the same for every image."""

    width: int

    @nn.compact
    def __call__(self, real: Array) -> Array:
        """bool [B, h, w] -> float32 [B, h, w, D]: the column first, unlike ``sine``.

        Raises:
          ValueError: there are more rows or columns than the tables have.
        """
        batch, rows, cols = real.shape
        if max(rows, cols) > LEARNED_SIDE:
            raise ValueError(
                f"features of {rows}x{cols} cells: learned positions have {LEARNED_SIDE} rows and "
                "columns; use smaller pictures or model.detr.position 'sine'."
            )
        uniform = nn.initializers.uniform(1.0)
        shape = (LEARNED_SIDE, self.width // 2)
        row = self.param("row", uniform, shape, jnp.float32)[:rows, None]
        col = self.param("col", uniform, shape, jnp.float32)[None, :cols]
        row, col = (jnp.broadcast_to(x, (rows, cols, shape[1])) for x in (row, col))
        both = jnp.concatenate([col, row], axis=-1)
        return repeat(both, batch)
