"""Five optimiser steps of a DETR beside the original's own training function, in two settings.

goldens/detr_training.npz: facebookresearch/detr (commit 29901c5) in float32 on a CPU; a reduced
ResNet, 2 encoder and 3 decoder layers of width 32, no dropout, batches of two padded pictures, one
of them without targets. Setting a: the published rates, decay and clipping; b: lr 1e-3, backbone
5e-4, weight decay 0.1, clip 1. Every step's losses depend on all updates before it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from tests import golden_losses, tiny, tiny_detr
from yolos_jax import optimizer
from yolos_jax.batch import Canvas, CanvasBucket, Targets
from yolos_jax.convert import detr_names

pytestmark = pytest.mark.usefixtures("quick_to_compile")
CLASSES = 5
SETTINGS = {
    "a": {"lr": 1e-4, "backbone_lr": 1e-5, "weight_decay": 1e-4, "clip_norm": 0.1},
    "b": {"lr": 1e-3, "backbone_lr": 5e-4, "weight_decay": 0.1, "clip_norm": 1.0},
}
ATOL = {"a": (5e-5, 2e-4, 2e-4), "b": (5e-4, 1e-3, 2e-3)}  # losses, total, relative of the norm


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(golden_losses.GOLDENS / "detr_training.npz") as stored:
        return dict(stored)


def make_config(setting: str):
    config = common.get_config()
    config.model.update(
        tiny_detr.model_config(
            blocks=(2, 1, 2, 1), stem_width=8, width=32, heads=4, mlp_width=64, num_queries=10,
            encoder_depth=2, decoder_depth=3, dropout=0.0,
        )
    )  # fmt: skip
    config.loss.update(dict(class_loss_group=0, reference_processes=1))
    config.optimizer.update(SETTINGS[setting])
    config.optimizer.freeze = (r"backbone/conv1/.*", r"backbone/layer1/.*")
    return config


def load_batch(number: int) -> tuple[Canvas, Targets]:
    """Pixels as sixty-fourths, and the targets of a step."""
    stored = {
        name.removeprefix(f"step{number}_"): values
        for name, values in golden().items()
        if name.startswith(f"step{number}_")
    }
    pixels = stored["x"].astype(np.float32).transpose(0, 2, 3, 1) / 64
    labels = stored["tgt_labels"]
    targets = Targets(
        labels=np.maximum(labels, 0).astype(np.int32),
        boxes_cxcywh=stored["tgt_boxes"],
        target_valid=np.arange(labels.shape[1]) < stored["tgt_count"][:, None],
    )
    return Canvas(pixels, stored["hw"].astype(np.int32), np.ones(2, bool)), targets


def start(config) -> dict:
    state = {
        name.removeprefix("init/"): value
        for name, value in golden().items()
        if name.startswith("init/")
    }
    return detr_names.to_params(state, config.model.to_dict(), CLASSES, "golden")


@pytest.fixture
def normalised_already(monkeypatch):
    """The pictures of the original's test are normalised floats, which no bytes could be."""

    def empty(self, images, patch_size, zeros=np.zeros):
        del patch_size
        return Canvas(
            zeros((images, self.rows, self.cols, 3), np.float32),
            zeros((images, 2), np.int32) + 1,
            zeros((images,), bool),
        )

    monkeypatch.setattr(CanvasBucket, "empty", empty)
    monkeypatch.setattr(Canvas, "normalised", lambda self, mean, std: self)


def train(setting: str):
    """Yields a step's metrics, and what is stored of it; at last the parameters."""
    config, mesh = make_config(setting), tiny.mesh_of(1)
    with jax.default_matmul_precision("highest"):
        train_step = tiny.make_step(mesh, config, CLASSES)
        state = train_step.init_state(jax.random.key(0), start(config))
        for number in range(5):
            batch, targets = load_batch(number)
            bucket = CanvasBucket(0, *batch.pixels.shape[1:3])
            parts = jax.tree.map(jnp.asarray, [(batch, targets)])
            state, metrics = train_step(state, parts, bucket, config.optimizer.lr)
            prefix = f"trace_{setting}_"
            stored = {
                name.removeprefix(prefix): values[number]
                for name, values in golden().items()
                if name.startswith(prefix)
            }
            yield metrics, stored
    yield state.params, start(config)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_five_steps(setting, normalised_already):
    loss_atol, total_atol, norm_rtol = ATOL[setting]
    *steps, (params, before) = train(setting)
    for metrics, stored in steps:
        assert metrics["finite"]
        for name in stored.keys() - {"total", "grad_norm"}:
            np.testing.assert_allclose(metrics[name], stored[name], rtol=0, atol=loss_atol)
        np.testing.assert_allclose(metrics["loss"], stored["total"], rtol=0, atol=total_atol)
        np.testing.assert_allclose(metrics["grad_norm"], stored["grad_norm"], rtol=norm_rtol)
    frozen = make_config(setting).optimizer.freeze
    _, constants = optimizer.partition(before, (r"backbone/(.*/)?(bn.|downsample_bn)/.*", *frozen))
    for path, value in zip(optimizer.paths(constants), jax.tree.leaves(constants), strict=True):
        after = functools.reduce(lambda tree, key: tree[key], path.split("/"), params)
        np.testing.assert_array_equal(after, value, path)
