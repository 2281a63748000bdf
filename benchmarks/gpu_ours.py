"""Our side of ``benchmarks.gpu``: each function runs in a process of its own and yields rows.

Pictures are arrays on the device; nothing is read. What only the host does comes first, then all
compile, among others, and then each measures alone (``turns``).
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from benchmarks import flops, matching, mix, ours, pictures, timing, turns
from benchmarks.gpu_room import fitting, room, with_fewer
from benchmarks.two_programs import program_bytes, row_of, step_bytes
from yolos_jax import mesh as mesh_lib
from yolos_jax.metrics import Metrics
from yolos_jax.models.build import build_model
from yolos_jax.step import StepShape, TrainStep

SAMPLE = 10  # queries whose predictions are compared one by one
BUCKETS = 4  # of the mix, at most: the recipes' would take too long to compile


def ready(modules: Sequence[str], device: str) -> Iterator[dict[str, Any]]:
    """Whether everything can be imported, the card is there and its attention works.

    Raises:
      RuntimeError: the device is another one.
    """
    for module in modules:
        importlib.import_module(module)
    found = jax.devices()[0]
    if found.platform != {"cuda": "gpu", "cpu": "cpu"}[device]:
        raise RuntimeError(f"--device={device}: jax has {found.platform}")
    config = config_of("s", tiny=False)
    yield {"jax": jax.__version__, "device": found.device_kind, "limit": room()} | (
        ours.surroundings(config, ours.bucket_of(config, 50, 83))
    )


def train(
    model: str,
    grid: Sequence[int],
    images: int,
    seconds: float,
    steps: int,
    tiny: bool,
    lock: str,
) -> Iterator[dict[str, Any]]:
    """A training step of pictures of one size: images per second, bytes, the wait for the match.

    Args:
      model: a key of ``ours.RECIPES``.
      grid: rows and columns of patches of the pictures.
      images: of a step; fewer if they do not fit.
      seconds: that every program is run for.
      steps: that the wait for the match is taken from, six times.
      tiny: two blocks, for a test.
      lock: of ``turns``.
    """
    config = config_of(model, tiny)
    yield from with_fewer(
        lambda images: _train(config, tuple(grid), images, seconds, steps, lock), images
    )


def _train(
    config: Any, grid: tuple[int, int], images: int, seconds: float, steps: int, lock: str
) -> Iterator[dict[str, Any]]:
    train_step = ours.make_train_step(config)
    params = ours.draw_params(train_step.model)
    images = fitting(train_step, grid, images)
    images, programs, compiling = _compiled(train_step, grid, images, lock)
    on_host, bucket = ours.make_host_part(config, images, grid)
    needed = step_bytes(train_step, programs)
    known = {"images": images, **ours.surroundings(config, bucket)}
    with turns.alone(lock):
        part = mesh_lib.put_batch(on_host, train_step.mesh)
        run = Steps(train_step, params)
        metrics = run.take(part, bucket)
        first = {name: metrics[name] for name in ("loss", "grad_norm")}
        each = timing.seconds_each(lambda: run.take(part, bucket), at_least=seconds, most=1000)
        yield {
            "what": "equal",
            "images_per_s": images / each,
            "mfu": mfu(flops.training_flops, config, np.prod(grid), images / each),
            **first,
            "peak_bytes": ours.peak_bytes(),
            "program_bytes": needed,
            "compile_s": compiling,
            **known,
        }
        residuals = train_step.residual_bytes()[bucket]
        forms = row_of("host", bucket, images, each, needed, residuals, first["loss"])
        yield {"row": "programs", **forms, **known}
        waiting = matching.waiting(train_step, run.state, [part], bucket, steps)
        yield {"row": "idle", **waiting, **known}


def _compiled(
    train_step: TrainStep, grid: tuple[int, int], images: int, lock: str
) -> tuple[int, dict[str, Any], float]:
    """So many images or fewer, programs that fit on the card with them, seconds of compiling."""
    while True:
        shape = StepShape(ours.bucket_of(train_step.config, *grid), images, pictures.MOST_BOXES)
        with turns.shared(lock):
            started = time.monotonic()
            programs = train_step.compile(shape)
            seconds = time.monotonic() - started
        limit = room()
        if images == 1 or limit is None or step_bytes(train_step, programs) <= limit:
            return images, programs, seconds
        images //= 2


def forward(
    model: str, grid: Sequence[int], batches: Sequence[int], seconds: float, tiny: bool, lock: str
) -> Iterator[dict[str, Any]]:
    """Images per second of the forward pass on pictures of one size; arguments as in ``train``.

    From few pictures to many, each batch put on the device in its turn: a peak of memory does not
    go down again.
    """
    config = config_of(model, tiny)
    side = config.model.patch_size
    built = build_model(config.model, ours.NUM_CLASSES)
    bucket = ours.bucket_of(config, *grid)
    params, made = ours.draw_params(built), []
    for images in sorted(batches):
        found, _ = pictures.sample(images, grid[0] * side, grid[1] * side, ours.NUM_CLASSES)
        made.append(pictures.as_sequences(found, side, bucket))
    with turns.shared(lock):
        params = jax.device_put(params)
        program = ours.make_forward(built, config, bucket)
        programs = _together(lambda batch: program.lower(params, batch).compile(), made)
    known = ours.surroundings(config, bucket)
    with turns.alone(lock):
        for on_host, program in zip(made, programs, strict=True):
            batch, images = jax.device_put(on_host), len(on_host.grid)
            each = timing.seconds_each(
                lambda program=program, batch=batch: program(params, batch).pred_boxes,
                at_least=seconds,
                most=1000,
            )
            boxes = np.asarray(program(params, batch).pred_boxes[0], np.float64)
            yield {
                "what": f"batch {images}",
                "images": images,
                "images_per_s": images / each,
                "mfu": mfu(flops.forward_flops, config, np.prod(grid), images / each),
                **boxes_of(boxes),
                "peak_bytes": ours.peak_bytes(),
                "program_bytes": program_bytes(program),
                **known,
            }


def memory(
    model: str, grid: Sequence[int], remat: str, batches: Sequence[int], tiny: bool, lock: str
) -> Iterator[dict[str, Any]]:
    """Peak bytes of a training step with some batches, ascending, since a peak does not go down."""
    config = config_of(model, tiny, remat=remat)
    train_step = ours.make_train_step(config)
    params = ours.draw_params(train_step.model)
    parts = {images: ours.make_host_part(config, images, tuple(grid)) for images in sorted(batches)}
    with turns.shared(lock):
        shapes = [StepShape(part[1], images, pictures.MOST_BOXES) for images, part in parts.items()]
        programs = _together(train_step.compile, shapes)
        needed = [step_bytes(train_step, each) for each in programs]
    with turns.alone(lock):
        for (images, (on_host, bucket)), program in zip(parts.items(), needed, strict=True):
            part = mesh_lib.put_batch(on_host, train_step.mesh)
            run = Steps(train_step, params)
            for _ in range(2):
                metrics = run.take(part, bucket)
            jax.block_until_ready(metrics)
            del run, part
            yield {
                "remat": remat,
                "images": images,
                "peak_bytes": ours.peak_bytes(),
                "program_bytes": program,
                **ours.surroundings(config, bucket),
            }


def idle(
    model: str,
    grid: Sequence[int],
    images: int,
    microbatches: int,
    steps: int,
    tiny: bool,
    lock: str,
) -> Iterator[dict[str, Any]]:
    """How much of a step goes by waiting for the match; arguments as in ``train``."""
    config = config_of(model, tiny)
    train_step = ours.make_train_step(config)
    params = ours.draw_params(train_step.model)
    made = [
        ours.make_host_part(config, images // microbatches, tuple(grid), seed)
        for seed in range(microbatches)
    ]
    bucket = made[0][1]
    with turns.shared(lock):
        train_step.compile(StepShape(bucket, images, pictures.MOST_BOXES, microbatches))
    with turns.alone(lock):
        parts = [mesh_lib.put_batch(on_host, train_step.mesh) for on_host, _ in made]
        state = train_step.init_state(jax.random.key(0), params)
        found = matching.waiting(train_step, state, parts, bucket, steps)
    yield {"images": images, **found, **ours.surroundings(config, bucket)}


def _together(compiled: Callable[[Any], Any], shapes: Sequence[Any]) -> list[Any]:
    """Programs compiled side by side."""
    with ThreadPoolExecutor(len(shapes)) as pool:
        return list(pool.map(compiled, shapes))


class Steps:
    """Steps one after the other, with whatever batch."""

    def __init__(self, train_step: TrainStep, params: Any) -> None:
        """Puts a state on the device.

        Args:
          train_step: of the steps.
          params: to start from, numpy.
        """
        self.train_step = train_step
        self.state = train_step.init_state(jax.random.key(0), params)

    def take(self, part: Any, bucket: Any) -> Metrics:
        """The step's metrics, not waited for."""
        self.state, metrics = self.train_step(self.state, [part], bucket, 1e-6)
        return metrics


