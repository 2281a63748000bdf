"""Reads COCO annotation files."""

from __future__ import annotations

import json
import os
from typing import Any

from yolos_jax.data import files


def read_coco(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a COCO detection file; masks are left behind, they are nine tenths of its memory.

    Returns:
      The file's object: lists ``images``, ``annotations``, ``categories`` and whatever else it has.
      Of ``segmentation`` only empty ones are still there.

    Raises:
      ValueError: no such file, not JSON (truncated, say), or not a COCO detection file.
    """
    name = os.fspath(path)
    try:
        raw = files.read_bytes(path)
    except OSError as error:
        reason = files.reason(error)
        raise ValueError(f"{name}: cannot read these annotations: {reason}") from None
    size = len(raw)
    try:
        # Text in any Unicode encoding, with or without a byte order mark.
        text = raw.decode(json.detect_encoding(raw))
        del raw  # half a gigabyte for COCO
        coco = json.loads(text, object_hook=_without_mask)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{name}: not JSON, or truncated ({size} bytes, expected a COCO file): {error}"
        ) from None
    _check_structure(coco, name)
    return coco


def _without_mask(entry: dict[str, Any]) -> dict[str, Any]:
    if entry.get("segmentation"):
        del entry["segmentation"]
    return entry


def _check_structure(coco: Any, name: str) -> None:
    if not isinstance(coco, dict):
        hint = ", as a results file does" if isinstance(coco, list) else ""
        raise ValueError(
            f"{name}: holds a {type(coco).__name__}{hint}; expected a COCO file: an object with "
            "images, annotations and categories"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(coco.get(key), list):
            given = f"{key!r} is a {type(coco[key]).__name__}" if key in coco else f"no {key!r}"
            raise ValueError(
                f"{name}: {given} (its keys: {', '.join(sorted(coco)) or 'none'}); expected a "
                "COCO detection file with lists of images, annotations and categories"
            )
    if not coco["images"]:
        raise ValueError(f"{name}: the list of images is empty, expected at least one")
