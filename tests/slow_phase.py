"""Phases of the trainer that take long and say when they begin: a test can do something there."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from yolos_jax import checkpoint, evaluation, run, startup, step, visualize
from yolos_jax.watchdog import Watchdog

PHASES = {
    "preparing": (startup, "build"),
    "compiling": (step.TrainStep, "__call__"),
    "reading": (run.Run, "train_batches"),
    "saving": (checkpoint.Checkpoints, "save"),
    "writing": (ocp.AsyncCheckpointer, "save"),  # orbax's part, with what it asks before behind it
    "evaluating": (run.Run, "eval_batches"),
    "scoring": (evaluation, "coco_metrics"),
    "drawing": (visualize, "split_sheet"),
}
COMPILER = "compiler"  # no phase of its own: any program, in the thread that compiles it
_OWNERS = PHASES | {COMPILER: (jax.stages.Lowered, "compile")}
PATIENCE = 3600  # seconds


def prolong(phase: str, seconds: float) -> None:
    """Makes a phase print ``now PHASE`` each time it begins, and take so many seconds more."""

    def delay() -> None:
        print(f"now {phase}", flush=True)
        end = time.monotonic() + seconds
        while time.monotonic() < end:  # a sleep would end with the signal's handler
            time.sleep(0.05)

    _wrap(phase, delay)


def hang(phase: str, until: Path) -> None:
    """Makes a phase hang until somebody writes to a file that it is not done."""

    def delay() -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if until.exists() and f"{phase} is not done" in until.read_text():
                time.sleep(1)  # time to be told again, by a watchdog that would
                return
            time.sleep(0.05)

    _wrap(phase, delay)


def watch_only(phase: str) -> None:
    """Makes the watchdog look at one phase alone: others take as long as the machine lets them."""
    watch = Watchdog.watch

    def wrapper(self, now: str, **identity: Any) -> None:
        self.configured = getattr(self, "configured", self.seconds)
        self.seconds = self.configured if now == phase else PATIENCE
        watch(self, now, **identity)

    Watchdog.watch = wrapper


def _wrap(phase: str, delay: Callable[[], None]) -> None:
    owner, name = _OWNERS[phase]
    original = getattr(owner, name)

    @functools.wraps(original)
    def call(*args, **kwargs):
        delay()
        return original(*args, **kwargs)

    @functools.wraps(original)
    def batches(*args, **kwargs):
        found = original(*args, **kwargs)
        try:
            while True:
                delay()
                try:
                    batch = next(found)
                except StopIteration:
                    return
                yield batch
        finally:
            found.close()

    setattr(owner, name, batches if name.endswith("_batches") else call)
