"""Pictures packed into array_record shards by ``data.records``, read by number.

``records.json`` lists shards, pictures and a checksum of each; it is written last, so a folder
without it is not packed, or not yet. ArrayRecord checks what it reads by itself; our own checksum
is of the picture's file as it was, and is compared each time a record is read.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from yolos_jax.data import files

MANIFEST = "records.json"
FORMAT = 1
SUFFIX = ".array_record"


class Shard(NamedTuple):
    """One file of records."""

    file: str  # its name
    bytes: int
    records: int


@dataclass(frozen=True)
class Shards:
    """The pictures of one folder; a ``files.Store``."""

    folder: str
    shards: tuple[Shard, ...]
    annotations_sha256: str  # of the annotation file that they were packed from
    names: tuple[str, ...]  # [R], file names of the annotations, record by record
    checksums: np.ndarray  # uint32 [R], CRC-32 of each picture's file
    left_out: tuple[tuple[str, str], ...]  # pictures without a record: file name, what is wrong
    _opened: list[Any] = field(default_factory=list, compare=False)

    def read(self, records: Sequence[int]) -> list[bytes | ValueError]:
        """The files of pictures; -1 stands for the first one without a record, -2 for the next."""
        wanted = [int(record) for record in records if record >= 0]
        try:
            found = iter(self._source().__getitems__(wanted) if wanted else ())
        except Exception:  # RuntimeError for a damaged record; who knows what for a disk
            found = map(self._read_one, wanted)
        return [
            self._checked(int(record), next(found)) if record >= 0 else self._absent(-1 - record)
            for record in records
        ]

    def numbers(self) -> dict[str, int]:
        """Numbers of all pictures by file name; below 0 for those left out."""
        numbers = {name: number for number, name in enumerate(self.names)}
        return numbers | {name: -1 - k for k, (name, _) in enumerate(self.left_out)}

    def _source(self) -> Any:
        if not self._opened:
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            # With their counts the files need not be opened before they are read.
            self._opened.append(
                ArrayRecordDataSource(
                    [f"{os.path.join(self.folder, s.file)}[0:{s.records}]" for s in self.shards]
                )
            )
        return self._opened[0]

    def _read_one(self, record: int) -> bytes | Exception:
        try:
            return self._source()[record]
        except Exception as error:
            return error

    def _absent(self, number: int) -> ValueError:
        name, problem = self.left_out[number]
        return ValueError(f"{name}: left out when {self.folder} was packed: {problem}")

    def _checked(self, record: int, content: bytes | Exception) -> bytes | ValueError:
        if isinstance(content, bytes) and zlib.crc32(content) == self.checksums[record]:
            return content
        if isinstance(content, bytes):
            problem = (
                f"checksum {zlib.crc32(content):08x}, {MANIFEST} says {self.checksums[record]:08x}"
            )
        else:
            problem = files.reason(content)
        ends = np.cumsum([shard.records for shard in self.shards])
        shard = int(np.searchsorted(ends, record, side="right"))
        place = record - (int(ends[shard - 1]) if shard else 0)
        return ValueError(
            f"{os.path.join(self.folder, self.shards[shard].file)}: record {place} "
            f"({self.names[record]}) is damaged: {problem}"
        )


def find(folder: str | os.PathLike) -> Shards | None:
    """Opens the shards of a picture folder; None for one that holds loose files.

    Raises:
      ValueError: a shard is missing or has not the size that it was written with, the list of
        shards is no such list, or the folder is in an object store.
    """
    name = os.fspath(folder)
    path = epath.Path(folder) / MANIFEST
    if files.state(path) is None:
        return None
    if files.is_remote(folder):
        raise ValueError(
            f"{name}: array_record reads local files only; mount the bucket (gcsfuse), copy the "
            "folder to a disk, or give loose pictures as data.root"
        )
    listed = read_manifest(path)
    tables = listed["tables"]
    shards = tuple(Shard(t["file"], t["bytes"], len(t["crc32"])) for t in tables)
    wrong = []
    for shard in shards:
        found = files.state(os.path.join(name, shard.file))
        if found is None or found[0] != shard.bytes:
            size = "missing" if found is None else f"{found[0]} bytes"
            wrong.append(f"{shard.file}: {size}, expected {shard.bytes} bytes")
    if wrong:
        raise ValueError(
            f"{name}: {len(wrong)} of {len(shards)} shards are not what {MANIFEST} says: "
            f"{'; '.join(wrong[:5])}; run yolos_jax.data.records again, it keeps whole ones"
        )
    return Shards(
        folder=name,
        shards=shards,
        annotations_sha256=listed["annotations_sha256"],
        names=tuple(name for table in tables for name in _packed(table)),
        checksums=np.array([crc for table in tables for crc in table["crc32"]], np.uint32),
        left_out=tuple((name, what) for table in tables for name, what in table["left_out"]),
    )


def read_manifest(path: str | os.PathLike) -> dict[str, Any]:
    """The list that ``data.records`` wrote. Raises ValueError when it is something else."""
    name = os.fspath(path)
    try:
        listed = json.loads(files.read_bytes(path))
        if listed["format"] != FORMAT:
            raise ValueError(f"its format is {listed['format']}, expected {FORMAT}")
        for table in listed["tables"]:
            if len(_packed(table)) != len(table["crc32"]):
                raise ValueError(f"{table['file']}: as many checksums as pictures were expected")
            table["bytes"] + 0
        listed["annotations_sha256"].lower()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{name}: not a list of shards: {files.reason(error)}; run yolos_jax.data.records again"
        ) from None
    return listed


def _packed(table: Mapping[str, Any]) -> list[str]:
    """The pictures of one shard, record by record."""
    left_out = {name for name, _ in table["left_out"]}
    return [name for name, _ in table["pictures"] if name not in left_out]
