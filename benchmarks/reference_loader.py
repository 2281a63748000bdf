"""The reference's way to a batch: a PyTorch DataLoader over Pillow transforms.

After datasets/transforms.py and datasets/coco.py of facebookresearch/detr, in the sizes of
hustvl/YOLOS (rounded down to patches): flip; then resize to a random scale, or resize, crop, resize
to a random scale; then a float tensor, normalised; a batch is padded to its largest sides. What is
drawn at random is what the plan has drawn, so both sides make the same pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from yolos_jax.data.augment import Draws
from yolos_jax.data.index import Index


def transformed(path: str, flip: bool, frame: np.ndarray, rect: np.ndarray, size: np.ndarray):
    """A picture after the geometric transforms.

    Args:
      path: of the file.
      flip: left to right, before anything else.
      frame: height and width before the crop.
      rect: top, left, height, width of the crop in the frame.
      size: final height and width.

    Returns:
      A Pillow picture of mode RGB.
    """
    picture = Image.open(path).convert("RGB")
    if flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = _resized(picture, frame)
    top, left, height, width = (int(side) for side in rect)
    if (height, width) != (picture.height, picture.width):
        picture = picture.crop((left, top, left + width, top + height))
    return _resized(picture, size)


class Pictures(torch.utils.data.Dataset):
    """Normalised pictures, float32 [3, height, width], of every row of an index."""

    def __init__(self, index: Index, draws: Draws, mean: Sequence[float], std: Sequence[float]):
        self.index, self.draws = index, draws
        self.mean = torch.tensor(mean).reshape(3, 1, 1)
        self.std = torch.tensor(std).reshape(3, 1, 1)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> torch.Tensor:
        drawn = (column[row] for column in self.draws)
        picture = transformed(self.index.path(row), *drawn)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
        return (pixels.to(torch.float32).div(255) - self.mean) / self.std


def padded(images: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch [B, 3, H, W] of the largest sides, and its mask: True where padding is."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    batch = torch.zeros(len(images), 3, height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for i, image in enumerate(images):
        batch[i, :, : image.shape[1], : image.shape[2]] = image
        mask[i, : image.shape[1], : image.shape[2]] = False
    return batch, mask


def loader(
    index: Index,
    draws: Draws,
    batches: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    workers: int,
) -> torch.utils.data.DataLoader:
    """Batches in the plan's order; ``batches`` int [steps, B], rows of the index."""
    return torch.utils.data.DataLoader(
        Pictures(index, draws, mean, std),
        batch_sampler=batches.tolist(),
        num_workers=workers,
        collate_fn=padded,
    )


def _resized(picture: Image.Image, size: np.ndarray) -> Image.Image:
    height, width = int(size[0]), int(size[1])
    if (height, width) == (picture.height, picture.width):
        return picture
    return picture.resize((width, height), Image.Resampling.BILINEAR)
