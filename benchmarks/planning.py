"""How long it takes to plan an epoch of COCO's size on one core.

python -m benchmarks.planning --out planning.json
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

from benchmarks import report
from benchmarks.coco_like import coco_like
from configs import yolos_s
from yolos_jax.data.plan import Recipe, choose_buckets, make_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="", help="JSON file to write")
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--boxes", type=int, default=860_000)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    config = yolos_s.get_config()
    recipe = Recipe.from_config(config, config.model.patch_size)
    index = coco_like(arguments.images, arguments.boxes)
    prefix = 1 + config.model.num_queries
    shape = (config.buckets.count, config.buckets.multiple, prefix)
    buckets = choose_buckets(index, recipe, *shape)
    plan = make_plan(index, recipe, buckets, seed=0, epoch=0, batch_size=64)
    tasks = {
        "choose buckets, once per run": lambda: choose_buckets(index, recipe, *shape),
        "plan, once per epoch": lambda: make_plan(
            index, recipe, buckets, seed=0, epoch=1, batch_size=64
        ),
        "fingerprint": plan.fingerprint,
    }
    print(f"{len(index)} images, {len(index.labels)} boxes; seconds, best of five, one core")
    rows = []
    for name, task in tasks.items():
        rows.append({"task": name, **_seconds(task)})
        print(f"{name:30s} {rows[-1]['wall']:.2f} wall, {rows[-1]['cpu']:.2f} processor")
    report.write(arguments.out, "planning", rows)


def _seconds(task: Callable[[], object]) -> dict[str, float]:
    times = []
    for _ in range(5):
        wall, cpu = time.perf_counter(), time.process_time()
        task()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return {"wall": min(wall for wall, _ in times), "cpu": min(cpu for _, cpu in times)}


if __name__ == "__main__":
    main()
