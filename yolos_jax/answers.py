"""What a detector's answers are like, whether right or not: do they depend on the picture at all?

A set-prediction detector that has learnt little gives every picture the same boxes, with scores
below any threshold: AP 0 and pictures without a box, which look like a fault of the data.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from yolos_jax.batch import Detections

# The demo's boxes vary by 0.002 and 0.005 of a side in its first hundred steps, by more than 0.01
# from AP 0.002 on, by 0.04 at AP 0.05.
_SAME = 0.01
_FEW = 8  # pictures; of fewer all may be alike by chance
_SHOWN = 0.5  # score from which predict draws a box, unless told otherwise


def describe(detections: Detections, sizes: np.ndarray) -> dict[str, float]:
    """Two numbers for the log, -1 where there is nothing to say.

    Args:
      detections: numpy, [I, Q, ...], of I pictures.
      sizes: int [I, 2], their heights and widths in pixels.

    Returns:
      ``best_score``, of all; and ``box_spread``, how much a query's box varies over pictures (8 or
      more): the standard deviation of its corners in shares of the sides, mean over queries.
    """
    finite = np.isfinite(detections.scores).all(1) & np.isfinite(detections.boxes_xyxy_px).all(
        (1, 2)
    )
    scores, boxes = detections.scores[finite], detections.boxes_xyxy_px[finite]
    sides = sizes[finite][:, None, [1, 0, 1, 0]]
    spread = (boxes / sides).std(axis=0).mean() if len(boxes) >= _FEW else -1
    return {"best_score": float(scores.max(initial=-1)), "box_spread": float(spread)}


def notes(metrics: Mapping[str, float]) -> list[str]:
    """Lines for whoever wonders about an AP of 0 or -1, or pictures without boxes.

    Args:
      metrics: of ``describe``, and COCO's.
    """
    lines = []
    if metrics.get("AP") == -1:
        lines.append("note: these pictures have no box that counts: COCO's AP of nothing is -1")
    spread, best = metrics.get("box_spread", -1), metrics.get("best_score", -1)
    if 0 <= spread < _SAME:
        lines.append(
            f"note: a query's box is the same on every picture (it varies by {spread:.1%} of the "
            "sides): the model does not look at pictures yet"
        )
    if 0 <= best < _SHOWN:
        lines.append(
            f"note: no box scores {_SHOWN:g} or more, the best {best:.3f}: none is drawn without a "
            "lower threshold"
        )
    return lines
