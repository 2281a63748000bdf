"""Says where a run hangs: a phase that takes too long is written down with every thread's stack."""

from __future__ import annotations

import datetime
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from ml_collections import ConfigDict


class Watchdog:
    """Watches over the phases of a run: ``with Watchdog(...) as watchdog``, then ``watch`` each.

    When a phase has not ended (no other has begun) after so many seconds, the stacks of all threads
    and what was being done are written once, to stderr and to the file; then the run goes on
    waiting, or ends. The clock of a phase includes what is compiled in it: the first step of every
    bucket, and the first evaluation. A process that is stopped as a whole is not noticed.
    """

    def __init__(self, seconds: float, path: Path, end: Callable[[str], None] | None = None):
        """Starts nothing yet.

        Args:
          seconds: that a phase may take; 0: any time.
          path: file that is written to, in a folder that exists by then; it is appended to.
          end: called with one line when a phase took too long, to end the run; None: it goes on.
        """
        self.seconds, self.path, self._end = seconds, Path(path), end
        self._changed = threading.Condition()
        self._phase: tuple[str, dict[str, Any]] | None = None
        self._since = 0.0
        self._told = False
        self._thread: threading.Thread | None = None

    @classmethod
    def of(cls, config: ConfigDict, folder: Path, end: Callable[[str], None]) -> Watchdog:
        """As the ``log`` part of a configuration says; each process has a file in the folder."""
        path = folder / f"watchdog_{jax.process_index()}.txt"
        return cls(config.watchdog_seconds, path, end if config.watchdog_exit else None)

    def __enter__(self) -> Watchdog:
        if self.seconds > 0:
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.seconds = 0
        self.rest()
        if self._thread is not None:
            self._thread.join()

    def watch(self, phase: str, **identity: Any) -> None:
        """A phase begins, and the one before it has ended.

        Args:
          phase: its name: 'compiling', 'reading', 'step', 'evaluating', 'saving'.
          identity: which one it is: step, epoch, bucket, image ids.
        """
        self._begin((phase, identity))

    def rest(self) -> None:
        """The phase has ended, and nothing to be watched has begun."""
        self._begin(None)

    def _begin(self, phase: tuple[str, dict[str, Any]] | None) -> None:
        with self._changed:
            if self._told:
                self._told = False
                _tell(f"watchdog: it went on after {time.monotonic() - self._since:.0f} s")
            self._phase, self._since = phase, time.monotonic()
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while self.seconds > 0:
                if self._phase is None or self._told:
                    self._changed.wait()
                    continue
                left = self._since + self.seconds - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                self._told = True
                message = self._dump()
                if self._end is not None:
                    self._end(message)

    def _dump(self) -> str:
        phase, identity = self._phase
        what = ", ".join(f"{name} {value}" for name, value in identity.items())
        message = f"{phase} is not done after {self.seconds:g} s: {what or 'no more is known'}"
        now = datetime.datetime.now().isoformat(timespec="seconds")
        head = f"watchdog, {now}, pid {os.getpid()}: {message}\n"
        for write in (self._to_stderr, self._to_file):
            try:
                write(head)
            except (OSError, ValueError):  # A full disk, a stderr without a descriptor:
                continue  # the other one may do.
        return message

    def _to_stderr(self, head: str) -> None:
        _tell(f"{head}its stacks are in {self.path}, too")
        faulthandler.dump_traceback(sys.stderr, all_threads=True)

    def _to_file(self, head: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(head)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.write("\n")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