def boxes_of(boxes: np.ndarray) -> dict[str, Any]:
    """What is compared of boxes [B, Q, 4]: some of the first picture, all of the distinct ones."""
    return {
        "boxes": boxes[0, :SAMPLE].tolist(),
        "all_boxes": np.round(boxes[: pictures.DISTINCT], 5).tolist(),
    }


def config_of(model: str, tiny: bool, **changes: Any) -> Any:
    """The recipe in bfloat16, with few buckets."""
    config = ours.recipe(model, tiny=tiny, dtype="bfloat16", **changes)
    config.buckets.count = BUCKETS
    return config


def shrunk(config: Any, tiny: bool) -> Any:
    """The recipe with scales that a test has time for."""
    if tiny:
        config = config.copy_and_resolve_references()
        config.augment.update({"scales": (64, 96), "crop": 0.0, "max_size": 160})
        config.preprocess.update({"size": 64, "max_size": 128})
        config.buckets.count = 2
    return config


def picture_count(tiny: bool) -> int:
    """How many pictures the mix is drawn from."""
    return 64 if tiny else mix.PICTURES


def mfu(count: Any, config: Any, patches: Any, rate: float) -> float | None:
    """Share of the card's arithmetic that is used; None on anything but a card."""
    needed = count(config.model, ours.NUM_CLASSES, int(patches))
    return rate * needed / flops.H200_PEAK if on_gpu() else None


def on_gpu() -> bool:
    """Whether this process' arrays are on a card."""
    return jax.devices()[0].platform == "gpu"
