"""Writes the shards of a packed folder, one after another, so that a run can be killed anywhere.

A shard is written under another name, read back, and renamed; beside it lies the list of its
pictures until ``records.json``, written last, takes all lists in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from yolos_jax.data import files, image, shards
from yolos_jax.data.index import picture_path
from yolos_jax.data.parts import Part

TABLE = ".json"  # ends the name of a finished shard's list, until all shards are finished
PARTIAL = ".partial"
VERIFIED_AT_ONCE = 64  # records that are read back together


def refuse_others(
    target: Path, copied: Path, name: str, annotations: str, pictures: Sequence[str]
) -> None:
    """Raises ValueError where packing would take away what is not of this split.

    Args:
      target: where the shards go.
      copied: where a copy of the annotations goes.
      name: of the annotation file, relative to both roots.
      annotations: the file itself.
      pictures: file names of the split.
    """
    inside = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    others = [inner for inner in inside if inner.lower().endswith(image.SUFFIXES)]
    if others:
        raise ValueError(f"{target}: holds {others[0]}, which is no shard; choose another OUT")
    known = finished(target)
    if not known and copied.exists() and copied.read_bytes() != files.read_bytes(annotations):
        raise ValueError(f"{copied}: another file is there already; choose another OUT")
    packed = None
    with contextlib.suppress(ValueError):
        packed = shards.read_manifest(target / shards.MANIFEST).get("annotations")
    if packed is None:
        # Older lists, and those of single shards, do not say of which file they are.
        there = {picture for table in known.values() for picture, _ in table["pictures"]}
        packed = "another split" if there and there.isdisjoint(pictures) else name
    if packed != name:
        raise ValueError(
            f"{target}: holds the pictures of {packed}; pack both in one call, or choose another "
            "OUT"
        )


def finished(target: Path) -> dict[str, dict]:
    """What earlier runs finished: the list of each shard, by its file name."""
    known = {}
    with contextlib.suppress(ValueError):
        manifest = shards.read_manifest(target / shards.MANIFEST)
        known |= {table["file"]: table for table in manifest["tables"]}
    for path in target.glob(f"*{shards.SUFFIX}{TABLE}"):
        with contextlib.suppress(ValueError, OSError):
            table = json.loads(path.read_text())
            known[table["file"]] = table
    return known


def missing(target: Path, parts: Sequence[Part], on_error: str) -> list[Part]:
    """The shards that are still to be written, see ``is_whole``."""
    known = finished(target)
    return [part for part in parts if not is_whole(part, known.get(part.path.name), on_error)]


def is_whole(part: Part, table: dict | None, on_error: str) -> bool:
    """Whether a shard is there, as large as it was when it was written, and of these pictures.

    Uncompressed pictures have the same size whatever is on them, so times are compared, too. With
    on_error='raise' a shard that left some out is none.
    """
    if table is None or (on_error == "raise" and table["left_out"]):
        return False
    if not part.path.exists() or part.path.stat().st_size != table["bytes"]:
        return False
    written = table.get("written", part.written)  # which older lists do not say
    return table["pictures"] == part.pictures and written == part.written


def reopen(target: Path) -> None:
    """Takes the manifest away, so that the folder is no packed one, and leaves its shards' lists.

    A run that ends before all is finished leaves the next one what it knew.
    """
    path, tables = target / shards.MANIFEST, []
    with contextlib.suppress(ValueError):
        tables = shards.read_manifest(path)["tables"]
    for table in tables:
        _write_list(target / table["file"], table)
    path.unlink(missing_ok=True)


def bad_pictures(
    parts: Sequence[Part],
    source: str,
    pool: ThreadPoolExecutor,
    workers: int,
    progress: Callable[[int], Any],
) -> list[str]:
    """What is wrong with pictures of shards that are still to be written."""
    paths = [picture_path(source, "", name) for part in parts for name, _ in part.pictures]
    bad = []
    for _, content in _ahead(pool, _checked, paths, 4 * workers):
        progress(1)
        if isinstance(content, ValueError):
            bad.append(str(content))
    return bad


def write_shard(
    part: Part,
    source: str,
    pool: ThreadPoolExecutor,
    workers: int,
    on_error: str,
    progress: Callable[[int], Any],
) -> list[str]:
    """Writes, reads back and names one shard; returns what is wrong with its pictures.

    With on_error='raise' a shard with such a picture is not written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    partial = part.path.with_name(f"{part.path.name}.{os.getpid()}{PARTIAL}")
    checksums: list[int] = []
    left_out: list[list[str]] = []
    try:
        # One record to a group, so that one is read alone; pictures are compressed already.
        writer = ArrayRecordWriter(os.fspath(partial), "group_size:1,uncompressed")
        paths = ((name, picture_path(source, "", name)) for name, _ in part.pictures)
        for (name, _), content in _ahead(pool, lambda item: _checked(item[1]), paths, 4 * workers):
            progress(1)
            if isinstance(content, ValueError):
                left_out.append([name, str(content)])
            elif not left_out or on_error == "skip":
                checksums.append(zlib.crc32(content))
                writer.write(content)
        writer.close()
        if left_out and on_error == "raise":
            partial.unlink()
            return [what for _, what in left_out]
        _verify(partial, checksums)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        _take_in(part, partial, checksums, left_out)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, RuntimeError | OSError):
            raise ValueError(f"{partial}: cannot be written: {files.reason(error)}") from error
        raise
    return [what for _, what in left_out]


