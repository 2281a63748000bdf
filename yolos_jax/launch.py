"""How a run starts on one process or many, and how it ends when something goes wrong."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from ml_collections import ConfigDict

from yolos_jax import agreement, cluster, waiting
from yolos_jax.meeting import Meeting
from yolos_jax.preemption import Preemption, Stopped

__all__ = [
    "Preemption",
    "Stopped",
    "end",
    "fail",
    "finish",
    "initialise",
    "interrupted",
    "is_first",
    "stop",
]

OWN_REASON_SECONDS = 2  # for every process to report itself what ends all of them
# After which jax aborts; as it beats every half of it, at the earliest half of it after a process
# fell silent. The meeting, which says who did, is to be faster where a host was cut off.
HEARTBEAT_SECONDS = 180
FINISH_SECONDS = 60  # for all others to go before process 0; jax misses nobody for that long


def initialise(config: ConfigDict, settings: Mapping[str, Any], folder: Path | None = None) -> None:
    """Joins the processes of a run; call it before anything else touches jax.

    The same command starts everywhere. With a ``coordinator`` this is process ``process_id`` of
    ``num_processes`` that meet there; else it joins the cluster that jax recognises (TPU pod
    slices, SLURM, Open MPI, indexed Kubernetes jobs) if that has several processes; else it is on
    its own, at once.

    Args:
      config: ``config.mesh``.
      settings: of the run, compared with those of the other processes.
      folder: its work directory, which all processes must see; None: it has none.

    Raises:
      ValueError: values that make no start, or processes that do not agree.
      OSError: not all processes came; says how many of how many.
      Stopped: this process, or another, was asked to stop meanwhile.
    """
    place = cluster.find(config, say=_tell)
    if place is None:
        return
    meeting = waiting.meet(place, config.wait_seconds, _tell)
    try:
        meeting.agree(agreement.facts(settings), agreement.differences)
        if folder is not None:
            _share_folder(meeting, folder)
        together = _Together(meeting, config.stopped_code)
        sys.excepthook = together.report
    except Stopped:
        meeting.stop()
        raise
    meeting.watch(together.end, together.stopped)
    # Between processes the CPU needs to be told how to talk; accelerators do not look at it.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        place.address,
        place.count,
        place.number,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",  # It was asked above.
        initialization_timeout=config.wait_seconds,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    # After jax, which waits at exit until all processes are there: so this is run first.
    atexit.register(meeting.leave)
    if jax.default_backend() == "cpu":
        # A program that jax has kept comes back without what orders the exchanges of numbers in a
        # loop and around it (jaxlib 0.10): of two devices one may be in the loop and one before it,
        # and gloo gives each what the other has sent next.
        jax.config.update("jax_enable_compilation_cache", False)
    agreement.check_devices()


def _share_folder(meeting: Meeting, folder: Path) -> None:
    first = meeting.place.number == 0
    token = agreement.Token(folder) if first else None
    name, problem = meeting.tell([token.path.name, token.problem] if token else None)
    try:
        if problem:
            raise ValueError(problem)
        meeting.agree(
            agreement.look_for(folder, name),
            lambda unseen: agreement.judge_folder(folder, unseen),
        )
    finally:
        if token:
            token.remove()


class _Together:
    """How one of several processes ends.

    Left to itself it would wait for the others at exit, and they for it. What it ends with, the
    others are told. All stay for a moment, process 0 longest: who loses its partners, or jax's
    service on process 0, reports that and not what happened.
    """

    def __init__(self, meeting: Meeting, stopped_code: int):
        self.meeting = meeting
        self.stopped_code = stopped_code
        self._reporting = threading.Lock()

    def report(
        self, kind: type[BaseException], error: BaseException, where: TracebackType | None
    ) -> None:
        """Instead of ``sys.excepthook``."""
        traceback.print_exception(kind, error, where)
        self.fail("".join(traceback.format_exception_only(kind, error)))

    def fail(self, message: str) -> None:
        """Ends this process, which has said why, and through the meeting all others."""
        self._reporting.acquire(blocking=False)
        try:
            self.meeting.fail(message)
            if self.meeting.place.number:
                time.sleep(2 * OWN_REASON_SECONDS)
            else:
                self.meeting.outlast(3 * OWN_REASON_SECONDS)
        finally:  # also when asked to stop meanwhile: why it ends has been said
            _exit()

    def end(self, why: str, killed: bool) -> None:
        """Ends this process because of another one.

        If that failed, this one may be failing for the same reason, and its own words go first. If
        it was killed there is no time: without process 0, jax aborts.
        """
        if not killed:
            time.sleep(OWN_REASON_SECONDS)
        if not self._reporting.acquire(blocking=False):
            return
        _tell(f"this run is over: {why}")
        if not self.meeting.place.number:
            self.meeting.outlast(2 * OWN_REASON_SECONDS)
        _exit()

    def stop(self, why: str) -> None:
        """Ends this process, which was asked to stop, and through the meeting all others."""
        self._reporting.acquire()  # Where another was faster, its word ends this one.
        self.meeting.stop()
        self._leave(why)

    def stopped(self, why: str) -> None:
        """Ends this process because another one was asked to stop."""
        if self._reporting.acquire(blocking=False):
            self._leave(why)

    def finish(self) -> None:
        """Says that this process has done its work; process 0 lets the others go first."""
        self._reporting.acquire()  # From now on nobody is missed who goes.
        self.meeting.leave()
        if not self.meeting.place.number:
            self.meeting.outlast(FINISH_SECONDS)

    def _leave(self, why: str) -> None:
        # At once: at exit jax would wait for processes that are leaving likewise.
        _tell(f"{why}, before the first step; nothing to save")
        if not self.meeting.place.number:
            self.meeting.outlast(2 * OWN_REASON_SECONDS)
        _exit(self.stopped_code)


def stop(why: str) -> None:
    """Ends all of several processes that have nothing to save yet; one on its own it lets go on.

    Args:
      why: for people: who was asked to stop.
    """
    together = _together()
    if together is not None:
        together.stop(why)


def fail(message: str) -> None:
    """Ends the program with a message; one of several processes does not wait for the others."""
    if _together() is not None:
        end(message)
    sys.exit(message)


def end(message: str) -> None:
    """Ends the program with a message, from any thread, without waiting for anything."""
    _tell(message)
    together = _together()
    if together is not None:
        together.fail(message)
    _exit()


def interrupted(program: str) -> None:
    """Ends one of several processes, which are told; one on its own it lets go on."""
    if _together() is not None:
        end(f"{program}: interrupted")


def finish(code: int = 0) -> None:
    """Ends the program, whose work is done, without waiting for threads that still compile."""
    together = _together()
    try:
        if together is not None:
            together.finish()
    finally:  # also when interrupted: what it had to do is done
        _exit(code)


def is_first() -> bool:
    """Whether this process is the one that prints what all know."""
    return jax.process_index() == 0


def _together() -> _Together | None:
    together = getattr(sys.excepthook, "__self__", None)
    return together if isinstance(together, _Together) else None


def _exit(code: int = 1) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
