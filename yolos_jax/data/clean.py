"""What a COCO file says, checked entry by entry and turned into columns."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from yolos_jax.data import sizes
from yolos_jax.data.problems import Problems
from yolos_jax.labels import LabelMap

OUTSIDE_TOLERANCE = 1.0  # pixels; what exporters' rounding does to boxes at a border is no problem


class Images(NamedTuple):
    """The images that are kept, as columns, in the file's order."""

    entries: list[Mapping[str, Any]]  # [I], of the file
    ids: np.ndarray  # int64 [I]
    heights: np.ndarray  # int32 [I], as stated
    widths: np.ndarray  # int32 [I]
    left_out: set  # ids of images that are not kept


class Annotations(NamedTuple):
    """The annotations that are kept, crowds too, as columns, in the file's order."""

    positions: np.ndarray  # int64 [T], in the file's list
    rows: np.ndarray  # int64 [T], in Images
    labels: np.ndarray  # int32 [T], slots
    boxes_xyxy_px: np.ndarray  # float32 [T, 4], clipped to the picture
    crowd: np.ndarray  # bool [T]


def clean_images(images: list, problems: Problems) -> Images:
    """Checks the ``images`` of a COCO file; what cannot be used goes to ``problems``."""
    usable: dict[int, Mapping[str, Any]] = {}
    left_out: set = set()
    for entry in images:
        wrong = _image_fault(entry)
        number = entry.get("id") if isinstance(entry, Mapping) else None
        if wrong:
            problems.add("image entry", entry, None, *wrong)
            if isinstance(number, _SCALARS):
                left_out.add(number)
        elif number in usable:
            other = usable[number]
            if [other[key] for key in _IMAGE_KEYS] == [entry[key] for key in _IMAGE_KEYS]:
                done = "the same entry a second time"
            else:
                # Nothing says which of the two an annotation is of.
                done = f"also the id of {other['file_name']}, {other['width']}x{other['height']}"
                left_out.add(number)
            problems.add("image id twice", entry, None, done, "ids that differ")
        else:
            usable[int(number)] = entry
    entries = [entry for number, entry in usable.items() if number not in left_out]
    return Images(
        entries,
        np.array([entry["id"] for entry in entries], np.int64),
        np.array([entry["height"] for entry in entries], np.int32),
        np.array([entry["width"] for entry in entries], np.int32),
        left_out,
    )


def clean_annotations(
    annotations: list, images: Images, label_map: LabelMap, known_ids: set, problems: Problems
) -> Annotations:
    """Checks the ``annotations`` of a COCO file; what cannot be used goes to ``problems``.

    Args:
      annotations: of the file.
      images: what was kept of the file's images, with sizes as the pixels will be seen.
      label_map: slots.
      known_ids: the category ids that the file lists (a map may hold more).
      problems: filled.

    Returns:
      The annotations kept, boxes clipped as datasets/coco.py of hustvl/YOLOS does (in float32).
    """
    rows_by_id = {int(number): row for row, number in enumerate(images.ids)}
    slots_by_id = {i: s for s, i in enumerate(label_map.category_ids) if i in known_ids}
    expected_category = _one_of(sorted(slots_by_id))
    seen: dict[Any, int] = {}
    positions, rows, labels, boxes = array("q"), array("q"), array("i"), array("d")
    crowd = bytearray()
    for position, entry in enumerate(annotations):
        wrong = _annotation_fault(entry)
        if wrong:
            problems.add("annotation entry", *_whose(entry, images, rows_by_id), *wrong)
            continue
        image_id, category_id, number = entry["image_id"], entry["category_id"], entry.get("id")
        row, slot = rows_by_id.get(image_id), slots_by_id.get(category_id)
        if row is None:
            kind = "left out with image" if image_id in images.left_out else "unknown image"
            problems.add(kind, None, number, f"image_id {image_id!r}", "the id of a listed image")
            continue
        if slot is None:
            value = f"category_id {category_id!r}"
            problems.add("unknown category", images.entries[row], number, value, expected_category)
            continue
        if number is not None:
            first = annotations[seen.setdefault(number, position)]
            if first is not entry:
                value = f"also the id of an annotation of image {first['image_id']}"
                entries = images.entries[row]
                problems.add("annotation id twice", entries, number, value, "ids that differ")
                if all(first[key] == entry[key] for key in ("image_id", "category_id", "bbox")):
                    continue
        positions.append(position)
        rows.append(row)
        labels.append(slot)
        boxes.extend(entry["bbox"])
        crowd.append(entry.get("iscrowd") == 1)
    found = Annotations(
        np.array(positions, np.int64),
        np.array(rows, np.int64),
        np.array(labels, np.int32),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(crowd, bool),
    )
    return _clip(found, annotations, images, problems)


