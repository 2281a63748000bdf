"""From costs on the device to the assignment on the device, as the step of training does it.

    python -m benchmarks.matching --out matching.json

64 images, 100 queries, COCO-like numbers of boxes. And how much of a step the device waits for the
match: the step's time beside that of the same step with an assignment that was made before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import checks, ours, report, timing
from yolos_jax import matching
from yolos_jax.step import StepShape, TrainStep

IMAGES = 64
GRID = (4, 4)  # of the little pictures: the match sees none of them
COLUMNS = {"what": "", "median_ms": ".2f", "low_ms": ".2f", "high_ms": ".2f"}
IDLE_COLUMNS = {
    "microbatches": "d", "step_ms": ".2f", "without_match_ms": ".2f", "idle": ".1%",
    "least": ".1%", "most": ".1%",
}  # fmt: skip


def measure(images: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Times of the match, whole and in parts."""
    config = ours.recipe("s", tiny=True, dtype="float32")
    train_step = ours.make_train_step(config)
    part, bucket = ours.make_part(train_step, images, GRID)
    ground_truth = part[1]
    state = train_step.init_state(jax.random.key(0), ours.draw_params(train_step.model))
    shape = StepShape(bucket, images, ground_truth.labels.shape[1])
    forward_program = train_step.compile(shape)["forward"]
    forward = forward_program(state.params, state.step, ours.microbatch(part))
    jax.block_until_ready(forward.outputs)
    # The host's copy of an array is kept by jax: every round needs new costs.
    fresh = [
        forward_program(state.params, state.step, ours.microbatch(part)) for _ in range(rounds + 2)
    ]
    jax.block_until_ready([each.outputs for each in fresh])

    costs = config.matcher
    weights = matching.MatcherWeights(costs.class_cost, costs.l1_cost, costs.giou_cost)
    cost = np.asarray(matching.costs(jax.device_get(forward.outputs), _host(ground_truth), weights))
    valid = np.asarray(ground_truth.target_valid)
    check(np.asarray(train_step.match(fresh.pop(), ground_truth)), cost, valid)
    waiting = iter(fresh)
    seconds = timing.interleaved(
        {
            "match, device to device": lambda: jax.block_until_ready(
                train_step.match(next(waiting), ground_truth)
            ),
            "scipy alone": lambda: matching.assign_host(cost, valid),
        },
        rounds,
    )
    for what, values in seconds.items():
        low, middle, high = (1000 * value for value in timing.spread(values))
        yield {"what": what, "median_ms": middle, "low_ms": low, "high_ms": high, "images": images}


def idle_share(
    train_step: TrainStep, images: int, grid: tuple[int, int], microbatches: int, steps: int
) -> dict[str, Any]:
    """How much of a step goes by waiting for the match.

    Args:
      train_step: with matcher.where 'host'.
      images: of a step.
      grid: rows and columns of patches of every picture.
      microbatches: that the step is divided into.
      steps: that are timed in one go, three times with the match and three times without.

    Returns:
      As ``waiting``.
    """
    made = [ours.make_part(train_step, images // microbatches, grid) for _ in range(microbatches)]
    state = train_step.init_state(jax.random.key(0), ours.draw_params(train_step.model))
    return waiting(train_step, state, [part for part, _ in made], made[0][1], steps)


def waiting(
    train_step: TrainStep, state: Any, parts: Sequence[Any], bucket: Any, steps: int
) -> dict[str, Any]:
    """How much of a step goes by waiting for the match; arguments of the step and ``idle_share``.

    Uses the state up.

    Returns:
      ``step_ms``, ``without_match_ms`` and ``idle``, the share of the step, medians of the
      repetitions; ``least`` and ``most``, the extremes of their shares.
    """
    match, known = train_step.match, {}

    def remember(forward: Any, targets: Any) -> Any:
        known[id(targets)] = match(forward, targets)
        return known[id(targets)]

    def ready(forward: Any, targets: Any) -> Any:
        del forward
        return known[id(targets)]

    def run(function: Callable[[Any, Any], Any], count: int) -> float:
        nonlocal state
        train_step.match = function
        started = time.perf_counter()
        for _ in range(count):
            state, metrics = train_step(state, parts, bucket, 1e-6)
        jax.block_until_ready(metrics)
        return (time.perf_counter() - started) / count

    try:
        run(remember, 1)
        run(ready, 1)
        pairs = [(run(match, steps), run(ready, steps)) for _ in range(3)]
    finally:
        train_step.match = match
    step, without = np.median(np.array(pairs), axis=0)
    shares = [1 - ready_s / match_s for match_s, ready_s in pairs]
    return {
        "microbatches": len(parts),
        "step_ms": 1000 * step,
        "without_match_ms": 1000 * without,
        "idle": 1 - without / step,
        "least": min(shares),
        "most": max(shares),
    }


def _host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def check(matched_query: np.ndarray, cost: np.ndarray, valid: np.ndarray) -> None:
    """The assignment costs what the cheapest one costs."""

    def total(query: np.ndarray) -> float:
        image, target = np.nonzero(query[0] >= 0)
        return float(cost[0, image, target, query[0, image, target]].sum())

    expected, _ = matching.assign_host(cost, valid)
    checks.same("pairs", (matched_query >= 0).sum(), (expected >= 0).sum(), most=0)
    checks.same("cost of the assignment", total(matched_query), total(expected), most=1e-2)


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    images, rounds = (8, 3) if arguments.quick else (arguments.images, arguments.rounds)
    rows = list(measure(images, rounds))
    print(report.table(rows, COLUMNS))
    train_step = ours.make_train_step(ours.recipe("s", tiny=True, dtype="float32"))
    idle = [idle_share(train_step, images, GRID, parts, rounds) for parts in (1, 2)]
    device = jax.devices()[0]
    print(f"\nshare of a tiny model's step spent waiting, on {device.device_kind}")
    if device.platform == "cpu":
        print("(here host and device are the same cores: no estimate for an accelerator)")
    print(report.table(idle, IDLE_COLUMNS))
    report.write(arguments.out, "matching", rows + idle, device=device.device_kind)


if __name__ == "__main__":
    main()
