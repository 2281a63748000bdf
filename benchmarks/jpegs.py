"""A folder of generated JPEGs in COCO's layout, for benchmarks that read from the disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import pictures

SIZES = ((480, 640), (480, 640), (640, 480))  # height and width in pixels, in turn
QUALITY = 85
CATEGORIES = ("one", "two", "three")


def write(root: str | Path, count: int, seed: int = 0) -> int:
    """Writes distinct pictures to ``root`` under the names of COCO's training split.

    Args:
      root: folder, made when missing.
      count: of pictures.
      seed: of pixels and boxes.

    Returns:
      Bytes of all pictures.
    """
    root, random = Path(root), np.random.default_rng(seed)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "train2017").mkdir(exist_ok=True)
    images, annotations, size = [], [], 0
    counts = pictures.box_counts(random, count)
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        name = f"{number + 1:012d}.jpg"
        path = root / "train2017" / name
        Image.fromarray(pictures.photograph(random, height, width)).save(path, quality=QUALITY)
        size += path.stat().st_size
        images.append({"id": number + 1, "file_name": name, "height": height, "width": width})
        for _ in range(counts[number]):
            x, y = random.uniform(0, 0.7, 2) * (width, height)
            w, h = random.uniform(0.05, 0.3, 2) * (width, height)
            box = [float(value) for value in (x, y, w, h)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": int(random.integers(len(CATEGORIES))) + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CATEGORIES)],
    }
    (root / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    return size
