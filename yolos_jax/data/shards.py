"""Pictures packed into array_record shards by ``data.records``, read by number.

``records.json`` lists shards, pictures and a checksum of each; it is written last, so a folder
without it is not packed, or not yet. ArrayRecord checks what it reads by itself; our own checksum
is of the picture's file as it was, and is compared each time a record is read.
"""

from __future__ import annotations

import json
import os
import threading
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
READER_BYTES = 32768  # of each file's buffer; TFDS and Grain take as much


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
    _readers: dict[int, Any] = field(default_factory=dict, compare=False)
    _lock: Any = field(default_factory=threading.Lock, compare=False)

    @property
    def ends(self) -> np.ndarray:
        """int64 [shards]: records up to the end of each."""
        return np.cumsum([shard.records for shard in self.shards])

    def read(self, records: Sequence[int]) -> list[bytes | ValueError]:
        """The files of pictures; -1 stands for the first one without a record, -2 for the next."""
        found: list = [None] * len(records)
        wanted: dict[int, list[int]] = {}  # places in the answer, by shard
        ends = self.ends
        for place, record in enumerate(map(int, records)):
            if record < 0:
                found[place] = self._absent(-1 - record)
            else:
                shard = int(np.searchsorted(ends, record, side="right"))
                wanted.setdefault(shard, []).append(place)

        # In this thread: threads of our own would each keep memory of what they have read.
        for shard, places in wanted.items():
            contents = self._read_shard(shard, [int(records[place]) for place in places])
            for place, content in zip(places, contents, strict=True):
                found[place] = content
        return found

    def numbers(self) -> dict[str, int]:
        """Numbers of all pictures by file name; below 0 for those left out."""
        numbers = {name: number for number, name in enumerate(self.names)}
        return numbers | {name: -1 - k for k, (name, _) in enumerate(self.left_out)}

    def _read_shard(self, shard: int, records: list[int]) -> list[bytes | ValueError]:
        """Records of one shard, together; one by one where that fails."""
        first = int(self.ends[shard]) - self.shards[shard].records
        positions = [record - first for record in records]
        try:
            contents = self._reader(shard).read(positions)
        except Exception:  # RuntimeError for a damaged record; who knows what for a disk
            contents = [self._read_one(shard, position) for position in positions]
        return [
            self._checked(shard, position, record, content)
            for position, record, content in zip(positions, records, contents, strict=True)
        ]

    def _read_one(self, shard: int, position: int) -> bytes | Exception:
        try:
            return self._reader(shard).read([position])[0]
        except Exception as error:
            return error

    def _reader(self, shard: int) -> Any:
        """The reader of a shard: kept, and used by several threads at once."""
        with self._lock:
            if shard not in self._readers:
                from array_record.python.array_record_module import ArrayRecordReader

                self._readers[shard] = ArrayRecordReader(
                    os.path.join(self.folder, self.shards[shard].file),
                    options="readahead_buffer_size:0,max_parallelism:0",  # for random access
                    file_reader_buffer_size=READER_BYTES,
                )
            return self._readers[shard]

    def _absent(self, number: int) -> ValueError:
        name, problem = self.left_out[number]
        return ValueError(f"{name}: left out when {self.folder} was packed: {problem}")

    def _checked(
        self, shard: int, position: int, record: int, content: bytes | Exception
    ) -> bytes | ValueError:
        if isinstance(content, bytes) and zlib.crc32(content) == self.checksums[record]:
            return content
        if isinstance(content, bytes):
            problem = (
                f"checksum {zlib.crc32(content):08x}, {MANIFEST} says {self.checksums[record]:08x}"
            )
        else:
            problem = files.reason(content)
        return ValueError(
            f"{os.path.join(self.folder, self.shards[shard].file)}: record {position} "
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
