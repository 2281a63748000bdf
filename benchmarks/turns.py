"""Processes on one card: many may compile at once, but whoever keeps the card busy is alone.

    shared   compiling, and putting arrays on the card. Compilers try their kernels and time them
    alone    any run of steps or of forward passes, the first one too: it would disturb the others'
             trials as well as what they measure

A lock on a file, taken by many or by one, behind a second one, the gate: whoever wants the first
holds the gate while waiting. Without it those that share the lock would go on taking it while one
waits to be alone, who might never be. An empty path stands for no lock, where there is nobody else.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator


@contextlib.contextmanager
def shared(path: str) -> Iterator[None]:
    """While others compile too; nobody runs meanwhile."""
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
        with open(f"{path}.gate", "a") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)
            try:
                fcntl.flock(file, kind)
            finally:
                fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            # Closing is not enough: a compiler's helper that was forked meanwhile has the file too.
            fcntl.flock(file, fcntl.LOCK_UN)
