"""PyTorch's side of ``benchmarks.gpu``: each function runs in a process of its own, yields rows.

transformers' YOLOS with torch's fused attention, compiled by torch.compile where that works (the
row says 'eager' where it does not), bfloat16: the whole model in the forward pass, autocast in
training, with the fused AdamW. The same weights, pictures and objects as on our side.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks import gpu_ours, ours, pictures, theirs, timing, turns
from benchmarks.torch_compiled import Task, eager, give_back, retried
from yolos_jax.models.build import build_model

WARM = 3  # runs of a forward pass before it is timed: a CUDA graph is recorded in the second


def ready(modules: Sequence[str], device: str) -> Iterator[dict[str, Any]]:
    """Whether everything can be imported and the card is there.

    Raises:
      RuntimeError: there is no card.
    """
    for module in modules:
        importlib.import_module(module)
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device=cuda: torch sees no card")
    name = torch.cuda.get_device_name() if device == "cuda" else device
    yield {"torch": torch.__version__, "device": name}


def train(
    model: str,
    grid: Sequence[int],
    images: int,
    seconds: float,
    compiled: bool,
    device: str,
    tiny: bool,
    lock: str,
) -> Iterator[dict[str, Any]]:
    """Images per second of a training step; arguments as in ``gpu_ours.train``."""
    config = gpu_ours.config_of(model, tiny)

    def attempt(images: int, compiled: bool) -> Iterator[dict[str, Any]]:
        on_host = host_batch(config, tuple(grid), images)
        peer = model_of(config)
        with turns.shared(lock):
            step, task, pixels, labels = prepared(config, peer, on_host, compiled, device)
        with turns.alone(lock):
            loss, norm = (float(value) for value in step(pixels, labels))
            reset_peak(device)
            each = seconds_of(lambda: step(pixels, labels), seconds, device)
            yield {
                "what": "equal",
                "images": images,
                "images_per_s": images / each,
                "loss": loss,
                "grad_norm": norm,
                "peak_bytes": peak(device),
                "form": task.form,
            }

    yield from retried(attempt, images, compiled)


def forward(
    model: str,
    grid: Sequence[int],
    batches: Sequence[int],
    seconds: float,
    compiled: bool,
    device: str,
    tiny: bool,
    lock: str,
) -> Iterator[dict[str, Any]]:
    """Images per second of the forward pass; arguments as in ``gpu_ours.forward``.

    A single picture once more in a CUDA graph, as with mode='reduce-overhead'.
    """
    config = gpu_ours.config_of(model, tiny)
    peer = model_of(config)
    side = config.model.patch_size
    ways = [(images, False) for images in sorted(batches)]
    ways += [(images, True) for images in batches if images == 1 and compiled]
    for images, graphs in ways:
        found, _ = pictures.sample(images, grid[0] * side, grid[1] * side, ours.NUM_CLASSES)
        canvas = _pixels(config, found)
        with turns.shared(lock), torch.inference_mode():
            peer = peer.to(device, torch.bfloat16).eval()
            pixels = canvas.to(device, torch.bfloat16)
            task = Task(peer, compiled, dynamic=False, graphs=graphs)
            task.prepare(pixels)
        with turns.alone(lock), torch.inference_mode():
            try:
                row = _forward(task, pixels, seconds, device)
            except Exception as error:
                if not graphs:
                    raise
                row = {"form": eager(error)}  # graphs are extra: what there is stays
        what = {"what": f"batch {images}", "images": images}
        if graphs:
            what |= {"what": f"batch {images}, CUDA graph", "against": what["what"]}
        yield {**what, **row}


def _forward(task: Task, pixels: torch.Tensor, seconds: float, device: str) -> dict[str, Any]:
    boxes = task(pixels)[1].double().cpu().numpy()
    for _ in range(WARM - 1):
        task(pixels)
    reset_peak(device)
    each = seconds_of(lambda: task(pixels), seconds, device)
    return {
        "images_per_s": len(pixels) / each,
        **gpu_ours.boxes_of(boxes),
        "peak_bytes": peak(device),
        "form": task.form,
    }


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

    def attempt(images: int, compiled: bool) -> Iterator[dict[str, Any]]:
        on_host = host_batch(config, tuple(grid), images)
        peer = model_of(config)
        with turns.shared(lock):
            step, task, pixels, labels = prepared(
                config, peer, on_host, compiled, device, checkpointing=checkpointing
            )
        with turns.alone(lock):
            step(pixels, labels)
            reset_peak(device)
            for _ in range(2):
                step(pixels, labels)
            theirs.synchronise(step.device)
            yield {
                "remat": "full" if checkpointing else "none",
                "images": images,
                "peak_bytes": peak(device),
                "form": task.form,
            }

    for images in sorted(batches):
        yield from retried(attempt, images, compiled)
        torch.compiler.reset()
        give_back()


def prepared(
    config: Any,
    peer: torch.nn.Module,
    on_host: tuple[torch.Tensor, list],
    compiled: bool,
    device: str,
    *,
    checkpointing: bool = False,
) -> tuple[theirs.Step, Task, torch.Tensor, list]:
    """A step of pictures of one size, compiled, and its batch on the device. Runs nothing."""
    step = step_of(config, peer, device, checkpointing=checkpointing)
    pixels, labels = on_host[0].to(device), theirs.on_device(on_host[1], device)
    step.forward = task = Task(step.model, compiled, dynamic=False)
    with step.precision():
        task.prepare(pixels)
    return step, task, pixels, labels


class _Done:
    """Tells when the card has done what it was asked for until now."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event()
        self.event.record()

    def block_until_ready(self) -> None:
        self.event.synchronize()


def seconds_of(task: Callable[[], Any], at_least: float, device: str, *, least: int = 3) -> float:
    """``timing.seconds_each`` of what runs on a card."""

    def started() -> _Done | None:
        task()
        return _Done() if device == "cuda" else None

    return timing.seconds_each(started, at_least=at_least, most=1000, least=least)


def model_of(config: Any) -> torch.nn.Module:
    """Their model with our weights, on the host."""
    built = build_model(config.model, ours.NUM_CLASSES)
    return theirs.build(config.model, ours.draw_params(built))


def step_of(
    config: Any, peer: torch.nn.Module, device: str, *, checkpointing: bool = False
) -> theirs.Step:
    """A step of training on the device."""
    torch.set_float32_matmul_precision("high")  # what autocast leaves: a favour
    return theirs.Step(
        peer.to(device), config.optimizer, autocast=True, checkpointing=checkpointing
    )


def _pixels(config: Any, found: list[np.ndarray]) -> torch.Tensor:
    canvas = pictures.as_canvas(found, config.preprocess.mean, config.preprocess.std)
    return torch.from_numpy(canvas)


def host_batch(config: Any, grid: tuple[int, int], images: int) -> tuple[torch.Tensor, list]:
    """Pictures of one size and their labels, on the host."""
    side = config.model.patch_size
    found, targets = pictures.sample(images, grid[0] * side, grid[1] * side, ours.NUM_CLASSES)
    return _pixels(config, found), pictures.as_labels(targets)


def reset_peak(device: str) -> None:
    """From here on ``peak`` counts."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> int | None:
    """The most bytes that this process held since ``reset_peak``; None where nobody counts."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else None
