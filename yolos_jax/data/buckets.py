"""The few static sequence lengths that a run compiles for, chosen from the dataset and recipe.

A bucket has a length and bounds on rows and columns of patches (models resize their position
tables into that frame, so tight bounds save work). The largest bucket takes everything that the
recipe can possibly make of the dataset; the others are where padding is least. Buckets are a pure
function of index and recipe: the same in every epoch, on every host, after every restart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from yolos_jax.batch import Bucket
from yolos_jax.data import augment, sizes
from yolos_jax.data.augment import EvalRecipe, Recipe

if TYPE_CHECKING:  # Planning needs none of the libraries that read datasets.
    from yolos_jax.data.index import Index

SIMULATED_ROWS = 50_000  # at least, for the distribution of lengths
# Share of the pictures of a bucket's length that its bounds leave to a later bucket: panoramas,
# which would otherwise make every bucket as wide as the widest picture of the dataset.
OUTLIERS = 0.001
CHUNK = 1_000_000  # sizes computed at once, to bound memory


def choose_buckets(
    index: Index, recipe: Recipe | EvalRecipe, count: int, multiple: int, num_prefix: int
) -> tuple[Bucket, ...]:
    """Chooses at most ``count`` buckets that minimise padding, from short to long.

    Args:
      index: the dataset.
      recipe: of training, or of evaluation.
      count: buckets at most.
      multiple: of which the whole sequence, prefix and patches, is a multiple.
      num_prefix: tokens before the patches, 1 + Q.

    Returns:
      Buckets, each at least as large as the one before in length, rows and columns. If all
      pictures have one length, there is one bucket.

    Raises:
      ValueError: for an empty dataset or a count below one.
    """
    check_choice(index, count, multiple)
    simulated = simulate(index, recipe)
    possible = possible_grids(index, recipe)
    lengths = _padded(possible.prod(axis=1), multiple, num_prefix)
    longest = int(lengths.max())
    weights = np.bincount(_padded(simulated.prod(axis=1), multiple, num_prefix))
    candidates = np.union1d(np.flatnonzero(weights), longest)
    weights = np.append(weights, np.zeros(longest + 1 - len(weights), np.int64))[candidates]
    chosen = candidates[_least_padding(candidates, weights, count)]
    bounds = [_bounds(simulated[simulated.prod(axis=1) <= length]) for length in chosen[:-1]]
    bounds = np.maximum.accumulate([*bounds, possible.max(axis=0)], axis=0)
    return tuple(
        Bucket(int(length), int(rows), int(cols))
        for length, (rows, cols) in zip(chosen, bounds, strict=True)
    )


def check_choice(index: Index, count: int, multiple: int) -> None:
    """Raises ValueError where there is nothing to choose buckets for, or none may be chosen."""
    if count < 1 or multiple < 1:
        raise ValueError(f"buckets.count {count} and buckets.multiple {multiple} must be positive")
    if not len(index):
        raise ValueError(f"{index.annotations}: no picture is left to choose buckets for")


def smallest_bucket(grid: np.ndarray, buckets: tuple[Bucket, ...]) -> np.ndarray:
    """Number of the smallest bucket that takes each grid: int32 [R] from int [R, 2].

    Raises:
      ValueError: when even the largest does not (the buckets are those of another recipe).
    """
    return smallest_for_all(grid[:, None], buckets)


def smallest_for_all(grids: np.ndarray, buckets: tuple[Bucket, ...]) -> np.ndarray:
    """Number of the smallest bucket that takes every grid of a step, int32 [S] from int [S, B, 2].

    Raises as ``smallest_bucket`` does.
    """
    most = grids.max(axis=1)
    needs = np.concatenate([grids.prod(axis=2, dtype=np.int64).max(axis=1)[:, None], most], axis=1)
    smallest = np.full(len(needs), -1, np.int32)
    for number, bucket in reversed(list(enumerate(buckets))):
        smallest[(needs <= np.array(bucket)).all(axis=1)] = number
    if (smallest < 0).any():
        rows, cols = most[np.argmin(smallest)]
        raise ValueError(
            f"a picture of {rows} x {cols} patches does not fit the largest bucket, "
            f"{buckets[-1]}: buckets and recipe do not belong together"
        )
    return smallest


def neighbours(buckets: tuple[Bucket, ...]) -> np.ndarray:
    """Places of the buckets in an order whose neighbours have most in common: int64 [K].

    A step that two neighbours share fits the next larger one. Where each bucket takes what the one
    before takes that is their own order; canvases go from wide ones, large to small, to high ones,
    small to large: where a wide picture and a high one meet, both are small.
    """
    shapes = np.array(buckets)
    if (np.diff(shapes, axis=0) >= 0).all():
        return np.arange(len(buckets))
    size, rows, cols = shapes.T
    high = rows > cols
    places = np.empty(len(buckets), np.int64)
    places[np.lexsort([np.where(high, size, -size), high])] = np.arange(len(buckets))
    return places


def possible_grids(index: Index, recipe: Recipe | EvalRecipe) -> np.ndarray:
    """Every grid that the recipe can make of a picture of the dataset, int64 [G, 2], exactly."""
    shapes = np.unique(np.stack([index.heights, index.widths], axis=1), axis=0)
    if isinstance(recipe, EvalRecipe):
        return _grids(shapes, (recipe.size,), recipe)
    whole = shapes[: len(shapes) if recipe.crop < 1 else 0]
    cut = _possible_crops(shapes, recipe) if recipe.crop > 0 else shapes[:0]
    return _grids(np.concatenate([whole, cut]), recipe.scales, recipe)


def _possible_crops(shapes: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Every (height, width) that the crop can have, int64 [C, 2]; shapes int [U, 2].

    The sides of a crop are drawn independently, so a picture allows a rectangle of pairs. The
    union of rectangles comes from marking their corners and summing.
    """
    least, most = recipe.crop_range
    corners = np.zeros((most + 2, most + 2), np.int64)
    for side in recipe.crop_resize:
        frame = np.stack(sizes.resized_size(*shapes.T, side, 0, recipe.multiple), axis=1)
        low, high = np.minimum(frame, least), np.minimum(frame, most) + 1
        for rows, cols, sign in ((low, low, 1), (low, high, -1), (high, low, -1), (high, high, 1)):
            np.add.at(corners, (rows[:, 0], cols[:, 1]), sign)
    return np.argwhere(corners.cumsum(axis=0).cumsum(axis=1) > 0)


