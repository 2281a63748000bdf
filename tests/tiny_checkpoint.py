"""A detector of random weights, written as a checkpoint: for tests of what reads one."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from configs import shapes
from yolos_jax import checkpoint
from yolos_jax.labels import LabelMap
from yolos_jax.models.build import build_model


def write(folder: Path, label_map: LabelMap, seed: int = 0) -> Path:
    """Writes a detector for 64-pixel pictures that finds all kinds of things."""
    config = shapes.get_config()
    config.model.depth, config.model.width, config.model.mlp_width = 1, 24, 48
    config.model.scan = False
    model = build_model(config.model, label_map.num_classes)
    random = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32),
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    metadata = {
        "format": checkpoint.FORMAT,
        "model": config.model.to_dict(),
        "num_classes": label_map.num_classes,
        "label_map": label_map.to_json(),
        "preprocess": config.preprocess.to_dict(),
        "config": config.to_dict(),
        "source": "random weights",
    }
    checkpoint.save_params(folder, params, metadata)
    return folder
