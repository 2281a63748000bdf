"""A work directory has one run at a time, and a run that is gone has none."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from tests.processes import ROOT
from yolos_jax import claim
from yolos_jax.claim import Claim

HOLD = """
import sys, time
from pathlib import Path
from yolos_jax.claim import Claim
held = Claim()
held.take(Path(sys.argv[1]))
print("taken", flush=True)
time.sleep(600)
"""


def test_a_folder_that_another_process_holds_is_refused_until_that_is_killed(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "taken\n"
            holder = re.escape(f"{folder} is in use by another run ({socket.gethostname()}, pid ")
            with Claim() as mine, pytest.raises(ValueError, match=f"^{holder}{other.pid}.: .*$"):
                mine.take(folder)
        finally:
            other.send_signal(signal.SIGKILL)
            other.wait()
    with Claim() as mine:
        mine.take(folder)
        assert (folder / claim.FILE).read_text().endswith(f", pid {os.getpid()}\n")
    with Claim() as next_one:
        next_one.take(folder)


def test_the_lock_of_a_host_that_is_lost_is_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(claim, "LOST_HOST_SECONDS", 30)
    with Claim() as other:
        other.take(tmp_path)
        (tmp_path / claim.FILE).write_text("elsewhere, pid 1\n")
        monkeypatch.setattr("time.sleep", lambda seconds: other.__exit__())
        with Claim() as mine:
            mine.take(tmp_path)
        assert "is held by another run (elsewhere, pid 1), perhaps of" in capsys.readouterr().err
    monkeypatch.setattr(claim, "LOST_HOST_SECONDS", 0)
    with Claim() as other, Claim() as mine:
        other.take(tmp_path)
        (tmp_path / claim.FILE).write_text("elsewhere, pid 1\n")
        with pytest.raises(ValueError, match=r"\(elsewhere, pid 1\): .* is lost, remove run.lock"):
            mine.take(tmp_path)
        (tmp_path / claim.FILE).unlink()
        mine.take(tmp_path)


def test_a_file_system_without_locks_is_used_without(tmp_path, monkeypatch):
    def none_here(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none_here)
    with Claim() as one, Claim() as other:
        one.take(tmp_path)
        other.take(tmp_path)
