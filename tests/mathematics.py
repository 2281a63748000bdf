"""Twenty steps of a tiny model on any number of processes and devices; a program for tests.

    python -m tests.mathematics OUT COORDINATOR PROCESSES ID VARIANT...

A variant is ``model:fsdp:microbatches:matcher``, of a YOLOS with ``:attention`` or without. Process
0 writes ``OUT/VARIANT.npz`` for each: the loss of every step, and the parameters after the last by
path.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np

from tests import tiny, tiny_detr
from yolos_jax import launch
from yolos_jax import mesh as mesh_lib
from yolos_jax.batch import HostBatch
from yolos_jax.optimizer import paths

STEPS = 20
MODELS = {"yolos": tiny, "detr": tiny_detr}
IMAGES = {"yolos": 8, "detr": 4}
SHARDED_FROM = {"yolos": 256, "detr": 64}  # elements: the models are small
YOLOS = ("yolos:1:1:host", "yolos:2:1:host", "yolos:2:1:host:heads", "yolos:2:2:device")
DETR = ("detr:1:1:host", "detr:2:1:host")


def with_boxes_only(host: HostBatch, rows: slice) -> HostBatch:
    """The batch without the boxes of other rows."""
    keep = np.zeros(len(host.image_ids), bool)
    keep[rows] = True
    targets = host.targets
    return host._replace(
        targets=targets._replace(
            labels=np.where(keep[:, None], targets.labels, 0),
            boxes_cxcywh=np.where(keep[:, None, None], targets.boxes_cxcywh, 0),
            target_valid=targets.target_valid & keep[:, None],
        )
    )


def global_batch(model: str, number: int) -> HostBatch:
    """The same on every process; of 2 or 4 processes many have no box, or no readable picture."""
    whole = MODELS[model].make_batch(number, IMAGES[model], boxes=number != 7)
    part = IMAGES[model] // 4
    return {
        1: with_boxes_only(whole, slice(0, part)),
        2: with_boxes_only(whole, slice(3 * part, 4 * part)),
        3: with_boxes_only(whole, slice(2 * part, 2 * part + 1)),
        4: tiny.without(whole, slice(0, 2 * part)),
        5: tiny.without(whole, [2 * part - 1, 3 * part]),
    }.get(number % 8, whole)


def rows_of(host: HostBatch, rows: np.ndarray) -> HostBatch:
    """This process' part of a batch."""
    arrays = jax.tree.map(lambda array: array[rows], (host.batch, host.targets))
    return host._replace(batch=arrays[0], targets=arrays[1])


def run(mesh: jax.sharding.Mesh, variant: str) -> dict[str, np.ndarray]:
    """Trains; returns ``losses`` [STEPS] and every parameter by its path."""
    model, fsdp, microbatches, where, *attention = variant.split(":")
    assert mesh.shape["fsdp"] == int(fsdp)
    own = MODELS[model]
    changes = {"matcher.where": where}
    if attention:
        (changes["model.attention"],) = attention
    train_step = tiny.make_step(mesh, own.make_config(**changes), own.CLASSES)
    state, losses = own.start(train_step), []
    mine = mesh_lib.host_rows(mesh, IMAGES[model], int(microbatches))
    for number in range(STEPS):
        host = rows_of(global_batch(model, number), mine)
        parts = mesh_lib.put_microbatches(host, mesh, int(microbatches))
        state, metrics = train_step(state, parts, host.bucket, tiny.LR)
        losses.append(metrics["loss"])
    params = mesh_lib.gather_rows(state.params)
    named = dict(zip(paths(params), jax.tree.leaves(params), strict=True))
    return named | {"losses": np.array(losses)}


def main(out: str, coordinator: str, processes: str, number: str, *variants: str) -> None:
    config = tiny.make_config()
    config.mesh.coordinator, config.mesh.wait_seconds = coordinator, 60
    config.mesh.num_processes, config.mesh.process_id = int(processes), int(number)
    launch.initialise(config.mesh, config.to_dict())
    for variant in variants:
        model, fsdp, *_ = variant.split(":")
        mesh_lib.SHARDED_FROM = SHARDED_FROM[model]
        found = run(mesh_lib.make_mesh(int(fsdp)), variant)
        if jax.process_index() == 0:
            np.savez(Path(out) / f"{variant}.npz", **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
