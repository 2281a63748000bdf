"""The command for a card, without one: its locks, its processes, and how it ends."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_cases, gpu_runner, isolated

ROOT = Path(__file__).resolve().parent.parent


def holder(lock: str, kind: str, seconds: float, count: int):
    """Takes a lock again and again; yields when it had it."""
    from benchmarks import turns

    for _ in range(count):
        with getattr(turns, kind)(lock):
            began = time.time()
            time.sleep(seconds)
            yield {"kind": kind, "began": began, "ended": time.time()}


def test_whoever_wants_to_be_alone_is_not_starved(tmp_path):
    lock = str(tmp_path / "lock")
    target, many = "tests.test_benchmarks_gpu_run:holder", 12
    sharing = {"lock": lock, "kind": "shared", "seconds": 0.25, "count": many}
    jobs = [isolated.Job(target, sharing) for _ in range(3)]
    time.sleep(1.5)  # from here on the lock is hardly ever free
    jobs.append(isolated.Job(target, {**sharing, "kind": "alone", "count": 1}))
    rows = []
    for job in jobs:
        found, error = job.result(timeout=60)
        assert not error
        rows += found
    (alone,) = [row for row in rows if row["kind"] == "alone"]
    others = [row for row in rows if row["kind"] == "shared"]
    assert len(others) == 3 * many
    assert all(row["ended"] <= alone["began"] or row["began"] >= alone["ended"] for row in others)
    assert sum(row["began"] >= alone["ended"] for row in others) >= 2  # it did not come last
    spans = sorted((row["began"], row["ended"]) for row in others)
    assert any(a[1] > b[0] for a, b in itertools.pairwise(spans))  # they did share


def sleeper(seconds: float, note: str):
    """Starts a process that sleeps, says which, and sleeps."""
    child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({seconds})"])
    yield {"child": child.pid, "pid": os.getpid(), "note": note}
    time.sleep(seconds)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds: float = 30) -> bool:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if condition():
            return True
        time.sleep(0.1)
    return False


def test_a_process_ends_with_those_that_it_started():
    job = isolated.Job("tests.test_benchmarks_gpu_run:sleeper", {"seconds": 100, "note": ""})
    rows, error = job.result(timeout=8)
    assert error == "ended after 8 s" and len(rows) == 1
    assert wait_until(lambda: not is_running(rows[0]["child"]))


# Two cases of which one ends and the other sleeps, in the place of those of a card.
STAND_INS = """
import sys
from benchmarks import gpu, gpu_cases, gpu_runner
from benchmarks.gpu_cases import Case

def cases(options, lock):
    rows = "tests.test_benchmarks:two_rows_and_an_error"
    sleep = "tests.test_benchmarks_gpu_run:sleeper"
    return [
        Case("memory", "ours", "s", rows, {"first": 1}),
        Case("memory", "ours", "s", sleep, {"seconds": 300, "note": sys.argv.pop()}),
    ]

gpu_cases.cases = cases
gpu_runner.Runner.prepare = lambda self, sides: None
gpu.gpu_tables.summary = lambda results: ([], [])
gpu.main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_its_results_and_no_process(tmp_path, number):
    out = tmp_path / "out.json"
    command = [sys.executable, "-c", STAND_INS, "--device", "cpu", "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--lanes", "1", "--seconds=1"], cwd=ROOT, text=True, stdout=subprocess.DEVNULL
    )
    # The first of the two is on the disk while the second is running.
    assert wait_until(out.exists, 60)
    written = json.loads(out.read_text())
    assert [row["value"] for row in written["measurements"]] == [1, 2]
    assert "no third row" in written["left_out"][0]
    time.sleep(3)  # the second has started and yielded
    pids = [
        int(pid)
        for task in Path(f"/proc/{process.pid}/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]
    assert pids
    process.send_signal(number)
    code = process.wait(timeout=30)
    assert wait_until(lambda: not any(is_running(pid) for pid in pids))
    written = json.loads(out.read_text())
    assert written["measurements"][:1]
    if number == signal.SIGTERM:
        assert code == 128 + number
        assert any("SIGTERM" in line for line in written["left_out"])
        assert written["measurements"][-1]["note"] == "--seconds=1"  # what the second had yielded


def test_a_side_that_cannot_be_imported_ends_the_run(tmp_path, monkeypatch):
    (tmp_path / "ml_collections.py").write_text("raise ImportError('hidden for the test')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--sides", "ours"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "ours cannot be measured at all" in done.stdout and "hidden for the test" in done.stdout


def test_a_side_of_which_nothing_was_measured_is_named(monkeypatch):
    arguments = ["gpu", "--device", "cpu", "--budget", "100", "--lanes", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    options = gpu.read_options()
    runner = gpu_runner.Runner(options, "cache", lambda runner: None)
    target = "tests.test_benchmarks_gpu_run:fails"
    pending = [gpu_cases.Case("memory", side, "s", target, {}) for side in ("ours", "theirs")]
    runner.run(pending)
    assert runner.failures == ["nothing was measured of ours", "nothing was measured of theirs"]
    assert len(runner.left_out) == 2 and "at once" in runner.left_out[0]
    # With no time left nothing is begun.
    runner = gpu_runner.Runner(options, "cache", lambda runner: None)
    runner.deadline = time.monotonic()
    runner.run(pending)
    assert all(line.endswith("no time") for line in runner.left_out) and runner.failures


def fails():
    yield from ()
    raise ValueError("at once")
