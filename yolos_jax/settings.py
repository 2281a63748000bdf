"""A run's configuration made complete and checked before anything is built from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

# Keys that recipes for fine-tuning leave at 0: what they are is in the checkpoint of the start.
FROM_CHECKPOINT = {
    "model": (
        "patch_size",
        "width",
        "depth",
        "heads",
        "mlp_width",
        "num_queries",
        "position_grid",
        "mid_position_grid",
        "layer_norm_eps",
    ),
    "preprocess": ("size", "max_size", "mean", "std"),
}
OPEN = (0, (0, 0), (0.0, 0.0, 0.0))
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
    """Returns a copy in which keys left at 0 (lists: at zeros) have the checkpoint's values.

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
        for key in keys:
            value = config[section][key]
            # () says "no table"; only zeros say "as in the checkpoint".
            if value not in OPEN:
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


def check(config: ConfigDict) -> None:
    """Refuses values that no run can have.

    What only one room can judge (names of schedules, backends, dtypes, ...) is refused there.

    Raises:
      ValueError: naming every wrong key, its value and what was expected.
    """
    wrong = []

    def expect(key: str, condition: bool, expected: str) -> None:
        section, _, name = key.rpartition(".")
        value = (config[section] if section else config)[name]
        if not condition:
            wrong.append(f"{key}={value!r}: expected {expected}")

    for key in ("epochs", "batch_size", "microbatches"):
        expect(key, config[key] >= 1, "at least 1")
    expect("seed", config.seed >= 0, "0 or more")
    expect(
        "batch_size",
        config.microbatches < 1 or config.batch_size % config.microbatches == 0,
        f"a multiple of microbatches={config.microbatches}",
    )
    expect("data.root", bool(config.data.root), "the folder of the pictures and annotations")
    for key in ("on_error", "exif"):
        allowed = {"on_error": ("raise", "skip"), "exif": ("ignore", "apply")}[key]
        expect(f"data.{key}", config.data[key] in allowed, f"one of {allowed}")
    for key in ("train_subset", "val_subset", "workers"):
        expect(f"data.{key}", config.data[key] >= 0, "0 or more")
    expect("data.prefetch", config.data.prefetch >= 1, "at least 1")
    expect("data.max_bad_fraction", 0 <= config.data.max_bad_fraction <= 1, "0 to 1")
    for key in ("mean", "std"):
        expect(f"preprocess.{key}", len(config.preprocess[key]) == 3, "three numbers")
    group = config.loss.class_loss_group
    images = config.batch_size // max(config.microbatches, 1)
    expect(
        "loss.class_loss_group",
        group == 0 or (group > 0 and images % group == 0),
        f"0, or a divisor of the {images} images of a microbatch",
    )
    expect("loss.reference_processes", config.loss.reference_processes >= 1, "at least 1")
    expect("matcher.where", config.matcher.where in ("host", "device"), "'host' or 'device'")
    expect("optimizer.lr", config.optimizer.lr > 0, "more than 0")
    expect("optimizer.backbone_lr", config.optimizer.backbone_lr >= 0, "0 or more")
    expect("optimizer.ema_decay", 0 <= config.optimizer.ema_decay < 1, "0 to less than 1")
    expect("optimizer.max_skipped", config.optimizer.max_skipped >= 1, "at least 1")
    for key in ("keep_last", "wait_seconds"):
        expect(f"checkpoint.{key}", config.checkpoint[key] >= 1, "at least 1")
    expect("eval.batch_size", config.eval.batch_size >= 1, "at least 1")
    for key in ("checkpoint.every_steps", "checkpoint.keep_best", "eval.every_epochs"):
        section, name = key.split(".")
        expect(key, config[section][name] >= 0, "0 or more")
    expect("log.every_steps", config.log.every_steps >= 1, "at least 1")
    for key in ("pictures", "watchdog_seconds"):
        expect(f"log.{key}", config.log[key] >= 0, "0 or more")
    if wrong:
        raise ValueError("configuration:\n  " + "\n  ".join(wrong))
