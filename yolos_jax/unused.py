"""Keys of a configuration that change nothing, given what other keys say: worth a note."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

# Keys, the key that decides whether they are read, and the values of it with which they are.
_READ: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("optimizer.warmup_steps", "optimizer.schedule", lambda value: value == "cosine"),
    (
        "optimizer.warmup_epochs optimizer.warmup_lr",
        "optimizer.schedule",
        lambda value: value == "published",
    ),
    ("optimizer.warmup_lr", "optimizer.warmup_epochs", bool),
    ("optimizer.min_lr", "optimizer.schedule", lambda value: value in ("published", "cosine")),
    ("optimizer.lr_drop", "optimizer.schedule", lambda value: value in ("published_step", "step")),
    ("augment.crop_resize augment.crop_range", "augment.crop", bool),
    ("data.tfds_dir data.tfds_train data.tfds_val", "data.tfds_name", bool),
    ("data.train_images data.val_images", "data.tfds_name", lambda value: not value),
    (
        """model.patch_size model.depth model.position_grid model.mid_position_grid
        model.position_init model.det_token_std model.attention""",
        "model.name",
        lambda value: value == "yolos",
    ),
    (
        """model.detr.blocks model.detr.stem_width model.detr.dilation model.detr.encoder_depth
        model.detr.decoder_depth model.detr.pre_norm model.detr.position model.detr.dropout""",
        "model.name",
        lambda value: value == "detr",
    ),
    # All of these are the checkpoint's where the blocks are: see settings.complete.
    (
        """model.detr.stem_width model.detr.dilation model.detr.encoder_depth
        model.detr.decoder_depth model.detr.pre_norm model.detr.position""",
        "model.detr.blocks",
        any,
    ),
    ("log.watchdog_exit", "log.watchdog_seconds", bool),
)


def notes(config: ConfigDict, defaults: Mapping[str, Any]) -> list[str]:
    """One line for every key that somebody set in vain.

    Args:
      config: a run's, as it was given.
      defaults: nested, what keys are that nobody set, such as those of configs/common.py. Empty:
        unknown.
    """
    found = {}
    for keys, decides, reads in _READ if defaults else ():
        why = _value(config, decides)
        if reads(why):
            continue
        for key in keys.split():
            value = _value(config, key)
            if value != _value(defaults, key):
                found.setdefault(key, f"note: {key}={value!r} is not used with {decides}={why!r}")
    return list(found.values())


def _value(config: Mapping[str, Any], key: str) -> Any:
    for name in key.split("."):
        config = config[name]
    return tuple(config) if isinstance(config, list) else config
