"""Files of a dataset, on local disks and in object stores alike (gs:// and what etils knows).

Local files raise OSError; TensorFlow, fsspec and Google's libraries raise errors of their own.
Here they all become one kind, so that callers can name the file and say what is wrong.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from typing import BinaryIO, Protocol

from etils import epath


class Store(Protocol):
    """Pictures that are not files of their own: records, read by number."""

    def read(self, records: Sequence[int]) -> list[bytes | ValueError]:
        """The files of pictures, read together; an error that names it instead of a bad one."""


def read_bytes(path: str | os.PathLike) -> bytes:
    """A whole file. Raises OSError, whatever the file system raises."""
    try:
        return epath.Path(path).read_bytes()
    except OSError:
        raise
    except Exception as error:
        raise OSError(reason(error)) from error


def open_binary(path: str | os.PathLike) -> BinaryIO:
    """A file to read from; what it says of errors is that of ``read_bytes``."""
    if is_remote(path):
        # One request for all of it takes about as long as one for its first bytes.
        return io.BytesIO(read_bytes(path))
    return epath.Path(path).open("rb")


def read_picture(path: str) -> bytes:
    """A whole file. Raises ValueError naming it."""
    try:
        return read_bytes(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {reason(error)}") from None


def path_of(path: str | os.PathLike) -> epath.Path:
    """A path, local or in an object store. Raises ValueError where no file system is known."""
    try:
        return epath.Path(path)
    except KeyError:
        scheme = os.fspath(path).split("://")[0]
        raise ValueError(
            f"{os.fspath(path)}: no file system is known for {scheme}://, expected a local path or "
            "gs://"
        ) from None


def is_folder(path: str | os.PathLike) -> bool:
    """Whether there is such a folder. Raises ValueError where nobody can say."""
    return _ask(path_of(path), lambda known: known.is_dir())


def exists(path: str | os.PathLike) -> bool:
    """Whether there is such a file or folder. Raises ValueError where nobody can say."""
    return _ask(path_of(path), lambda known: known.exists())


def _ask(path: epath.Path, question: Callable[[epath.Path], bool]) -> bool:
    try:
        return question(path)
    except Exception as error:
        raise ValueError(f"{os.fspath(path)}: cannot be looked at: {reason(error)}") from error


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is one of an object store."""
    return "://" in os.fspath(path)


def state(path: str | os.PathLike) -> tuple[int, int] | None:
    """Bytes of a file, and when it was last written (nanoseconds where known); None without it."""
    try:
        if not is_remote(path):
            stat = os.stat(path)
            return stat.st_size, stat.st_mtime_ns
        stat = epath.Path(path).stat()
    except Exception:
        return None
    return int(stat.length), int(stat.mtime) * 10**9


def reason(error: BaseException) -> str:
    """What an error says, in one line without its number."""
    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return text.splitlines()[0]
