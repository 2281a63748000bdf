"""Processes on one card: many may compile at once, but who measures time is alone.

A lock on a file: taken by many for what needs the processor, by one for what is timed. An empty
path stands for no lock, where there is nobody else.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator


@contextlib.contextmanager
def shared(path: str) -> Iterator[None]:
    """While others compile too; nobody measures meanwhile."""
    with _held(path, fcntl.LOCK_SH):
        yield


@contextlib.contextmanager
def alone(path: str) -> Iterator[None]:
    """While nobody else uses the card."""
    with _held(path, fcntl.LOCK_EX):
        yield


@contextlib.contextmanager
def _held(path: str, kind: int) -> Iterator[None]:
    if not path:
        yield
        return
    with open(path, "a") as file:
        fcntl.flock(file, kind)
        yield
