"""Position tables resized to each image's own grid of patches, exactly as torch resizes them.

A table is a grid [h, w, D] of learnt vectors. An image of r x c patches needs it at r x c, and the
images of a batch differ. Bicubic interpolation is separable, so the resized grid is two small
matrix products, with weights computed from the image's grid inside the compiled step; then the
cells are laid out along the sequence, patch n at (n // c, n % c).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from yolos_jax.models import platforms, precision
from yolos_jax.models.repeat import repeat

Array = jax.Array

_CUBIC_A = -0.75  # torch's coefficient; jax.image.resize has -0.5 and no clamped border.


class Placement(NamedTuple):
    """Where the tokens of a sequence sit in a grid of ``rows * cols`` cells, and back.

    T = prefix + N: tokens that are no patches, the patches, padding.
    """

    cell: Array  # int32 [B, T]: the cell of each patch, 0 of what is none.
    cell_of_valid: Array  # bool [B, T]: False for what is no patch.
    token: Array  # int32 [B, rows * cols]: the token of each cell.
    token_of_valid: Array  # bool [B, rows * cols]: False for cells outside the image's own grid.


def place(grid: Array, num_patches: int, bounds: tuple[int, int], prefix: int) -> Placement:
    """Maps row-major sequences to cells of a common grid.

    Args:
      grid: int32 [B, 2], rows and columns of each image, at least 1 and at most ``bounds``.
      num_patches: N, padding included.
      bounds: rows and columns of the common grid.
      prefix: tokens before the first patch, as many as ``lay_out`` is given.

    Returns:
      The indices both ways.
    """
    rows, cols = grid[:, :1], grid[:, 1:]
    patch = jnp.arange(-prefix, num_patches, dtype=jnp.int32)[None]
    patch_valid = (patch >= 0) & (patch < rows * cols)
    cell = jnp.where(patch_valid, patch // cols * bounds[1] + patch % cols, 0)

    index = np.arange(bounds[0] * bounds[1], dtype=np.int32)[None]
    row, col = index // bounds[1], index % bounds[1]
    cell_valid = (row < rows) & (col < cols)
    token_of_cell = jnp.where(cell_valid, prefix + row * cols + col, 0)
    return Placement(cell, patch_valid, token_of_cell, cell_valid)


def cubic_weights(table_size: int, sizes: Array, bound: int) -> Array:
    """Weights of a bicubic resize along one axis, as ``torch.nn.functional.interpolate`` has them.

    Half-pixel centres, indices clamped at the border, a = -0.75, no antialiasing. The identity
    where the size equals the table's.

    Args:
      table_size: rows (or columns) of the table.
      sizes: int32 [B], rows (or columns) wanted for each image.
      bound: the largest of them.

    Returns:
      float32 [B, bound, table_size]; what stands beyond ``sizes[b]`` is finite and means nothing.
    """
    scale = np.float32(table_size) / sizes.astype(jnp.float32)[:, None]
    position = scale * (np.arange(bound, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    first = jnp.floor(position)
    t = position - first
    source = np.arange(table_size, dtype=np.int32)
    weights = jnp.zeros((sizes.shape[0], bound, table_size), jnp.float32)
    for offset, weight in zip((-1, 0, 1, 2), _cubic_taps(t), strict=True):
        tap = jnp.clip(first.astype(jnp.int32) + offset, 0, table_size - 1)
        weights += jnp.where(tap[..., None] == source, weight[..., None], 0.0)
    return weights


def _cubic_taps(t: Array) -> tuple[Array, Array, Array, Array]:
    """The weights of the four neighbours of a sample ``t`` after the second of them."""

    def near(x):
        return ((_CUBIC_A + 2) * x - (_CUBIC_A + 3)) * x * x + 1

    def far(x):
        return ((_CUBIC_A * x - 5 * _CUBIC_A) * x + 8 * _CUBIC_A) * x - 4 * _CUBIC_A

    return far(t + 1), near(t), near(1 - t), far(2 - t)


class Resizer(NamedTuple):
    """What takes a table to the sequences of one batch; tables of one size share it."""

    row_weights: Array  # float32 [B, R, h]
    col_weights: Array  # float32 [B, C, w]
    placement: Placement


def make_resizer(
    table_grid: tuple[int, int], grid: Array, placement: Placement, bounds: tuple[int, int]
) -> Resizer:
    """Prepares the resize of tables of ``table_grid`` = (h, w) to each image's ``grid``.

    ``grid``, ``placement`` and ``bounds`` as in ``place``.
    """
    return Resizer(
        row_weights=cubic_weights(table_grid[0], grid[:, 0], bounds[0]),
        col_weights=cubic_weights(table_grid[1], grid[:, 1], bounds[1]),
        placement=placement,
    )


def token_positions(
    table: dict[str, Array], resizer: Resizer, place: Callable[[Array], Array] = lambda x: x
) -> Array:
    """One position vector per token, in the sequence's order.

    Args:
      table: ``cls`` [1, D], ``det`` [Q, D], ``grid`` [h, w, D], float32.
      resizer: for tables of h x w, its placement with a prefix of 1 + Q.
      place: says of arrays [B, ...] on which devices they are. Without it the compiler leaves
        tables that are spread over devices where they are, and moves what is made of them.

    Returns:
      float32 [B, 1 + Q + N, D], zeros for padding.
    """
    cells = resize(table["grid"], resizer.row_weights, resizer.col_weights, place)
    first = jnp.concatenate([table["cls"], table["det"]])
    first = place(repeat(first, cells.shape[0]))
    return place(lay_out(first, cells, resizer.placement))


def resize(
    table: Array,
    row_weights: Array,
    col_weights: Array,
    place: Callable[[Array], Array] = lambda x: x,
) -> Array:
    """Resizes one table for every image.

    Args:
      table: float32 [h, w, D].
      row_weights: float32 [B, R, h].
      col_weights: float32 [B, C, w].
      place: as ``token_positions`` takes it.

    Returns:
      float32 [B, R * C, D].
    """
    # The accelerators' default is 3e-3 wrong here.
    product = functools.partial(jnp.einsum, precision=precision.of(jnp.float32))

    def rows_first(table, row_weights, col_weights):
        rows = place(product("brh,hwd->brwd", row_weights, table))
        return product("bcw,brwd->brcd", col_weights, rows)

    def columns_first(table, row_weights, col_weights):
        """Batched products write [B, R, C, D] as it is; rows first GPUs transpose it afterwards."""
        cols = place(product("bcw,hwd->bhcd", col_weights, table))
        return product("brh,bhcd->brcd", row_weights, cols)

    cells = platforms.on_gpus(columns_first, rows_first, table, row_weights, col_weights)
    cells = place(cells)
    return cells.reshape(cells.shape[0], -1, cells.shape[-1])


def lay_out(first: Array, cells: Array, placement: Placement) -> Array:
    """Lays cells out along the sequence, behind each image's first tokens.

    The gradient of cells is a gather too (each feeds at most one patch), where that of indexing
    would be a scatter. Written in one piece, not joined of two: neither part fills a TPU's tiles
    of 8 tokens, and the patches would be moved.

    Args:
      first: float [B, prefix, D].
      cells: float [B, R * C, D].
      placement: of the same batch and prefix.

    Returns:
      float [B, T, D], zeros for padding.
    """
    return _lay_out(first.shape[1], first, cells, placement)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lay_out(prefix, first, cells, placement):
    tokens = _gather(cells, placement.cell, placement.cell_of_valid)
    return tokens + jnp.pad(first, ((0, 0), (0, tokens.shape[1] - prefix), (0, 0)))


def _gather(values: Array, index: Array, valid: Array) -> Array:
    rows = jnp.take_along_axis(values, index[..., None], axis=1, mode="promise_in_bounds")
    return jnp.where(valid[..., None], rows, 0)


def _forward(prefix, first, cells, placement):
    return _lay_out(prefix, first, cells, placement), placement


def _backward(prefix, placement, cotangent):
    cells = _gather(cotangent, placement.token, placement.token_of_valid)
    return cotangent[:, :prefix], cells, None


_lay_out.defvjp(_forward, _backward)
