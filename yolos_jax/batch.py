"""What flows between the stages: every field's dtype, shape and unit, in this one place.

Dimensions, used in every docstring of this package:

    A  prediction layers (1 for YOLOS, one per decoder layer for DETR)
    B  images of a batch          Q  detection tokens (object queries)
    N  patches of a sequence      M  targets of an image, padded
    P  values of a patch, patch_size * patch_size * 3
    K  classes; slot K is no-object
    D  width of a token           H  attention heads          L  blocks

Of a canvas H and W are height and width in pixels; of its features h and w, in cells.
Sizes are always (height, width). Booleans named ``*_valid`` are True for what is real.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = Any  # numpy.ndarray on the host, jax.Array on the device.


class Batch(NamedTuple):
    """Images as sequences of patches.

    The valid patches of an image are the first ``rows * columns`` ones, row-major; the rest is
    padding whose values never reach an output.
    """

    patches: Array  # uint8 (raw) or float32 (normalised) [B, N, P]; P is y, x, channel.
    grid: Array  # int32 [B, 2]: rows and columns of patches; (1, 1) where the image is not valid.
    image_valid: Array  # bool [B]: False for padding rows and pictures that could not be read.

    def put(self, row: int, cells: np.ndarray, grid: Sequence[int]) -> None:
        """Writes an image, uint8 [rows * columns, P], into a batch of numpy arrays."""
        self.patches[row, : len(cells)] = cells
        self.grid[row], self.image_valid[row] = grid, True

    def normalised(self, mean: Sequence[float], std: Sequence[float]) -> Batch:
        """What a model takes: ``normalise`` the patches."""
        return self._replace(patches=normalise(self.patches, mean, std))


class Canvas(NamedTuple):
    """Images in the upper left corners of canvases of one shape, as convolutions look at them.

    What lies outside of an image's size may hold anything: models put zeros there, which
    convolutions see, after normalising.
    """

    pixels: Array  # uint8 (raw) or float32 (normalised) [B, H, W, 3].
    size: Array  # int32 [B, 2]: height and width of the image, pixels; (1, 1) where not valid.
    image_valid: Array  # bool [B]: False for padding rows and pictures that could not be read.

    def put(self, row: int, cells: np.ndarray, grid: Sequence[int]) -> None:
        """Writes an image, uint8 [height * width, 3], into a batch of numpy arrays."""
        height, width = grid
        self.pixels[row, :height, :width] = cells.reshape(height, width, 3)
        self.size[row], self.image_valid[row] = grid, True

    def normalised(self, mean: Sequence[float], std: Sequence[float]) -> Canvas:
        """What a model takes: ``normalise`` the pixels."""
        return self._replace(pixels=normalise(self.pixels, mean, std))


class Bucket(NamedTuple):
    """A static shape of batches: what one compiled program is made for."""

    patches: int  # N: patches of a sequence, padding included.
    rows: int  # no image of this bucket has more rows of patches ...
    cols: int  # ... or more columns.

    @property
    def unit(self) -> str:
        """What the first number counts."""
        return "patches"

    def empty(self, images: int, patch_size: int, zeros: Callable[..., Array] = np.zeros) -> Batch:
        """A raw batch of this shape without any image; ``zeros`` makes its arrays."""
        return Batch(
            patches=zeros((images, self.patches, 3 * patch_size**2), np.uint8),
            grid=zeros((images, 2), np.int32) + 1,
            image_valid=zeros((images,), bool),
        )


class CanvasBucket(Bucket):
    """A static shape of canvases, whose patches are pixels: ``rows`` high and ``cols`` wide."""

    __slots__ = ()

    @property
    def unit(self) -> str:
        """What the first number counts."""
        return "pixels"

    def empty(self, images: int, patch_size: int, zeros: Callable[..., Array] = np.zeros) -> Canvas:
        """A raw batch of this shape without any image; ``zeros`` makes its arrays."""
        del patch_size  # it is 1
        return Canvas(
            pixels=zeros((images, self.rows, self.cols, 3), np.uint8),
            size=zeros((images, 2), np.int32) + 1,
            image_valid=zeros((images,), bool),
        )


class Targets(NamedTuple):
    """Ground truth of a batch. Padding has label 0, a box of zeros and target_valid False."""

    labels: Array  # int32 [B, M]: slots of the label map.
    boxes_cxcywh: Array  # float32 [B, M, 4]: relative to the image, 0..1.
    target_valid: Array  # bool [B, M].


class HostBatch(NamedTuple):
    """What the input pipeline yields: this host's rows of one step, as numpy arrays."""

    batch: Batch | Canvas
    targets: Targets
    image_ids: Array  # int64 [B]: the dataset's image ids; -1 for padding rows.
    original_size: Array  # int32 [B, 2]: height and width of the picture in pixels.
    bucket: Bucket
    unreadable: tuple[str, ...] = ()  # one message per row that could not be read.


class Outputs(NamedTuple):
    """What a detector predicts, per prediction layer; the last layer is the answer."""

    pred_logits: Array  # float32 [A, B, Q, K + 1].
    pred_boxes: Array  # float32 [A, B, Q, 4]: cxcywh relative to the image, 0..1.


class Detections(NamedTuple):
    """Post-processed predictions, every query kept, in query order."""

    scores: Array  # float32 [B, Q]: probability of the best class, no-object excluded.
    labels: Array  # int32 [B, Q]: slots of the label map.
    boxes_xyxy_px: Array  # float32 [B, Q, 4]: in pixels of the original picture, not clipped.


def normalise(patches: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """Turns raw patches into what a model takes: ``(x / 255 - mean) / std`` per channel.

    Called inside the compiled step, where XLA fuses it into what reads the pictures first, so
    that they travel to the device as bytes.

    Args:
      patches: uint8 [..., P], P = y, x, channel, row-major; a canvas's pixels are patches of one
        pixel each.
      mean: three numbers in 0..1, red, green, blue.
      std: likewise.

    Returns:
      float32 [..., P].
    """
    repeats = patches.shape[-1] // 3
    mean_row = np.tile(np.asarray(mean, np.float32), repeats)
    std_row = np.tile(np.asarray(std, np.float32), repeats)
    return (patches.astype(np.float32) / np.float32(255) - mean_row) / std_row
