"""Cases of goldens/matcher_loss.npz and aux_loss.npz, as the stages of this package take them.

Both were computed with the original PyTorch criteria, of hustvl/YOLOS (commit 5717fc2) and of
facebookresearch/detr, on random predictions: matcher weights 1, 5, 2, loss weights 1, 5, 2 and 0.1
for no-object. ``ddp_`` arrays are of one process per image. aux_loss.npz has several layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from yolos_jax.batch import Outputs, Targets
from yolos_jax.losses import LossWeights
from yolos_jax.matching import MatcherWeights

GOLDENS = Path(__file__).parent / "goldens"
MATCHER_WEIGHTS = MatcherWeights(class_cost=1.0, l1_cost=5.0, giou_cost=2.0)
LOSS_WEIGHTS = LossWeights(class_weight=1.0, l1_weight=5.0, giou_weight=2.0, eos_coef=0.1)
SINGLE_LAYER = ("c02", "c03", "c05", "c06")  # more targets than queries: c03
SEVERAL_LAYERS = ("c1", "c2", "c3")  # an image without targets; none with any; more than queries
NAMES = [*SINGLE_LAYER, *SEVERAL_LAYERS]


class Case(NamedTuple):
    arrays: dict[str, np.ndarray]  # as stored, without the case's prefix
    outputs: Outputs
    targets: Targets
    matched_query: np.ndarray  # int32 [A, B, M], the original's
    unique: np.ndarray  # bool [B]: only one assignment is the cheapest


def load(name: str) -> Case:
    file = "matcher_loss.npz" if name in SINGLE_LAYER else "aux_loss.npz"
    with np.load(GOLDENS / file) as stored:
        arrays = {
            key.removeprefix(f"{name}_"): stored[key]
            for key in stored
            if key.startswith(f"{name}_")
        }
    logits, boxes = arrays["logits"], arrays["boxes"]
    queries, matched = arrays["match_src"], arrays["match_tgt"]
    if name in SINGLE_LAYER:
        logits, boxes, queries, matched = logits[None], boxes[None], queries[None], matched[None]
    layers, images = logits.shape[:2]
    slots = arrays["tgt_labels"].shape[1]
    matched_query = np.full((layers, images, slots), -1, np.int32)
    for layer, image in np.ndindex(layers, images):
        real = matched[layer, image] >= 0
        matched_query[layer, image, matched[layer, image][real]] = queries[layer, image][real]
    targets = Targets(
        labels=np.maximum(arrays["tgt_labels"], 0).astype(np.int32),
        boxes_cxcywh=arrays["tgt_boxes"],
        target_valid=np.arange(slots) < arrays["tgt_count"][:, None],
    )
    unique = np.broadcast_to(arrays["match_gap"] > 1e-3, images)
    return Case(arrays, Outputs(logits, boxes), targets, matched_query, unique)