def _clip(found: Annotations, annotations: list, images: Images, problems: Problems) -> Annotations:
    """Turns COCO's x, y, width, height into clipped corners and drops boxes of no area."""
    xywh = found.boxes_xyxy_px
    xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    clipped = sizes.clip_boxes(xyxy, images.heights[found.rows], images.widths[found.rows])
    keep = sizes.has_area(clipped)
    # A clipped box is smaller by what it reached out; NaN cannot occur, entries were checked.
    outside = keep & (np.abs(clipped - xyxy).max(axis=1, initial=0) > OUTSIDE_TOLERANCE)
    for kind, which in (("no area", ~keep), ("outside", outside)):
        for t in np.flatnonzero(which):
            entry, row = annotations[found.positions[t]], found.rows[t]
            size = f"a box inside {images.widths[row]}x{images.heights[row]}"
            value = f"bbox {entry['bbox']}"
            problems.add(kind, images.entries[row], entry.get("id"), value, size)
    for t in np.flatnonzero(found.crowd & keep):
        entry = annotations[found.positions[t]]
        problems.add("crowd", images.entries[found.rows[t]], entry.get("id"), "iscrowd 1")
    with_box = np.zeros(len(images.ids), bool)
    with_box[found.rows[keep & ~found.crowd]] = True
    for row in np.flatnonzero(~with_box):
        problems.add("empty image", images.entries[row], None, "no box to learn from")
    return Annotations(*(column[keep] for column in found._replace(boxes_xyxy_px=clipped)))


_IMAGE_KEYS = ("file_name", "height", "width")
_INT64 = 2**63
_SCALARS = (int, float, str)


def _image_fault(entry: Any) -> tuple[str, str] | None:
    """What is wrong with an image entry: (value, expected), or None."""
    if not isinstance(entry, Mapping):
        return f"{entry!r}", "an object with id, file_name, height and width"
    if not is_integer(entry.get("id")):
        return f"id is {entry.get('id')!r}", "an integer"
    name = entry.get("file_name")
    if not isinstance(name, str) or not name.strip() or "\0" in name or not _is_text(name):
        return f"file_name is {name!r}", "a text"
    for key in ("height", "width"):
        value = entry.get(key)
        if not is_integer(value) or not 0 < value < 2**31:
            return f"{key} is {value!r}", "a whole number of pixels above 0"
    return None


def _annotation_fault(entry: Any) -> tuple[str, str] | None:
    """What is wrong with an annotation by itself: (value, expected), or None."""
    if not isinstance(entry, Mapping):
        return f"{entry!r}", "an object with image_id, category_id and bbox"
    for key in ("image_id", "category_id"):
        if not isinstance(entry.get(key), _SCALARS):
            return f"{key} is {entry.get(key)!r}", "an integer"
    number = entry.get("id")
    if number is not None and not isinstance(number, _SCALARS):
        return f"id is {number!r}", "an integer"
    box = entry.get("bbox")
    expected = "bbox as four finite numbers x, y, width, height"
    if not isinstance(box, list) or len(box) != 4:
        return f"bbox is {box!r}", expected
    for value in box:
        # Beyond float32's range there is no picture either.
        if type(value) not in (int, float) or not abs(value) < 1e30:
            return f"bbox is {box!r}", expected
    if entry.get("iscrowd") not in (None, 0, 1):
        return f"iscrowd is {entry['iscrowd']!r}", "0 or 1"
    return None


def is_integer(value: Any) -> bool:
    """Whether a JSON value is an integer of 64 bits; 3.0 is, as it is for pycocotools."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value % 1 == 0 and -_INT64 <= value < _INT64


def _is_text(name: str) -> bool:
    """False for halves of surrogate pairs, which JSON can spell and no file can be called."""
    return name.isascii() or name.encode(errors="ignore").decode() == name


def _whose(entry: Any, images: Images, rows_by_id: dict[int, int]) -> tuple[Any, Any]:
    """The image (entry or id) and the id of an annotation that may be anything."""
    if not isinstance(entry, Mapping):
        return None, None
    image_id = entry.get("image_id")
    row = rows_by_id.get(image_id) if isinstance(image_id, int | float) else None
    return (image_id if row is None else images.entries[row]), entry.get("id")


def _one_of(ids: list[int]) -> str:
    shown = ", ".join(str(i) for i in ids[:12])
    return f"one of {shown}" + (f", ... {ids[-1]}" if len(ids) > 12 else "")
