"""Whether two sides computed the same, before anybody asks which was faster."""

from __future__ import annotations

from typing import Any

import numpy as np


def same(what: str, ours: Any, theirs: Any, *, most: float) -> float:
    """The largest difference of two arrays.

    Args:
      what: what to call them.
      ours, theirs: of one shape.
      most: what it may be.

    Raises:
      RuntimeError: it is more, or not a number.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise RuntimeError(f"{what}: ours has the shape {ours.shape}, theirs {theirs.shape}")
    difference = float(np.abs(ours - theirs).max(initial=0))
    if not difference <= most:
        raise RuntimeError(f"{what}: ours and theirs differ by {difference:.3g}, allowed {most:g}")
    return difference


def picture_shows(outputs: Any, *, least: float) -> None:
    """Asks that outputs [B, ...] of different pictures differ; else ``same`` proves little.

    Raises:
      RuntimeError: they differ by less.
    """
    outputs = np.asarray(outputs, np.float64)
    difference = float(np.abs(outputs[1:] - outputs[:1]).max(initial=0))
    if not difference >= least:
        raise RuntimeError(
            f"outputs of different pictures differ by {difference:.3g} only, expected {least:g}: "
            "with such weights a wrong model would pass"
        )
