"""Learning rates: float64 functions of the optimiser step, evaluated on the host.

``published`` and ``published_step`` are those of YOLOS: constant within an epoch, and one epoch
late, because its scheduler steps with an epoch's own number after that epoch. Epochs 0 and 1 train
at the start value and a drop at ``lr_drop`` is felt in epoch ``lr_drop + 1``. ``step`` is DETR's,
which is not late: epoch ``lr_drop`` is the first that is slower. ``cosine`` is smooth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


def make_schedule(
    config: Mapping[str, Any], *, steps_per_epoch: int, total_steps: int, epochs: int
) -> Callable[[int], float]:
    """The learning rate of every step.

    Args:
      config: the ``optimizer`` part of the configuration.
      steps_per_epoch: optimiser steps of one epoch.
      total_steps: optimiser steps of the whole run.
      epochs: of the whole run.

    Returns:
      A function of the step, 0 for the first.

    Raises:
      ValueError: for a schedule that does not exist, or a drop every 0 epochs.
    """
    if config["schedule"] == "published":
        return lambda step: _warmup_cosine_epoch(
            max(step // steps_per_epoch - 1, 0), epochs, config
        )
    if config["schedule"] in ("published_step", "step"):
        if config["lr_drop"] < 1:
            raise ValueError(f"optimizer.lr_drop is {config['lr_drop']}; expected at least 1 epoch")
        late = 1 if config["schedule"] == "published_step" else 0
        return lambda step: _step_epoch(max(step // steps_per_epoch - late, 0), config)
    if config["schedule"] == "cosine":
        return lambda step: _cosine(step, total_steps, config)
    raise ValueError(
        f"optimizer.schedule is {config['schedule']!r}; expected 'published', 'published_step', "
        "'step' or 'cosine'"
    )


def _warmup_cosine_epoch(epoch: int, epochs: int, config: Mapping[str, Any]) -> float:
    """timm's CosineLRScheduler as the reference sets it up: warm-up does not shift the cosine."""
    lr, warmup = config["lr"], config["warmup_epochs"]
    if epoch < warmup:
        return config["warmup_lr"] + epoch * (lr - config["warmup_lr"]) / warmup
    cosine = math.cos(math.pi * epoch / epochs)
    return config["min_lr"] + 0.5 * (lr - config["min_lr"]) * (1 + cosine)


def _step_epoch(epoch: int, config: Mapping[str, Any]) -> float:
    return config["lr"] * 0.1 ** (epoch // config["lr_drop"])


def _cosine(step: int, total_steps: int, config: Mapping[str, Any]) -> float:
    """From 0 up to lr in ``warmup_steps``, then half a cosine down to min_lr at ``total_steps``."""
    lr, warmup = config["lr"], config["warmup_steps"]
    if step < warmup:
        return lr * step / warmup
    share = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    return config["min_lr"] + 0.5 * (lr - config["min_lr"]) * (1 + math.cos(math.pi * share))
