"""What the values of a configuration must be, whatever the data and the machine.

What only one room can judge (names of schedules, backends, dtypes, ...) is refused there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

Rule = tuple[str, Callable[[Any], bool], str]  # keys, what holds of each, in words


def _of_each(holds: Callable[[float], bool]) -> Callable[[tuple], bool]:
    """Of three numbers."""
    return lambda values: (
        len(values) == 3
        and all(isinstance(value, int | float) and holds(value) for value in values)
    )


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


_RULES: tuple[Rule, ...] = (
    (
        """epochs batch_size microbatches data.prefetch loss.reference_processes
        optimizer.max_skipped checkpoint.keep_last checkpoint.wait_seconds
        eval.batch_size log.every_steps model.width model.heads model.mlp_width model.num_queries
        preprocess.size""",
        lambda value: value >= 1,
        "at least 1",
    ),
    (
        """data.train_subset data.val_subset data.workers preprocess.max_size augment.max_size
        matcher.class_cost matcher.l1_cost matcher.giou_cost
        loss.class_weight loss.l1_weight loss.giou_weight loss.eos_coef
        optimizer.backbone_lr optimizer.warmup_steps optimizer.warmup_epochs optimizer.warmup_lr
        optimizer.min_lr optimizer.weight_decay optimizer.clip_norm
        model.det_token_std checkpoint.every_steps checkpoint.keep_best eval.every_epochs
        log.pictures log.watchdog_seconds""",
        lambda value: value >= 0,
        "0 or more",
    ),
    ("optimizer.lr optimizer.eps model.layer_norm_eps", lambda value: value > 0, "more than 0"),
    ("data.max_bad_fraction", lambda value: 0 <= value <= 1, "0 to 1"),
    (
        "optimizer.b1 optimizer.b2 optimizer.ema_decay model.detr.dropout",
        lambda value: 0 <= value < 1,
        "0 to less than 1",
    ),
    (
        "optimizer.freeze",
        lambda value: all(isinstance(pattern, str) for pattern in value),
        "regular expressions, such as ('backbone',)",
    ),
    ("mesh.stopped_code", lambda value: 0 <= value <= 255, "an exit code, 0 to 255"),
    ("seed", lambda value: 0 <= value < 2**63, "0 or more, below 2 ** 63"),
    ("data.root", bool, "the folder of the pictures and annotations"),
    ("data.on_error", lambda value: value in ("raise", "skip"), "'raise' or 'skip'"),
    ("data.exif", lambda value: value in ("ignore", "apply"), "'ignore' or 'apply'"),
    ("matcher.where", lambda value: value in ("host", "device"), "'host' or 'device'"),
    ("preprocess.mean", _of_each(lambda x: 0 <= x <= 1), "three numbers from 0 to 1"),
    ("preprocess.std", _of_each(lambda x: 0 < x <= 1), "three numbers above 0, at most 1"),
)
_RULES_OF_YOLOS: tuple[Rule, ...] = (
    ("model.patch_size model.depth", lambda value: value >= 1, "at least 1"),
    (
        "model.position_grid",
        lambda value: len(value) == 2 and all(map(_is_positive, value)),
        "rows, columns",
    ),
    (
        "model.mid_position_grid",
        lambda value: not value or (len(value) == 2 and all(map(_is_positive, value))),
        "rows, columns; () for none",
    ),
)


def check_values(config: ConfigDict) -> None:
    """Refuses values that no run can have.

    Args:
      config: a complete one, see ``settings.complete``.

    Raises:
      ValueError: naming every wrong key, its value and what was expected.
    """
    wrong = []

    def expect(key: str, holds: bool, expected: str) -> None:
        if not holds:
            wrong.append(f"{key}={_value(config, key)!r}: expected {expected}")

    for key, value in _numbers(config):
        expect(key, math.isfinite(value), "a finite number")
    rules = _RULES + (_RULES_OF_YOLOS if config.model.name == "yolos" else ())
    for keys, holds, expected in rules:
        for key in keys.split():
            expect(key, holds(_value(config, key)), expected)

    parts = max(config.microbatches, 1)
    expect("batch_size", config.batch_size % parts == 0, f"a multiple of microbatches={parts}")
    group, images = config.loss.class_loss_group, config.batch_size // parts
    expect(
        "loss.class_loss_group",
        group == 0 or (group > 0 and images % group == 0),
        f"0, or a divisor of the {images} images of a microbatch",
    )
    weights = ("class_weight", "l1_weight", "giou_weight")
    some = any(config.loss[key] for key in weights)
    expect("loss.class_weight", some, f"more than 0, or one of {', '.join(weights[1:])}")
    costs = ("class_cost", "l1_cost", "giou_cost")
    some = any(config.matcher[key] for key in costs)
    expect("matcher.class_cost", some, f"more than 0, or one of {', '.join(costs[1:])}")
    # Otherwise the size would be changed in vain: the longer side is what decides.
    for key, size in (
        ("preprocess.size", config.preprocess.size),
        ("augment.scales", max(config.augment.scales, default=0)),
    ):
        section = key.partition(".")[0]
        most = config[section].max_size
        expect(key, size <= most or most == 0, f"no more than {section}.max_size={most}")
    if wrong:
        raise ValueError("configuration:\n  " + "\n  ".join(wrong))


def _value(config: ConfigDict, key: str) -> Any:
    for name in key.split("."):
        config = config[name]
    return config


def _numbers(config: ConfigDict, prefix: str = "") -> list[tuple[str, float]]:
    """Every float with its key."""
    found = []
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            found += _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            found.append((prefix + name, value))
    return found
