"""The reference's evaluation batches: pictures in pairs, padded to a common canvas, no mask.

The published YOLOS-Ti was evaluated with two pictures per process: both zero-padded (after
normalisation, so with the mean colour) to the larger height and width, and the padding mask never
reached the model, which therefore saw canvases, while boxes were read relative to the picture. Its
28.7 AP is a number of such pairs. This module rebuilds them; nothing else in the package pads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from yolos_jax import losses
from yolos_jax import mesh as mesh_lib
from yolos_jax.batch import Batch, Bucket, Detections, HostBatch, normalise
from yolos_jax.data.buckets import smallest_bucket
from yolos_jax.data.index import Index
from yolos_jax.data.layout import Layout, Sequences
from yolos_jax.data.plan import EvalRecipe, Plan, choose_buckets, make_eval_plan
from yolos_jax.models.build import Model
from yolos_jax.programs import jit

# Columns of a plan that are copied, and their values in a row that pads.
PADDING_ROW = {"flip": False, "crop": 0.0, "size": 1, "grid": 1}


def check(layout: Layout) -> None:
    """Raises ValueError for the layout of a model that knows padding from pictures."""
    if not isinstance(layout, Sequences):
        raise ValueError(
            "--reference_padding is for a YOLOS, which would not know padding from pictures; this "
            "model's batches are canvases, padded and masked as the original's are"
        )


def make_canvas_plan(
    index: Index,
    recipe: EvalRecipe,
    *,
    group: int,
    batch_size: int,
    bucket_count: int,
    multiple: int,
    layout: Sequences,
) -> tuple[Plan, np.ndarray]:
    """Plans an evaluation of groups of pictures that share a canvas.

    Groups are neighbours in the order of image ids, in which the reference's dataset reads them
    (on one process; its distributed sampler deals pictures out first). The last group may be
    smaller. Groups, not pictures, are then sorted by length.

    Args:
      index: the split.
      recipe: of resizing.
      group: pictures per canvas; 2 as published.
      batch_size: images of a step over all hosts; divisible by group.
      bucket_count, multiple: as for ``choose_buckets``.
      layout: of the model's batches.

    Returns:
      The plan, whose buckets hold the canvases, and canvas int32 [S, B, 2]: rows and columns of
      patches of the canvas of each row, (1, 1) for padding rows.

    Raises:
      ValueError: groups do not divide the batch, or as ``make_eval_plan``.
    """
    if group < 1 or batch_size % group:
        raise ValueError(
            f"batches of {batch_size} images do not divide into groups of {group} that share a "
            "canvas: choose another batch size or number of devices"
        )
    num_prefix = layout.num_prefix
    buckets = choose_buckets(index, recipe, 1, multiple, num_prefix)
    whole = make_eval_plan(index, recipe, buckets, batch_size=len(index))
    place = np.argsort(whole.rows[0])  # of each row of the index in the plan's only step
    by_id = np.argsort(index.image_ids, kind="stable")
    groups = _padded(by_id, group)
    canvas = _with_padding(whole.grid[0][place], 1)[groups].max(axis=1)
    buckets = _canvas_buckets(canvas, bucket_count, multiple, num_prefix)
    required = smallest_bucket(canvas, buckets)

    steps = _padded(np.lexsort([canvas.prod(axis=1), required]), batch_size // group)
    rows = _with_padding(groups, -1)[steps].reshape(len(steps), batch_size)
    plan = _dealt_out(
        whole, place, rows, buckets, bucket=_with_padding(required, 0)[steps].max(axis=1)
    )
    canvas = np.repeat(_with_padding(canvas, 1)[steps], group, axis=1)
    return plan, np.where(rows[..., None] >= 0, canvas, 1).astype(np.int32)


def _padded(column: np.ndarray, width: int) -> np.ndarray:
    """Rows of a width, the last one filled with -1."""
    return np.pad(column, (0, -len(column) % width), constant_values=-1).reshape(-1, width)


def _with_padding(column: np.ndarray, value: int) -> np.ndarray:
    """Appends a row of one value: what the index -1 finds."""
    return np.concatenate([column, np.full_like(column[:1], value)])


def _dealt_out(
    whole: Plan,
    place: np.ndarray,
    rows: np.ndarray,
    buckets: tuple[Bucket, ...],
    bucket: np.ndarray,
) -> Plan:
    """The only step of a plan as other steps; without targets, since nothing is learnt here."""
    columns = {
        name: _with_padding(getattr(whole, name)[0][place], value)[rows]
        for name, value in PADDING_ROW.items()
    }
    return dataclasses.replace(
        whole,
        rows=rows,
        **columns,
        bucket=bucket,
        buckets=buckets,
        box_offsets=np.zeros(rows.size + 1, np.int64),
        boxes_cxcywh=np.zeros((0, 4), np.float32),
        labels=np.zeros(0, np.int32),
    )


def _canvas_buckets(
    canvas: np.ndarray, count: int, multiple: int, num_prefix: int
) -> tuple[Bucket, ...]:
    """Lengths at equal shares of the canvases [G, 2]; the last one holds the longest."""
    lengths = -(-(canvas.prod(axis=1) + num_prefix) // multiple) * multiple - num_prefix
    shares = np.linspace(0, 1, count + 1)[1:]
    chosen = np.unique(np.quantile(lengths, shares, method="higher"))
    return tuple(
        Bucket(int(length), *(int(side) for side in canvas[lengths <= length].max(axis=0)))
        for length in chosen
    )


def make_predict_step(
    model: Model, mesh: jax.sharding.Mesh
) -> Callable[[Any, Batch, Any, Bucket], Detections]:
    """A ``predict_step.PredictStep`` for patches that are already normalised."""

    def predict(params: Any, batch: Batch, original_size: Any, bucket: Bucket) -> Detections:
        outputs = model.apply(params, batch, bounds=(bucket.rows, bucket.cols))
        return losses.postprocess(outputs, original_size)

    return jit(predict, mesh, static_argnums=3, out_shardings=mesh_lib.batch_sharding(mesh))


def on_canvases(
    batches: Iterable[HostBatch],
    canvas: np.ndarray,
    host_rows: slice | np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
) -> Iterator[HostBatch]:
    """Puts the pictures of a canvas plan into the top left corners of their canvases.

    Args:
      batches: the plan's steps, this host's rows of each.
      canvas: int32 [S, B, 2], of ``make_canvas_plan``.
      host_rows: which of the B rows are this host's.
      mean, std: of the preprocessing.

    Yields:
      Batches whose patches are normalised (float32) and whose grid is that of the canvas.
    """
    for batch, step_canvas in zip(batches, canvas, strict=True):
        images = batch.batch
        patches = normalise(images.patches, mean, std)
        padded = np.zeros_like(patches)
        grids = np.where(images.image_valid[:, None], step_canvas[host_rows], 1).astype(np.int32)
        for i, ((rows, cols), (canvas_rows, canvas_cols)) in enumerate(
            zip(images.grid, grids, strict=True)
        ):
            view = padded[i, : canvas_rows * canvas_cols].reshape(canvas_rows, canvas_cols, -1)
            view[:rows, :cols] = patches[i, : rows * cols].reshape(rows, cols, -1)
        yield batch._replace(batch=images._replace(patches=padded, grid=grids))
