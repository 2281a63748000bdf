"""Whether both sides of ``benchmarks.gpu`` came to the same, by the kernels that were meant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

# bfloat16 on both sides, rounded in different places. At full depth on a CPU, S and B: boxes of the
# compared queries up to 0.005 apart, all boxes of four pictures 0.0012 on average, losses 0.08 %,
# norms of gradients 2 %. A wrong GELU, a wrong resize or a lost token is beyond these.
BOX_MOST = 0.01  # of the picture's side, over the compared queries
BOX_MEAN = 0.004  # over all queries of several pictures
LOSS = 0.005  # relative
GRADIENT_NORM = 0.03  # relative
SHORT = 256  # tokens; up to here ``attention.resolve`` takes the textbook form everywhere

Row = dict[str, Any]


def of(results: Iterable[Row], row: str, side: str = "ours") -> list[Row]:
    """The measurements of a row of the table and a side."""
    return [each for each in results if each["row"] == row and each["side"] == side]


def pairs(results: Sequence[Row], row: str) -> list[tuple[Row, Row]]:
    """What both sides measured of one thing; an empty dictionary where one did not.

    A row of theirs may name with ``against`` which of ours it is to be held against.
    """
    ours, theirs = (
        {(each["model"], each["what"]): each for each in of(results, row, side)}
        for side in ("ours", "theirs")
    )
    found = []
    for key in sorted({**ours, **theirs}):
        other = theirs.get(key, {})
        found.append((ours.get((key[0], other.get("against", key[1])), {}), other))
    return found


def differences(results: Sequence[Row]) -> list[str]:
    """Where both sides, or two forms of ours, did not come to the same."""
    found = [text for each in results if (text := wrong_attention(each))]
    for ours, theirs in pairs(results, "train"):
        found += _finite(ours, "ours") + _finite(theirs, "theirs")
        if ours.get("images") != theirs.get("images"):
            continue  # a mean over other objects
        for key, most in (("loss", LOSS), ("grad_norm", GRADIENT_NORM)):
            if key in ours and key in theirs and not abs(ours[key] / theirs[key] - 1) <= most:
                found.append(
                    f"{key} of {ours['model']}: ours {ours[key]:.4f}, theirs {theirs[key]:.4f}"
                )
    for ours, theirs in pairs(results, "forward"):
        found += _boxes(ours, theirs)
    losses: dict[str, list[float]] = {}
    for each in of(results, "programs"):
        losses.setdefault(each["model"], []).append(each["loss"])
    for model, values in losses.items():
        if not max(values) <= (1 + LOSS) * min(values):
            found.append(f"losses of {model} in one program and in two: {values}")
    return list(dict.fromkeys(found))


def wrong_attention(row: Row) -> str:
    """What is wrong with the attention that a row of ours was measured with; '' if nothing is."""
    meant = row.get("platform") == "gpu" and row.get("dtype") == "bfloat16"
    if not meant or row.get("tokens", 0) <= SHORT or row.get("attention") == "cudnn":
        return ""
    return (
        f"ours {row.get('model', '')}: attention is {row.get('attention')!r} on a GPU in bfloat16, "
        f"not 'cudnn' (cuDNN {row.get('cudnn')}): these are not the figures of this project"
    )


def _finite(row: Row, side: str) -> list[str]:
    values = {key: row[key] for key in ("loss", "grad_norm") if key in row}
    return [
        f"{key} of {row['model']} is {value}: {side}"
        for key, value in values.items()
        if not np.isfinite(value)
    ]


def _boxes(ours: Row, theirs: Row) -> list[str]:
    found = []
    kinds = (("boxes", np.max, BOX_MOST, "most"), ("all_boxes", np.mean, BOX_MEAN, "mean"))
    for key, reduce, allowed, name in kinds:
        if key in ours and key in theirs:
            apart = float(reduce(np.abs(np.subtract(ours[key], theirs[key]))))
            if not apart <= allowed:
                found.append(
                    f"boxes of {ours['model']}, {theirs['what']}: {apart:.4f} apart ({name}; "
                    f"allowed {allowed})"
                )
    return found
