"""DETR's position encodings against the original's own, and the mask they are computed from."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_detr
from yolos_jax.models import detr_position

GOLDEN = np.load(Path(__file__).parent / "goldens" / "detr_posenc.npz")


def test_sine():
    expected = [GOLDEN[f"s{case}n_pos"].transpose(0, 2, 3, 1) for case in range(6)]
    real = [GOLDEN[f"s{case}n_mask"] == 0 for case in range(6)]

    @jax.jit  # all cases at once: compiling is most of the work
    def encode(real):
        return [
            detr_position.sine(one, pos.shape[-1]) for one, pos in zip(real, expected, strict=True)
        ]

    for found, pos in zip(encode(real), expected, strict=True):
        np.testing.assert_allclose(found, pos, atol=1e-5, rtol=0)


def test_learned():
    tables = [{side: GOLDEN[f"l{case}_{side}"] for side in ("row", "col")} for case in range(3)]
    real = [np.ones((1, *GOLDEN[f"l{case}_hw"]), bool) for case in range(3)]

    @jax.jit
    def encode(tables):
        return [
            detr_position.LearnedPosition(2 * table["row"].shape[1]).apply({"params": table}, one)
            for table, one in zip(tables, real, strict=True)
        ]

    for case, found in enumerate(encode(tables)):
        np.testing.assert_array_equal(found, GOLDEN[f"l{case}_pos"].transpose(0, 2, 3, 1))


def test_learned_tables_end():
    module = detr_position.LearnedPosition(4)
    tables = {"row": np.zeros((50, 2), np.float32), "col": np.zeros((50, 2), np.float32)}
    with pytest.raises(ValueError, match="3x51 cells: learned positions have 50 rows and columns"):
        module.apply({"params": tables}, jnp.ones((1, 3, 51), bool))


def test_a_cell_is_real_where_its_pixel_is():
    size = jnp.asarray([[64, 50], [1, 1], [67, 90]])
    real = np.asarray(detr_position.real_cells(size, (67, 90), (3, 3)))
    # Pixels 0, 22 and 44 of 67 rows; 0, 30 and 60 of 90 columns.
    np.testing.assert_array_equal(real[0], [[True, True, False]] * 3)
    np.testing.assert_array_equal(real[1], np.eye(3)[:1].T @ np.eye(3)[:1] > 0)
    assert real[2].all()


@pytest.mark.parametrize(
    ("dilation", "pixels"), [(False, 1600), pytest.param(True, 800, marks=pytest.mark.slow)]
)
def test_layouts_know_how_far_learned_tables_reach(dilation, pixels):
    model = tiny_detr.make_model(position="learned", dilation=dilation)
    assert model.layout.most == pixels
    assert tiny_detr.make_model(dilation=dilation).layout.most == 0
    params = jax.eval_shape(model.init, jax.random.key(0))

    def trace(width):
        canvas = tiny_detr.make_canvas([(1, 1)], (1, width))
        return jax.eval_shape(model.apply, params, canvas)

    trace(pixels)
    with pytest.raises(ValueError, match="features of 1x51 cells"):
        trace(pixels + 1)
