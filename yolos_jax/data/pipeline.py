"""Executes the rows of a plan: read, decode, cut, resize, mirror, into patches; in the background.

Pillow does the work, in threads: its decoders and its resize release Python's lock, it reads every
kind of picture in one way, and its pixels are exactly those that the reference trains on and that
``predict`` sees. benchmarks/input.py measures it. A crop is resized from its fractional rectangle
of the original at once, where the reference resizes, cuts and resizes again.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from etils import epath
from PIL import Image

from yolos_jax.batch import Batch, HostBatch, Targets
from yolos_jax.data import image
from yolos_jax.data.index import Index
from yolos_jax.data.plan import Plan

TASKS_PER_WORKER = 4  # that a step is divided into: pictures take unequal time


def host_batches(
    index: Index,
    plan: Plan,
    *,
    start_step: int = 0,
    host_rows: np.ndarray | slice = slice(None),
    workers: int = 0,
    prefetch: int = 2,
) -> Iterator[HostBatch]:
    """Yields this host's rows of each step of a plan, in order.

    A picture that cannot be used (missing, truncated, not a picture, not of the stated size) keeps
    its row, with ``image_valid`` and all of its ``target_valid`` False, patches of zeros and a
    message in ``unreadable``. Pictures are read from local paths, and from whatever else
    ``etils.epath`` opens (gs://).

    Args:
      index: the dataset that the plan was made for.
      plan: of training or evaluation.
      start_step: step of the plan to begin with.
      host_rows: which of the B rows of every step are this host's.
      workers: pictures decoded at once; 0: one per core of this process.
      prefetch: steps that are worked on ahead of the one last yielded.

    Returns:
      A generator of HostBatch. Its threads end when it is exhausted, closed or forgotten.

    Raises:
      ValueError: when a number makes no sense.
    """
    if not 0 <= start_step <= plan.steps or workers < 0 or prefetch < 0:
        raise ValueError(
            f"start_step {start_step} (of {plan.steps} steps), data.workers {workers} and "
            f"data.prefetch {prefetch} must not be negative, nor the first be past the end"
        )
    places = np.arange(plan.batch_size)[host_rows]
    return _generate(index, plan, start_step, places, workers or _cores(), prefetch)


class _Begun(NamedTuple):
    """A step whose pictures are being worked on."""

    step: int
    patches: np.ndarray  # uint8 [b, N, P], being filled
    tasks: list[Future[dict[int, str]]]


def _generate(
    index: Index, plan: Plan, start_step: int, places: np.ndarray, workers: int, prefetch: int
) -> Iterator[HostBatch]:
    pool = ThreadPoolExecutor(workers, thread_name_prefix="pictures")
    begun: collections.deque[_Begun] = collections.deque()
    share = max(len(places) // (workers * TASKS_PER_WORKER), 1)
    try:
        for step in range(start_step, plan.steps):
            shape = plan.buckets[plan.bucket[step]].patches, 3 * plan.patch_size**2
            patches = np.zeros((len(places), *shape), np.uint8)
            tasks = [
                pool.submit(
                    _execute, index, plan, step, places, patches, range(first, first + share)
                )
                for first in range(0, len(places), share)
            ]
            begun.append(_Begun(step, patches, tasks))
            if len(begun) > prefetch:
                yield _finish(index, plan, places, begun.popleft())
        while begun:
            yield _finish(index, plan, places, begun.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _execute(
    index: Index, plan: Plan, step: int, places: np.ndarray, patches: np.ndarray, mine: range
) -> dict[int, str]:
    """Fills some rows of patches [b, N, P]; returns a message for each that could not be."""
    messages = {}
    for i in mine[: len(places) - mine.start]:
        place = int(places[i])
        if plan.rows[step, place] >= 0:
            try:
                _fill(index, plan, step, place, patches[i])
            except ValueError as error:
                messages[i] = str(error)
    return messages


def _fill(index: Index, plan: Plan, step: int, place: int, patches: np.ndarray) -> None:
    """One row of a plan into patches uint8 [N, P]; ValueError, naming the file, where it fails."""
    row = int(plan.rows[step, place])
    path = index.path(row)
    exif = "apply" if index.orientation[row] > 1 else "ignore"
    picture = image.open_rgb(_read(path), exif, path)
    stated = int(index.heights[row]), int(index.widths[row])
    if picture.size != stated[::-1]:
        raise ValueError(
            f"{path}: is {picture.height}x{picture.width} pixels (height x width), "
            f"{index.annotations} states {stated[0]}x{stated[1]}"
        )
    top, left, height, width = plan.crop[step, place].tolist()
    # A sum that rounds to more than the side would be refused.
    box = left, top, min(left + width, stated[1]), min(top + height, stated[0])
    new_height, new_width = plan.size[step, place].tolist()
    picture = picture.resize((new_width, new_height), Image.Resampling.BILINEAR, box=box)
    if plan.flip[step, place]:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    _write_patches(np.asarray(picture), plan.patch_size, patches)


def _read(path: str) -> bytes:
    """A file's bytes; ValueError naming it."""
    try:
        if "://" in path:
            return epath.Path(path).read_bytes()
        with open(path, "rb") as file:
            return file.read()
    # Remote file systems raise their own kinds of errors.
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"{path}: cannot be read: {reason}") from error


def _write_patches(pixels: np.ndarray, patch_size: int, patches: np.ndarray) -> None:
    """``image.patchify`` of uint8 [h, w, 3] into the first rows of patches [N, P].

    A patch's row of pixels moves as one element: five times as fast as byte by byte.
    """
    rows, cols = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
    run = 3 * patch_size
    source = pixels.reshape(rows, patch_size, cols, run).view(f"V{run}")
    target = patches[: rows * cols].reshape(rows, cols, patch_size, run).view(f"V{run}")
    target[...] = source.swapaxes(1, 2)


def _finish(index: Index, plan: Plan, places: np.ndarray, begun: _Begun) -> HostBatch:
    """Waits for a step's pictures and adds what the plan knows."""
    messages: dict[int, str] = {}
    for task in begun.tasks:
        messages |= task.result()
    step = begun.step
    rows = plan.rows[step, places]
    real = rows >= 0
    valid = real.copy()
    valid[list(messages)] = False
    original_size = np.stack([index.heights[rows], index.widths[rows]], axis=1)
    return HostBatch(
        batch=Batch(
            patches=begun.patches,
            grid=np.where(valid[:, None], plan.grid[step, places], np.int32(1)),
            image_valid=valid,
        ),
        targets=_targets(plan, step * plan.batch_size + places, valid),
        image_ids=np.where(real, index.image_ids[rows], -1),
        original_size=np.where(real[:, None], original_size, np.int32(1)),
        bucket=plan.buckets[plan.bucket[step]],
        unreadable=tuple(messages[i] for i in sorted(messages)),
    )


def _targets(plan: Plan, rows: np.ndarray, valid: np.ndarray) -> Targets:
    """Targets of rows [b] of the flattened plan; none where a row is not valid."""
    starts, ends = plan.box_offsets[rows], plan.box_offsets[rows + 1]
    box = starts[:, None] + np.arange(plan.max_boxes)
    target_valid = (box < ends[:, None]) & valid[:, None]
    labels = np.zeros(box.shape, np.int32)
    labels[target_valid] = plan.labels[box[target_valid]]
    boxes_cxcywh = np.zeros((*box.shape, 4), np.float32)
    boxes_cxcywh[target_valid] = plan.boxes_cxcywh[box[target_valid]]
    return Targets(labels, boxes_cxcywh, target_valid)


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
