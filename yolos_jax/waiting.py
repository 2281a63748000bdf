"""How the processes of a run come together: all are waited for, and who is missing is said."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Iterable

from yolos_jax.cluster import BY_CONFIG, Place
from yolos_jax.meeting import Line, Meeting, describe
from yolos_jax.preemption import Stopped

FIRST_NOTICE, NEXT_NOTICE = 10, 60  # seconds of waiting before somebody who watches is told
SHOWN = 20  # processes named in one message


def meet(place: Place, seconds: float, say: Callable[[str], None]) -> Meeting:
    """Waits for all processes of a run.

    Args:
      place: of this process.
      seconds: to wait, from now.
      say: told what is waited for.

    Raises:
      TimeoutError: not all came; says how many of how many did, and how long was waited.
      ValueError: two processes have one number, or do not agree on how many there are.
      OSError: the port on process 0 is not free.
      Stopped: a process was asked to stop.
    """
    guests = _Guests(place, seconds, say)
    try:
        if place.number == 0:
            guests.receive_all()
        else:
            guests.go()
    except BaseException as error:
        if isinstance(error, Stopped):
            guests.meeting().stop()
        elif isinstance(error, ValueError | OSError) and place.number == 0:
            guests.refuse(str(error))
        raise
    return guests.meeting()


class _Guests:
    """Who has come so far."""

    def __init__(self, place: Place, seconds: float, say: Callable[[str], None]):
        self.place, self.seconds, self.say = place, seconds, say
        self.started = time.monotonic()
        self.notice = self.started + FIRST_NOTICE
        self.lines: dict[int, Line] = {}
        self.names: dict[int, str] = {}

    def meeting(self) -> Meeting:
        return Meeting(self.place, self.lines, self.names)

    def refuse(self, problem: str) -> None:
        for line in self.lines.values():
            line.send(refused=problem)

    def waited(self) -> float:
        return time.monotonic() - self.started

    def remind(self, text: str) -> None:
        """Tells, after some time and every so often, what is waited for."""
        if time.monotonic() > self.notice:
            self.notice = time.monotonic() + NEXT_NOTICE
            self.say(f"{text}; {self.waited():.0f} of {self.seconds:.0f} s waited")

    # Process 0.

    def receive_all(self) -> None:
        """Listens until all others have come and are still there."""
        with self.listen() as listener, selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ, None)
            while len(self.lines) < self.place.count - 1:
                for key, _ in selector.select(timeout=0.5):
                    if key.data is None:
                        line = Line(listener.accept()[0])
                        selector.register(line.socket, selectors.EVENT_READ, line)
                    elif not self.hear(key.data):
                        selector.unregister(key.fileobj)
                        key.data.close()
                if self.waited() > self.seconds:
                    raise TimeoutError(self.who_is_missing() + self.way_out())
                self.remind(f"waiting at {self.place.address}: {self.who_is_missing()}")
            for line in self.lines.values():
                line.send(welcome=True)

    def listen(self) -> socket.socket:
        """Binds the port, on all interfaces as jax does, when whoever has it leaves it."""
        port = int(self.place.address.rpartition(":")[2])
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        while True:
            try:
                return socket.create_server(
                    ("", port), family=family, dualstack_ipv6=both, backlog=self.place.count
                )
            except OSError as error:
                if self.waited() > self.seconds:
                    raise OSError(
                        f"process 0 cannot listen at port {port} of this host, after "
                        f"{self.seconds:.0f} s: {error}; is an earlier run still there?"
                    ) from None
            time.sleep(0.5)
            self.remind(f"port {port} of this host is not free, trying again")

    def hear(self, line: Line) -> bool:
        """Takes in what a connection says; returns whether to go on listening to it."""
        number = next((i for i, known in self.lines.items() if known is line), None)
        try:
            message = line.receive(time.monotonic() + 1)
        except TimeoutError:
            message = {}
        if "stopped" in message:
            for other in self.lines.values():
                other.send(**message)
            raise Stopped(message["stopped"])
        if number is not None:  # Nothing else is said before all are there: it is gone.
            del self.lines[number], self.names[number]
            return False
        if not isinstance(message.get("hello"), int) or not isinstance(message.get("of"), int):
            return False  # Not one of ours.
        number, name = message["hello"], str(message.get("name"))
        if message["of"] != self.place.count or not 0 < number < self.place.count:
            line.send(refused=f"process 0 expects {self.place.count} processes, {name} differs")
            raise ValueError(f"process 0 is one of {self.place.count} processes, {name} came")
        if number in self.lines:
            line.send(refused=f"{name} came, but {self.names[number]} is there")
            raise ValueError(f"two processes have one number: {self.names[number]} and {name}")
        self.lines[number], self.names[number] = line, name
        return True

    def who_is_missing(self) -> str:
        here = {0, *self.lines}
        missing = [i for i in range(self.place.count) if i not in here]
        return (
            f"{len(here)} of {self.place.count} processes came to {self.place.address} in "
            f"{self.waited():.0f} s; missing: {few(missing)}; here: "
            f"{few([describe(self.place), *(self.names[i] for i in sorted(self.lines))])}"
        )

    def way_out(self) -> str:
        if self.place.found_by == BY_CONFIG:
            return ""
        return f"; as {self.place.found_by} says: --config.mesh.distributed=off starts alone"

    # All others.

    def go(self) -> None:
        """Connects to process 0, as soon as it is there, and waits until all others have come."""
        problem = "it was not tried"
        while self.waited() < self.seconds:
            try:
                line = self.connect()
            except OSError as error:
                problem = str(error)
                time.sleep(0.5)
                self.remind(f"waiting for process 0 at {self.place.address} ({problem})")
                continue
            self.lines, self.names = {0: line}, {0: f"process 0 at {self.place.address}"}
            line.send(hello=self.place.number, of=self.place.count, name=describe(self.place))
            try:
                message = self.await_answer(line)
            except TimeoutError:
                problem = "somebody listens there, but does not answer"
                break
            if message.get("welcome"):
                return
            if "stopped" in message:
                raise Stopped(message["stopped"])
            if "refused" in message:
                raise OSError(message["refused"])
            problem = "it was there, and left"
            self.lines.clear()
            line.close()
            time.sleep(0.5)
        raise TimeoutError(
            f"process 0 of {self.place.count} did not come to {self.place.address} in "
            f"{self.waited():.0f} s ({problem}); only it would know how many did; this is "
            f"{describe(self.place)}{self.way_out()}"
        )

    def await_answer(self, line: Line) -> dict:
        """Waits for what process 0 has to say, which comes when all are there or some are not."""
        # It may have begun to wait later than this process.
        deadline = time.monotonic() + self.seconds + FIRST_NOTICE
        while True:
            self.remind(f"connected to process 0 at {self.place.address}, waiting for the others")
            try:
                return line.receive(min(deadline, time.monotonic() + 0.5))
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise

    def connect(self) -> Line:
        host, _, port = self.place.address.rpartition(":")
        return Line(socket.create_connection((host.strip("[]"), int(port)), timeout=5))


def few(items: Iterable) -> str:
    """The first few of a list, and how many more."""
    items = list(items)
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(str(item) for item in items[:SHOWN]) + more
