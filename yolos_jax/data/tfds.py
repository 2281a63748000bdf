"""A split that TFDS prepared (``coco/2017`` and what has its features), read by index.

TFDS numbers classes 0..79 and stores areas as integers, so the annotation file stays the authority:
it gives category ids (by name, never by arithmetic), the order of the pictures, and all that
evaluation scores against. Pictures, their sizes and the boxes to train on are TFDS's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from yolos_jax.data import files, image
from yolos_jax.data.coco import read_coco
from yolos_jax.data.index import Source
from yolos_jax.labels import checked_categories

RECORDS_AT_ONCE = 256  # while the index is built


class TfdsPictures:
    """The pictures of a split by number, as they were encoded; a ``files.Store``."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        self._source = _source(builder, split)
        self._place = f"{builder.data_path} ({split})"

    def read(self, records: Sequence[int]) -> list[bytes | ValueError]:
        """The files of pictures."""
        wanted = [int(record) for record in records]
        try:
            return [bytes(example["image"]) for example in self._source.__getitems__(wanted)]
        except Exception:  # RuntimeError for a damaged record; who knows what for a disk
            return [self._read_one(record) for record in wanted]

    def _read_one(self, record: int) -> bytes | ValueError:
        try:
            return bytes(self._source[record]["image"])
        except Exception as error:
            return ValueError(f"{self._place}: record {record}: {files.reason(error)}")


def open_builder(name: str, data_dir: str, split: str) -> tfds.core.DatasetBuilder:
    """Opens a prepared dataset; nothing is ever downloaded.

    Args:
      name: TFDS's, 'coco/2017' for example.
      data_dir: the folder that it was prepared in; '' for TFDS's default.
      split: 'train', for example.

    Raises:
      ValueError: no such dataset or split there, or one that cannot be read by index.
    """
    place = f"data.tfds_name={name!r} in {data_dir or 'the default folder of TFDS'}"
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
        if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
            # It may have been prepared in both formats.
            with contextlib.suppress(ValueError):
                builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
        splits, file_format = builder.info.splits, builder.info.file_format
    except Exception as error:
        raise ValueError(f"{place}: {files.reason(error)}") from error
    if not splits or file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        found = f"prepared as {file_format.value}" if splits else "not prepared"
        raise ValueError(
            f"{place}: {found}, expected array_record, which is read by index: "
            f"`tfds build {name} --file_format=array_record`"
        )
    if split not in splits:
        raise ValueError(f"{place}: no split {split!r}; its splits: {', '.join(sorted(splits))}")
    if files.is_remote(builder.data_path):
        raise ValueError(
            f"{place}: array_record reads local files only; mount the bucket (gcsfuse) or copy it"
        )
    missing = [path for path in shard_paths(builder, split) if files.state(path) is None]
    if missing:
        raise ValueError(f"{place}: {len(missing)} shards are missing: {', '.join(missing[:3])}")
    return builder


def shard_paths(builder: tfds.core.DatasetBuilder, split: str) -> list[str]:
    """The files of a split."""
    return [os.fspath(path) for path in builder.info.splits[split].filepaths]


def open_tfds(
    builder: tfds.core.DatasetBuilder, split: str, annotations: str
) -> tuple[Source, dict[str, Any], dict[str, Any]]:
    """Reads a split once, headers of its pictures included, without decoding any.

    Args:
      builder: of ``open_builder``.
      split: of it.
      annotations: path of the COCO file that the split was made from.

    Returns:
      Where the pictures are; the split as a COCO file's object, for ``index.from_coco``; and the
      annotation file, for ``truth.ground_truth``.

    Raises:
      ValueError: not a COCO file, features or classes that are not those of the annotations, or
        other pictures.
    """
    coco = read_coco(annotations)
    place = f"{builder.data_path} ({split})"
    try:
        ids = checked_categories(coco["categories"])
    except ValueError as error:
        raise ValueError(f"{annotations}: {error}") from None
    category_of = _categories(builder, place, {name: i for i, name in ids.items()}, annotations)
    stated = {
        entry["id"]: entry
        for entry in coco["images"]
        if isinstance(entry, Mapping) and "id" in entry
    }
    numbers, found, boxes = _scan(builder, split, category_of, stated, place)
    missing = [number for number in stated if number not in found]
    if missing:
        raise ValueError(
            f"{place}: {len(missing)} of the {len(stated)} pictures of {annotations} are not there "
            f"(ids {', '.join(map(str, missing[:5]))}): the annotations are of other data"
        )
    images = [
        found.get(e["id"], e) if isinstance(e, Mapping) and "id" in e else e for e in coco["images"]
    ]
    store = TfdsPictures(builder, split)
    source = Source(os.fspath(builder.data_path), split, annotations, store, numbers)
    return source, dict(coco, images=images, annotations=boxes), coco


