"""Our side of ``benchmarks.gpu``: each function runs in a process of its own and yields rows.

Pictures are arrays on the device; nothing is read. All compile first, among others, and then
measure alone (``turns``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from benchmarks import flops, matching, mix, ours, pictures, timing, turns
from benchmarks.two_programs import bytes_of, program_bytes
from yolos_jax import mesh as mesh_lib
from yolos_jax.batch import Batch
from yolos_jax.models.build import build_model
from yolos_jax.step import StepShape, TrainStep

TOGETHER = 8  # programs compiled at once
SAMPLE = 10  # queries whose predictions both sides hand out


def train(
    model: str,
    grid: Sequence[int],
    images: int,
    mixed: bool,
    seconds: float,
    tiny: bool,
    lock: str,
) -> Iterator[dict[str, Any]]:
    """Images per second of a training step: pictures of one size, or the recipe's mix.

    Args:
      model: a key of ``ours.RECIPES``.
      grid: rows and columns of patches of the pictures of one size.
      images: of a step; halved while they do not fit.
      mixed: the recipe's mix of sizes instead, in batches of the plan.
      seconds: that every program is run for.
      tiny: two blocks, for a test.
      lock: of ``turns``.
    """
    config = config_of(model, tiny)
    while True:
        try:
            if mixed:
                yield _train_mix(config, images, seconds, tiny, lock)
            else:
                yield _train_equal(config, tuple(grid), images, seconds, lock)
            return
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or images == 1:
                raise
            images //= 2


def forward(
    model: str,
    grid: Sequence[int],
    batches: Sequence[int],
    mixed: int,
    seconds: float,
    tiny: bool,
    lock: str,
) -> Iterator[dict[str, Any]]:
    """Images per second of the forward pass: batches of one size, then a mix in batches of one.

    Args:
      model, grid, seconds, tiny, lock: as in ``train``.
      batches: numbers of pictures of one size.
      mixed: pictures of a batch of the mix.
    """
    config = config_of(model, tiny)
    side = config.model.patch_size
    with turns.shared(lock):
        built = build_model(config.model, ours.NUM_CLASSES)
        params = jax.device_put(ours.draw_params(built))
        bucket = ours.bucket_of(config, *grid)
        plan = mix.evaluation_plan(shrunk(config, tiny), mixed, picture_count(tiny))
        equal = []
        for images in batches:
            found, _ = pictures.sample(images, grid[0] * side, grid[1] * side, ours.NUM_CLASSES)
            equal.append((bucket, pictures.as_sequences(found, side, bucket)))
        numbers = np.unique(plan.bucket).tolist()
        of_mix = [(plan.buckets[number], _noise(plan, number, side)) for number in numbers]
        tasks = _forward_tasks(built, config, params, [*equal, *of_mix])
    with turns.alone(lock):
        for images, task in zip(batches, tasks, strict=False):
            each = timing.seconds_each(task, at_least=seconds, most=1000)
            yield {
                "what": f"batch {images}",
                "images": images,
                "images_per_s": images / each,
                "mfu": _mfu(flops.forward_flops, config, np.prod(grid), images / each),
                "boxes": np.asarray(task()[0, 0, :SAMPLE], np.float64).tolist(),
                "peak_bytes": ours.peak_bytes(),
            }
        times = {
            number: timing.seconds_each(task, at_least=seconds / 2, most=1000)
            for number, task in zip(numbers, tasks[len(batches) :], strict=True)
        }
    yield _of_mix(plan, times, config, flops.forward_flops)


def memory(
    model: str, grid: Sequence[int], remat: str, batches: Sequence[int], tiny: bool, lock: str
) -> Iterator[dict[str, Any]]:
    """Peak bytes of a training step with some batches, ascending, since a peak does not go down."""
    config = config_of(model, tiny, remat=remat)
    train_step = ours.make_train_step(config)
    with turns.shared(lock):
        for images in sorted(batches):
            part, bucket = ours.make_part(train_step, images, tuple(grid))
            programs = train_step.compile(StepShape(bucket, images, pictures.MOST_BOXES))
            state = train_step.init_state(jax.random.key(0), ours.draw_params(train_step.model))
            needed = max(
                program_bytes(programs["forward"].compiled) + bytes_of(state.opt_state),
                program_bytes(programs["update"].compiled),
            )
            for _ in range(2):
                state, metrics = train_step(state, [part], bucket, 1e-6)
            jax.block_until_ready(metrics)
            del state, part
            peak = ours.peak_bytes()
            yield {"remat": remat, "images": images, "peak_bytes": peak, "program_bytes": needed}


def idle(
    model: str, grid: Sequence[int], images: int, steps: int, tiny: bool, lock: str
) -> Iterator[dict[str, Any]]:
    """How much of a step goes by waiting for the match, with one and with two microbatches."""
    train_step = ours.make_train_step(config_of(model, tiny))
    for microbatches in (1, 2):
        with turns.shared(lock):
            bucket = ours.bucket_of(train_step.config, *grid)
            shape = StepShape(bucket, images, pictures.MOST_BOXES, microbatches)
            train_step.compile(shape)
        with turns.alone(lock):
            found = matching.idle_share(train_step, images, tuple(grid), microbatches, steps)
        yield {"images": images, **found}


def _forward_tasks(
    built: Any, config: Any, params: Any, batches: Sequence[tuple[Any, Any]]
) -> list[Callable[[], Any]]:
    """Functions that give the boxes [A, B, Q, 4] of batches, compiled, each with its bucket."""

    def make(bucket: Any, batch: Any) -> Callable[[], Any]:
        batch = jax.device_put(batch)
        program = ours.make_forward(built, config, bucket).lower(params, batch).compile()
        return lambda: program(params, batch).pred_boxes

    with ThreadPoolExecutor(TOGETHER) as pool:
        return list(pool.map(make, *zip(*batches, strict=True)))


class _Steps:
    """Steps one after the other, with whatever batch."""

    def __init__(self, train_step: TrainStep) -> None:
        self.train_step = train_step
        params = ours.draw_params(train_step.model)
        self.state = train_step.init_state(jax.random.key(0), params)

    def take(self, part: Any, bucket: Any) -> Any:
        """The loss, [] on the device."""
        self.state, metrics = self.train_step(self.state, [part], bucket, 1e-6)
        return metrics["loss"]


def _train_equal(
    config: Any, grid: tuple[int, int], images: int, seconds: float, lock: str
) -> dict[str, Any]:
    with turns.shared(lock):
        train_step = ours.make_train_step(config)
        started = time.monotonic()
        bucket = ours.bucket_of(config, *grid)
        train_step.compile(StepShape(bucket, images, pictures.MOST_BOXES))
        compiling = time.monotonic() - started
        steps = _Steps(train_step)
    with turns.alone(lock):
        part, _ = ours.make_part(train_step, images, grid)
        loss = float(steps.take(part, bucket))
        each = timing.seconds_each(lambda: steps.take(part, bucket), at_least=seconds, most=1000)
    return {
        "what": "equal",
        "images": images,
        "images_per_s": images / each,
        "mfu": _mfu(flops.training_flops, config, np.prod(grid), images / each),
        "loss": loss,
        "peak_bytes": ours.peak_bytes(),
        "compile_s": compiling,
    }


def _train_mix(config: Any, images: int, seconds: float, tiny: bool, lock: str) -> dict[str, Any]:
    """Every bucket's step on its own, weighted by how often the plan takes it."""
    with turns.shared(lock):
        train_step = ours.make_train_step(config)
        count = max(picture_count(tiny), 4 * images)
        plan = mix.training_plan(shrunk(config, tiny), images, count)
        numbers = np.unique(plan.bucket).tolist()
        shapes = [StepShape(plan.buckets[n], images, pictures.MOST_BOXES) for n in numbers]
        with ThreadPoolExecutor(TOGETHER) as pool:
            list(pool.map(train_step.compile, shapes))
        steps = _Steps(train_step)
    side, times = config.model.patch_size, {}
    targets = pictures.targets(np.random.default_rng(0), images, ours.NUM_CLASSES)
    with turns.alone(lock):
        for number in numbers:
            bucket = plan.buckets[number]
            part = mesh_lib.put_batch((_noise(plan, number, side), targets), train_step.mesh)
            times[number] = timing.seconds_each(
                lambda part=part, bucket=bucket: steps.take(part, bucket),
                at_least=seconds / 2,
                most=1000,
            )
            del part
    return _of_mix(plan, times, config, flops.training_flops)


