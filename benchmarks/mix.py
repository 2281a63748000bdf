"""Pictures of COCO-like sizes as batches: ours by the plan, PyTorch's at random and padded.

Needs none of the libraries that read datasets.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from benchmarks.coco_like import draw_sizes
from yolos_jax.data import plan as plan_lib
from yolos_jax.models.build import layout_of

PICTURES = 8192


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a plan asks of an Index whose pictures have no boxes."""

    heights: np.ndarray  # int32 [I]
    widths: np.ndarray  # int32 [I]
    annotations: str = "sizes like COCO's"
    max_boxes: int = 0
    boxes_xyxy_px: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 4)))
    labels: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))

    def __len__(self) -> int:
        return len(self.heights)

    @property
    def box_offsets(self) -> np.ndarray:
        """int64 [I + 1]."""
        return np.zeros(len(self) + 1, np.int64)

    def select(self, rows: np.ndarray) -> Sizes:
        """The pictures of ``rows``."""
        return Sizes(self.heights[rows], self.widths[rows])

    def path(self, row: int) -> str:
        """What to call a picture."""
        return f"picture {row}"


def sizes(count: int = PICTURES) -> Sizes:
    """Pictures with COCO's sizes."""
    drawn = draw_sizes(np.random.default_rng(0), count).astype(np.int32)
    return Sizes(*drawn.T)


def training_plan(config: Any, batch_size: int, count: int = PICTURES) -> plan_lib.Plan:
    """An epoch of the recipe in our batches."""
    index, layout = sizes(count), layout_of(config.model)
    recipe = plan_lib.Recipe.from_config(config, layout.patch_size)
    return plan_lib.make_plan(
        index,
        recipe,
        layout.buckets(index, recipe, config.buckets.count, config.buckets.multiple),
        seed=0,
        epoch=0,
        batch_size=batch_size,
        grouped=config.buckets.grouped,
    )


def evaluation_plan(config: Any, batch_size: int, count: int = PICTURES) -> plan_lib.Plan:
    """The same pictures as they are evaluated, in our batches."""
    index, layout = sizes(count), layout_of(config.model)
    recipe = plan_lib.EvalRecipe.from_config(config, layout.patch_size)
    buckets = layout.buckets(index, recipe, config.buckets.count, config.buckets.multiple)
    return plan_lib.make_eval_plan(index, recipe, buckets, batch_size=batch_size)


def padded_batches(plan: plan_lib.Plan, batch_size: int, steps: int) -> list[np.ndarray]:
    """The plan's pictures in batches as PyTorch's sampler forms them.

    Returns:
      Grids int [batch_size, 2] of each batch; its canvas has the most rows and the most columns.
    """
    grids = plan.grid[plan.rows >= 0]
    order = np.random.default_rng(1).permutation(len(grids))[: steps * batch_size]
    return list(grids[order].reshape(-1, batch_size, 2))
