"""Runs the cases of ``benchmarks.gpu``: in lanes, until they are done, the time is, or a signal."""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import gpu_checks, isolated
from benchmarks.gpu_cases import Case

FEW = 60  # seconds; with less left nothing is begun
STARTING = 240  # seconds to import everything and to see the card
MODULES = {
    "ours": ("benchmarks.gpu_ours", "benchmarks.gpu_mix_ours", "benchmarks.two_programs"),
    "theirs": ("benchmarks.gpu_theirs", "benchmarks.gpu_mix_theirs"),
}


class Runner:
    """What was measured until now, and what was not."""

    def __init__(
        self, options: argparse.Namespace, cache: str, save: Callable[[Runner], None]
    ) -> None:
        """Starts nothing; the time runs.

        Args:
          options: the command's.
          cache: folder of compiled programs.
          save: called after every case.
        """
        self.options, self.cache, self._save = options, cache, save
        self.deadline = time.monotonic() + options.budget
        self.results: list[dict[str, Any]] = []
        self.failures: list[str] = []  # that make the exit code another than 0
        self.left_out: list[str] = []
        self.stopped = 0  # the signal that ended it
        self._jobs: set[isolated.Job] = set()
        self._guard = threading.RLock()  # a signal's handler may come while this thread has it

    def prepare(self, sides: Sequence[str]) -> None:
        """Imports everything that will be needed, and looks at the card, on each side.

        What is wrong then is in ``failures``: a run without one side would compare nothing.
        """
        started = {}
        for side in sides:
            arguments = {"modules": MODULES[side], "device": self.options.device}
            started[side] = self._start(f"benchmarks.gpu_{side}:ready", arguments, side)
        for side, job in started.items():
            rows, error = self._finish(job, min(STARTING, self.options.budget))
            for row in rows:
                print(f"{side}: {', '.join(f'{key} {value}' for key, value in row.items())}")
                if found := gpu_checks.wrong_attention({**row, "side": side}):
                    _shout(found)
            if error and not self.stopped:
                self.failures.append(f"{side} cannot be measured at all: {error}")

    def run(self, pending: Sequence[Case]) -> None:
        """Runs everything; each side has lanes of its own."""
        lanes = []
        for side in sorted({case.side for case in pending}):
            queue = [case for case in pending if case.side == side]
            for _ in range(self.options.lanes):
                lanes.append(threading.Thread(target=self._lane, args=(queue,)))
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
        for side in sorted({case.side for case in pending}):
            if not any(row["side"] == side for row in self.results):
                self.failures.append(f"nothing was measured of {side}")

    def stop_on_signals(self) -> None:
        """From now on SIGTERM and SIGINT end what runs, and what there is is kept."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: Any) -> None:
        del frame
        with self._guard:
            self.stopped = number
            for job in self._jobs:
                job.end(f"ended by {signal.Signals(number).name}")

    def _start(self, target: str, arguments: dict[str, Any], side: str) -> isolated.Job:
        with self._guard:
            job = isolated.Job(target, arguments, environment=self._environment(side, target))
            self._jobs.add(job)
            if self.stopped:  # the signal came while it was started
                job.end("ended by a signal")
            return job

    def _finish(self, job: isolated.Job, seconds: float) -> tuple[list[dict[str, Any]], str]:
        try:
            return job.result(timeout=max(seconds, 1))
        finally:
            with self._guard:
                self._jobs.discard(job)

    def _lane(self, queue: list[Case]) -> None:
        while True:
            with self._guard:
                if not queue:
                    return
                case = queue.pop(0)
                remaining = self.deadline - time.monotonic()
                if self.stopped or remaining < min(FEW, self.options.budget / 4):
                    self.left_out.append(f"{case.name}: {'stopped' if self.stopped else 'no time'}")
                    continue
            started = time.monotonic()
            job = self._start(case.target, case.arguments, case.side)
            rows, error = self._finish(job, remaining)
            with self._guard:
                print(f"{case.name}: {time.monotonic() - started:.0f} s", flush=True)
                rows = [{**case.labels, **row} for row in rows]
                for found in {gpu_checks.wrong_attention(row) for row in rows} - {""}:
                    _shout(found)
                self.results += rows
                if error:
                    self.left_out.append(f"{case.name}: {error}")
                self._save(self)

    def _environment(self, side: str, target: str) -> dict[str, str]:
        """Variables of a process; where this process has one of these already, it stays."""
        on_card = side == "ours" and self.options.device == "cuda"
        found = {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        }
        if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name; not both
            found["XLA_CLIENT_MEM_FRACTION"] = "0.95"
        if side == "theirs" and target.endswith("gpu_mix_theirs:train"):
            # Batches of many sizes leave holes that none of the next fits into.
            found["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        found = {key: value for key, value in found.items() if key not in os.environ}
        return found | {
            "JAX_PLATFORMS": "cuda" if on_card else "cpu",
            "JAX_COMPILATION_CACHE_DIR": os.path.join(self.cache, "jax"),
            "TORCHINDUCTOR_CACHE_DIR": os.path.join(self.cache, "inductor"),
            "TRITON_CACHE_DIR": os.path.join(self.cache, "triton"),
        }


def _shout(text: str) -> None:
    line = "!" * 100
    print(f"{line}\n{text}\n{line}", flush=True)
