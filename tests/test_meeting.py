"""Processes meet, agree, wait in vain, and go: each a thread with a socket, no jax."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import re
import socket
import threading
import time

import pytest

from tests.processes import free_address
from yolos_jax import launch, waiting
from yolos_jax.cluster import Place
from yolos_jax.preemption import Stopped


def places(count, of=None):
    address = free_address()
    return [Place(address, of or count, number, None, "test") for number in range(count)]


def together(tasks):
    """Runs functions at the same time; returns what each returned or raised."""

    def outcome(task):
        try:
            return task()
        except BaseException as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(len(tasks)) as pool:
        return list(pool.map(outcome, tasks))


def meet(where, seconds=30, say=lambda text: None):
    return together([lambda p=p: waiting.meet(p, seconds, say) for p in where])


@contextlib.contextmanager
def connected(place):
    """A connection to process 0, as soon as it listens."""
    host, port = place.address.split(":")
    deadline = time.monotonic() + 20
    while True:
        try:
            connection = socket.create_connection((host, int(port)))
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    with connection:
        yield connection


def test_all_come_in_any_order_and_agree():
    where = places(5)

    def late(place):
        time.sleep(0.1 * ((place.number + 2) % 5))  # process 0 is neither the first nor the last
        meeting = waiting.meet(place, 30, print)
        meeting.agree({"who": place.number}, lambda said: None)
        return meeting.tell("word" if place.number == 0 else None)

    assert together([lambda p=p: late(p) for p in where]) == ["word"] * 5


def test_what_the_judge_says_is_raised_on_all_with_all_sides():
    meetings = meet(places(3))
    heard = []

    def judge(said):
        heard.append(said)
        return f"{said[0]} is not {said[2]}"

    mine = [[1, (2, 3)], "b", {"c": None}]
    errors = together(
        [lambda m=m, v=v: m.agree(v, judge) for m, v in zip(meetings, mine, strict=True)]
    )
    assert heard == [[[1, [2, 3]], "b", {"c": None}]]
    assert [type(error) for error in errors] == [ValueError] * 3
    assert {str(error) for error in errors} == {"[1, [2, 3]] is not {'c': None}"}


def test_a_missing_process_ends_the_start_on_all_and_is_counted():
    started = time.monotonic()
    errors = meet(places(3, of=5), seconds=1.5)
    assert time.monotonic() - started < 8
    assert all(isinstance(error, OSError) for error in errors)
    assert isinstance(errors[0], TimeoutError)
    (message,) = {str(error) for error in errors}
    assert message.endswith("as test says: --config.mesh.distributed=off starts alone")
    assert "3 of 5 processes came" in message and "missing: 3, 4" in message and "in 2 s" in message


def test_without_process_0_the_others_say_what_they_know():
    where = places(3)[1:]
    errors = meet(where, seconds=1)
    for place, error in zip(where, errors, strict=True):
        assert isinstance(error, TimeoutError)
        assert f"process 0 of 3 did not come to {place.address} in" in str(error)
        assert f"this is process {place.number} of 3" in str(error)
        assert "as test says: --config.mesh.distributed=off starts alone" in str(error)


def test_one_that_came_and_left_is_missing():
    zero = places(1, of=3)[0]

    def come_and_go():
        with connected(zero) as connection:
            connection.sendall(json.dumps({"hello": 1, "of": 3, "name": "one"}).encode() + b"\n")
            time.sleep(0.3)

    error, _ = together([lambda: waiting.meet(zero, 2, print), come_and_go])
    assert isinstance(error, TimeoutError) and "1 of 3 processes came" in str(error)


def test_strangers_at_the_port_are_ignored():
    zero, one = places(2)

    def strangers():
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"hello": "x"}\n', b"\xff\n", b""):
            with connected(zero) as connection:
                connection.sendall(data)
        return waiting.meet(one, 20, print)

    meeting, other = together([lambda: waiting.meet(zero, 20, print), strangers])
    assert meeting.place == zero and other.place == one


def test_two_of_one_number_are_an_error_on_all():
    zero, one = places(2)
    errors = meet([Place(*zero[:1], 3, 0, *zero[3:])] + [Place(*one[:1], 3, 1, *one[3:])] * 2, 10)
    assert all(isinstance(error, ValueError | OSError) for error in errors)
    assert "two processes have one number: process 1 of 3" in str(errors[0])


def test_processes_that_count_differently_are_an_error_on_all():
    zero, one = places(2)
    errors = meet([zero, one._replace(count=4)], seconds=10)
    assert "process 0 is one of 2 processes, process 1 of 4" in str(errors[0])
    assert "process 0 expects 2 processes" in str(errors[1])


def test_a_port_that_is_taken_is_waited_for_and_named():
    zero = places(1, of=2)[0]
    other = socket.create_server(("", int(zero.address.split(":")[1])))
    with other, pytest.raises(OSError, match=r"cannot listen at port.*earlier run"):
        waiting.meet(zero, 1, print)


@pytest.mark.parametrize("asked", [0, 1, 2])
def test_a_request_to_stop_while_waiting_stops_all_that_have_come(asked, monkeypatch):
    monkeypatch.setattr(waiting, "FIRST_NOTICE", 0)
    monkeypatch.setattr(waiting, "NEXT_NOTICE", 0)

    all_here = threading.Event()

    def wait(place):
        def stop(text):  # as a signal would, in the midst of it
            if "3 of 4 processes came" in text:  # on process 0
                all_here.set()
            if place.number == asked and all_here.is_set():
                raise Stopped("asked to stop")

        return waiting.meet(place, 20, stop)

    outcomes = together([lambda p=p: wait(p) for p in places(3, of=4)])
    assert [type(outcome) for outcome in outcomes] == [Stopped] * 3
    assert str(outcomes[asked]) == "asked to stop"
    told = {str(outcome) for outcome in outcomes} - {"asked to stop"}
    assert told == {f"process {asked} was asked to stop"}


@pytest.mark.parametrize(
    ("end", "why"),
    [
        (lambda meeting: meeting.fail("disk full\n"), r"process 1 of 3 .* failed: disk full"),
        (lambda meeting: meeting._lines[0].close(), r"process 1 of 3 .* is gone"),
    ],
)
def test_who_fails_or_dies_ends_the_others(end, why):
    meetings = meet(places(3))
    ended = {0: [], 2: []}
    for number, reasons in ended.items():
        meetings[number].watch(lambda *said, to=reasons: to.append(said), pytest.fail)
    end(meetings[1])
    deadline = time.monotonic() + 10
    while not all(ended.values()) and time.monotonic() < deadline:
        time.sleep(0.01)
    for reasons in ended.values():
        ((reason, killed),) = reasons
        assert re.fullmatch(why, reason) and killed == ("gone" in why)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the kernel cannot be asked")
def test_a_host_that_is_cut_off_is_missed_by_the_kernel_before_jax_does():
    for meeting in meet(places(2)):
        (line,) = meeting._lines.values()
        assert line.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
        idle, interval, count, under_way_ms = (
            line.socket.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names
        )
        slowest = max(idle + interval * count, idle + interval + under_way_ms / 1000)
        assert slowest < launch.HEARTBEAT_SECONDS / 2


@pytest.mark.parametrize("asked", [0, 1])
def test_who_is_asked_to_stop_stops_the_others(asked):
    meetings = meet(places(3))
    stopped = {number: [] for number in range(3) if number != asked}
    for number, reasons in stopped.items():
        meetings[number].watch(pytest.fail, reasons.append)
    meetings[asked].stop()
    deadline = time.monotonic() + 10
    while not all(stopped.values()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(why == [f"process {asked} was asked to stop"] for why in stopped.values())


def test_process_0_goes_last():
    meetings = meet(places(3))
    started = time.monotonic()

    def go(meeting, after):
        time.sleep(after)
        meeting.fail("the same everywhere")
        meeting._lines[0].close()

    together([lambda: meetings[0].outlast(10)] + [lambda m=m: go(m, 0.3) for m in meetings[1:]])
    assert 0.3 <= time.monotonic() - started < 5
    meetings = meet(places(2))
    started = time.monotonic()
    meetings[0].outlast(0.3)
    assert 0.3 <= time.monotonic() - started < 5


def test_who_leaves_after_its_work_ends_nobody():
    meetings = meet(places(3))
    ended = []
    for meeting in meetings:
        meeting.watch(lambda *said: ended.append(said), ended.append)
    for meeting in (meetings[2], meetings[0], meetings[1]):
        meeting.leave()
    deadline = time.monotonic() + 10
    while any(t.name == "meeting" for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not ended


def test_who_watches_is_told_what_is_waited_for(monkeypatch):
    monkeypatch.setattr(waiting, "FIRST_NOTICE", 0)
    told = []
    zero, one = places(1, of=2)[0], places(2)[1]
    meet([zero], 1, told.append)
    assert len(told) == 1 and "1 of 2 processes came" in told[0] and "of 1 s waited" in told[0]
    meet([one], 1, told.append)
    assert "waiting for process 0 at" in told[1]