def _categories(
    builder: tfds.core.DatasetBuilder, place: str, ids: Mapping[str, int], annotations: str
) -> list[int]:
    """The category id of every class of TFDS, by name."""
    try:
        names = builder.info.features["objects"].feature["label"].names
        builder.info.features["image/id"], builder.info.features["image/filename"]
    except (KeyError, AttributeError):
        raise ValueError(
            f"{place}: its features are {', '.join(builder.info.features)}; expected those of "
            "coco/2017: image, image/filename, image/id and objects with bbox, label and is_crowd"
        ) from None
    unknown = [name for name in names if name not in ids]
    if unknown:
        raise ValueError(
            f"{place}: classes {', '.join(map(repr, unknown[:5]))} are not among the categories of "
            f"{annotations}: {', '.join(map(repr, list(ids)[:12]))}"
        )
    return [ids[name] for name in names]


def _scan(
    builder: tfds.core.DatasetBuilder,
    split: str,
    category_of: Sequence[int],
    stated: Mapping[int, Mapping[str, Any]],
    place: str,
) -> tuple[dict[str, int], dict[int, dict], list[dict]]:
    """Record numbers by file name, image entries by id, and annotations, record by record."""
    examples = _source(builder, split)
    numbers: dict[str, int] = {}
    found: dict[int, dict] = {}
    boxes: list[dict] = []
    bar = tqdm(total=len(examples), desc=f"index of {place}", unit="picture", disable=None)
    with bar:
        for start in range(0, len(examples), RECORDS_AT_ONCE):
            records = range(start, min(start + RECORDS_AT_ONCE, len(examples)))
            for record, example in zip(records, _read(examples, records, place), strict=True):
                image_id, name = int(example["image/id"]), example["image/filename"].decode()
                if image_id not in stated:
                    raise ValueError(
                        f"{place}: picture {name} has id {image_id}, which the annotations do not "
                        "list: they are of other data"
                    )
                entry = dict(stated[image_id], file_name=name)
                height, width = _size(bytes(example["image"]), entry)
                numbers[name] = record
                found[image_id] = entry | {"height": height, "width": width}
                boxes += _annotations(example["objects"], found[image_id], category_of)
            bar.update(len(records))
    return numbers, found, boxes


def _source(builder: tfds.core.DatasetBuilder, split: str) -> Any:
    """The examples of a split by number, pictures left encoded."""
    return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})


def _read(examples: Any, records: range, place: str) -> list[dict]:
    try:
        return examples.__getitems__(list(records))
    except Exception as error:
        raise ValueError(
            f"{place}: records {records.start} to {records.stop - 1}: {files.reason(error)}"
        ) from error


def _size(content: bytes, stated: Mapping[str, Any]) -> tuple[Any, Any]:
    """(height, width) of a picture from its header; as stated when it has none that makes sense."""
    try:
        header = image.read_header(content)
    except ValueError:
        return stated.get("height"), stated.get("width")
    return header.height, header.width


def _annotations(
    objects: Mapping[str, Sequence], entry: Mapping[str, Any], category_of: Sequence[int]
) -> list[dict[str, Any]]:
    """A picture's boxes as COCO states them: x, y, width, height in pixels.

    None where nothing says how large it is: ``clean`` names such a picture and leaves it out.
    """
    image_id, height, width = entry["id"], entry["height"], entry["width"]
    if not all(isinstance(side, int | float) for side in (height, width)):
        return []
    relative = np.asarray(objects["bbox"], np.float64).reshape(-1, 4)
    y0, x0, y1, x1 = (relative * [height, width, height, width]).T
    bbox = np.stack([x0, y0, x1 - x0, y1 - y0], axis=1).tolist()
    numbers = [int(n) for n in objects["id"]] if "id" in objects else [None] * len(bbox)
    # TFDS writes -1 for a class that it was not told.
    categories = [category_of[label] if label >= 0 else None for label in objects["label"]]
    return [
        {"id": n, "image_id": image_id, "category_id": c, "bbox": b, "iscrowd": int(d)}
        for n, c, b, d in zip(numbers, categories, bbox, objects["is_crowd"], strict=True)
    ]
