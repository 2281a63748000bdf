"""A run that is killed, however often and wherever, ends bit for bit as an unbroken one."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests import dying_train, small_run
from yolos_jax import checkpoint, checkpoint_files

SEED = int(os.environ.get("SEED", "0"))
KILLS = int(os.environ.get("KILLS", "4"))  # `make test-kills`: 20
OTHERS_END_SECONDS = 60  # for the other processes to notice that one of them is gone
STOP_SECONDS = 30  # from SIGTERM to the end

# Places, how often a process may have come there, and about how many seconds it stays there. An
# attempt that begins late comes there less often, and is not killed then.
PLACES = {
    "anywhere": (1, 12.0),
    "joining": (1, 0.5),
    "starting": (1, 0.5),
    "restoring": (1, 0.2),
    "compiling": (1, 2.0),
    "reading": (3, 0.3),
    "stepping": (5, 0.05),
    "evaluating": (2, 0.4),
    "saving": (3, 0.4),
    "hashing": (3, 0.02),
}


class Kill:
    """A place and time to die, drawn at random."""

    def __init__(self, rng: np.random.Generator, processes: int, places: dict = PLACES):
        self.place = str(rng.choice(list(places)))
        most, seconds = places[self.place]
        self.number = int(rng.integers(1, most + 1))
        self.seconds = round(float(rng.uniform(0, seconds)), 4)
        self.signal = signal.Signals(int(rng.choice([signal.SIGTERM, signal.SIGKILL])))
        self.victim = int(rng.integers(processes))

    def __str__(self) -> str:
        return (
            f"{self.signal.name} to process {self.victim}, {self.seconds} s after {self.place} "
            f"for the {self.number}. time"
        )

    def plan(self) -> dict:
        return {
            "place": self.place,
            "number": self.number,
            "seconds": self.seconds,
            "signal": int(self.signal),
        }


class Chain:
    """Attempts at one run after another, some of them killed."""

    def __init__(self, folder: Path, flags: list[str], processes: int, cache: Path):
        self.folder, self.flags, self.processes, self.cache = folder, flags, processes, cache
        self.workdir = folder / "run"
        self.attempts = 0

    def attempt(self, kill: Kill | None = None) -> bool:
        """Runs until the end or until it is killed; returns whether it came to the end.

        Raises:
          AssertionError: the processes did not end as they should.
        """
        self.attempts += 1
        noted = self.folder / "batches" / str(self.attempts)
        noted.mkdir(parents=True)
        plans = [{"batches": str(noted / f"{i}.jsonl")} for i in range(self.processes)]
        if kill is not None:
            plans[kill.victim] |= kill.plan()
            if kill.place == "compiling":
                # To have something to compile. One process' next attempts find what it left.
                self.cache = self.folder / f"compiled {self.attempts}"
        flags = [*self.flags, f"--workdir={self.workdir}", f"--config.compile.cache={self.cache}"]
        folder = self.folder / "printed" / str(self.attempts)
        with dying_train.Group(folder, flags, plans) as group:
            first = group.members[kill.victim if kill else 0]
            first.join(small_run.PATIENCE)
            ended = time.monotonic()
            codes = group.wait(OTHERS_END_SECONDS)
            waited = time.monotonic() - ended
            printed = group.printed()
        assert None not in codes, f"{codes} after {waited:.0f} s\n{printed}"
        if kill is not None and kill.signal == signal.SIGKILL and -signal.SIGKILL in codes:
            print(f"    codes {codes}, the others ended {waited:.1f} s later", flush=True)
            return False
        assert codes == [0] * self.processes, f"{codes}\n{printed}"
        summaries = [json.loads(s) for s in printed.splitlines() if s.startswith('{"AP"')]
        return bool(summaries) and summaries[0]["finished"]

    def state(self) -> tuple[int, float]:
        """Newest step that can be loaded, and the best AP of those; -1 without any."""
        folder = checkpoint_files.absolute(self.workdir / checkpoint.FOLDER)
        if not checkpoint_files.steps(folder):
            return -1, -1.0
        last = checkpoint.load_params(self.workdir, prefer="last")[1]
        best = checkpoint.load_params(self.workdir, prefer="best")[1]
        return last["step"], -1.0 if best["ap"] is None else best["ap"]


def assert_equal_runs(left: Path, right: Path) -> None:
    """Compares all that two runs leave, bit for bit."""
    assert small_run.metrics(left) == small_run.metrics(right)
    first, second = small_run.arrays(left), small_run.arrays(right)
    assert first.keys() == second.keys()
    assert {path[0] for path in first} == {"params", "optimizer", "ema"}
    for path, array in first.items():
        assert array.tobytes() == second[path].tobytes(), path


def endure(kills: int, processes: int, folder: Path, pictures: Path, places: dict, **changes):
    """Kills runs until there were so many kills, and compares each that ends with one unbroken."""
    rng = np.random.default_rng(SEED)
    cache = folder / "compiled"
    flags = small_run.flags(pictures, folder, **changes)
    unbroken = Chain(folder / "unbroken", flags, processes, cache)
    assert unbroken.attempt()
    expected = small_run.batches(unbroken.folder / "batches")
    done, chains = 0, 0
    while done < kills:
        chains += 1
        chain = Chain(folder / f"chain {chains}", flags, processes, cache)
        before, finished = (-1, -1.0), False
        while not finished:
            kill = Kill(rng, processes, places) if done < kills else None
            finished = chain.attempt(kill)
            after = chain.state()
            if not finished:
                done += 1
                print(f"kill {done} (seed {SEED}): {kill}; step {after[0]}", flush=True)
            assert after[0] >= before[0] and after[1] >= before[1], (before, after)
            before = after
        assert_equal_runs(unbroken.workdir, chain.workdir)
        assert small_run.batches(chain.folder / "batches") == expected


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return small_run.write_pictures(tmp_path_factory.mktemp("shapes"))


def test_three_kills(pictures, tmp_path):
    places = {"stepping": (3, 0.05), "evaluating": (1, 0.3), "saving": (2, 0.3)}
    endure(3, 1, tmp_path, pictures, places, epochs=2)


@pytest.mark.kills
def test_kills_on_two_processes(pictures, tmp_path):
    endure(KILLS, 2, tmp_path, pictures, PLACES)
