"""A plan carried out: its rows read, decoded and laid out as host batches, ahead of the device."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator

import numpy as np
from absl import logging

from yolos_jax.batch import HostBatch, Targets
from yolos_jax.data import files
from yolos_jax.data.index import Index
from yolos_jax.data.plan import Plan
from yolos_jax.data.rows import Needs, Row, read_row, read_row_with_pillow
from yolos_jax.data.tensorflow_import import tf

CHUNK_BYTES = 4 << 20  # of pictures that leave the graph together, at most ...
CHUNK_ROWS = 64  # ... and at most so many
ROWS_AHEAD = 16  # decoded rows that wait, per worker, besides finished batches
READS_AHEAD = 4  # host batches of records that are read at the same time
POLL_SECONDS = 0.2  # how often a thread that waits looks whether it is still wanted


def host_batches(
    index: Index,
    plan: Plan,
    *,
    host_rows: np.ndarray,
    start_step: int = 0,
    workers: int = 0,
    prefetch: int = 2,
) -> _Background:
    """Returns an iterator over this host's part of every step of a plan, in order.

    A picture that cannot be read keeps its row: ``image_valid`` is False, it has no targets, and
    ``unreadable`` says why. Work begins at once; ``close()`` the iterator, or exhaust it, to end
    its threads.

    Args:
      index: the dataset that the plan was made of.
      plan: of training or evaluation.
      host_rows: int [b], which of a step's B rows are this host's.
      start_step: the first step to yield.
      workers: pictures decoded at once; 0: one per core.
      prefetch: finished batches that wait at most.

    Raises:
      ValueError: a step beyond the plan.
    """
    if not 0 <= start_step <= plan.steps:
        raise ValueError(f"start_step is {start_step}, the plan has {plan.steps} steps")
    host_rows = np.asarray(host_rows)
    steps = range(start_step, plan.steps)
    return _Background(_assemble(index, plan, host_rows, steps, workers), prefetch)


def _assemble(
    index: Index, plan: Plan, host_rows: np.ndarray, steps: range, workers: int
) -> Iterator[HostBatch]:
    """Lays the pictures out in batches, in the thread of the caller."""
    patch_size = plan.patch_size
    columns = _columns(index, plan, host_rows, steps)
    pictures = _pictures(columns, patch_size, workers, index.store, len(host_rows))
    for step in steps:
        rows = plan.rows[step][host_rows]
        bucket = plan.buckets[plan.bucket[step]]
        batch, unreadable = bucket.empty(len(rows), patch_size), []
        for place in np.flatnonzero(rows >= 0):
            picture = next(pictures)
            if isinstance(picture, ValueError):
                unreadable.append(str(picture))
            else:
                batch.put(place, picture, plan.grid[step, host_rows[place]])
        original = np.stack([index.heights[rows], index.widths[rows]], axis=1)
        yield HostBatch(
            batch=batch,
            targets=_targets(plan, step, host_rows, batch.image_valid),
            image_ids=np.where(rows >= 0, index.image_ids[rows], -1),
            original_size=np.where(rows[:, None] >= 0, original, 1).astype(np.int32),
            bucket=bucket,
            unreadable=tuple(unreadable),
        )


def _pictures(
    columns: Row, patch_size: int, workers: int, store: files.Store | None, at_once: int
) -> Iterator[np.ndarray | ValueError]:
    """Every row's patches in order, uint8 [rows * columns, P], or why there are none."""
    lengths = (columns.size // patch_size).prod(axis=1)

    def refused(row: int) -> np.ndarray | ValueError:
        try:
            only = Row(*(column[row] for column in columns))
            patches = read_row_with_pillow(only, patch_size, store)
        except ValueError as error:
            return error
        logging.warning("%s: TensorFlow cannot read it, Pillow does", columns.path[row])
        return patches

    following = 0
    if len(lengths):
        chunks = _chunks(columns, patch_size, workers, store, at_once)
        for numbers, chunk in chunks.as_numpy_iterator():
            for number, picture in zip(numbers, chunk, strict=True):
                for row in range(following, number):
                    yield refused(row)
                yield picture[: lengths[number]]
                following = number + 1
    for row in range(following, len(lengths)):
        yield refused(row)


def _chunks(
    columns: Row, patch_size: int, workers: int, store: files.Store | None, at_once: int
) -> tf.data.Dataset:
    """Numbers and patches of the rows that TensorFlow can read, some at a time, padded."""
    workers = workers or os.cpu_count() or 1
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = workers
    options.threading.max_intra_op_parallelism = 1
    options.autotune.enabled = False
    needs = Needs.of(columns)
    rows = tf.data.Dataset.from_tensor_slices(
        columns._replace(path=tf.constant(columns.path, tf.string))
    ).enumerate()

    def patches(number: tf.Tensor, row: Row, content: tf.Tensor | None = None):
        content = tf.io.read_file(row.path) if content is None else content
        return number, read_row(row, content, patch_size, needs)

    if store is not None:
        rows = _with_records(rows, store, at_once)
    read = rows.map(patches, num_parallel_calls=workers)
    # Leaving the graph costs more than decoding a small picture: several leave together.
    rows_at_once = int(np.clip(CHUNK_BYTES // (3 * columns.size.prod(axis=1).max()), 1, CHUNK_ROWS))
    chunks = read.ignore_errors().padded_batch(rows_at_once)
    return chunks.prefetch(max(ROWS_AHEAD * workers // rows_at_once, 1)).with_options(options)


def _with_records(rows: tf.data.Dataset, store: files.Store, at_once: int) -> tf.data.Dataset:
    """Adds each row's file, read from the store so many at a time; an empty one where it fails."""

    def read(records: np.ndarray) -> np.ndarray:
        found = store.read(records)
        # What is wrong is said later, when the row is read once more.
        return np.array([b"" if isinstance(file, ValueError) else file for file in found], object)

    def with_files(number: tf.Tensor, row: Row):
        content = tf.numpy_function(read, [row.record], tf.string)
        return number, row, tf.ensure_shape(content, [None])

    groups = rows.batch(at_once).map(with_files, num_parallel_calls=READS_AHEAD)
    return groups.unbatch()


def _columns(index: Index, plan: Plan, host_rows: np.ndarray, steps: range) -> Row:
    """What this host reads, row after row: padding left out."""
    chosen = plan.rows[steps.start : steps.stop][:, host_rows]
    real = chosen >= 0
    rows = chosen[real]

    def planned(column: np.ndarray) -> np.ndarray:
        return column[steps.start : steps.stop][:, host_rows][real]

    return Row(
        path=np.array(index.paths(rows), object),
        record=index.records[rows],
        stated=np.stack([index.heights[rows], index.widths[rows]], axis=1).astype(np.int32),
        orientation=index.orientation[rows].astype(np.int32),
        flip=planned(plan.flip),
        crop=planned(plan.crop).astype(np.float32),
        size=planned(plan.size),
    )


def _targets(plan: Plan, step: int, host_rows: np.ndarray, image_valid: np.ndarray) -> Targets:
    """Ground truth of a step's rows, padded; none for pictures that could not be read."""
    first = plan.box_offsets[step * plan.batch_size + host_rows]
    last = plan.box_offsets[step * plan.batch_size + host_rows + 1]
    places = np.arange(plan.max_boxes)
    valid = (places < (last - first)[:, None]) & image_valid[:, None]
    source = (first[:, None] + places)[valid]
    labels = np.zeros(valid.shape, np.int32)
    boxes = np.zeros((*valid.shape, 4), np.float32)
    labels[valid] = plan.labels[source]
    boxes[valid] = plan.boxes_cxcywh[source]
    return Targets(labels, boxes, valid)


class _Background:
    """Runs an iterator in a thread of its own, at most some items ahead; begins at once."""

    def __init__(self, items: Iterator[HostBatch], ahead: int):
        self._ready: queue.Queue = queue.Queue(ahead)
        self._unwanted = threading.Event()
        # The thread must not hold this object: one that is forgotten ends it.
        self._thread = threading.Thread(
            target=_run, args=(items, self._ready, self._unwanted), name="host_batches", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> _Background:
        return self

    def __next__(self) -> HostBatch:
        if self._unwanted.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, HostBatch):
            return item
        self.close()
        raise item

    def close(self) -> None:
        """Ends the thread; what it has ready is lost."""
        self._unwanted.set()
        self._thread.join()

    __del__ = close


def _run(items: Iterator[HostBatch], ready: queue.Queue, unwanted: threading.Event) -> None:
    """Puts items, and at last what ended them, until they are unwanted."""

    def put(item: object) -> bool:
        while not unwanted.is_set():
            try:
                ready.put(item, timeout=POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    try:
        for item in items:
            if not put(item):
                return
        put(StopIteration())
    except BaseException as error:  # Whatever it is, the consumer must see it.
        put(error)
