"""What the host does in a step of training besides waiting for the device.

    python -m benchmarks.host_time --out host_time.json

A model so small that the device is done at once. The step of a run (batch to the device, learning
rate, two programs, match, metrics) takes turns with the bare programs, called with an assignment
that was made before; the difference is the host's.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from benchmarks import checks, ours, pictures, report, timing
from yolos_jax import mesh as mesh_lib
from yolos_jax import schedules
from yolos_jax.step import StepShape

IMAGES, GRID = 8, (4, 4)
SMALL = {"width": 32, "heads": 2, "mlp_width": 64, "num_queries": 8}
COLUMNS = {"what": "", "median_ms": ".2f", "low_ms": ".2f", "high_ms": ".2f"}


def measure(images: int, rounds: int) -> list[dict[str, Any]]:
    """Times of a step, of its parts, and the host's share."""
    config = ours.recipe("s", tiny=True, dtype="float32", **SMALL)
    train_step = ours.make_train_step(config)
    part, bucket = ours.make_part(train_step, images, GRID)
    host_part = jax.device_get(part)
    params = ours.draw_params(train_step.model)
    programs = train_step.compile(StepShape(bucket, images, pictures.MOST_BOXES))
    schedule = schedules.make_schedule(
        config.optimizer, steps_per_epoch=1000, total_steps=150_000, epochs=150
    )
    whole = train_step.init_state(jax.random.key(0), params)
    bare = train_step.init_state(jax.random.key(0), params)
    microbatch = ours.microbatch(part)
    lr = np.float32(schedule(0))
    forward = programs["forward"](bare.params, bare.step, microbatch)
    matched_query = jax.block_until_ready(train_step.match(forward, part[1]))

    def step() -> dict[str, float]:
        nonlocal whole
        parts = [mesh_lib.put_batch(host_part, train_step.mesh)]
        whole, metrics = train_step(whole, parts, bucket, schedule(0))
        return dict(metrics)

    def device_only() -> Any:
        nonlocal bare
        forward = programs["forward"](bare.params, bare.step, microbatch)
        bare, metrics = programs["update"](bare, microbatch, forward, matched_query, lr)
        return jax.block_until_ready(metrics)

    checks.same("loss of the first step", step()["loss"], device_only()["loss"], most=1e-4)
    seconds = timing.interleaved({"step": step, "programs alone": device_only}, rounds, warmup=3)
    seconds["host"] = list(np.subtract(seconds["step"], seconds["programs alone"]))
    rows = []
    for what, values in seconds.items():
        low, middle, high = (1000 * value for value in timing.spread(values))
        rows.append({"what": what, "median_ms": middle, "low_ms": low, "high_ms": high})
    return rows


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    rows = measure(arguments.images, 5 if arguments.quick else arguments.rounds)
    print(report.table(rows, COLUMNS))
    report.write(arguments.out, "host_time", rows, images=arguments.images)


if __name__ == "__main__":
    main()
