"""PyTorch's side of ``benchmarks.gpu`` over a COCO-like mix: random batches, padded as it pads.

One program for canvases of any size, without CUDA graphs, which are recorded for one size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks import gpu_ours, gpu_theirs, mix, ours, pictures, theirs, turns
from benchmarks.torch_compiled import Task, retried

BATCHES = 24  # of the mix


def train(
    model: str,
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
        count = max(gpu_ours.picture_count(tiny), 4 * images)
        plan = mix.training_plan(gpu_ours.shrunk(config, tiny), images, count)
        canvases = _canvases(plan, images, config.model.patch_size, tiny)
        targets = pictures.targets(np.random.default_rng(0), images, ours.NUM_CLASSES)
        peer = gpu_theirs.model_of(config)
        with turns.shared(lock):
            step = gpu_theirs.step_of(config, peer, device)
            step.forward = task = Task(step.model, compiled, dynamic=True)
            labels = theirs.on_device(pictures.as_labels(targets), device)
            with step.precision():
                task.prepare(torch.randn(images, 3, *canvases[0], device=device))
        with turns.alone(lock):
            # Made anew each time: all at once would take the room of a larger batch.
            yield _of_mix(
                task,
                lambda canvas: step(torch.randn(images, 3, *canvas, device=device), labels),
                canvases,
                images,
                seconds,
                device,
            )

    yield from retried(attempt, images, compiled)


def forward(
    model: str,
    images: int,
    seconds: float,
    compiled: bool,
    device: str,
    tiny: bool,
    lock: str,
) -> Iterator[dict[str, Any]]:
    """Images per second of the forward pass; arguments as in ``gpu_ours.train``."""
    config = gpu_ours.config_of(model, tiny)

    def attempt(images: int, compiled: bool) -> Iterator[dict[str, Any]]:
        count = gpu_ours.picture_count(tiny)
        plan = mix.evaluation_plan(gpu_ours.shrunk(config, tiny), images, count)
        canvases = _canvases(plan, images, config.model.patch_size, tiny)
        peer = gpu_theirs.model_of(config)

        def draw(canvas: tuple[int, int]) -> torch.Tensor:
            return torch.randn(images, 3, *canvas, device=device, dtype=torch.bfloat16)

        # No inference mode over a yield: it is the thread's, not the generator's.
        with turns.shared(lock), torch.inference_mode():
            task = Task(peer.to(device, torch.bfloat16).eval(), compiled, dynamic=True)
            task.prepare(draw(canvases[0]))
        with turns.alone(lock), torch.inference_mode():
            row = _of_mix(
                task, lambda canvas: task(draw(canvas)), canvases, images, seconds, device
            )
        yield row

    yield from retried(attempt, images, compiled)


def _canvases(plan: Any, images: int, side: int, tiny: bool) -> list[tuple[int, int]]:
    """Height and width of each batch, in pixels."""
    batches = mix.padded_batches(plan, images, 2 if tiny else BATCHES)
    return [tuple(int(n) * side for n in grids.max(axis=0)) for grids in batches]


def _of_mix(
    task: Task,
    run: Callable[[tuple[int, int]], Any],
    canvases: Sequence[tuple[int, int]],
    images: int,
    seconds: float,
    device: str,
) -> dict[str, Any]:
    """Images per second over batches of different canvases, all of them once before."""

    def all_of_them() -> None:
        for canvas in canvases:
            run(canvas)

    gpu_theirs.reset_peak(device)
    each = gpu_theirs.seconds_of(all_of_them, seconds, device, least=1)
    return {
        "what": "mix",
        "images": images,
        "batches": len(canvases),
        "images_per_s": images * len(canvases) / each,
        "peak_bytes": gpu_theirs.peak(device),
        "form": task.form,
    }
