"""A model so small that a step takes milliseconds, and batches for it, shared by tests."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh

from configs import common
from yolos_jax import mesh as mesh_lib
from yolos_jax import optimizer as optimizer_lib
from yolos_jax import step
from yolos_jax.batch import Batch, Bucket, HostBatch, Targets
from yolos_jax.models.build import build_model

BUCKET = Bucket(patches=12, rows=4, cols=4)
WIDE = Bucket(patches=16, rows=4, cols=6)
CLASSES, QUERIES, TARGETS = 3, 5, 8


def make_config(**changes):
    config = common.get_config()
    config.model.update(
        dict(patch_size=8, width=32, depth=3, heads=2, mlp_width=64, num_queries=QUERIES,
             position_grid=(4, 4), mid_position_grid=(4, 4), dtype="float32",
             position_init="normal")
    )  # fmt: skip
    config.loss.class_loss_group = 2
    config.optimizer.clip_norm = 0.1
    config.update_from_flattened_dict(changes)
    return config


def make_batch(seed: int, size: int = 8, bucket: Bucket = BUCKET, boxes: bool = True) -> HostBatch:
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, bucket.rows + 1, size)
    cols = np.minimum(rng.integers(1, bucket.cols + 1, size), bucket.patches // rows)
    valid = rng.random((size, TARGETS)) < (0.5 if boxes else -1)
    boxes_cxcywh = np.concatenate(
        [rng.uniform(0.3, 0.7, (size, TARGETS, 2)), rng.uniform(0.1, 0.5, (size, TARGETS, 2))], -1
    )
    return HostBatch(
        batch=Batch(
            rng.integers(0, 256, (size, bucket.patches, 8 * 8 * 3)).astype(np.uint8),
            np.stack([rows, cols], 1).astype(np.int32),
            np.ones(size, bool),
        ),
        targets=Targets(
            np.where(valid, rng.integers(0, CLASSES, valid.shape), 0).astype(np.int32),
            np.where(valid[..., None], boxes_cxcywh, 0).astype(np.float32),
            valid,
        ),
        image_ids=np.arange(size),
        original_size=np.full((size, 2), 32, np.int32),
        bucket=bucket,
    )


def without(host: HostBatch, rows) -> HostBatch:
    """The batch with some rows unreadable."""
    pictures, size, image_valid = jax.tree.map(np.copy, host.batch)
    target_valid = host.targets.target_valid.copy()
    image_valid[rows], size[rows], target_valid[rows] = False, 1, False
    return host._replace(
        batch=type(host.batch)(pictures, size, image_valid),
        targets=host.targets._replace(target_valid=target_valid),
    )


def mesh_of(count: int, fsdp: int = 1) -> Mesh:
    devices = np.array(jax.devices()[:count]).reshape(count // fsdp, fsdp)
    return Mesh(devices, mesh_lib.ROWS, axis_types=(jax.sharding.AxisType.Auto,) * 2)


def make_step(mesh: Mesh, config=None, classes: int = CLASSES) -> step.TrainStep:
    config = config or make_config()
    model = build_model(config.model, classes, mesh)
    params = jax.eval_shape(model.init, jax.random.key(0))
    freeze = (*model.constants, *config.optimizer.freeze)
    trainable, _ = optimizer_lib.partition(params, freeze)
    optimizer = optimizer_lib.make_optimizer(config.optimizer, trainable, model.rules)
    return step.TrainStep(model, optimizer, mesh, config)


def start(train_step: step.TrainStep) -> step.TrainState:
    """A state from parameters of numpy: drawing them in jax takes seconds to compile."""
    rng = np.random.default_rng(7)
    abstract = train_step.abstract_state.params
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), abstract)
    return train_step.init_state(jax.random.key(0), params)


def host_copy(tree):
    return jax.tree.map(np.array, tree)


def run(train_step, mesh, microbatches=1, batches=None, state=None):
    """Returns the state after some steps, on the host, and the metrics of every step."""
    state = state or start(train_step)
    history = []
    for host in batches or BATCHES:
        parts = mesh_lib.put_microbatches(host, mesh, microbatches)
        state, metrics = train_step(state, parts, host.bucket, LR)
        history.append(dict(metrics))
    return host_copy(state), history


def losses_of(history) -> list[float]:
    return [metrics["loss"] for metrics in history]


LR = 1e-3
BATCHES = [make_batch(0), without(make_batch(1), [0, 5]), make_batch(2)]


def parts_of(host: HostBatch, mesh: Mesh, microbatches: int = 1) -> list[step.Microbatch]:
    parts = mesh_lib.put_microbatches(host, mesh, microbatches)
    whole = tuple((targets, batch.image_valid) for batch, targets in parts)
    return [step.Microbatch(np.int32(i), *part, whole) for i, part in enumerate(parts)]