def _of_mix(plan: Any, times: dict[int, float], config: Any, count: Any) -> dict[str, Any]:
    """Images per second of the plan, whose buckets take so long each."""
    total = sum(times[number] for number in plan.bucket.tolist())
    grids = plan.grid[plan.rows >= 0]
    rate = len(grids) / total
    mean = float(np.mean(count(config.model, ours.NUM_CLASSES, grids.prod(axis=1))))
    return {
        "what": "mix",
        "images": plan.batch_size,
        "images_per_s": rate,
        "mfu": rate * mean / flops.H200_PEAK if _on_gpu() else None,
        "padding": plan.waste(),
        "programs": len(times),
    }


def _noise(plan: Any, number: int, side: int) -> Any:
    """A batch of a bucket: the grids of one of its steps, pixels without meaning."""
    step = int(np.flatnonzero(plan.bucket == number)[0])
    bucket, grid = plan.buckets[number], plan.grid[step]
    shape = (len(grid), bucket.patches, 3 * side**2)
    patches = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return Batch(patches, grid.astype(np.int32), np.ones(len(grid), bool))


def config_of(model: str, tiny: bool, **changes: Any) -> Any:
    return ours.recipe(model, tiny=tiny, dtype="bfloat16", **changes)


def shrunk(config: Any, tiny: bool) -> Any:
    """The recipe with scales that a test has time for."""
    if tiny:
        config = config.copy_and_resolve_references()
        config.augment.update({"scales": (64, 96), "crop": 0.0, "max_size": 160})
        config.preprocess.update({"size": 64, "max_size": 128})
        config.buckets.count = 2
    return config


def picture_count(tiny: bool) -> int:
    return 64 if tiny else mix.PICTURES


def _mfu(count: Any, config: Any, patches: Any, rate: float) -> float | None:
    needed = count(config.model, ours.NUM_CLASSES, int(patches))
    return rate * needed / flops.H200_PEAK if _on_gpu() else None


def _on_gpu() -> bool:
    return jax.devices()[0].platform == "gpu"
