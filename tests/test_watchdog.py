"""A phase that hangs is written down once, with what it was; others leave no trace."""

from __future__ import annotations

import os
import threading
import time

from yolos_jax.watchdog import Watchdog


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_a_phase_that_hangs_is_dumped_once_and_goes_on(tmp_path, capfd):
    path = tmp_path / "watchdog_0.txt"
    with Watchdog(0.3, path) as watchdog:
        for step in range(3):  # together they take longer than one may
            watchdog.watch("reading", step=step)
            time.sleep(0.15)
        assert not path.exists()
        watchdog.watch("step", number=7, bucket=(64, 8, 8), image_ids=[3, 9])
        wait_for(lambda: path.exists() and path.read_text().endswith("\n\n"))
        time.sleep(0.7)
        watchdog.watch("reading", step=8)
    text = path.read_text()
    assert text.count("watchdog, ") == 1
    assert f"pid {os.getpid()}: step is not done after 0.3 s: " in text
    assert "number 7, bucket (64, 8, 8), image_ids [3, 9]" in text
    assert "test_watchdog.py" in text and "(most recent call first)" in text
    printed = capfd.readouterr().err
    assert "number 7" in printed and "test_watchdog.py" in printed and str(path) in printed
    assert "it went on after" in printed


def test_every_hanging_phase_is_dumped(tmp_path):
    path = tmp_path / "watchdog_0.txt"
    with Watchdog(0.1, path) as watchdog:
        for phase in ("saving", "evaluating"):
            watchdog.watch(phase)
            wait_for(lambda name=phase: path.exists() and f": {name} is" in path.read_text())
    assert path.read_text().count("watchdog, ") == 2


def test_the_run_can_be_ended(tmp_path):
    ended = []
    with Watchdog(0.1, tmp_path / "watchdog_0.txt", ended.append) as watchdog:
        watchdog.watch("step", number=3)
        wait_for(lambda: ended)
        time.sleep(0.3)
    assert ended == ["step is not done after 0.1 s: number 3"]


def test_a_folder_that_cannot_be_written_to_still_gets_the_stacks_on_stderr(tmp_path, capfd):
    ended = []
    with Watchdog(0.1, tmp_path / "missing" / "file.txt", ended.append) as watchdog:
        watchdog.watch("step", number=3)
        wait_for(lambda: ended)
    assert "(most recent call first)" in capfd.readouterr().err


def test_resting_and_off_dump_nothing(tmp_path):
    before = threading.active_count()
    path = tmp_path / "watchdog_0.txt"
    with Watchdog(0, path) as off, Watchdog(0.1, path) as resting:
        off.watch("step")
        resting.watch("step")
        resting.rest()
        time.sleep(0.3)
    assert not path.exists()
    assert threading.active_count() == before
