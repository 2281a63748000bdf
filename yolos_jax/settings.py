"""A run's configuration, made complete from the checkpoint that it starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

# Keys that recipes for fine-tuning leave open, with the value that says so, which no detector can
# have: what they are is in the checkpoint of the start.
FROM_CHECKPOINT = {
    "model": {
        "patch_size": 0,
        "width": 0,
        "depth": 0,
        "heads": 0,
        "mlp_width": 0,
        "num_queries": 0,
        "position_grid": (0, 0),
        "mid_position_grid": (0, 0),  # () says that there are none
        "layer_norm_eps": 0.0,
    },
    "preprocess": {"size": 0, "max_size": -1, "mean": (), "std": ()},  # max_size 0 is no limit
}
# model.detr is left open as a whole, by its blocks: not every key of it has a value for "open".
OPEN_BLOCKS = (0, 0, 0, 0)
DETR_FROM_CHECKPOINT = (
    "blocks",
    "stem_width",
    "dilation",
    "encoder_depth",
    "decoder_depth",
    "pre_norm",
    "position",
)


def complete(
    config: ConfigDict, metadata: Mapping[str, Any] | None, source: str = "the checkpoint"
) -> ConfigDict:
    """Returns a copy in which keys left open have the checkpoint's values.

    Args:
      config: a run's.
      metadata: of the checkpoint that the run starts from or goes on from; None without one.
      source: what to call it.

    Raises:
      ValueError: a key is left open and no checkpoint says what it is, or the checkpoint is one of
        another model.
    """
    config = config.copy_and_resolve_references()
    stored_model = (metadata or {}).get("model", {})
    if metadata is not None and config.model.name != stored_model["name"]:
        raise ValueError(
            f"model.name is {config.model.name!r}, but {source} is a {stored_model['name']!r}"
        )
    for section, keys in FROM_CHECKPOINT.items():
        for key, left_open in keys.items():
            value = config[section][key]
            if value != left_open:
                continue
            if metadata is None:
                raise ValueError(
                    f"{section}.{key} is {value}, which means: as in the checkpoint that "
                    "--config.init names; but --config.init is empty"
                )
            if key not in metadata[section]:
                raise ValueError(
                    f"{section}.{key} is {value}, which means: as in the checkpoint; but {source} "
                    f"has none, being a {stored_model['name']!r}"
                )
            stored = metadata[section][key]
            config[section][key] = tuple(stored) if isinstance(value, tuple) else stored
    if tuple(config.model.detr.blocks) == OPEN_BLOCKS and "detr" in stored_model:
        for key in DETR_FROM_CHECKPOINT:
            value = stored_model["detr"][key]
            config.model.detr[key] = tuple(value) if isinstance(value, list) else value
    return config
