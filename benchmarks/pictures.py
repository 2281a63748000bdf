"""Pictures and objects for benchmarks, without a dataset and without Pillow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from yolos_jax.batch import Batch, Bucket, Targets

MOST_BOXES = 96  # M of COCO: at most 93 boxes, rounded up to a multiple of 8
DISTINCT = 4  # of a sample
BOXES = 7.3  # of a picture on average, as COCO's 860 k boxes on 118 k pictures


def photograph(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A picture with the spectrum of photographs (amplitude falls as 1 / frequency).

    Returns:
      uint8 [height, width, 3].
    """
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf  # no mean: it is set below
    planes = []
    for strength in (45.0, 10.0, 10.0):  # brightness varies more than colour does
        noise = np.fft.rfft2(random.normal(size=(height, width))) / frequency
        plane = np.fft.irfft2(noise, s=(height, width))
        planes.append(plane * (strength / plane.std()))
    light, blue, red = planes
    pixels = np.stack([light + red, light - 0.3 * (blue + red), light + blue], axis=-1)
    return np.clip(pixels + 118, 0, 255).astype(np.uint8)


def sample(
    images: int, height: int, width: int, num_classes: int, seed: int = 0
) -> tuple[list[np.ndarray], Targets]:
    """Pictures and their objects, the same for both sides; only a few of the pictures differ."""
    random = np.random.default_rng(seed)
    distinct = [photograph(random, height, width) for _ in range(min(images, DISTINCT))]
    return [distinct[i % DISTINCT] for i in range(images)], targets(random, images, num_classes)


def box_counts(random: np.random.Generator, images: int) -> np.ndarray:
    """How many boxes each picture has, as COCO's training pictures: int [images]."""
    return np.minimum(random.gamma(0.8, BOXES / 0.8, images), MOST_BOXES).astype(int)


def targets(random: np.random.Generator, images: int, num_classes: int) -> Targets:
    """Ground truth with COCO-like counts, M = MOST_BOXES."""
    valid = np.arange(MOST_BOXES) < box_counts(random, images)[:, None]
    centre = random.uniform(0.2, 0.8, (*valid.shape, 2))
    size = random.uniform(0.02, 0.4, (*valid.shape, 2))
    boxes = np.concatenate([centre, size], axis=-1)
    return Targets(
        labels=np.where(valid, random.integers(1, num_classes, valid.shape), 0).astype(np.int32),
        boxes_cxcywh=np.where(valid[..., None], boxes, 0).astype(np.float32),
        target_valid=valid,
    )


def as_sequences(images: Sequence[np.ndarray], patch_size: int, bucket: Bucket) -> Batch:
    """Pictures uint8 [h, w, 3], sides multiples of the patch, as our models take them."""
    batch = Batch(
        patches=np.zeros((len(images), bucket.patches, 3 * patch_size**2), np.uint8),
        grid=np.ones((len(images), 2), np.int32),
        image_valid=np.ones(len(images), bool),
    )
    for i, image in enumerate(images):
        rows, cols = image.shape[0] // patch_size, image.shape[1] // patch_size
        cut = image.reshape(rows, patch_size, cols, patch_size, 3).transpose(0, 2, 1, 3, 4)
        batch.patches[i, : rows * cols] = cut.reshape(rows * cols, -1)
        batch.grid[i] = rows, cols
    return batch


def as_canvas(
    images: Sequence[np.ndarray], mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
    """The same pictures as PyTorch's models take them: normalised, padded to the largest sides.

    Returns:
      float32 [B, 3, height, width]; zeros to the right of and below each picture.
    """
    height, width = np.max([image.shape[:2] for image in images], axis=0)
    canvas = np.zeros((len(images), 3, height, width), np.float32)
    for i, image in enumerate(images):
        pixels = (image.astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)
        canvas[i, :, : image.shape[0], : image.shape[1]] = pixels.transpose(2, 0, 1)
    return canvas


def as_labels(ground_truth: Targets) -> list[dict[str, np.ndarray]]:
    """Targets as PyTorch's models take them: a dictionary per picture, no padding."""
    return [
        {"class_labels": labels[valid].astype(np.int64), "boxes": boxes[valid]}
        for labels, boxes, valid in zip(*ground_truth, strict=True)
    ]
