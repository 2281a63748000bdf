"""Position tables resized as torch does it. The goldens are torch's own values and gradients
(posembed.npz: one channel of the bicubic resizes that the original YOLOS makes)."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolos_jax.models import position

GOLDEN = np.load(Path(__file__).parent / "goldens" / "posembed.npz")
CASES = sorted({name.split("_")[0] for name in GOLDEN.files})


cubic_weights = jax.jit(position.cubic_weights, static_argnums=(0, 2))


@functools.partial(jax.jit, static_argnums=(2, 3))
def resize_to(table, grid, bounds, num_patches):
    placement = position.place(grid, num_patches, bounds, prefix=0)
    resizer = position.make_resizer(table.shape[:2], grid, placement, bounds)
    cells = position.resize(table, resizer.row_weights, resizer.col_weights)
    return position.lay_out(jnp.zeros((len(grid), 0, table.shape[2])), cells, placement)


@functools.partial(jax.jit, static_argnums=2)
def resize_and_pull_back(table, grid, bounds, cotangent):
    num_patches = cotangent.shape[1]
    values, pullback = jax.vjp(lambda t: resize_to(t, grid, bounds, num_patches), table)
    return values, *pullback(cotangent)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_torchs(case):
    _, _, rows, cols = GOLDEN[f"{case}_hwHW"]
    table = GOLDEN[f"{case}_in"][..., None]
    grid = np.array([[rows, cols]], np.int32)
    cotangent = GOLDEN[f"{case}_cot"].reshape(1, -1, 1)
    values, gradient = resize_and_pull_back(table, grid, (int(rows), int(cols)), cotangent)
    np.testing.assert_allclose(values[0, :, 0], GOLDEN[f"{case}_out"].ravel(), atol=1e-4, rtol=0)
    np.testing.assert_allclose(gradient[..., 0], GOLDEN[f"{case}_grad_in"], atol=1e-4, rtol=0)


def test_every_image_of_a_batch_gets_its_own_grid():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    table = rng.normal(size=(7, 12, 4)).astype(np.float32)
    # The table's size, portrait, one patch, larger, as many patches as the table in another shape.
    grid = np.array([[7, 12], [13, 5], [1, 1], [10, 11], [12, 7]], np.int32)
    num_patches, bounds = 116, (13, 13)
    cotangent = rng.normal(size=(5, num_patches, 4)).astype(np.float32)
    values, gradient = resize_and_pull_back(table, grid, bounds, cotangent)

    leaf = torch.from_numpy(table).requires_grad_()
    for row, (rows, cols) in enumerate(grid):
        theirs = torch.nn.functional.interpolate(
            leaf.permute(2, 0, 1)[None], (rows, cols), mode="bicubic", align_corners=False
        )
        theirs = theirs[0].flatten(1).T
        count = rows * cols
        np.testing.assert_allclose(values[row, :count], theirs.detach(), atol=1e-5, rtol=0)
        assert not np.asarray(values[row, count:]).any()
        (theirs * torch.from_numpy(cotangent[row, :count])).sum().backward()
    np.testing.assert_allclose(gradient, leaf.grad, atol=1e-4, rtol=0)


def test_a_table_of_the_right_size_is_left_alone():
    weights = cubic_weights(9, jnp.array([9, 9]), 9)
    np.testing.assert_array_equal(weights, np.broadcast_to(np.eye(9), (2, 9, 9)))


def test_the_same_number_of_patches_in_another_shape_is_resized():
    table = np.arange(6, dtype=np.float32).reshape(2, 3, 1)
    swapped = resize_to(table, np.array([[3, 2]], np.int32), (3, 2), 6)[0, :, 0]
    assert np.abs(np.asarray(swapped) - table.ravel()).max() > 0.3
    # The middle row of three lies between the table's two, by symmetry.
    np.testing.assert_allclose(swapped[2:4].mean(), 2.5, atol=1e-6)


def test_weights_by_hand():
    # From 2 to 4: the first sample sits at (0 + 0.5) / 2 - 0.5 = -0.25, so t = 0.75 after index -1,
    # and the taps -2, -1, 0, 1 clamp to 0, 0, 0, 1. The last tap is at distance 1.25:
    # a * (1.25^3 - 5 * 1.25^2 + 8 * 1.25 - 4) with a = -0.75.
    last = -0.75 * (1.25**3 - 5 * 1.25**2 + 8 * 1.25 - 4)
    weights = cubic_weights(2, jnp.array([4]), 4)[0]
    np.testing.assert_allclose(weights[0], [1 - last, last], atol=1e-6)
    np.testing.assert_allclose(weights[3], [last, 1 - last], atol=1e-6)
    # One row is that row everywhere.
    np.testing.assert_allclose(cubic_weights(1, jnp.array([3]), 3)[0], 1, atol=1e-6)


@given(st.lists(st.integers(1, 40), min_size=3, max_size=3))
def test_weights_are_a_partition_of_one_and_symmetric(sizes):
    weights = np.asarray(cubic_weights(11, jnp.array(sizes), 40))
    assert np.isfinite(weights).all()
    for size, weight in zip(sizes, weights, strict=True):
        np.testing.assert_allclose(weight[:size].sum(axis=1), 1, atol=1e-5)
        mirrored = weight[:size][::-1, ::-1]
        np.testing.assert_allclose(weight[:size], mirrored, atol=2e-5)


def test_the_gradient_of_the_layout_is_a_gather():
    grid = np.array([[2, 3], [3, 1], [1, 1]], np.int32)
    placement = jax.jit(lambda: position.place(grid, 8, (3, 3), prefix=2))()
    rng = np.random.default_rng(0)
    first = rng.normal(size=(3, 2, 2)).astype(np.float32)
    cells = rng.normal(size=(3, 9, 2)).astype(np.float32)

    def by_indexing(first, cells):
        rows = jnp.take_along_axis(cells, placement.cell[:, 2:, None], axis=1)
        rows = jnp.where(placement.cell_of_valid[:, 2:, None], rows, 0)
        return jnp.concatenate([first, rows], axis=1)

    def ours_by_gather(first, cells):
        return position.lay_out(first, cells, placement)

    ours = jax.jit(ours_by_gather)(first, cells)
    np.testing.assert_array_equal(ours, jax.jit(by_indexing)(first, cells))
    np.testing.assert_array_equal(ours[0, 2:8], cells[0, [0, 1, 2, 3, 4, 5]])
    np.testing.assert_array_equal(ours[1, 2:5], cells[1, [0, 3, 6]])
    cotangent = jnp.asarray(rng.normal(size=ours.shape), jnp.float32)

    def gradient_of(function):
        return jax.jit(lambda g: jax.vjp(function, first, cells)[1](g))

    ours, theirs = gradient_of(ours_by_gather), gradient_of(by_indexing)
    for mine, other in zip(ours(cotangent), theirs(cotangent), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6)
    assert "scatter" in theirs.lower(cotangent).as_text()
    assert "scatter" not in ours.lower(cotangent).as_text()


def test_tokens_come_in_the_sequences_order():
    table = {
        "cls": np.full((1, 1), 10, np.float32),
        "det": np.array([[20], [21]], np.float32),
        "grid": np.arange(4, dtype=np.float32).reshape(2, 2, 1),
    }
    grid = np.array([[2, 2]], np.int32)

    @jax.jit
    def positions(table):
        resizer = position.make_resizer((2, 2), grid, position.place(grid, 5, (2, 2), 3), (2, 2))
        return position.token_positions(table, resizer)

    tokens = positions(table)
    np.testing.assert_allclose(tokens[0, :, 0], [10, 20, 21, 0, 1, 2, 3, 0], atol=1e-6)
