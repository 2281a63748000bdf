"""Times of tasks that take turns, and what may be said of them.

On a shared machine the load changes from second to second. Tasks that take turns see the same load,
so the ratio of a round means something where the times alone do not.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# Torch's OpenMP threads go on spinning for a while when their work is done: what runs next on the
# same cores would run beside them.
PAUSE = 0.3
AHEAD = 2  # runs that a device has not finished when the next one is started


def interleaved(
    tasks: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1, pause: float = 0.0
) -> dict[str, list[float]]:
    """Runs every task in every round.

    Args:
      tasks: by name; each returns when its work is done, on the device too.
      rounds: that are timed; the order within a round alternates.
      warmup: rounds before them.
      pause: seconds before each task; PAUSE where another library's threads ran before it.

    Returns:
      Seconds of every round by task.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(warmup + rounds):
        order = list(tasks) if number % 2 else list(reversed(tasks))
        for name in order:
            time.sleep(pause)
            started = time.perf_counter()
            tasks[name]()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    low, middle, high = np.percentile(np.asarray(values, np.float64), (25, 50, 75))
    return float(low), float(middle), float(high)


def speedup(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """How many times as fast ours is, round by round.

    Args:
      ours: seconds of every round.
      theirs: of the same rounds.

    Returns:
      ``speedup`` (median of the rounds' ratios), its quartiles ``low`` and ``high``, and the
      median seconds ``ours_s`` and ``theirs_s``.

    Raises:
      ValueError: when the rounds are not the same.
    """
    if len(ours) != len(theirs) or not len(ours):
        raise ValueError(f"{len(ours)} rounds of ours and {len(theirs)} of theirs: not the same")
    low, middle, high = spread(np.asarray(theirs) / np.asarray(ours))
    return {
        "speedup": middle,
        "low": low,
        "high": high,
        "ours_s": spread(ours)[1],
        "theirs_s": spread(theirs)[1],
    }


def seconds_each(
    task: Callable[[], Any], *, at_least: float, most: int = 50, least: int = 3
) -> float:
    """Mean seconds of a task that is run again and again, after one run that does not count.

    For devices that nobody shares. A task may return before the device is done; then it returns
    something with ``block_until_ready``, and the next one is prepared while the device works.

    Args:
      task: returns what tells when it is done, or None when it has waited itself.
      at_least: seconds to go on for.
      most: runs at most.
      least: runs at least.
    """
    _wait(task())
    started, count = time.perf_counter(), 0
    unfinished: collections.deque[Any] = collections.deque()
    while count < most and (count < least or time.perf_counter() - started < at_least):
        unfinished.append(task())
        count += 1
        if len(unfinished) > AHEAD:  # or hours of work would be queued in a second
            _wait(unfinished.popleft())
    while unfinished:
        _wait(unfinished.popleft())
    return (time.perf_counter() - started) / count


def _wait(done: Any) -> None:
    if done is not None:
        done.block_until_ready()
