"""What detections are scored against: the annotations of a split as pycocotools wants them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from yolos_jax.data import clean
from yolos_jax.data.index import Index
from yolos_jax.data.problems import Problems
from yolos_jax.labels import LabelMap


def ground_truth(coco: Mapping[str, Any], index: Index | None = None) -> dict[str, Any]:
    """A copy of a COCO file's object that pycocotools scores without stumbling.

    The same images and annotations as ``load_coco(on_error='skip')`` keeps, crowds too, boxes as
    the file states them (pycocotools does not clip). A missing area is width times height, a
    missing iscrowd 0. Annotations are numbered anew from 1: with ids that repeat, pycocotools takes
    the last annotation for all of them, and it counts a match with annotation 0 as no match.

    Args:
      coco: of ``read_coco``.
      index: of the same file. Its sizes tell which boxes have an area inside their picture; they
        differ from the stated ones with exif='apply'. By default the stated ones do.

    Returns:
      A dict with images, annotations and categories; ``coco`` is left as it is.
    """
    label_map = LabelMap.from_categories(coco["categories"])
    problems = Problems("")
    images = clean.clean_images(coco["images"], problems)
    if index is not None:
        _, ours, theirs = np.intersect1d(images.ids, index.image_ids, return_indices=True)
        images.heights[ours], images.widths[ours] = index.heights[theirs], index.widths[theirs]
    known = set(label_map.category_ids)
    found = clean.clean_annotations(coco["annotations"], images, label_map, known, problems)
    annotations = []
    for number, (position, row) in enumerate(zip(found.positions, found.rows, strict=True), 1):
        entry = coco["annotations"][position]
        x, y, width, height = entry["bbox"]
        area = entry.get("area")
        if not isinstance(area, int | float) or not 0 <= area < float("inf"):
            area = width * height
        annotations.append(
            {
                "id": number,
                "image_id": int(images.ids[row]),
                "category_id": int(entry["category_id"]),
                "bbox": [x, y, width, height],
                "area": area,
                "iscrowd": int(entry.get("iscrowd") == 1),
            }
        )
    return {
        "info": dict(coco.get("info") or {}),
        "images": [dict(entry, id=int(entry["id"])) for entry in images.entries],
        "annotations": annotations,
        "categories": [dict(entry, id=int(entry["id"])) for entry in coco["categories"]],
    }


def pack(truth: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What scoring needs of ``ground_truth``, as columns: a twentieth of its memory.

    Args:
      truth: of ``ground_truth``. Of images only id, file name and size are kept.
    """
    images, annotations = truth["images"], truth["annotations"]
    return {
        "image_id": np.array([entry["id"] for entry in images], np.int64),
        "image_name": np.array([entry["file_name"].encode() for entry in images], np.bytes_),
        "image_size": np.array([[e["height"], e["width"]] for e in images], np.int64),
        "of_image": np.array([entry["image_id"] for entry in annotations], np.int64),
        "category": np.array([entry["category_id"] for entry in annotations], np.int64),
        "bbox": np.array([entry["bbox"] for entry in annotations], np.float64).reshape(-1, 4),
        "area": np.array([entry["area"] for entry in annotations], np.float64),
        "crowd": np.array([entry["iscrowd"] for entry in annotations], np.uint8),
        "categories": np.array(json.dumps(truth["categories"])),
    }


def unpack(columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The inverse of ``pack``."""
    images = zip(
        columns["image_id"].tolist(),
        columns["image_name"].tolist(),
        columns["image_size"].tolist(),
        strict=True,
    )
    annotations = zip(
        columns["of_image"].tolist(),
        columns["category"].tolist(),
        columns["bbox"].tolist(),
        columns["area"].tolist(),
        columns["crowd"].tolist(),
        strict=True,
    )
    return {
        "info": {},
        "images": [
            {"id": number, "file_name": name.decode(), "height": height, "width": width}
            for number, name, (height, width) in images
        ],
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": bbox,
                "area": area,
                "iscrowd": crowd,
            }
            for number, (image_id, category_id, bbox, area, crowd) in enumerate(annotations, 1)
        ],
        "categories": json.loads(str(columns["categories"])),
    }
