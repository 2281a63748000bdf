"""The processes of a run meet before jax starts, agree on what they run, and notice who goes.

Process 0 listens at the address where jax will listen afterwards; the others connect to it and
stay connected. jax alone ends processes by SIGABRT when one of them is missing, and tells nobody
how many came; and of a process that dies it learns only after missing its heartbeats.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from yolos_jax.cluster import Place
from yolos_jax.preemption import Stopped

ANSWER_SECONDS = 60  # for a process that is there: it hashes files, looks for one
# A host that was cut off or lost its power says nothing more, and its kernel answers no probe: it
# is missed after a minute, before jax misses its heartbeats and aborts (launch.HEARTBEAT_SECONDS).
# No compiler and no lock of Python holds up a kernel; but it does answer for a process that hangs
# or was stopped, which is left to jax.
PROBES = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 5, "TCP_USER_TIMEOUT": 60_000}
LONGEST = 2**20  # bytes of a message; a stranger at the port may send anything


class Line:
    """A connection that carries one JSON value per line."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in PROBES.items():
            if hasattr(socket, name):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._received = b""
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        """Sends; to somebody who has gone: does nothing."""
        data = json.dumps(message).encode() + b"\n"
        try:
            with self._sending:
                self.socket.settimeout(ANSWER_SECONDS)
                self.socket.sendall(data)
        except OSError:
            pass  # Who reads from this line finds out.

    def receive(self, deadline: float) -> dict:
        """The next message; ``{}`` from somebody who has gone, or is no member of a run.

        Raises:
          TimeoutError: none came until then (of ``time.monotonic``).
        """
        while b"\n" not in self._received:
            self.socket.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                data = self.socket.recv(2**16)
            except TimeoutError:
                raise
            except OSError:
                data = b""
            if not data or len(self._received) > LONGEST:
                return {}
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError:
            return {}
        return message if isinstance(message, dict) else {}

    def close(self) -> None:
        self.socket.close()


class Meeting:
    """The processes of a run, all there: ``waiting.meet`` makes one."""

    def __init__(self, place: Place, lines: dict[int, Line], names: dict[int, str]):
        """Args:
        place: of this process.
        lines: process 0: to each of the others by number; the others: to process 0.
        names: of the processes at the other ends.
        """
        self.place = place
        self._lines = lines
        self._names = names

    def agree(self, mine: Any, judge: Callable[[list], str | None]) -> None:
        """Compares what every process says; every process must call it.

        Args:
          mine: JSON of this process.
          judge: given all in the order of their numbers, on process 0, says what is wrong.

        Raises:
          ValueError: what the judge said, on every process.
          Stopped: a process was asked to stop.
        """
        deadline = time.monotonic() + ANSWER_SECONDS
        if self.place.number == 0:
            own = json.loads(json.dumps(mine))  # As the others' have come: tuples are lists.
            said = [own] + [self._hear(i, deadline)["said"] for i in sorted(self._lines)]
            problem = judge(said)
            self._tell_all(problem=problem)
        else:
            self._lines[0].send(said=mine)
            # The slowest of all processes may take as long as the first of them was given.
            problem = self._hear(0, deadline + ANSWER_SECONDS)["problem"]
        if problem:
            raise ValueError(problem)

    def tell(self, mine: Any) -> Any:
        """Returns what process 0 says, on every process; every process must call it."""
        if self.place.number == 0:
            self._tell_all(told=mine)
            return mine
        return self._hear(0, time.monotonic() + 2 * ANSWER_SECONDS)["told"]

    def stop(self) -> None:
        """This process was asked to stop before the first step: tells the others."""
        self._tell_all(stopped=f"process {self.place.number} was asked to stop")

    def fail(self, message: str) -> None:
        """This process is about to end with an error: tells the others, who end too."""
        self._tell_all(failed=f"{describe(self.place)} failed: {message.strip()[-2000:]}")

    def leave(self) -> None:
        """This process has done its work: nobody need worry that it goes."""
        self._tell_all(bye=True)

    def outlast(self, seconds: float) -> None:
        """Waits until all others have gone, at most so long."""
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            for line in self._lines.values():
                selector.register(line.socket, selectors.EVENT_READ)
            while selector.get_map() and time.monotonic() < deadline:
                for key, _ in selector.select(timeout=0.1):
                    try:
                        gone = not key.fileobj.recv(2**16)
                    except OSError:
                        gone = True
                    if gone:
                        selector.unregister(key.fileobj)

    def watch(self, end: Callable[[str, bool], None], stop: Callable[[str], None]) -> None:
        """From now on notices, in a thread, who fails, dies or stops; then the run is over.

        Args:
          end: ends this process; is told why, and whether one was killed (else it said so).
          stop: ends this process before its first step; is told who was asked to stop.
        """
        threading.Thread(target=self._watch, args=(end, stop), name="meeting", daemon=True).start()

    def _watch(self, end: Callable[[str, bool], None], stop: Callable[[str], None]) -> None:
        with selectors.DefaultSelector() as selector:
            for number, line in self._lines.items():
                selector.register(line.socket, selectors.EVENT_READ, number)
            while selector.get_map():
                for key, _ in selector.select():
                    try:
                        message = self._lines[key.data].receive(time.monotonic() + ANSWER_SECONDS)
                    except TimeoutError:
                        message = {}
                    if message.get("bye"):
                        selector.unregister(key.fileobj)
                        continue
                    if "stopped" in message:
                        if self.place.number == 0:
                            self._tell_all(**message)
                        stop(message["stopped"])
                        return
                    why = message.get("failed", f"{self._names[key.data]} is gone")
                    killed = "failed" not in message or message.get("killed", False)
                    if self.place.number == 0:
                        self._tell_all(failed=why, killed=killed)
                    end(why, killed)
                    return

    def _hear(self, number: int, deadline: float) -> dict:
        """The next message from another process, or the end of the start on every process."""
        try:
            message = self._lines[number].receive(deadline)
        except TimeoutError:
            message = {}
        for key, error in (("stopped", Stopped), ("failed", ConnectionError)):
            if key in message:
                self._tell_all(**message)
                raise error(message[key])
        if not message:
            why = f"{self._names[number]} is gone"
            self._tell_all(failed=why)
            raise ConnectionError(why)
        return message

    def _tell_all(self, **message: Any) -> None:
        for line in self._lines.values():
            line.send(**message)


def describe(place: Place) -> str:
    """This process for people: its number, of how many, its host and pid."""
    return f"process {place.number} of {place.count} ({socket.gethostname()}, pid {os.getpid()})"
