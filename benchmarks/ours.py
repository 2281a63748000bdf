"""Our side of a comparison: recipes, weights and steps, without files and without a dataset."""

from __future__ import annotations

import importlib
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from benchmarks import pictures
from yolos_jax import mesh as mesh_lib
from yolos_jax import optimizer as optimizer_lib
from yolos_jax.batch import Batch, Bucket, Targets, normalise
from yolos_jax.models import attention
from yolos_jax.models.build import Model, build_model
from yolos_jax.passes import Microbatch
from yolos_jax.programs import jit
from yolos_jax.step import TrainStep

RECIPES = {"ti": "yolos_ti", "s": "yolos_s", "b": "yolos_b"}
NUM_CLASSES = 91  # slots of labels='coco91'
TINY = {"width": 48, "mlp_width": 96, "depth": 2, "position_grid": (4, 6)}  # for --quick


def recipe(name: str, *, tiny: bool = False, **changes: Any) -> ConfigDict:
    """A published recipe, with the losses of one process (PyTorch's side has one).

    Args:
      name: a key of RECIPES.
      tiny: two narrow blocks instead of the model.
      changes: of ``config.model``.
    """
    config = importlib.import_module(f"configs.{RECIPES[name]}").get_config()
    if tiny:
        config.model.update(TINY)
        if config.model.mid_position_grid:
            config.model.mid_position_grid = TINY["position_grid"]
    config.model.update(changes)
    config.loss.class_loss_group, config.loss.reference_processes = 0, 1
    return config


def one_device() -> Mesh:
    """A mesh of the first device."""
    devices = np.array(jax.devices()[:1]).reshape(1, 1)
    return Mesh(devices, mesh_lib.ROWS, axis_types=(AxisType.Auto,) * 2)


def draw_params(model: Model, seed: int = 0) -> dict:
    """Parameters with which a picture shows in the outputs; the usual start hides it.

    Returns:
      Nested dict of numpy float32.
    """
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        noise = random.standard_normal(leaf.shape, np.float32)
        if name.endswith("kernel"):
            return noise * np.float32(leaf.shape[-2] ** -0.5)
        if name.endswith("scale"):
            return 1 + np.float32(0.1) * noise
        return noise * np.float32(0.02 if name.endswith("bias") else 0.5)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def bucket_of(config: ConfigDict, rows: int, cols: int) -> Bucket:
    """The bucket of a dataset all of whose pictures have one size, in patches."""
    prefix, multiple = 1 + config.model.num_queries, config.buckets.multiple
    tokens = -(-(prefix + rows * cols) // multiple) * multiple
    return Bucket(tokens - prefix, rows, cols)


def make_train_step(config: ConfigDict) -> TrainStep:
    """The step of a run on one device."""
    mesh = one_device()
    model = build_model(config.model, NUM_CLASSES, mesh)
    params = jax.eval_shape(model.init, jax.random.key(0))
    trainable, _ = optimizer_lib.partition(params, config.optimizer.freeze)
    optimizer = optimizer_lib.make_optimizer(config.optimizer, trainable)
    return TrainStep(model, optimizer, mesh, config)


def make_host_part(
    config: ConfigDict, images: int, grid: tuple[int, int], seed: int = 0
) -> tuple[tuple[Batch, Targets], Bucket]:
    """A microbatch of pictures of one size, in patches, numpy; and its bucket."""
    side = config.model.patch_size
    bucket = bucket_of(config, *grid)
    found, targets = pictures.sample(images, grid[0] * side, grid[1] * side, NUM_CLASSES, seed)
    return (pictures.as_sequences(found, side, bucket), targets), bucket


def make_part(
    train_step: TrainStep, images: int, grid: tuple[int, int], seed: int = 0
) -> tuple[tuple[Batch, Targets], Bucket]:
    """``make_host_part`` on the device."""
    part, bucket = make_host_part(train_step.config, images, grid, seed)
    return mesh_lib.put_batch(part, train_step.mesh), bucket


def microbatch(part: tuple[Batch, Targets]) -> Microbatch:
    """A part that is the whole of its step."""
    return Microbatch(np.int32(0), *part, ((part[1], part[0].image_valid),))


def make_forward(model: Model, config: ConfigDict, bucket: Bucket) -> Any:
    """``forward(params, batch)`` -> Outputs, compiled; the batch's patches are uint8."""

    def forward(params, batch):
        patches = normalise(batch.patches, config.preprocess.mean, config.preprocess.std)
        batch = batch._replace(patches=patches)
        return model.apply(params, batch, bounds=(bucket.rows, bucket.cols))

    return jit(forward)


def surroundings(config: ConfigDict, bucket: Bucket) -> dict[str, Any]:
    """What a figure of ours depends on beside the model: it belongs into every row.

    Returns:
      ``attention``, the backend that programs of a bucket take; its ``tokens``, ``dtype`` and
      ``platform``; ``cudnn``, its version where jax knows; ``xla_flags``.
    """
    model, platform = config.model, jax.devices()[0].platform
    tokens = 1 + model.num_queries + bucket.patches
    backend = attention.resolve(
        model.attention, platform=platform, dtype=model.dtype, tokens=tokens
    )
    return {
        "attention": backend,
        "tokens": tokens,
        "dtype": model.dtype,
        "platform": platform,
        "cudnn": _cudnn_version(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _cudnn_version() -> int | None:
    try:
        from jax._src.lib import cuda_versions  # jax has no public name for it

        return cuda_versions.cudnn_get_version()
    except Exception:  # none here, or the name has moved: no reason not to measure
        return None


def memory_limit() -> int | None:
    """What this process may hold on the first device; None where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def peak_bytes() -> int | None:
    """The most that this process has held on the first device; None where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
