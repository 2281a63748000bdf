"""A dataset as columns: pictures, sizes, boxes. Read from a COCO file without opening a picture.

A hundred thousand images take some twenty megabytes, where the JSON's objects take gigabytes.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from yolos_jax.data import clean, files, image, shards
from yolos_jax.data.coco import read_coco
from yolos_jax.data.problems import Problems
from yolos_jax.labels import LabelMap, checked_categories

PLAIN_NAME = re.compile(r"[^./][^/]*(/[^./][^/]*)*")  # that needs no tidying to be part of a path
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
    records: np.ndarray  # int64 [I]: numbers of the pictures in the store, if there is one
    dropped: Problems  # what was cleaned: counts and first offenders; print it
    store: files.Store | None = None  # holds the pictures; None: each is a file of its own

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def max_boxes(self) -> int:
        """Most boxes of an image; 0 without any."""
        return int(np.diff(self.box_offsets).max(initial=0))

    def path(self, row: int) -> str:
        """Path of the picture of a row; with a store, what the picture is called."""
        return picture_path(self.root, self.images_dir, self.file_names[row].decode())

    def paths(self, rows: np.ndarray) -> list[str]:
        """``path`` of many rows: of a whole epoch, say."""
        folder = picture_path(self.root, self.images_dir, "")
        names = (name.decode() for name in self.file_names[rows].tolist())
        return [
            f"{folder}/{name}" if PLAIN_NAME.fullmatch(name) else picture_path(folder, "", name)
            for name in names
        ]

    def read(self, row: int) -> bytes:
        """The file of a row's picture. Raises ValueError naming it where it cannot be read."""
        if self.store is None:
            return files.read_picture(self.path(row))
        (content,) = self.store.read([self.records[row]])
        if isinstance(content, ValueError):
            raise content
        return content

    def select(self, rows: np.ndarray) -> Index:
        """The images of ``rows`` (int [R], in that order) with their boxes."""
        counts = np.diff(self.box_offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        boxes = np.arange(offsets[-1]) + np.repeat(self.box_offsets[rows] - offsets[:-1], counts)
        per_image = ("image_ids", "file_names", "heights", "widths", "orientation", "records")
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


class Source(NamedTuple):
    """Where a split comes from."""

    root: str  # folder or gs:// path
    images_dir: str  # folder of the pictures, relative to root
    annotations: str  # path of the COCO file
    store: files.Store | None  # holds the pictures; None: each is a file of its own
    numbers: Mapping[str, int] | None  # with a store: numbers in it by file name

    def place(self) -> str:
        """The folder of the pictures."""
        return picture_path(self.root, self.images_dir, "")


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
      images_dir: the folder of the pictures, loose or packed by ``data.records``.
      labels: 'dataset' or 'coco91', see ``LabelMap.build``.
      on_error: entries that make no sense: 'raise', or 'skip' to leave them out and count them.
      keep_empty: whether images without a box stay.
      exif: 'ignore' (the reference's choice: pixels as stored), or 'apply' to turn pictures as
        their EXIF tag says; boxes and sizes are then those of the turned picture, and the header
        of every picture is read. One that cannot be read is left to the pipeline, which names it.

    Raises:
      ValueError: no such file or folder, not a COCO file, labels that make no sense, no image left,
        damaged shards or shards of other annotations, and with on_error='raise' any error entry.
        One message with file, ids and values.
    """
    _check_choice("data.on_error", on_error, ("raise", "skip"))
    _check_choice("data.exif", exif, ("ignore", "apply"))
    options = {"labels": labels, "on_error": on_error, "keep_empty": keep_empty, "exif": exif}
    return from_coco(*open_coco(root, annotations, images_dir), **options)


def open_coco(
    root: str | os.PathLike, annotations: str, images_dir: str
) -> tuple[Source, dict[str, Any]]:
    """Where a split's pictures are, and its annotation file. Raises as ``load_coco`` does."""
    if not files.is_folder(root):
        raise ValueError(f"data.root: no such folder: {os.fspath(root)!r}")
    path, folder = picture_path(root, "", annotations), picture_path(root, images_dir, "")
    packed = shards.find(folder)
    if packed is not None and files.state(path) is not None:
        digest = hashlib.sha256(files.read_bytes(path)).hexdigest()
        if digest != packed.annotations_sha256:
            raise ValueError(
                f"{folder}: packed from other annotations (sha256 {packed.annotations_sha256[:12]}"
                f"...) than {path} ({digest[:12]}...); run yolos_jax.data.records again, it keeps "
                "the shards whose pictures are the same"
            )
    coco = read_coco(path)
    if packed is None and not files.is_folder(folder):
        raise ValueError(f"no such folder of pictures: {folder!r}")
    numbers = None if packed is None else packed.numbers()
    return Source(os.fspath(root), images_dir, path, packed, numbers), coco


def from_coco(
    source: Source,
    coco: Mapping[str, Any],
    *,
    labels: str,
    on_error: str,
    keep_empty: bool,
    exif: str,
) -> Index:
    """``load_coco`` of a file that was read; arguments and errors are those."""
    path = source.annotations
    try:
        label_map = LabelMap.build(labels, coco["categories"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    images = clean.clean_images(coco["images"], problems := Problems(path))
    records = _records(source, [entry["file_name"] for entry in images.entries])
    orientation = np.ones(len(images.ids), np.uint8)
    if exif == "apply":
        images, orientation = _turned(images, source, records)
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
    index = _columns(source, label_map, images, found, problems)
    index = replace(index, records=records, orientation=orientation)
    if not keep_empty:
        index = index.select(np.flatnonzero(np.diff(index.box_offsets)))
    if not len(index):
        raise ValueError(f"{path}: no image is left of {len(coco['images'])}\n{problems}")
    return index


def _check_choice(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{key} is {value!r}, expected one of {known}")


def _records(source: Source, file_names: Sequence[str]) -> np.ndarray:
    """Numbers of the pictures in the store, int64 [I]."""
    if source.numbers is None:
        return np.arange(len(file_names))
    missing = [name for name in file_names if name not in source.numbers]
    if missing:
        raise ValueError(
            f"{source.place()}: {len(missing)} of the {len(file_names)} pictures of "
            f"{source.annotations} are not there ({', '.join(missing[:3])}): it was made of other "
            "annotations"
        )
    return np.array([source.numbers[name] for name in file_names], np.int64)


def _columns(source, label_map, images, found, problems) -> Index:
    """Images and annotations as an Index: boxes grouped by image, crowds out."""
    boxes = np.flatnonzero(~found.crowd)
    boxes = boxes[np.argsort(found.rows[boxes], kind="stable")]
    counts = np.bincount(found.rows[boxes], minlength=len(images.ids))
    return Index(
        root=source.root,
        images_dir=source.images_dir,
        annotations=source.annotations,
        label_map=label_map,
        image_ids=images.ids,
        file_names=np.array([e["file_name"].encode() for e in images.entries], np.bytes_),
        heights=images.heights,
        widths=images.widths,
        orientation=np.ones(len(images.ids), np.uint8),
        box_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes_xyxy_px=found.boxes_xyxy_px[boxes],
        labels=found.labels[boxes],
        records=np.arange(len(images.ids)),
        dropped=problems,
        store=source.store,
    )


def _turned(
    images: clean.Images, source: Source, records: np.ndarray
) -> tuple[clean.Images, np.ndarray]:
    """Sizes as seen after EXIF, and orientations uint8 [I], from the pictures' headers.

    Exporters state the size before or after turning; both are taken for what they are. Any other
    stated size stays, and the pipeline names the picture when it decodes to something else.
    """

    def seen(row: int) -> tuple[int, int, int]:
        stated = int(images.heights[row]), int(images.widths[row])
        path = picture_path(source.root, source.images_dir, images.entries[row]["file_name"])
        content = path if source.store is None else source.store.read([records[row]])[0]
        if isinstance(content, ValueError):
            return *stated, 1
        try:
            header = image.read_header(content, path)
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
