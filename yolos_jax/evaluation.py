"""A split through the model, every image once, gathered over hosts and scored."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from yolos_jax import answers
from yolos_jax import mesh as mesh_lib
from yolos_jax.batch import Detections, HostBatch
from yolos_jax.data.index import Index
from yolos_jax.data.plan import Plan
from yolos_jax.scoring import coco_metrics, coco_results


class Evaluation(NamedTuple):
    """What an evaluation found; the same on every host, `messages` apart."""

    metrics: dict  # of coco_metrics and answers.describe
    results: list[dict]  # COCO results, in the order of the index, queries in their order
    unreadable: tuple[int, ...]  # ids of pictures that could not be read: no detections
    messages: tuple[str, ...]  # why, for the pictures that this host tried to read
    nonfinite: int  # detections left out because a number of theirs is not finite


def round_up_batch(batch_size: int, mesh: jax.sharding.Mesh, group: int = 1) -> int:
    """Returns the next batch size of which every device of the mesh takes an equal part.

    Args:
      batch_size: images that were asked for, over all devices.
      mesh: the mesh.
      group: images that stay together on a batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}: expected at least 1")
    multiple = math.lcm(mesh.size, group)
    return -(-batch_size // multiple) * multiple


def evaluate(
    predict_step: Callable[..., Detections],
    params: dict,
    index: Index,
    plan: Plan,
    batches: Iterable[HostBatch],
    mesh: jax.sharding.Mesh,
    ground_truth: dict,
    *,
    category_ids: np.ndarray | None = None,
    judge: Callable[[int, Sequence[str]], None] = lambda unreadable, messages: None,
) -> Evaluation:
    """Predicts every image of a split exactly once and scores the predictions.

    Every host must call it, with its own rows of the same plan; every host gathers and scores
    everything, so that what follows from the numbers is the same everywhere.

    Args:
      predict_step: a ``predict_step.PredictStep``, or what is called like one.
      params: parameters on the mesh.
      index: the split.
      plan: its evaluation plan.
      batches: the plan's steps in order, this host's rows of each. Wrap it to show progress.
      mesh: the mesh that batches are sharded over.
      ground_truth: ``data.truth.ground_truth`` of the split.
      category_ids: int64 [K], the dataset's category id of every slot, -1 for none
        (``match_categories``); by default as the index numbers them.
      judge: told after every batch, on every host, how many pictures of all hosts could not be
        read so far, and why those of this host could not; may raise.

    Raises:
      ValueError: the batch size does not divide among the devices.
      RuntimeError: an image was not scored exactly once.
    """
    if plan.batch_size % mesh.size:
        raise ValueError(
            f"evaluation batches of {plan.batch_size} images do not divide among {mesh.size} "
            f"devices: use {round_up_batch(plan.batch_size, mesh)}"
        )
    if category_ids is None:
        category_ids = np.asarray(index.label_map.category_ids, np.int64)
    in_dataset = {category["id"] for category in ground_truth["categories"]}
    category_ids = np.where(np.isin(category_ids, list(in_dataset)), category_ids, -1)

    rows, valid, found, messages = _predict(predict_step, params, index, plan, batches, mesh, judge)
    _check_once(index, rows)
    order = np.argsort(rows)
    order = order[valid[order]]
    results, nonfinite = [], 0
    for i in order:
        image_results, bad = coco_results(
            int(index.image_ids[rows[i]]), Detections(*(d[i] for d in found)), category_ids
        )
        results += image_results
        nonfinite += bad
    seen = rows[order]
    sizes = np.stack([index.heights[seen], index.widths[seen]], -1)
    metrics = coco_metrics(ground_truth, results, index.image_ids)
    metrics |= answers.describe(Detections(*(d[order] for d in found)), sizes)
    unreadable = tuple(int(index.image_ids[row]) for row in np.sort(rows[~valid]))
    return Evaluation(metrics, results, unreadable, messages, nonfinite)


def _predict(predict_step, params, index, plan, batches, mesh, judge):
    """Returns rows [I], valid [I], Detections [I, ...] and this host's messages."""
    host_rows = mesh_lib.host_rows(mesh, plan.batch_size, 1)
    # Results are fetched one step late: the device computes while the host gathers.
    running: collections.deque = collections.deque()
    gathered: list = []
    messages: list[str] = []

    unreadable = 0

    def collect(rows, outputs):
        nonlocal unreadable
        gathered.append(jax.tree.map(lambda x: x[rows >= 0], (rows, mesh_lib.gather_rows(outputs))))
        valid = gathered[-1][1][0]
        unreadable += int((~valid).sum())
        judge(unreadable, messages)

    for rows, host_batch in zip(plan.rows, batches, strict=True):
        expected = np.where(rows >= 0, index.image_ids[rows], -1)[host_rows]
        if not np.array_equal(host_batch.image_ids, expected):
            raise RuntimeError(
                f"the pipeline gave images {host_batch.image_ids}, the plan says {expected}"
            )
        messages += host_batch.unreadable
        batch, size = mesh_lib.put_batch((host_batch.batch, host_batch.original_size), mesh)
        detections = predict_step(params, batch, size, host_batch.bucket)
        running.append((rows, (batch.image_valid, detections)))
        if len(running) > 1:
            collect(*running.popleft())
    while running:
        collect(*running.popleft())
    rows, (valid, detections) = jax.tree.map(lambda *xs: np.concatenate(xs), *gathered)
    return rows, valid, detections, tuple(messages)


def _check_once(index: Index, rows: np.ndarray) -> None:
    scored, times = np.unique(rows, return_counts=True)
    missing = np.setdiff1d(np.arange(len(index)), scored)
    if missing.size or (times > 1).any():
        raise RuntimeError(
            f"every image must be scored once: {missing.size} of {len(index)} were not, "
            f"{int((times > 1).sum())} were more than once; the first: "
            f"{index.image_ids[np.concatenate([missing, scored[times > 1]])[:10]]}"
        )
