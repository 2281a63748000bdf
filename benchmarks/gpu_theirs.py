"""PyTorch's side of ``benchmarks.gpu``: each function runs in a process of its own, yields rows.

transformers' YOLOS with torch's fused attention, compiled by torch.compile where that works (the
row says 'eager' where it does not), bfloat16: the whole model in the forward pass, autocast in
training, with the fused AdamW. The same weights, pictures and objects as on our side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks import gpu_ours, mix, ours, pictures, theirs, timing, turns
from yolos_jax.models.build import build_model

PADDED_BATCHES = 6  # of the mix


def train(
    model: str,
    grid: Sequence[int],
    images: int,
    mixed: bool,
    seconds: float,
    compiled: bool,
    device: str,
    tiny: bool,
    lock: str,
) -> Iterator[dict[str, Any]]:
    """Images per second of a training step; arguments as in ``gpu_ours.train``."""
    config = gpu_ours.config_of(model, tiny)
    failure = {}
    while True:
        step = None
        try:
            step = _step(config, device, checkpointing=False)
            if mixed:
                row = _train_mix(config, step, images, seconds, compiled, tiny, lock)
            else:
                row = _train_equal(config, step, tuple(grid), images, seconds, compiled, lock)
            yield {**row, **failure}
            return
        except torch.OutOfMemoryError:
            if images == 1:
                raise
            images //= 2
        except Exception as error:  # the backward pass compiles when it is first needed
            if not compiled:
                raise
            compiled, failure = False, {"form": _eager(error)}
        del step
        torch.compiler.reset()
        _give_back()


def forward(
    model: str,
    grid: Sequence[int],
    batches: Sequence[int],
    mixed: int,
    seconds: float,
    compiled: bool,
    device: str,
    tiny: bool,
    lock: str,
) -> Iterator[dict[str, Any]]:
    """Images per second of the forward pass; arguments as in ``gpu_ours.forward``."""
    config = gpu_ours.config_of(model, tiny)
    peer = _model(config).to(device, torch.bfloat16).eval()
    side = config.model.patch_size
    plan = mix.evaluation_plan(gpu_ours.shrunk(config, tiny), mixed, gpu_ours.picture_count(tiny))
    with torch.inference_mode():
        for images in batches:
            found, _ = pictures.sample(images, grid[0] * side, grid[1] * side, ours.NUM_CLASSES)
            pixels = _pixels(config, found, device).to(torch.bfloat16)
            task = _Task(peer, compiled, dynamic=False)
            with turns.shared(lock):
                _, boxes = task(pixels)
            with turns.alone(lock):
                _reset_peak(device)
                each = _seconds(lambda task=task, pixels=pixels: task(pixels), seconds, device)
            yield {
                "what": f"batch {images}",
                "images": images,
                "images_per_s": images / each,
                "boxes": boxes[0, : gpu_ours.SAMPLE].double().cpu().tolist(),
                "peak_bytes": _peak(device),
                "form": task.form,
            }
        canvases = [
            torch.randn(mixed, 3, *(int(n) * side for n in grids.max(axis=0)), device=device)
            for grids in mix.padded_batches(plan, mixed, 2 if tiny else PADDED_BATCHES)
        ]
        canvases = [canvas.to(torch.bfloat16) for canvas in canvases]
        task = _Task(peer, compiled, dynamic=True)
        yield _of_mix(task, [lambda x=x: task(x) for x in canvases], mixed, seconds, device, lock)


def memory(
    model: str,
    grid: Sequence[int],
    checkpointing: bool,
    batches: Sequence[int],
    compiled: bool,
    device: str,
    tiny: bool,
    lock: str,
) -> Iterator[dict[str, Any]]:
    """Peak bytes of a training step, with every block recomputed or none."""
    config = gpu_ours.config_of(model, tiny)
    with turns.shared(lock):
        for images in sorted(batches):
            step = _step(config, device, checkpointing=checkpointing)
            step.forward = task = _Task(step.model, compiled, dynamic=False)
            pixels, labels = _batch(config, tuple(grid), images, device)
            step(pixels, labels)
            _reset_peak(device)
            for _ in range(2):
                step(pixels, labels)
            theirs.synchronise(step.device)
            remat = "full" if checkpointing else "none"
            yield {
                "remat": remat, "images": images, "peak_bytes": _peak(device), "form": task.form
            }  # fmt: skip
            del step, task, pixels, labels
            torch.compiler.reset()


class _Task:
    """The model's forward pass, compiled; eager from the moment that compiling fails."""

    def __init__(self, model: torch.nn.Module, compiled: bool, *, dynamic: bool) -> None:
        self.eager = theirs.forward_of(model, compiled=False)
        self.run = theirs.forward_of(model, compiled=True, dynamic=dynamic) if compiled else None
        self.form = ("compiled, any size" if dynamic else "compiled") if compiled else "eager"

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.run is not None:
            try:
                return self.run(pixels)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self.run, self.form = None, _eager(error)
        return self.eager(pixels)


