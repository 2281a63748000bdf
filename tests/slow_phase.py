"""``train.py`` with one phase that takes long and says when it begins.

    python -m tests.slow_phase PHASE SECONDS [flags of train.py]

Prints ``now PHASE`` each time it begins, then sleeps in it: a test can send a signal there.
"""

from __future__ import annotations

import functools
import sys
import time

from absl import app

PHASES = ("preparing", "compiling", "reading", "evaluating", "scoring", "saving", "drawing")


def slow(function, phase, seconds):
    """The function, which says so and sleeps before it does its work."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        print(f"now {phase}", flush=True)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:  # a sleep would end with the signal's handler
            time.sleep(0.05)
        return function(*args, **kwargs)

    return wrapper


def slow_batches(function, phase, seconds):
    """The generator function, each of whose items takes its time."""

    def wrapper(*args, **kwargs):
        with_delay = slow(next, phase, seconds)
        batches = function(*args, **kwargs)
        try:
            while True:
                try:
                    batch = with_delay(batches)
                except StopIteration:
                    return
                yield batch
        finally:
            batches.close()

    return wrapper


def prolong(phase: str, seconds: float) -> None:
    """Makes a phase of the trainer take longer."""
    from yolos_jax import checkpoint, scoring, startup, step, visualize

    owner, name = {
        "preparing": (startup, "build"),
        "compiling": (step.TrainStep, "__call__"),
        "reading": (startup.Run, "train_batches"),
        "evaluating": (startup.Run, "eval_batches"),
        "scoring": (scoring, "coco_metrics"),
        "saving": (checkpoint.Checkpoints, "save"),
        "drawing": (visualize, "split_sheet"),
    }[phase]
    wrap = slow_batches if name.endswith("_batches") else slow
    changed = wrap(getattr(owner, name), phase, seconds)
    setattr(owner, name, changed)
    if phase == "scoring":
        from yolos_jax import evaluation

        evaluation.coco_metrics = changed  # it was imported by its name


if __name__ == "__main__":
    _, phase, seconds, *flags = sys.argv
    sys.argv = ["train.py", *flags]
    import train

    prolong(phase, float(seconds))
    app.run(train.main, flags_parser=train.parse_flags)
