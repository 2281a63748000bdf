"""Runs that are asked to stop, or that hang, in every phase, on one process and on two."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import pytest

from tests import dying_train, small_run
from tests.slow_phase import COMPILER, PATIENCE, PHASES

pytestmark = pytest.mark.slow
STOP_SECONDS = 30  # from SIGTERM to the end of all processes, on a machine that is theirs
ASLEEP = 2.0  # seconds that a phase takes longer; jax looks for a signal once a second
WATCHED = 3  # seconds that a phase may take before the watchdog speaks
CODES = {1: 0, 2: 143}  # mesh.stopped_code, by the number of processes
CHANGES = {"checkpoint.every_steps": 0, "checkpoint.keep_last": 99, "log.pictures": 2}


def busy():
    """How many times longer things take on a machine that is not ours alone."""
    return max(os.getloadavg()[0] / os.cpu_count(), 1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return small_run.write_pictures(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


def saved(workdir):
    """The steps of the checkpoints there."""
    return sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


def stop_in(phase, flags, folder, count, asleep=ASLEEP):
    """Sends SIGTERM to the last process when the first is in a phase; all must exit alike."""
    plans = [{"prolong": (phase, asleep)}] * count
    with dying_train.Group(folder, flags, plans) as group:
        group.wait_for(0, f"now {phase}")
        group.signal(signal.SIGTERM, count - 1)
        started = time.monotonic()
        codes = group.wait(20 * STOP_SECONDS)
        seconds = time.monotonic() - started
    finished = '"finished": true' in group.output(0)
    assert codes == [0 if finished else CODES[count]] * count, group.printed()
    assert "persistent compilation cache" not in group.printed()  # which those of one process share
    assert seconds < STOP_SECONDS * busy()
    print(f"{phase} on {count}: all had ended {seconds:.1f} s after SIGTERM, load {busy():.1f}")
    return group.output(0)


@pytest.mark.parametrize("count", [1, 2])
def test_a_request_to_stop_saves_once_and_the_same_command_goes_on(
    pictures, cache, tmp_path, count
):
    workdir = tmp_path / "run"
    changes = CHANGES | {"compile.cache": cache, "mesh.stopped_code": CODES[count]}
    flags = small_run.flags(pictures, workdir, **changes)
    kept = []
    for phase in PHASES:  # drawing comes last: only then there is something to draw
        text = stop_in(phase, flags, tmp_path / phase, count)
        before, kept = kept, saved(workdir)
        stopped = re.findall(r"stopped at step (\d+) of 12 as asked and saved", text)
        assert kept[: len(before)] == before, phase
        if phase == "preparing" and (count == 1 or not stopped):  # jax listens a little later
            assert "asked to stop, before the first step; nothing to save" in text
            assert not workdir.exists()
        elif phase == "drawing":  # After the last step: it is as quick to finish.
            assert json.loads(text.splitlines()[-1])["finished"] and not stopped
        else:
            assert len(stopped) == 1 and "asked to stop, leaving at step" in text, text
            assert kept[-1] == int(stopped[0])
    lines = small_run.metrics(workdir)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 13))
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [3, 6, 9, 12]


@pytest.mark.parametrize("count", [1, 2])
def test_a_request_to_stop_does_not_wait_for_the_compiler(pictures, tmp_path, count):
    changes = CHANGES | {"mesh.stopped_code": CODES[count]}
    flags = small_run.flags(pictures, tmp_path / "run", **changes)
    text = stop_in(COMPILER, flags, tmp_path / "printed", count, asleep=PATIENCE)
    assert "stopped at step 0 of 12 as asked and saved" in text
    assert json.loads(text.splitlines()[-1])["step"] == 0
    assert saved(tmp_path / "run") == [0]


@pytest.mark.parametrize("leave", [True, False])
def test_a_phase_that_hangs_is_written_down_and_the_run_ends_or_goes_on(
    pictures, cache, tmp_path, leave
):
    workdir = tmp_path / "run"
    changes = CHANGES | {"epochs": 1, "compile.cache": cache}
    changes |= {"log.watchdog_seconds": WATCHED, "log.watchdog_exit": leave}
    plans = [{"watch_only": ("saving",)} for _ in range(2)]
    plans[0]["hang"] = ("saving", workdir / "watchdog_0.txt")
    flags = small_run.flags(pictures, workdir, **changes)
    with dying_train.Group(tmp_path / "printed", flags, plans) as group:
        codes = group.wait(small_run.PATIENCE)
    assert codes == ([1, 1] if leave else [0, 0]), group.printed()
    written = (workdir / "watchdog_0.txt").read_text()
    assert f"saving is not done after {WATCHED} s: step 3" in written
    assert "slow_phase.py" in written and written.count("is not done") == 1
    for member in range(2) if leave else [0]:
        assert f"saving is not done after {WATCHED} s" in group.output(member)
    assert ("it went on after" in group.output(0)) == (not leave)


@pytest.mark.parametrize("member", [0, 1])
def test_when_one_is_killed_the_other_says_so_and_goes(pictures, cache, tmp_path, member):
    flags = small_run.flags(pictures, tmp_path / "run", **{"compile.cache": cache})
    plans = [{"prolong": ("reading", 1)}] * 2
    with dying_train.Group(tmp_path / "printed", flags, plans) as group:
        group.wait_for(0, "now reading")
        group.signal(signal.SIGKILL, member)
        started = time.monotonic()
        codes = group.wait(60 * busy())
        assert time.monotonic() - started < 15 * busy()
    assert codes[1 - member] == 1
    assert re.search(rf"this run is over: process {member} .*is gone", group.printed())
