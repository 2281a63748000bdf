"""Writes the demo's dataset: rectangles, ellipses and triangles on grey, in COCO layout.

    python -m yolos_jax.data.shapes runs/shapes --seed 0 --train 8000 --val 300 --size 64

Every picture has one to three shapes that hide at most a little of each other; a shape's colour
goes with its class, with jitter. The same arguments write the same files, bit by bit. The
annotations are written last, so that a folder that was left half-written is not taken for whole.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CATEGORIES = ("rectangle", "ellipse", "triangle")
COLOURS = np.array([[200, 60, 60], [60, 170, 70], [70, 90, 210]])  # of the classes, RGB
COLOUR_JITTER = 35  # grey levels, either way
MOST_SHAPES = 3
ATTEMPTS = 12  # at a place for a shape before the picture goes without it
MOST_HIDDEN = 0.15  # of the smaller of two shapes' boxes


def write(
    out: str | Path, *, seed: int = 0, train: int = 8000, val: int = 300, size: int = 64
) -> None:
    """Writes both splits below ``out`` under the names of COCO 2017.

    Args:
      out: folder, made when missing; files of the same name are overwritten.
      seed: of everything random.
      train: training pictures.
      val: validation pictures.
      size: height and width of every picture in pixels, at least 16.

    Raises:
      ValueError: when a number is too small to make sense.
    """
    if size < 16 or min(train, val, seed) < 0:
        raise ValueError(
            f"size is {size}, expected at least 16 pixels; train {train}, val {val} and seed "
            f"{seed} must not be negative"
        )
    root = Path(out)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    first_image, first_annotation = 1, 1
    for stream, (split, count) in enumerate((("train2017", train), ("val2017", val))):
        (root / split).mkdir(exist_ok=True)
        random = np.random.Generator(np.random.Philox(key=[seed, stream]))
        coco = _split(root / split, random, count, size, first_image, first_annotation)
        first_image += len(coco["images"])
        first_annotation += len(coco["annotations"])
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))


def _split(
    folder: Path,
    random: np.random.Generator,
    count: int,
    size: int,
    first_image: int,
    first_annotation: int,
) -> dict:
    """Draws and saves ``count`` pictures; returns their COCO dictionary."""
    boxes, real = _place(random, count, size)
    labels = random.integers(len(CATEGORIES), size=(count, MOST_SHAPES))
    jitter = random.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, size=(count, MOST_SHAPES, 3))
    colours = COLOURS[labels] + jitter
    greys = random.integers(110, 191, size=count)
    images, annotations = [], []
    for row in range(count):
        picture = Image.new("RGB", (size, size), (int(greys[row]),) * 3)
        draw = ImageDraw.Draw(picture)
        image_id = first_image + row
        for slot in np.flatnonzero(real[row]):
            box, label = boxes[row, slot].tolist(), int(labels[row, slot])
            _draw(draw, label, box, tuple(colours[row, slot].tolist()))
            annotations.append(
                _annotation(first_annotation + len(annotations), image_id, label, box)
            )
        name = f"{image_id:012d}.png"
        # Level 1 is as small as level 6 on flat colours, and three times as fast.
        picture.save(folder / name, compress_level=1)
        images.append({"id": image_id, "file_name": name, "height": size, "width": size})
    return {
        "info": {"description": "generated shapes"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CATEGORIES)],
    }


def _place(random: np.random.Generator, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes int64 [count, 3, 4], x0 y0 x1 y1 with inclusive ends, and which are real, bool.

    Every shape tries a few places and takes the first one where it neither hides nor is hidden
    too much; one that finds none is left out. The first always finds one.
    """
    wanted = random.integers(1, MOST_SHAPES + 1, size=count)
    boxes = np.zeros((count, MOST_SHAPES, 4), np.int64)
    real = np.zeros((count, MOST_SHAPES), bool)
    for slot in range(MOST_SHAPES):
        for _ in range(ATTEMPTS):
            sides = random.integers(size // 6, size // 2 + 1, size=(count, 2))
            corner = np.floor(random.random((count, 2)) * (size - sides + 1)).astype(np.int64)
            candidate = np.concatenate([corner, corner + sides - 1], axis=1)
            free = ~(real[:, :slot] & _hides(candidate, boxes[:, :slot])).any(axis=1)
            take = free & ~real[:, slot] & (slot < wanted)
            boxes[take, slot] = candidate[take]
            real[:, slot] |= take
    return boxes, real


def _hides(candidate: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Whether a box [count, 4] overlaps those [count, n, 4] too much: bool [count, n]."""
    both = np.minimum(candidate[:, None, 2:], boxes[..., 2:]) + 1
    both = np.clip(both - np.maximum(candidate[:, None, :2], boxes[..., :2]), 0, None).prod(-1)
    areas = (boxes[..., 2:] - boxes[..., :2] + 1).prod(-1)
    own = (candidate[:, 2:] - candidate[:, :2] + 1).prod(-1)
    return both > MOST_HIDDEN * np.minimum(areas, own[:, None])


def _draw(draw: ImageDraw.ImageDraw, label: int, box: list[int], colour: tuple) -> None:
    """Draws one shape that touches all four sides of its box (inclusive ends)."""
    x0, y0, x1, y1 = box
    if CATEGORIES[label] == "rectangle":
        draw.rectangle(box, fill=colour)
    elif CATEGORIES[label] == "ellipse":
        draw.ellipse(box, fill=colour)
    else:
        draw.polygon([(x0, y1), (x1, y1), ((x0 + x1) // 2, y0)], fill=colour)


def _annotation(annotation_id: int, image_id: int, label: int, box: list[int]) -> dict:
    x0, y0, x1, y1 = box
    width, height = x1 - x0 + 1, y1 - y0 + 1
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": label + 1,
        "bbox": [x0, y0, width, height],
        "area": width * height,
        "iscrowd": 0,
    }


def main() -> None:
    """Writes the pictures that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=8000, help="training pictures")
    parser.add_argument("--val", type=int, default=300, help="validation pictures")
    parser.add_argument("--size", type=int, default=64, help="side of a picture in pixels")
    arguments = vars(parser.parse_args())
    try:
        write(arguments.pop("out"), **arguments)
    except (ValueError, OSError, OverflowError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
