"""How a run starts alone, is asked to stop, and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from configs import common
from tests.processes import ROOT
from yolos_jax import launch


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_becomes_a_request_once(number, capsys):
    before = signal.getsignal(number)
    with launch.Preemption() as preemption:
        preemption.ready()
        assert not preemption.requested(3)
        assert signal.getsignal(number) != before
        os.kill(os.getpid(), number)
        assert preemption.requested(4) and preemption.requested(4)
        assert signal.getsignal(number) == before  # the second one acts as it always did
    said = capsys.readouterr().err
    assert "leaving at step 4 when it is saved; asked again it ends at once, unsaved" in said
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_there_is_a_state_a_signal_ends_the_start(number):
    before = signal.getsignal(number)
    with pytest.raises(launch.Stopped, match="asked to stop"), launch.Preemption():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_that_a_library_swallowed_is_not_lost(number, processes, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with launch.Preemption() as preemption:
        with pytest.raises(launch.Stopped):
            os.kill(os.getpid(), number)
        with pytest.raises(launch.Stopped):
            preemption.ready()
        assert preemption.early


def test_without_with_it_listens_to_the_end():
    before = signal.getsignal(signal.SIGTERM)
    preemption = launch.Preemption().listen()
    preemption.ready()
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.requested(1)
    assert signal.getsignal(signal.SIGTERM) == before


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(RuntimeError), launch.Preemption():
        raise RuntimeError
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_several_processes_agree_by_counting_questions(monkeypatch):
    asked = []

    def reached(question):
        asked.append(question)
        return question == 3

    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.experimental.multihost_utils.reached_preemption_sync_point", reached)
    before, interrupt = (signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT))
    with launch.Preemption() as preemption:
        preemption.ready()
        listening = signal.getsignal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) == interrupt
        assert [preemption.requested(7) for _ in range(3)] == [False, False, True]
    assert asked == [1, 2, 3]
    assert signal.getsignal(signal.SIGTERM) == listening  # jax's own: nothing is put in its place
    signal.signal(signal.SIGTERM, before)


def test_listening_begins_without_jax():
    code = "import sys, yolos_jax.preemption; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_an_end_waits_for_no_thread():
    code = "import threading; from yolos_jax import launch\n"
    code += "threading.Thread(target=threading.Event().wait).start(); launch.end('disk full')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, check=False, timeout=120, capture_output=True)
    assert (done.returncode, done.stderr) == (1, b"disk full\n")


def test_a_process_on_its_own_does_nothing_at_start(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("it is alone")

    monkeypatch.setattr("jax.distributed.initialize", never)
    hook = sys.excepthook
    launch.initialise(common.get_config().mesh, {})
    assert sys.excepthook is hook


def test_alone_an_error_is_a_line_and_a_code():
    with pytest.raises(SystemExit) as stop:
        launch.fail("train.py: no data")
    assert stop.value.code == "train.py: no data"  # printed, exit code 1


@pytest.mark.parametrize("number", [0, 1])
def test_who_is_ending_cannot_be_asked_to_stop(number, monkeypatch):
    def stopped_meanwhile(seconds):
        raise launch.Stopped("asked to stop")

    def ended(code=1):
        raise SystemExit(code)

    said = []
    meeting = SimpleNamespace(
        place=SimpleNamespace(number=number), fail=said.append, outlast=stopped_meanwhile
    )
    monkeypatch.setattr("time.sleep", stopped_meanwhile)
    monkeypatch.setattr(launch, "_exit", ended)
    with pytest.raises(SystemExit) as stop:
        launch._Together(meeting, 0).fail("no data")
    assert (stop.value.code, said) == (1, ["no data"])