def _eager(error: Exception) -> str:
    """What a row says when compiling failed."""
    return f"eager ({type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]})"


def _train_equal(
    config: Any,
    step: theirs.Step,
    grid: tuple[int, int],
    images: int,
    seconds: float,
    compiled: bool,
    lock: str,
) -> dict[str, Any]:
    device = step.device.type
    with turns.shared(lock):
        step.forward = task = _Task(step.model, compiled, dynamic=False)
        pixels, labels = _batch(config, grid, images, device)
        loss = float(step(pixels, labels)[0])
        _give_back(step)
    with turns.alone(lock):
        _reset_peak(device)
        each = _seconds(lambda: step(pixels, labels), seconds, device)
    return {
        "what": "equal",
        "images": images,
        "images_per_s": images / each,
        "loss": loss,
        "peak_bytes": _peak(device),
        "form": task.form,
    }


def _train_mix(
    config: Any,
    step: theirs.Step,
    images: int,
    seconds: float,
    compiled: bool,
    tiny: bool,
    lock: str,
) -> dict[str, Any]:
    count = max(gpu_ours.picture_count(tiny), 4 * images)
    plan = mix.training_plan(gpu_ours.shrunk(config, tiny), images, count)
    side, device = config.model.patch_size, step.device.type
    targets = pictures.targets(np.random.default_rng(0), images, ours.NUM_CLASSES)
    labels = theirs.on_device(pictures.as_labels(targets), device)
    step.forward = task = _Task(step.model, compiled, dynamic=True)
    canvases = [
        tuple(int(n) * side for n in grids.max(axis=0))
        for grids in mix.padded_batches(plan, images, 2 if tiny else PADDED_BATCHES)
    ]

    def one(canvas: tuple[int, int]) -> Callable[[], Any]:
        # Made anew each time: all at once would take the room of a larger batch.
        return lambda: step(torch.randn(images, 3, *canvas, device=device), labels)

    tasks = [one(canvas) for canvas in canvases]
    return _of_mix(task, tasks, images, seconds, device, lock)


def _of_mix(
    task: _Task, tasks: list[Callable], images: int, seconds: float, device: str, lock: str
) -> dict[str, Any]:
    """Images per second over batches of different canvases."""
    with turns.shared(lock):
        for one in tasks:
            one()
        _give_back()

    def all_of_them() -> None:
        for one in tasks:
            one()

    with turns.alone(lock):
        _reset_peak(device)
        each = _seconds(all_of_them, seconds, device)
    return {
        "what": "mix",
        "images": images,
        "images_per_s": images * len(tasks) / each,
        "peak_bytes": _peak(device),
        "form": task.form,
    }


class _Done:
    """Tells when the card has done what it was asked for until now."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event()
        self.event.record()

    def block_until_ready(self) -> None:
        self.event.synchronize()


def _seconds(task: Callable[[], Any], at_least: float, device: str) -> float:
    def started() -> _Done | None:
        task()
        return _Done() if device == "cuda" else None

    return timing.seconds_each(started, at_least=at_least, most=1000)


def _model(config: Any) -> torch.nn.Module:
    built = build_model(config.model, ours.NUM_CLASSES)
    return theirs.build(config.model, ours.draw_params(built))


def _step(config: Any, device: str, *, checkpointing: bool) -> theirs.Step:
    torch.set_float32_matmul_precision("high")  # what autocast leaves: a favour
    peer = _model(config).to(device)
    return theirs.Step(peer, config.optimizer, autocast=True, checkpointing=checkpointing)


def _pixels(config: Any, found: list[np.ndarray], device: str) -> torch.Tensor:
    canvas = pictures.as_canvas(found, config.preprocess.mean, config.preprocess.std)
    return torch.from_numpy(canvas).to(device)


def _batch(config: Any, grid: tuple[int, int], images: int, device: str) -> tuple[Any, list]:
    side = config.model.patch_size
    found, targets = pictures.sample(images, grid[0] * side, grid[1] * side, ours.NUM_CLASSES)
    labels = theirs.on_device(pictures.as_labels(targets), device)
    return _pixels(config, found, device), labels


def _give_back(step: theirs.Step | None = None) -> None:
    """Leaves the card to others until it is this process' turn."""
    if step is not None:
        step.optimizer.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> int | None:
    return torch.cuda.max_memory_allocated() if device == "cuda" else None
