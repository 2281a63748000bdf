"""Measurements in processes of their own: with some cores, some environment, and a fresh peak.

A peak of memory does not go down again, a library's threads are counted when it starts, and two
frameworks on one card take each other's memory: so each of these is measured in its own process.
What a process yields is on the disk at once, and survives if it dies or takes too long. A process
and those that it has started are a group: they end together, and when this process is gone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TAIL = 2000  # characters of a failed process' stderr that are shown


class Job:
    """A process that runs ``target(**arguments)``, a generator of plain dictionaries."""

    def __init__(
        self,
        target: str,
        arguments: Mapping[str, Any],
        *,
        cores: int = 0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Starts it.

        Args:
          target: 'module:function'.
          arguments: plain values, of the function.
          cores: that it may use; 0: all that this process may.
          environment: variables beside those of this process.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="benchmark-")
        self._rows = Path(self._folder.name) / "rows"
        self._errors = Path(self._folder.name) / "stderr"
        order = {
            "target": target,
            "arguments": dict(arguments),
            "cores": cores,
            "rows": str(self._rows),
        }
        with open(self._errors, "wb") as errors:
            self._ended = ""  # why it did not end by itself
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.isolated", json.dumps(order)],
                cwd=ROOT,
                env={**os.environ, **(environment or {})},
                stdout=errors,
                stderr=errors,
                process_group=0,
            )

    def result(self, timeout: float | None = None) -> tuple[list[dict[str, Any]], str]:
        """Waits for it.

        Args:
          timeout: seconds after which it is ended; None: never.

        Returns:
          What it yielded, and why there is no more ('' when it was finished).
        """
        error = ""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.end(f"ended after {timeout:.0f} s")
            code = self._process.wait()
        except BaseException:
            self.end("interrupted")
            raise
        _end_group(self._process.pid)  # a compiler's helpers may outlive it
        if self._ended:
            error = self._ended
        elif code:
            error = self._errors.read_text(errors="replace")[-TAIL:].strip() or f"exit code {code}"
        text = self._rows.read_text() if self._rows.exists() else ""
        self._folder.cleanup()
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")], error

    def end(self, reason: str) -> None:
        """Ends it and what it has started, unless it has ended; ``result`` then says why."""
        if self._process.poll() is None:
            self._ended = reason
            _end_group(self._process.pid)


def rows_of(target: str, arguments: Mapping[str, Any], **options: Any) -> list[dict[str, Any]]:
    """What a process yields; see ``Job``.

    Raises:
      RuntimeError: with the end of its messages, when it failed.
    """
    rows, error = Job(target, arguments, **options).result()
    if error:
        raise RuntimeError(f"{target}({json.dumps(dict(arguments))}) failed:\n{error}")
    return rows


def available_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _end_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _end_with_parent() -> None:
    """Ends this process' group when whoever started it is gone, by whatever signal."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _limit(cores: int) -> None:
    """Before any library starts its threads: jax counts the cores that it may use."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    if cores:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[name] = str(cores)


def _main() -> None:
    order = json.loads(sys.argv[1])
    _end_with_parent()
    _limit(order["cores"])
    module, _, function = order["target"].partition(":")
    started = time.monotonic()
    with open(order["rows"], "w", encoding="utf-8") as file:
        for row in getattr(importlib.import_module(module), function)(**order["arguments"]):
            row = {**row, "after_s": round(time.monotonic() - started, 1)}
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    _main()
