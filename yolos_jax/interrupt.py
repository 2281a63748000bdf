"""What Ctrl-C leaves of a command: one line, and nothing half-written."""

from __future__ import annotations

import _thread
import contextlib
import errno
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INTERRUPTED = 130  # what shells call the exit of a program that SIGINT ended


@contextlib.contextmanager
def one_line(program: str) -> Iterator[None]:
    """Ends the program with its name and that it was interrupted, not with a stack of calls."""
    ignored, sys.unraisablehook = sys.unraisablehook, _insist
    try:
        yield
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.stdout.flush()
        # Threads that read pictures or compile are not torn down under their work, which crashes.
        os._exit(INTERRUPTED)
    finally:
        sys.unraisablehook = ignored


def _insist(unraisable: Any) -> None:
    """Instead of ``sys.unraisablehook``: where C code calls Python's, an interruption is lost."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        threading.Timer(0.1, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(unraisable)


def make_folder(folder: Path) -> None:
    """Makes a folder where it is missing; raises OSError, by its name, where it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder}: no folder can be made there: {error.strerror}") from error


@contextlib.contextmanager
def complete_or_nothing(destination: str | Path) -> Iterator[Path]:
    """Yields a path beside the destination to write to; renames it when all went well.

    Raises:
      OSError: the destination cannot be written, by its own name.
    """
    target = Path(os.path.abspath(destination))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    replaced = target.with_name(f".{target.name}.{os.getpid()}.old")
    make_folder(target.parent)
    try:
        yield temporary
        try:
            # Only a file takes the place of a file at once; a folder has to go first.
            if target.exists() and (target.is_dir() or temporary.is_dir()):
                target.rename(replaced)
            temporary.replace(target)
        except BaseException:  # also when interrupted in between
            if replaced.exists() and not target.exists():
                replaced.rename(target)
            raise
    except OSError as error:
        # Of a write to an open file, errors have a number and no name; only a full disk's is told
        # from what else may have gone wrong meanwhile.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or str(error.filename).startswith(str(temporary)):
            raise OSError(f"{target}: cannot be written: {error.strerror}") from error
        raise
    finally:
        for path in (temporary, replaced):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
