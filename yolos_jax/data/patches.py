"""A picture as the sequence of its square patches, and back."""

from __future__ import annotations

import numpy as np


def patchify(image: np.ndarray, patch_size: int) -> np.ndarray:
    """Cuts a picture into square patches, row by row.

    Args:
      image: [height, width, 3]; pixels beyond the last whole patch are left out, as a convolution
        with that stride leaves them.
      patch_size: pixels.

    Returns:
      [rows * columns, P] of the same dtype, P = y, x, channel.
    """
    rows, cols = image.shape[0] // patch_size, image.shape[1] // patch_size
    whole = image[: rows * patch_size, : cols * patch_size]
    patches = whole.reshape(rows, patch_size, cols, patch_size, 3).transpose(0, 2, 1, 3, 4)
    return patches.reshape(rows * cols, patch_size * patch_size * 3)


def unpatchify(patches: np.ndarray, grid: tuple[int, int], patch_size: int) -> np.ndarray:
    """Puts patches back together.

    Args:
      patches: [N, P], N at least rows * columns; padding behind them is left out.
      grid: rows and columns.
      patch_size: pixels.

    Returns:
      [rows * patch_size, columns * patch_size, 3] of the same dtype.
    """
    rows, cols = (int(side) for side in grid)
    image = patches[: rows * cols].reshape(rows, cols, patch_size, patch_size, 3)
    return image.transpose(0, 2, 1, 3, 4).reshape(rows * patch_size, cols * patch_size, 3)
