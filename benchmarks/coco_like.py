"""A dataset's columns without its pictures, with the sizes and counts that COCO has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from yolos_jax.data.problems import Problems
from yolos_jax.labels import LabelMap

if TYPE_CHECKING:
    from yolos_jax.data.index import Index

# The most frequent sizes of COCO's training pictures and about how many of a hundred have them
# (height, width); the rest is one side of 640 and any other.
FREQUENT = {
    (480, 640): 27,
    (640, 480): 12,
    (427, 640): 13,
    (640, 427): 5,
    (426, 640): 8,
    (640, 426): 3,
    (375, 500): 6,
    (500, 375): 3,
    (333, 500): 2,
    (500, 333): 1,
    (612, 612): 2,
    (640, 640): 2,
    (360, 640): 2,
    (428, 640): 2,
    (640, 428): 1,
    (478, 640): 1,
}
MOST_BOXES = 93  # of one picture of COCO's training set


def coco_like(images: int, boxes: int, seed: int = 0) -> Index:
    """An Index of so many images with so many boxes, drawn at random."""
    # Here: whoever asks for sizes only may lack what reads datasets.
    from yolos_jax.data.index import Index

    random = np.random.default_rng(seed)
    size = draw_sizes(random, images)
    counts = np.minimum(random.gamma(0.8, boxes / images / 0.8, images), MOST_BOXES).astype(int)
    # Rounding and the cap took some away: they go to pictures that have fewest.
    np.add.at(counts, np.argsort(counts)[: max(boxes - counts.sum(), 0)], 1)
    for _ in range(boxes - counts.sum()):
        counts[random.integers(images)] += 1
    offsets = np.concatenate([[0], np.cumsum(counts)])
    total = int(offsets[-1])
    height, width = np.repeat(size, counts, axis=0).T
    wide, high = (1 + (side - 1) * random.beta(1, 3, total) for side in (width, height))
    left, top = random.random(total) * (width - wide), random.random(total) * (height - high)
    return Index(
        root="/data/coco",
        images_dir="train2017",
        annotations="a dataset like COCO",
        label_map=LabelMap.coco91(),
        image_ids=np.arange(1, images + 1),
        file_names=np.char.add(np.arange(images).astype("S12"), b".jpg"),
        heights=size[:, 0].astype(np.int32),
        widths=size[:, 1].astype(np.int32),
        orientation=np.ones(images, np.uint8),
        box_offsets=offsets,
        boxes_xyxy_px=np.stack([left, top, left + wide, top + high], axis=1).astype(np.float32),
        labels=random.integers(1, 91, total).astype(np.int32),
        records=np.arange(images),
        dropped=Problems("a dataset like COCO"),
    )


def draw_sizes(random: np.random.Generator, images: int) -> np.ndarray:
    """Heights and widths, int64 [I, 2]."""
    share = np.array([*FREQUENT.values(), 100 - sum(FREQUENT.values())]) / 100
    kind = random.choice(len(share), size=images, p=share)
    shorter = np.clip(640 * np.exp(-np.abs(random.normal(0, 0.35, images))), 80, 640)
    rare = np.stack([shorter.astype(np.int64), np.full(images, 640)], axis=1)
    portrait = random.random(images) < 0.3
    rare[portrait] = rare[portrait, ::-1]
    return np.concatenate([np.array(list(FREQUENT)), [[0, 0]]])[kind] + np.where(
        (kind == len(FREQUENT))[:, None], rare, 0
    )
