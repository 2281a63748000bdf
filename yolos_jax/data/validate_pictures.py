"""What is wrong with a dataset's pictures: every file is read whole, decoded and compared."""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from etils import epath
from tqdm import tqdm

from yolos_jax.data import clean, files, image, shards
from yolos_jax.data.index import picture_path
from yolos_jax.data.problems import Problems


class Picture(NamedTuple):
    """What a picture's file turned out to be."""

    header: image.Header | None  # None when the file cannot be read or decoded
    digest: bytes  # of the file's bytes; empty without a file
    message: str = ""


def check_pictures(
    folder: str,
    packed: shards.Shards | None,
    images: clean.Images,
    exif: str,
    problems: Problems,
) -> dict[str, Picture]:
    """Decodes every picture and compares it with its entry; sizes in ``images`` become as seen."""
    names = [entry["file_name"] for entry in images.entries]
    numbers = {} if packed is None else packed.numbers()

    def open_picture(name: str) -> Picture:
        path = picture_path(folder, "", name)
        if packed is None:
            return _open(path, lambda: files.read_picture(path))
        return _open(path, lambda: _record(packed, numbers.get(name), path))

    pictures: dict[str, Picture] = {}
    by_digest: dict[bytes, str] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        opened = pool.map(open_picture, names)
        opened = tqdm(opened, total=len(names), unit="picture", disable=None)
        for row, (name, picture) in enumerate(zip(names, opened, strict=True)):
            entry = images.entries[row]
            if name in pictures:
                problems.add("same file", entry, None, f"file_name {name}", "one image per file")
            elif picture.digest and by_digest.setdefault(picture.digest, name) != name:
                value = f"the same bytes as {by_digest[picture.digest]}"
                problems.add("same picture", entry, None, value, "different pictures")
            pictures[name] = picture
            if picture.header is None:
                problems.add("picture", entry, None, picture.message, "a picture that decodes")
                continue
            stated = int(images.heights[row]), int(images.widths[row])
            seen = _check_header(entry, picture.header, stated, exif, problems)
            images.heights[row], images.widths[row] = seen
    return pictures


def _record(packed: shards.Shards, number: int | None, path: str) -> bytes:
    """A picture's file out of a packed folder. Raises ValueError."""
    if number is None:
        raise ValueError(f"{path}: is not in the shards")
    (content,) = packed.read([number])
    if isinstance(content, ValueError):
        raise content
    return content


def _open(path: str, read: Callable[[], bytes]) -> Picture:
    """Reads and decodes a whole picture, which is what finds truncated ones."""
    try:
        source = read()
    except ValueError as error:
        return Picture(None, b"", str(error))
    digest = hashlib.blake2b(source, digest_size=16).digest()
    try:
        header = image.read_header(source, path)
        pixels = image.decode(source, name=path)
    except ValueError as error:
        return Picture(None, digest, str(error))
    return Picture(header._replace(height=pixels.shape[0], width=pixels.shape[1]), digest)


def _check_header(
    entry: Any, header: image.Header, stated: tuple[int, int], exif: str, problems: Problems
) -> tuple[int, int]:
    """Compares sizes; returns (height, width) that boxes are in, as ``load_coco`` takes them."""
    stored, turned = (header.height, header.width), header.turned_size
    if header.mode != "RGB":
        problems.add("mode", entry, None, f"mode {header.mode}")
    if header.orientation > 1:
        value = f"EXIF orientation {header.orientation}, stored {_wh(stored)}, stated {_wh(stated)}"
        kind = "orientation" if exif == "ignore" else "turned"
        problems.add(kind, entry, None, value, "boxes drawn on the stored pixels")
    if stated == stored or (exif == "apply" and stated == turned):
        return stored if exif == "ignore" else turned
    hint = " (width and height swapped)" if stated == stored[::-1] else ""
    expected = "the picture's own width and height"
    if stated == turned:
        hint, expected = " (turned by its EXIF tag)", f"{expected}, or data.exif='apply'"
    value = f"stated {_wh(stated)}, the picture is {_wh(stored)}{hint}"
    problems.add("size", entry, None, value, expected)
    return stated


def check_unlisted(folder: str, pictures: Collection[str], problems: Problems) -> None:
    """Files beside the pictures that no entry names; other folders are none of the dataset's."""
    names = {posixpath.normpath(name) for name in pictures}
    for place in sorted({posixpath.dirname(name) for name in names}):
        path = epath.Path(folder) / place
        found = path.iterdir() if path.is_dir() else ()
        for name in sorted(posixpath.join(place, e.name) for e in found if e.is_file()):
            if name not in names:
                problems.add("unlisted", None, None, name)


def _wh(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"
