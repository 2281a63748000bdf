"""``train.py`` in a process that dies, or whose disk fills up, where a test wants it to.

    with dying_train.Group(folder, flags, plans) as group:
        codes = group.wait(60)

A plan is of one process: ``{"place": ..., "number": ..., "seconds": ..., "signal": ...}``: so many
seconds after it reaches the place for that time, it sends itself the signal. ``"bytes"`` instead
of the signal: from there on no file may grow beyond that many. ``"batches"`` names a file in which
to note the images of every step. ``"prolong"`` and ``"hang"`` have the arguments of those functions
of ``slow_phase``, ``"watch_only"`` too; ``"flags"`` are this process' own. All are optional.

Processes are forked from one that has imported everything: that is half of their start.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app

import train
from tests import quick, shared_programs, slow_phase
from tests.processes import free_address
from yolos_jax import (
    checkpoint,
    checkpoint_files,
    compilation,
    evaluation,
    startup,
    step,
    trainer,
)
from yolos_jax.data import pipeline

PATIENCE = 1200  # seconds for a text, on a machine that does other things too
PLACES = {
    "joining": (jax.distributed, "initialize"),
    "starting": (startup, "build"),
    "restoring": (checkpoint.Checkpoints, "restore"),
    "compiling": (step.TrainStep, "__call__"),
    "stepping": (step.TrainStep, "__call__"),
    "reading": (pipeline, "host_batches"),
    "evaluating": (evaluation, "evaluate"),
    "saving": (checkpoint.Checkpoints, "_start"),
    "hashing": (checkpoint_files, "write_sums"),
}


class Group:
    """The processes of a run; all are killed on leaving. What process i prints is ``i.out``."""

    def __init__(
        self,
        folder: Path,
        flags: Sequence[str],
        plans: Sequence[dict],
        *,
        devices: int = 1,
    ):
        """Starts nothing yet.

        Args:
          folder: for what they print.
          flags: of ``train.py``; programs are kept where ``compile.cache`` says.
          plans: one per process.
          devices: virtual CPU devices of each.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / f"{number}.out" for number in range(len(plans))]
        meet = [
            f"--config.mesh.coordinator={free_address()}",
            f"--config.mesh.num_processes={len(plans)}",
        ]
        self.members = []
        for number, (plan, out) in enumerate(zip(plans, self.outputs, strict=True)):
            own = [*flags, *plan.get("flags", ())]
            if len(plans) > 1:
                own += [*meet, f"--config.mesh.process_id={number}"]
            args = (plan, own, str(out), devices)
            self.members.append(context.Process(target=run, args=args))

    def __enter__(self) -> Group:
        for member in self.members:
            member.start()
        return self

    def __exit__(self, *unused: object) -> None:
        for member in self.members:
            if member.exitcode is None:
                os.kill(member.pid, signal.SIGKILL)
            member.join()

    def wait(self, seconds: float) -> list[int | None]:
        """Exit codes of all; None of those that still run after so many seconds together."""
        deadline = time.monotonic() + seconds
        for member in self.members:
            member.join(max(deadline - time.monotonic(), 0))
        return [member.exitcode for member in self.members]

    def wait_for(self, member: int, text: str) -> None:
        """Waits until a process has printed a text."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.output(member):
            assert time.monotonic() < deadline, self.printed()
            assert self.members[member].is_alive(), self.printed()
            time.sleep(0.1)

    def signal(self, number: int, member: int) -> None:
        """Sends a signal to a process."""
        os.kill(self.members[member].pid, number)

    def output(self, member: int) -> str:
        """What one process has printed so far."""
        out = self.outputs[member]
        return out.read_text(errors="replace") if out.exists() else ""

    def printed(self) -> str:
        """What all have printed, for messages."""
        numbers = range(len(self.members))
        return "\n".join(f"--- process {i} ---\n{self.output(i)[-6000:]}" for i in numbers)


def run(plan: dict, flags: list[str], out: str, devices: int) -> None:
    """One process, from its first line to its last."""
    printed = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(printed, stream)
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    os.environ.pop(compilation.VARIABLE, None)
    shared_programs.same_names()
    # Whoever runs these tests and how: they are about what happens when, not about speed.
    jax.config.update("jax_disable_most_optimizations", True)
    quick.heed()
    arm(plan)
    if "batches" in plan:
        note_batches(plan["batches"])
    for name in ("prolong", "hang", "watch_only"):
        if name in plan:
            getattr(slow_phase, name)(*plan[name])
    sys.argv = ["train.py", *flags]
    try:
        app.run(train.main, flags_parser=train.parse_flags)
    except Exception:
        sys.excepthook(*sys.exc_info())  # which is not asked in a process of this kind
        raise
    finally:
        atexit._run_exitfuncs()  # likewise


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
        timer = threading.Timer(plan["seconds"], os.kill, (os.getpid(), plan["signal"]))
        timer.daemon = True
        timer.start()

    if plan.get("place") == "anywhere":
        act(())
    elif "place" in plan:
        before(*PLACES[plan["place"]], act)


def note_batches(path: str) -> None:
    """Notes the images of every step that this process takes part in."""

    def note(args: tuple) -> None:
        running, host_batch = args
        line = {"step": running.progress.step, "image_ids": host_batch.image_ids.tolist()}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    before(trainer.Trainer, "train_on", note)


def before(owner: Any, name: str, act: Callable[[tuple], None]) -> None:
    """Has a function called with the arguments of another before that one runs."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        act(args)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)
