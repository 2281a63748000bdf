"""The device mesh, where parameters live on it, and host rows -> global arrays and back.

One mesh with the axes ``data`` and ``fsdp``: batches are split over both, parameters over ``fsdp``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from yolos_jax.batch import Batch, Canvas, HostBatch, Targets

ROWS = ("data", "fsdp")  # the mesh axes that split a batch
# Smaller arrays are replicated: gathering one costs a message's latency and saves next to nothing.
SHARDED_FROM = 4096  # elements
_VECTORS = ("bias", "scale")  # small however many blocks they are of


def make_mesh(fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh over all devices of all processes.

    Args:
      fsdp: devices that share one copy of the parameters.
      devices: instead, for instance those of ``jax.experimental.topologies``.

    Raises:
      ValueError: if the devices do not divide into groups of that size.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if fsdp < 1 or count % fsdp:
        raise ValueError(f"mesh.fsdp is {fsdp}: it must divide the number of devices, {count}")
    # Not jax.make_mesh, which has no mesh for eight of the 4 x 4 x 4 chips of a TPU v5p slice.
    arranged = mesh_utils.create_device_mesh(
        (count // fsdp, fsdp), devices, allow_split_physical_axes=True
    )
    # Auto: under the default, Explicit, flax's LayerNorm does not trace.
    return Mesh(arranged, ROWS, axis_types=(AxisType.Auto,) * 2)


def sharding_of(shape: tuple[int, ...], mesh: Mesh, name: str) -> NamedSharding:
    """Returns where an array of parameters, or of the optimiser's state, lives.

    Its largest axis that divides among the ``fsdp`` devices is split over them, the last one of
    equal ones; an array without such an axis, or a small one, is on every device, as are biases and
    the scales of norms. The axis of stacked blocks is never the largest, so a loop over blocks
    gathers one block at a time.

    Of a ``kernel`` it is the axis of its inputs, if that divides: outputs of several layers side by
    side (queries, keys, values) are taken apart where they are.

    Args:
      shape: of the array.
      mesh: with the axis ``fsdp``.
      name: the last part of the parameter's name.
    """
    fsdp = mesh.shape["fsdp"]
    axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or not axes or name in _VECTORS or np.prod(shape) < SHARDED_FROM:
        return NamedSharding(mesh, PartitionSpec())
    inputs = len(shape) - 2
    chosen = max(axes, key=lambda axis: (shape[axis], axis))
    if name == "kernel" and inputs in axes:
        chosen = inputs
    names = [None] * len(shape)
    names[chosen] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*names))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns ``sharding_of`` every leaf; parameters, optimiser state and average agree by rule."""

    def of_leaf(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return sharding_of(leaf.shape, mesh, name)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def bytes_per_device(tree: Any, mesh: Mesh) -> int:
    """Returns what a tree of parameters or states takes on each device."""
    places = jax.tree.leaves(shardings(tree, mesh))
    sizes = [
        np.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(jax.tree.leaves(tree), places, strict=True)
    ]
    return int(sum(sizes))


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Returns the sharding of arrays whose axis ``axis`` is the images of a batch."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, ROWS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device has whole."""
    return NamedSharding(mesh, PartitionSpec())


def host_rows(mesh: Mesh, batch_size: int, microbatches: int = 1) -> np.ndarray:
    """Returns the rows of a global batch that this process reads, in the order it reads them.

    Microbatch j consists of the rows from j * batch_size / microbatches on, whatever the number of
    processes, so that a run can be resumed on another one.

    Args:
      mesh: of all devices.
      batch_size: rows of the global batch.
      microbatches: parts of equal size that the batch goes through the model in.

    Returns:
      int64 [batch_size / processes], ascending.

    Raises:
      ValueError: if a microbatch does not divide among the devices.
    """
    if batch_size < 1 or microbatches < 1 or batch_size % (mesh.size * microbatches):
        parts = f" x {microbatches} microbatches" if microbatches > 1 else ""
        raise ValueError(
            f"a batch of {batch_size} images does not divide among {mesh.size} devices{parts}: "
            f"the batch size must be a multiple of {mesh.size * microbatches}"
        )
    size = batch_size // microbatches
    mine = batch_sharding(mesh).addressable_devices_indices_map((size,))
    rows = np.unique([np.arange(size)[index] for index in mine.values()])
    return (np.arange(microbatches)[:, None] * size + rows).reshape(-1)


def put_whole(array: Any, sharding: NamedSharding) -> jax.Array:
    """Makes a global array of one that every process holds whole; each reads its part only."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def put_batch(arrays: Any, mesh: Mesh) -> Any:
    """Makes global arrays of this process' rows.

    Args:
      arrays: tree of numpy arrays [rows of this process, ...], in the order of ``host_rows``.
      mesh: that the rows are split over.

    Returns:
      The same tree of jax arrays [rows of all processes, ...]. Does not wait for the transfer.
    """
    sharding = batch_sharding(mesh)
    mine = len(jax.tree.leaves(arrays)[0])
    rows = mine * jax.process_count()
    blocks = sharding.addressable_devices_indices_map((rows,)).values()
    starts = sorted(block[0].start or 0 for block in blocks)
    size = mine // len(starts)
    local = {start: place * size for place, start in enumerate(starts)}

    def put(array: np.ndarray) -> jax.Array:
        if len(array) != mine:
            raise ValueError(f"arrays of {mine} and of {len(array)} rows are not of one batch")

        def of_device(index: tuple[slice, ...]) -> np.ndarray:
            first = local[index[0].start or 0]
            return array[first : first + size]

        # Half of the time of make_array_from_process_local_data: docs/performance.md.
        return jax.make_array_from_callback((rows, *array.shape[1:]), sharding, of_device)

    return jax.tree.map(put, arrays)


def put_microbatches(
    host_batch: HostBatch, mesh: Mesh, microbatches: int = 1
) -> list[tuple[Batch | Canvas, Targets]]:
    """Splits this process' rows of a step into microbatches and makes global arrays of each."""
    size = len(host_batch.batch.image_valid) // microbatches

    def part(index: int) -> tuple[Batch, Targets]:
        rows = slice(index * size, (index + 1) * size)
        arrays = (host_batch.batch, host_batch.targets)
        return put_batch(jax.tree.map(lambda array: array[rows], arrays), mesh)

    return [part(index) for index in range(microbatches)]


def gather_texts(texts: Sequence[str]) -> list[str]:
    """Returns the texts of all processes, process after process; each must call it."""
    if jax.process_count() == 1:
        return list(texts)
    mine = np.frombuffer(json.dumps(list(texts)).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(mine.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: mine.size] = mine
    rows = multihost_utils.process_allgather(padded)
    found = zip(rows, sizes, strict=True)
    return [text for row, size in found for text in json.loads(row[:size].tobytes())]


def from_first(read: Callable[[], Any]) -> Any:
    """Returns what process 0 reads, JSON, on every process; each must call it."""
    if jax.process_count() == 1:
        return read()
    first = jax.process_index() == 0
    return json.loads(gather_texts([json.dumps(read())] if first else [])[0])


def gather_rows(arrays: Any) -> Any:
    """Returns a tree of global arrays as numpy arrays, whole, on every process."""
    if jax.process_count() == 1:
        return jax.device_get(arrays)
    return multihost_utils.process_allgather(arrays, tiled=True)
