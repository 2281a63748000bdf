"""A dataset as columns: files, sizes, boxes. Read from a COCO file without opening a picture.

A hundred thousand images take some twenty megabytes, where the JSON's objects take gigabytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from etils import epath

from yolos_jax.data import clean, image
from yolos_jax.data.coco import read_coco
from yolos_jax.data.problems import Problems
from yolos_jax.labels import LabelMap, checked_categories

__all__ = ["Index", "ground_truth", "load_coco", "picture_path", "read_coco"]

HEADER_THREADS = 32  # headers are read over networks, where waiting is most of it


@dataclass(frozen=True)
class Index:
    """I images in the annotation file's order, and their T boxes, crowds left out."""

    root: str  # folder or gs:// path
    images_dir: str  # folder of the pictures, relative to root
    annotations: str  # path of the COCO file
    label_map: LabelMap
    image_ids: np.ndarray  # int64 [I]
    file_names: np.ndarray  # bytes, UTF-8 [I]; may hold folders
    heights: np.ndarray  # int32 [I], pixels as they will be seen: turned when exif='apply'
    widths: np.ndarray  # int32 [I]
    orientation: np.ndarray  # uint8 [I], EXIF's 1..8; 1 where nothing is to be turned
    box_offsets: np.ndarray  # int64 [I + 1]: boxes of image i are box_offsets[i]:box_offsets[i + 1]
    boxes_xyxy_px: np.ndarray  # float32 [T, 4], inside the picture, every one with an area
    labels: np.ndarray  # int32 [T], slots of label_map
    dropped: Problems  # what was cleaned: counts and first offenders; print it

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def max_boxes(self) -> int:
        """Most boxes of an image; 0 without any."""
        return int(np.diff(self.box_offsets).max(initial=0))

    def path(self, row: int) -> str:
        """Path of the picture of a row."""
        return picture_path(self.root, self.images_dir, self.file_names[row].decode())

    def select(self, rows: np.ndarray) -> Index:
        """The images of ``rows`` (int [R], in that order) with their boxes."""
        counts = np.diff(self.box_offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        boxes = np.arange(offsets[-1]) + np.repeat(self.box_offsets[rows] - offsets[:-1], counts)
        per_image = ("image_ids", "file_names", "heights", "widths", "orientation")
        return replace(
            self,
            **{name: getattr(self, name)[rows] for name in per_image},
            box_offsets=offsets,
            boxes_xyxy_px=self.boxes_xyxy_px[boxes],
            labels=self.labels[boxes],
        )

    def subset(self, n: int) -> Index:
        """The first n images, or all when there are fewer or n is 0."""
        return self.select(np.arange(min(n, len(self)))) if n else self

    def describe(self) -> str:
        """One line for people."""
        empty = int((np.diff(self.box_offsets) == 0).sum())
        return (
            f"{self.annotations}: {len(self)} images ({empty} without boxes), "
            f"{len(self.labels)} boxes, at most {self.max_boxes} in one image"
        )


def load_coco(
    root: str | os.PathLike,
    annotations: str,
    images_dir: str,
    *,
    labels: str = "dataset",
    on_error: str = "raise",
    keep_empty: bool = True,
    exif: str = "ignore",
) -> Index:
    """Reads a COCO annotation file into an Index.

    Boxes are clipped and filtered as datasets/coco.py of hustvl/YOLOS does. What differs: nothing
    needs ``area`` or ``segmentation``; categories and images that are not listed are errors; two
    annotations with one id stay two boxes, where the reference sees the last one twice.

    Args:
      root: folder or gs:// path that the next two are relative to.
      annotations: the JSON file.
      images_dir: the folder of the pictures.
      labels: 'dataset' or 'coco91', see ``LabelMap.build``.
      on_error: entries that make no sense: 'raise', or 'skip' to leave them out and count them.
      keep_empty: whether images without a box stay.
      exif: 'ignore' (the reference's choice: pixels as stored), or 'apply' to turn pictures as
        their EXIF tag says; boxes and sizes are then those of the turned picture, and the header
        of every picture is read. One that cannot be read is left to the pipeline, which names it.

    Raises:
      ValueError: no such file or folder, not a COCO file, labels that make no sense, no image left,
        and with on_error='raise' any error entry. One message with file, ids and values.
    """
    _check_choice("data.on_error", on_error, ("raise", "skip"))
    _check_choice("data.exif", exif, ("ignore", "apply"))
    path, coco = _open(root, annotations, images_dir)
    try:
        label_map = LabelMap.build(labels, coco["categories"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    images = clean.clean_images(coco["images"], problems := Problems(path))
    orientation = np.ones(len(images.ids), np.uint8)
    if exif == "apply":
        images, orientation = _turned(images, os.fspath(root), images_dir)
    found = clean.clean_annotations(
        coco["annotations"],
        images,
        label_map,
        set(checked_categories(coco["categories"])),
        problems,
    )
    if problems.errors and on_error == "raise":
        raise ValueError(
            f"{problems.errors} entries make no sense; repair the file, or leave them out with "
            f"data.on_error='skip'\n{problems.describe(('error',))}"
        )
    index = _columns(os.fspath(root), images_dir, path, label_map, images, found, problems)
    index = replace(index, orientation=orientation)
    if not keep_empty:
        index = index.select(np.flatnonzero(np.diff(index.box_offsets)))
    if not len(index):
        raise ValueError(f"{path}: no image is left of {len(coco['images'])}\n{problems}")
    return index


def _check_choice(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{key} is {value!r}, expected one of {known}")


def _open(root: str | os.PathLike, annotations: str, images_dir: str) -> tuple[str, dict]:
    """Path and content of the annotation file, once both folders are known to exist."""
    if not epath.Path(root).is_dir():
        raise ValueError(f"data.root: no such folder: {os.fspath(root)!r}")
    path = os.fspath(epath.Path(root) / annotations)
    coco = read_coco(path)
    if not (epath.Path(root) / images_dir).is_dir():
        raise ValueError(f"no such folder of pictures: {picture_path(root, images_dir, '')!r}")
    return path, coco


def _columns(root, images_dir, path, label_map, images, found, problems) -> Index:
    """Images and annotations as an Index: boxes grouped by image, crowds out."""
    boxes = np.flatnonzero(~found.crowd)
    boxes = boxes[np.argsort(found.rows[boxes], kind="stable")]
    counts = np.bincount(found.rows[boxes], minlength=len(images.ids))
    return Index(
        root=root,
        images_dir=images_dir,
        annotations=path,
        label_map=label_map,
        image_ids=images.ids,
        file_names=np.array([e["file_name"].encode() for e in images.entries], np.bytes_),
        heights=images.heights,
        widths=images.widths,
        orientation=np.ones(len(images.ids), np.uint8),
        box_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes_xyxy_px=found.boxes_xyxy_px[boxes],
        labels=found.labels[boxes],
        dropped=problems,
    )


def _turned(images: clean.Images, root: str, images_dir: str) -> tuple[clean.Images, np.ndarray]:
    """Sizes as seen after EXIF, and orientations uint8 [I], from the pictures' headers.

    Exporters state the size before or after turning; both are taken for what they are. Any other
    stated size stays, and the pipeline names the picture when it decodes to something else.
    """

    def seen(row: int) -> tuple[int, int, int]:
        stated = int(images.heights[row]), int(images.widths[row])
        try:
            header = image.read_header(
                picture_path(root, images_dir, images.entries[row]["file_name"])
            )
        except ValueError:
            return *stated, 1
        turned = header.turned_size
        known = stated in (turned, (header.height, header.width))
        return *(turned if known else stated), header.orientation

    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        columns = np.array(list(pool.map(seen, range(len(images.ids))))).reshape(-1, 3)
    heights, widths, orientation = columns.T
    images = images._replace(heights=heights.astype(np.int32), widths=widths.astype(np.int32))
    return images, orientation.astype(np.uint8)


def picture_path(root: str | os.PathLike, images_dir: str, file_name: str) -> str:
    """Where a picture is; gs:// paths stay what they are."""
    return os.fspath(epath.Path(root) / images_dir / file_name)


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
