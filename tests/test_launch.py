"""A request to stop becomes a flag; a second one ends the process."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from configs import common
from yolos_jax import launch


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_becomes_a_request_once(number, capsys):
    before = signal.getsignal(number)
    with launch.Preemption() as preemption:
        assert not preemption.requested(3)
        assert signal.getsignal(number) != before
        os.kill(os.getpid(), number)
        assert preemption.requested(4) and preemption.requested(4)
        assert signal.getsignal(number) == before  # the second one acts as it always did
    assert "leaving at step 4" in capsys.readouterr().err
    assert signal.getsignal(number) == before


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
    before = signal.getsignal(signal.SIGTERM)
    with launch.Preemption() as preemption:
        assert signal.getsignal(signal.SIGTERM) == before  # jax's own
        assert [preemption.requested(7) for _ in range(3)] == [False, False, True]
    assert asked == [1, 2, 3]


def test_a_process_on_its_own_does_nothing_at_start():
    hook = sys.excepthook
    mesh = common.get_config().mesh
    launch.initialise(mesh)
    assert sys.excepthook is hook
    mesh.distributed = "maybe"
    with pytest.raises(ValueError, match="distributed is 'maybe'; expected '' or 'auto'"):
        launch.initialise(mesh)
