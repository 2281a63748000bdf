"""``train.py`` that dies, or has its disk fill up, at a place of a test's choosing.

    python -m tests.dying_train JSON FLAGS...

JSON is ``{"place": ..., "number": ..., "seconds": ..., "signal": ...}``: so many seconds after the
place is reached for that time, the process sends itself the signal. ``"bytes"`` instead of the
signal: no file may grow beyond that many from there on. ``"batches"`` is a file in which to note
the images of every step. All are optional.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
from collections.abc import Callable
from typing import Any

from absl import app

import train
from yolos_jax import checkpoint, checkpoint_files, evaluation, startup, step, trainer
from yolos_jax.data import pipeline

PLACES = {
    "starting": (startup, "build"),
    "restoring": (checkpoint.Checkpoints, "restore"),
    "compiling": (step.TrainStep, "__call__"),
    "stepping": (step.TrainStep, "__call__"),
    "reading": (pipeline._Background, "__next__"),
    "evaluating": (evaluation, "evaluate"),
    "saving": (checkpoint.Checkpoints, "_start"),
    "hashing": (checkpoint_files, "write_sums"),
}


def before(owner: Any, name: str, act: Callable[[tuple], None]) -> None:
    """Has a function called with the arguments of another before that one runs."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        act(args)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def arm(plan: dict) -> None:
    """Prepares the process for what is to happen to it."""
    reached = 0

    def act(args: tuple) -> None:
        nonlocal reached
        reached += 1
        if reached != plan.get("number", 1):
            return
        if "bytes" in plan:
            resource.setrlimit(resource.RLIMIT_FSIZE, (plan["bytes"], resource.RLIM_INFINITY))
            return
        seconds, kill = plan["seconds"], (os.getpid(), plan["signal"])
        timer = threading.Timer(seconds, os.kill, kill)
        timer.daemon = True
        timer.start()

    if "place" in plan:
        before(*PLACES[plan["place"]], act)


def note_batches(path: str) -> None:
    """Notes the images of every step that this process takes part in."""

    def note(args: tuple) -> None:
        running, host_batch = args
        line = {"step": running.progress.step, "image_ids": host_batch.image_ids.tolist()}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    before(trainer.Trainer, "train_on", note)


if __name__ == "__main__":
    plan = json.loads(sys.argv.pop(1))
    arm(plan)
    if "batches" in plan:
        note_batches(plan["batches"])
    app.run(train.main, flags_parser=train.parse_flags)
