"""Our side of ``benchmarks.gpu`` over a COCO-like mix of sizes, in batches of the plan.

Every bucket's program is timed on its own and weighted by how often the plan takes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from benchmarks import flops, gpu_ours, mix, ours, pictures, timing, turns
from benchmarks.gpu_room import fitting, with_fewer
from yolos_jax import mesh as mesh_lib
from yolos_jax.batch import Batch
from yolos_jax.models.build import build_model
from yolos_jax.step import StepShape

TOGETHER = 8  # programs compiled at once


def train(
    model: str, images: int, seconds: float, tiny: bool, lock: str
) -> Iterator[dict[str, Any]]:
    """Images per second of a training step; arguments as in ``gpu_ours.train``."""
    yield from with_fewer(
        lambda images: _train(gpu_ours.config_of(model, tiny), images, seconds, tiny, lock), images
    )


def _train(
    config: Any, images: int, seconds: float, tiny: bool, lock: str
) -> Iterator[dict[str, Any]]:
    train_step = ours.make_train_step(config)
    params = ours.draw_params(train_step.model)
    recipe = gpu_ours.shrunk(config, tiny)
    plan = mix.training_plan(recipe, images, _pictures(images, tiny))
    largest = max(plan.buckets, key=lambda bucket: bucket.patches)
    fits = fitting(train_step, (largest.rows, largest.cols), images)
    if fits < images:
        images = fits
        plan = mix.training_plan(recipe, images, _pictures(images, tiny))
    numbers = np.unique(plan.bucket).tolist()
    shapes = [StepShape(plan.buckets[n], images, pictures.MOST_BOXES) for n in numbers]
    side, times = config.model.patch_size, {}
    targets = pictures.targets(np.random.default_rng(0), images, ours.NUM_CLASSES)
    batches = {number: _noise(plan, number, side) for number in numbers}
    with turns.shared(lock), ThreadPoolExecutor(TOGETHER) as pool:
        list(pool.map(train_step.compile, shapes))
    with turns.alone(lock):
        run = gpu_ours.Steps(train_step, params)
        for number, on_host in batches.items():
            bucket = plan.buckets[number]
            part = mesh_lib.put_batch((on_host, targets), train_step.mesh)
            times[number] = timing.seconds_each(
                lambda part=part, bucket=bucket: run.take(part, bucket),
                at_least=seconds / 2,
                most=1000,
            )
            del part
    yield _of_mix(plan, times, config, flops.training_flops)


def forward(
    model: str, images: int, seconds: float, tiny: bool, lock: str
) -> Iterator[dict[str, Any]]:
    """Images per second of the forward pass; arguments as in ``gpu_ours.train``."""
    config = gpu_ours.config_of(model, tiny)
    built = build_model(config.model, ours.NUM_CLASSES)
    params = ours.draw_params(built)
    count = gpu_ours.picture_count(tiny)
    plan = mix.evaluation_plan(gpu_ours.shrunk(config, tiny), images, count)
    numbers = np.unique(plan.bucket).tolist()
    batches = {number: _noise(plan, number, config.model.patch_size) for number in numbers}

    def compiled(number: int) -> Any:
        program = ours.make_forward(built, config, plan.buckets[number])
        return program.lower(params, batches[number]).compile()

    with turns.shared(lock), ThreadPoolExecutor(TOGETHER) as pool:
        params = jax.device_put(params)
        programs = dict(zip(numbers, pool.map(compiled, numbers), strict=True))
    times = {}
    with turns.alone(lock):
        for number, program in programs.items():
            batch = jax.device_put(batches[number])
            times[number] = timing.seconds_each(
                lambda program=program, batch=batch: program(params, batch).pred_boxes,
                at_least=seconds / 2,
                most=1000,
            )
    yield _of_mix(plan, times, config, flops.forward_flops)


def _pictures(images: int, tiny: bool) -> int:
    return max(gpu_ours.picture_count(tiny), 4 * images)


def _of_mix(plan: Any, times: dict[int, float], config: Any, count: Any) -> dict[str, Any]:
    """Images per second of the plan, whose buckets take so long each."""
    total = sum(times[number] for number in plan.bucket.tolist())
    grids = plan.grid[plan.rows >= 0]
    rate = len(grids) / total
    mean = float(np.mean(count(config.model, ours.NUM_CLASSES, grids.prod(axis=1))))
    longest = max((plan.buckets[number] for number in times), key=lambda bucket: bucket.patches)
    return {
        "what": "mix",
        "images": plan.batch_size,
        "images_per_s": rate,
        "mfu": rate * mean / flops.H200_PEAK if gpu_ours.on_gpu() else None,
        "padding": plan.waste(),
        "programs": len(times),
        "peak_bytes": ours.peak_bytes(),
        **ours.surroundings(config, longest),
    }


def _noise(plan: Any, number: int, side: int) -> Any:
    """A batch of a bucket: the grids of one of its steps, pixels without meaning."""
    step = int(np.flatnonzero(plan.bucket == number)[0])
    bucket, grid = plan.buckets[number], plan.grid[step]
    shape = (len(grid), bucket.patches, 3 * side**2)
    patches = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return Batch(patches, grid.astype(np.int32), np.ones(len(grid), bool))
