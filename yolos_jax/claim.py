"""A work directory belongs to one run at a time."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

from yolos_jax import mesh

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FILE = "run.lock"  # of a work directory; stays there, and is nobody's when no run holds it
LOST_HOST_SECONDS = 120  # a file server keeps the locks of a host that went away for about 90


class Claim:
    """What a run holds of its work directory: ``with Claim() as claim: claim.take(folder)``.

    Two runs would remove each other's checkpoints. The lock is the kernel's: it goes with the
    process, however that ends, so that a run that was killed can be resumed at once.
    """

    def __init__(self) -> None:
        """Takes nothing yet."""
        self._file = None

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *unused: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def take(self, folder: Path) -> None:
        """Takes a folder, which is made where it is missing, for all processes of this run.

        A file system, or a system, without locks is used without. Every process must call it.

        Raises:
          ValueError: another run has it; the same on every process.
        """
        problem = mesh.from_first(lambda: self._take(folder))
        if problem:
            raise ValueError(problem)

    def _take(self, folder: Path) -> str | None:
        """Returns what is wrong, or None."""
        if fcntl is None:
            return None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / FILE, "a+", encoding="utf-8")  # noqa: SIM115
            holder = self._wait(folder)
            if holder:
                return (
                    f"{folder} is in use by another run ({holder}): choose another --workdir, or "
                    f"stop that one; where its host is lost, remove {FILE} there"
                )
            self._file.truncate(0)
            print(f"{socket.gethostname()}, pid {os.getpid()}", file=self._file, flush=True)
        except OSError:
            pass  # No locks there; where nothing can be written, the first who writes says so.
        return None

    def _wait(self, folder: Path) -> str | None:
        """Locks the file; returns who has it where that fails, at once if that one is alive."""
        deadline = None
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return None
            except BlockingIOError:
                self._file.seek(0)
                holder = self._file.read().strip() or "which has not said its name yet"
            if deadline is None:
                deadline = time.monotonic() + (0 if _is_here(holder) else LOST_HOST_SECONDS)
                if time.monotonic() < deadline:
                    text = f"{folder} is held by another run ({holder}), perhaps of a lost host"
                    print(f"{text}: waiting {LOST_HOST_SECONDS} s", file=sys.stderr, flush=True)
            if time.monotonic() >= deadline:
                return holder
            time.sleep(0.5)


def _is_here(holder: str) -> bool:
    """Whether it is another process of this host; one with our number is of a lost container."""
    host, _, pid = holder.rpartition(", pid ")
    if host != socket.gethostname() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:  # It is somebody else's.
        return True
    return True
