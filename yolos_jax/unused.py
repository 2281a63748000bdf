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
    ("optimizer.min_lr", "optimizer.schedule", lambda value: value in ("published", "cosine")),
    ("optimizer.lr_drop", "optimizer.schedule", lambda value: value in ("published_step", "step")),
    ("augment.crop_resize augment.crop_range", "augment.crop", bool),
    ("data.tfds_dir data.tfds_train data.tfds_val", "data.tfds_name", bool),
    (
        "data.train_annotations data.train_images data.val_images",
        "data.tfds_name",
        lambda value: not value,
    ),
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
    ("log.watchdog_exit", "log.watchdog_seconds", bool),
)


def notes(config: ConfigDict, defaults: Mapping[str, Any]) -> list[str]:
    """One line for every key that somebody set in vain.

    Args:
      config: a run's, as it was given.
      defaults: nested, of configs/common.py; a key that is as there was not set by anybody. Empty:
        nobody knows.
    """
    found = []
    for keys, decides, reads in _READ if defaults else ():
        why = _value(config, decides)
        if reads(why):
            continue
        for key in keys.split():
            value = _value(config, key)
            if value != _value(defaults, key):
                found.append(f"note: {key}={value} is not used with {decides}={why!r}")
    return found


def _value(config: Mapping[str, Any], key: str) -> Any:
    for name in key.split("."):
        config = config[name]
    return tuple(config) if isinstance(config, list) else config
