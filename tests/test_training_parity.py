"""Ten optimiser steps beside the original's own training function, in two settings.

goldens/training.npz: hustvl/YOLOS (commit 5717fc2) in float32 on a CPU; 4 blocks of width 48, a
random start, batches of two pictures of five sizes, matcher and loss weights as published, one
process. Setting a: lr 1e-4, weight decay 1e-4; b: lr 1e-3, weight decay 0.1; both: AdamW, clip 0.1.
Stored are the pictures as bytes, the start, the change of every parameter (in float16, which adds
at most 5e-6) and the smaller gradients of the first step. Tolerances leave room for another order
of sums. Key biases have their own: their gradient is zero but for rounding, which Adam normalises.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from configs import common
from tests import golden_losses, torch_weights
from yolos_jax import losses, mesh, optimizer, step
from yolos_jax.batch import Batch, Bucket, Targets, normalise
from yolos_jax.models.build import build_model

BUCKET = Bucket(patches=120, rows=10, cols=14)  # holds every step's pictures: one program
SETTINGS = {"a": (1e-4, 1e-4), "b": (1e-3, 0.1)}  # learning rate, weight decay
ATOL = {"a": (5e-5, 1e-5, 5e-5), "b": (2e-4, 1e-4, 3e-4)}  # losses, parameters, key biases


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(golden_losses.GOLDENS / "training.npz") as stored:
        return dict(stored)


def named(prefix: str) -> dict[str, np.ndarray]:
    """Stored parameters or gradients by the original's names."""
    return {
        name.removeprefix(prefix): value
        for name, value in golden().items()
        if name.startswith(prefix)
    }


def as_ours(state: dict[str, np.ndarray]) -> dict:
    return torch_weights.params_from_yolos(
        state, depth=4, num_queries=100, grid=(8, 14), mid_grid=(8, 14)
    )


def make_config(lr: float = 1e-4, weight_decay: float = 1e-4):
    config = common.get_config()
    config.model.update(dict(width=48, depth=4, heads=4, mlp_width=192, dtype="float32"))
    config.model.position_grid = config.model.mid_position_grid = (8, 14)
    config.loss.update(dict(class_loss_group=0, reference_processes=1))
    config.optimizer.update(dict(lr=lr, weight_decay=weight_decay, clip_norm=0.1))
    return config


def load_batch(number: int) -> tuple[Batch, Targets]:
    pixels = golden()[f"step{number}_pixels"]
    patches, grid = torch_weights.to_patches(pixels, 16)
    padding = ((0, 0), (0, BUCKET.patches - patches.shape[1]), (0, 0))
    labels, count = (golden()[f"step{number}_tgt_{part}"] for part in ("labels", "count"))
    targets = Targets(
        labels=np.maximum(labels, 0).astype(np.int32),
        boxes_cxcywh=golden()[f"step{number}_tgt_boxes"],
        target_valid=np.arange(labels.shape[1]) < count[:, None],
    )
    batch = Batch(np.pad(patches, padding), np.int32([grid] * 2), np.ones(2, bool))
    return jax.tree.map(jnp.asarray, (batch, targets))


def difference(ours: dict, expected: dict) -> tuple[float, float]:
    """Largest differences: of all parameters but the key biases, and of those."""
    others, keys = 0.0, 0.0
    for path, mine, theirs in zip(
        optimizer.paths(expected), jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True
    ):
        gap = np.abs(np.asarray(mine, np.float64) - theirs)
        if path == "backbone/blocks/attention/qkv/bias":
            keys = gap[:, 48:96].max()
            gap[:, 48:96] = 0
        others = max(others, gap.max())
    return others, keys


@pytest.mark.slow
def test_gradients_of_the_first_step():
    config = make_config()
    model = build_model(config.model, 91)
    params = jax.tree.map(jnp.asarray, as_ours(named("init/")))
    batch, targets = load_batch(0)
    mean, std = config.preprocess.mean, config.preprocess.std
    batch = batch._replace(patches=normalise(batch.patches, mean, std))
    matched_query = np.full((1, *targets.labels.shape), -1, np.int32)
    for image in range(2):
        query, target = (golden()[f"trace_a_match_{side}"][0, image] for side in ("src", "tgt"))
        matched_query[0, image, target[target >= 0]] = query[target >= 0]
    norms = losses.normalisers(
        targets,
        batch.image_valid,
        num_queries=100,
        eos_coef=0.1,
        class_loss_group=0,
        reference_processes=1,
    )

    def loss(params):
        outputs = model.apply(params, batch, bounds=(BUCKET.rows, BUCKET.cols))
        return losses.set_criterion(
            outputs, targets, matched_query, batch.image_valid, golden_losses.LOSS_WEIGHTS, norms
        )[0]

    with jax.default_matmul_precision("highest"):
        gradient = jax.jit(jax.grad(loss))(params)
    expected = named("gradient/")
    absent = {name: np.full_like(x, np.nan) for name, x in named("init/").items()}
    compared = 0
    for mine, theirs in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(as_ours(absent | expected)), strict=True
    ):
        stored = ~np.isnan(theirs)
        np.testing.assert_allclose(np.asarray(mine)[stored], theirs[stored], rtol=0, atol=2e-5)
        compared += stored.sum()
    assert compared == sum(x.size for x in expected.values())


@pytest.mark.parametrize("trace", [pytest.param("a", marks=pytest.mark.slow), "b"])
def test_ten_steps(trace):
    lr, weight_decay = SETTINGS[trace]
    loss_atol, atol, key_atol = ATOL[trace]
    config = make_config(lr, weight_decay)
    model = build_model(config.model, 91)
    start = as_ours(named("init/"))
    one_device = Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1), mesh.ROWS, axis_types=(AxisType.Auto,) * 2
    )
    with jax.default_matmul_precision("highest"):
        chain = optimizer.make_optimizer(config.optimizer, start)
        train_step = step.TrainStep(model, chain, one_device, config)
        state = train_step.init_state(jax.random.key(0), start)
        for number in range(10):
            state, metrics = train_step(state, [load_batch(number)], BUCKET, lr)
            stored = {
                name.removeprefix(f"trace_{trace}_"): values[number]
                for name, values in golden().items()
                if name.startswith(f"trace_{trace}_")
            }
            assert stored["lr"] == np.float32(lr) and metrics["finite"]
            for name in ("loss_ce", "loss_bbox", "loss_giou"):
                np.testing.assert_allclose(metrics[name], stored[name], rtol=0, atol=loss_atol)
            np.testing.assert_allclose(metrics["loss"], stored["total"], rtol=0, atol=loss_atol)
            np.testing.assert_allclose(metrics["grad_norm"], stored["grad_norm"], rtol=1e-4)
            for name in ("class_error", "cardinality_error"):
                np.testing.assert_allclose(metrics[name], stored[name], rtol=0, atol=1e-4)
    change = named(f"change_{trace}/")
    final = as_ours({name: x + np.float32(change[name]) for name, x in named("init/").items()})
    others, keys = difference(state.params, final)
    assert others <= atol and keys <= key_atol
    assert train_step.programs() == {"forward": 1, "update": 1}