def _grids(shapes: np.ndarray, scales: tuple[int, ...], recipe: Recipe | EvalRecipe) -> np.ndarray:
    """Grids int64 [G, 2] of pictures [U, 2] at every scale."""
    found = [np.zeros((0, 2), np.int64)]
    for start in range(0, len(shapes), CHUNK):
        height, width = shapes[start : start + CHUNK].T
        for scale in scales:
            size = sizes.resized_size(height, width, scale, recipe.max_size, recipe.multiple)
            # Pairs as one number: unique over columns sorts records, many times slower.
            pairs = np.stack(size, axis=1) // recipe.multiple
            cols = int(pairs[:, 1].max()) + 1
            found.append(np.stack(np.divmod(np.unique(pairs @ [cols, 1]), cols), axis=1))
    return np.unique(np.concatenate(found), axis=0)


def simulate(index: Index, recipe: Recipe | EvalRecipe) -> np.ndarray:
    """Grids int64 [R, 2] as training will see them: an epoch, of the pictures repeated."""
    if isinstance(recipe, EvalRecipe):
        draws = augment.draw_eval(index, recipe)
    else:
        repeated = np.arange(max(len(index), SIMULATED_ROWS)) % len(index)
        draws = augment.draw(index.select(repeated), recipe, seed=0, epoch=0)
    return draws.size.astype(np.int64) // recipe.multiple


def _padded(lengths: np.ndarray, multiple: int, num_prefix: int) -> np.ndarray:
    """Patches of the shortest sequence allowed that holds so many."""
    return -(-(lengths + num_prefix) // multiple) * multiple - num_prefix


def _least_padding(candidates: np.ndarray, weights: np.ndarray, count: int) -> list[int]:
    """Which candidates to take, at most ``count`` and the last among them: dynamic programming.

    Args:
      candidates: int [V], possible lengths, ascending.
      weights: int [V], pictures whose shortest candidate it is.
      count: how many to take at most.
    """
    total = np.concatenate([[0], np.cumsum(weights)])
    # padded[i, j]: tokens of the pictures of candidates i..j in one bucket, as long as j.
    padded = (total[None, 1:] - total[:-1, None]) * candidates[None].astype(np.float64)
    padded[np.tril_indices(len(candidates), -1)] = np.inf
    cost, choices = padded[0], []
    for _ in range(min(count, len(candidates)) - 1):
        options = np.concatenate([cost[:-1, None] + padded[1:], padded[:1]])
        choices.append(np.argmin(options, axis=0))
        cost = options.min(axis=0)
    last, chosen = len(candidates) - 1, [len(candidates) - 1]
    for choice in reversed(choices):
        last = int(choice[last]) if choice[last] < len(candidates) - 1 else -1
        if last < 0:
            break
        chosen.append(last)
    return chosen[::-1]


def _bounds(grids: np.ndarray) -> np.ndarray:
    """Rows and columns [2] that all but the outliers among the grids [R, 2] have at most."""
    return np.quantile(grids, 1 - OUTLIERS, axis=0, method="higher")