def _take_in(part: Part, partial: Path, checksums: list[int], left_out: list[list[str]]) -> None:
    """Gives a shard that is written its name and its list; the folder is no packed one then."""
    table = {
        "file": part.path.name,
        "bytes": partial.stat().st_size,
        "pictures": part.pictures,
        "written": part.written,
        "crc32": checksums,
        "left_out": left_out,
    }
    reopen(part.path.parent)
    # The list first: a shard that has its name has its list, and an earlier one has it no longer.
    part.path.unlink(missing_ok=True)
    _write_list(part.path, table)
    partial.replace(part.path)


def _write_list(shard: Path, table: dict) -> None:
    _write_whole(shard.with_name(shard.name + TABLE), json.dumps(table).encode())


def _checked(path: str) -> bytes | ValueError:
    """A picture's file, once it has been decoded."""
    try:
        content = files.read_picture(path)
        image.decode(content, name=path)
    except ValueError as error:
        return error
    return content


def _ahead(
    pool: ThreadPoolExecutor, work: Callable, items: Iterable, ahead: int
) -> Iterator[tuple]:
    """(item, result) in order; so many are begun before they are asked for."""
    begun: deque = deque()
    for item in items:
        begun.append((item, pool.submit(work, item)))
        if len(begun) > ahead:
            first, future = begun.popleft()
            yield first, future.result()
    for first, future in begun:
        yield first, future.result()


def _verify(path: Path, checksums: Sequence[int]) -> None:
    """Reads a shard back. Raises OSError where it is not what was written."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(os.fspath(path))
    if reader.num_records() != len(checksums):
        raise OSError(f"{reader.num_records()} of {len(checksums)} records were read back")
    for start in range(0, len(checksums), VERIFIED_AT_ONCE):
        wanted = list(range(start, min(start + VERIFIED_AT_ONCE, len(checksums))))
        for record, content in zip(wanted, reader.read(wanted), strict=True):
            if zlib.crc32(content) != checksums[record]:
                raise OSError(f"record {record} was read back with another checksum")
    reader.close()


def finish(
    target: Path, parts: Sequence[Part], annotations: str, copied: Path, name: str
) -> list[list[str]]:
    """Puts the annotations and the list of all shards beside them; returns what was left out.

    Args:
      target: the folder of the shards.
      parts: all of them.
      annotations: the annotation file.
      copied: where its copy goes.
      name: of it, relative to both roots.
    """
    known = finished(target)
    # Lists of older versions learn the times of their pictures.
    tables = [{"written": part.written} | known[part.path.name] for part in parts]
    content = files.read_bytes(annotations)
    copied.parent.mkdir(parents=True, exist_ok=True)
    _write_whole(copied, content)
    left_out = [entry for table in tables for entry in table["left_out"]]
    manifest = {
        "format": shards.FORMAT,
        "annotations": name,
        "annotations_sha256": hashlib.sha256(content).hexdigest(),
        "tables": tables,
    }
    _write_whole(target / shards.MANIFEST, json.dumps(manifest).encode())
    kept = {table["file"] for table in tables}
    for path in target.iterdir():
        old_shard = path.name.endswith(shards.SUFFIX) and path.name not in kept
        if old_shard or path.name.endswith((shards.SUFFIX + TABLE, PARTIAL)):
            path.unlink()
    return left_out


def _write_whole(path: Path, content: bytes) -> None:
    """Writes a file under its name only when it is complete."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"{path}: cannot be written: {files.reason(error)}") from error
