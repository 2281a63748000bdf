"""How a run starts on one process or many, and how it is asked to stop."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict


def initialise(config: ConfigDict) -> None:
    """Joins the processes of a run; call it before anything else touches jax.

    Args:
      config: ``config.mesh``. With a ``coordinator`` this is process ``process_id`` of
        ``num_processes`` that meet there; else with ``distributed`` 'auto' it joins the cluster
        that jax recognises; else ('') it is on its own.

    Raises:
      ValueError: values that make no start.
    """
    if config.distributed not in ("", "auto"):
        raise ValueError(f"mesh.distributed is {config.distributed!r}; expected '' or 'auto'")
    if not (config.coordinator or config.distributed):
        return
    # Between processes the CPU needs to be told how to talk; accelerators do not look at it.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if config.coordinator:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            initialization_timeout=config.wait_seconds,
        )
    else:
        jax.distributed.initialize()
    sys.excepthook = _report_and_exit


def _report_and_exit(
    kind: type[BaseException], error: BaseException, where: TracebackType | None
) -> None:
    # Left to itself a process that failed waits for the others at exit, and they wait for it.
    traceback.print_exception(kind, error, where)
    sys.stderr.flush()
    os._exit(1)


def fail(message: str) -> None:
    """Ends the program with a message; one of several processes does not wait for the others."""
    print(message, file=sys.stderr, flush=True)
    if sys.excepthook is _report_and_exit:
        os._exit(1)
    sys.exit(1)


class Preemption:
    """Turns a request to stop into a question that a loop can ask: ``with Preemption() as asked``.

    A process on its own listens to SIGTERM and SIGINT; a second one of either ends it at once. Of
    several processes any may get SIGTERM, and all are told at the same question.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._questions = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        if jax.process_count() == 1:  # Among several jax listens to SIGTERM itself.
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *unused: object) -> None:
        for number in list(self._previous):
            signal.signal(number, self._previous.pop(number))

    def requested(self, step: int) -> bool:
        """Whether to stop now; every process must ask equally often.

        Args:
          step: of the run, for the message.
        """
        self._questions += 1
        if jax.process_count() > 1:
            # Answers True at one number, which lies ahead of all processes. A step would not do:
            # an evaluation asks many times in one step.
            stop = multihost_utils.reached_preemption_sync_point(self._questions)
        else:
            stop = bool(self._signal)
        if stop and jax.process_index() == 0:
            print(f"asked to stop, leaving at step {step}", file=sys.stderr, flush=True)
        return stop

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._signal = number
        self.__exit__()
