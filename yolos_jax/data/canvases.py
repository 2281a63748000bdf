"""The few static shapes of canvases that a run compiles for, chosen from the dataset and recipe.

Like ``buckets``, in two dimensions: the largest canvas takes everything that the recipe can make of
the dataset; the others are where pictures need least padding. To find the best rectangles is a
covering problem without a fast exact method; here they are taken one by one, each where it saves
most, and then moved as long as that saves more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from yolos_jax.batch import CanvasBucket
from yolos_jax.data import buckets as buckets_lib
from yolos_jax.data.augment import EvalRecipe, Recipe

if TYPE_CHECKING:  # Planning needs none of the libraries that read datasets.
    from yolos_jax.data.index import Index

SIDES = 64  # heights, and widths, among which those of canvases are searched
PASSES = 8  # over all canvases at most, each moved to where it saves most


def choose_canvases(
    index: Index, recipe: Recipe | EvalRecipe, count: int, multiple: int
) -> tuple[CanvasBucket, ...]:
    """Chooses at most ``count`` canvases that need little padding, from small to large.

    Args:
      index: the dataset.
      recipe: of training, or of evaluation.
      count: canvases at most.
      multiple: of which both sides are multiples, pixels.

    Returns:
      Canvases, the last of which holds every picture that is possible. If all pictures have one
      size, there is one canvas.

    Raises:
      ValueError: for an empty dataset or a count below one.
    """
    buckets_lib.check_choice(index, count, multiple)
    largest = _rounded(buckets_lib.possible_grids(index, recipe).max(axis=0), multiple)
    simulated = _rounded(buckets_lib.simulate(index, recipe), multiple)
    # Pairs as one number: unique over columns sorts records, many times slower.
    pairs, times = np.unique(simulated @ [largest[1] + 1, 1], return_counts=True)
    sizes = np.stack(np.divmod(pairs, largest[1] + 1), axis=1)
    chosen = _least_padding(sizes, times, _candidates(simulated), largest, count)
    area = chosen.prod(axis=1)
    return tuple(
        CanvasBucket(int(area[i]), *(int(side) for side in chosen[i]))
        for i in np.lexsort([chosen[:, 0], area])
    )


def _rounded(sizes: np.ndarray, multiple: int) -> np.ndarray:
    return -(-sizes // multiple) * multiple


def _candidates(sizes: np.ndarray) -> np.ndarray:
    """Shapes [R, 2] to choose from: frequent heights of the pictures [I, 2] and widths."""
    shares = np.linspace(0, 1, SIDES + 1)
    rows, cols = (np.unique(np.quantile(side, shares, method="higher")) for side in sizes.T)
    return np.stack(np.meshgrid(rows, cols, indexing="ij"), axis=-1).reshape(-1, 2)


def _least_padding(
    sizes: np.ndarray, times: np.ndarray, candidates: np.ndarray, largest: np.ndarray, count: int
) -> np.ndarray:
    """Canvases int64 [<= count, 2] with little padding, ``largest`` among them.

    Args:
      sizes: int64 [U, 2] of pictures.
      times: int64 [U], how many pictures have them.
      candidates: int64 [R, 2] to choose from.
      largest: int64 [2], holds every picture.
      count: how many to choose at most.
    """
    shapes = np.concatenate([candidates, largest[None]])
    area = shapes.prod(axis=1).astype(np.float64)  # sums of whole numbers: exact on every host
    holds = (sizes[None] <= shapes[:, None]).all(axis=-1)
    pixels = np.where(holds, area[:, None], np.inf)  # [R + 1, U]: of the canvas for the picture

    def best(chosen: list[int]) -> int | None:
        """What saves most besides those chosen; None: nothing."""
        saved = np.maximum(pixels[chosen].min(axis=0) - area[:, None], 0)
        saved = np.where(holds, saved, 0) @ times
        return int(saved.argmax()) if saved.max() > 0 else None

    def moved(chosen: list[int]) -> list[int]:
        for place in range(len(chosen) - 1, 0, -1):
            others = chosen[:place] + chosen[place + 1 :]
            better = best(others)
            chosen = others if better is None else [*chosen[:place], better, *chosen[place + 1 :]]
        return chosen

    chosen = [len(shapes) - 1]
    while len(chosen) < count and (following := best(chosen)) is not None:
        chosen.append(following)
    for _ in range(PASSES):
        after = moved(chosen)
        if after == chosen:
            break
        chosen = after
    used = np.unique(pixels[chosen].argmin(axis=0))
    return shapes[sorted({chosen[0], *(chosen[place] for place in used)})]
