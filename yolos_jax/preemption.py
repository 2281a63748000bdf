"""How a run is asked to stop, from its first line to its last."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """Asked to stop before the first step: there is nothing to save.

    As KeyboardInterrupt, not an Exception: nobody takes it for a failure of what was under way.
    """


class Preemption:
    """Turns a request to stop into a question that a loop can ask: ``with Preemption() as asked``.

    Until ``ready`` there is no state to save, and a signal raises Stopped where it finds the
    program. From then on a process on its own takes note of SIGTERM and SIGINT; a second one of
    either ends it at once. Of several processes any may get SIGTERM, and all are told at the same
    question.

    This module starts no jax: it listens while the libraries are still being imported.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._questions = 0
        self._ready = False
        self._previous: dict[int, Any] = {}

    def listen(self) -> Preemption:
        """Listens from now on; without ``with``, until the process has ended."""
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __enter__(self) -> Preemption:
        return self.listen()

    def __exit__(self, *unused: object) -> None:
        for number in list(self._previous):
            signal.signal(number, self._previous.pop(number))

    @property
    def early(self) -> bool:
        """Whether this process was asked to stop before there was a state to save."""
        return bool(self._signal) and not self._ready

    def ready(self) -> None:
        """There is a state to save from now on.

        Raises:
          Stopped: a request came, and a library let it pass.
        """
        import jax

        if self._signal:
            raise Stopped("asked to stop")
        self._ready = True
        if jax.process_count() > 1:
            # Among several jax listens to SIGTERM itself, since they met: leave it to it, for good.
            # Ctrl-C in a terminal goes to all of its processes: it ends them, without agreement.
            self._previous.pop(signal.SIGTERM, None)
            self.__exit__()

    def requested(self, step: int) -> bool:
        """Whether to stop now; every process must ask equally often.

        Args:
          step: of the run, for the message.
        """
        import jax
        from jax.experimental import multihost_utils

        self._questions += 1
        if jax.process_count() > 1:
            # Answers True at one number, which lies ahead of all processes. A step would not do:
            # an evaluation asks many times in one step.
            stop = multihost_utils.reached_preemption_sync_point(self._questions)
        else:
            stop = bool(self._signal)
        if stop and jax.process_index() == 0:
            once_more = "; asked again it ends at once, unsaved" if jax.process_count() == 1 else ""
            print(
                f"asked to stop, leaving at step {step} when it is saved{once_more}",
                file=sys.stderr,
                flush=True,
            )
        return stop

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._signal = number
        self.__exit__()
        if not self._ready:
            raise Stopped("asked to stop")


def leave(message: str, code: int) -> None:
    """Ends the program, which was asked to, with a message and a code.

    Threads that import, read pictures or compile are neither waited for nor torn down under their
    work, which may crash.
    """
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
