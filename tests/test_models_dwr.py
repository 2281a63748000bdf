"""A detector of the original whose LayerNorm epsilon shows, against the original's numbers.

yolos_dwr.npz holds the weights of a reduced small-dWr hustvl/YOLOS (width 66, 6 heads, tables of
different sizes) and what it makes of three pictures: one of the table's size, one whose sides are
no multiple of the patch, and one on the larger canvas of a zero-padded batch. The residual stream
is small on purpose; tolerances are those of the golden's README.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from configs import common
from tests.torch_weights import params_from_yolos, to_patches
from yolos_jax.batch import Batch
from yolos_jax.models.build import build_model

GOLDEN = Path(__file__).parent / "goldens" / "yolos_dwr.npz"
CASES = {"init": (7, 11), "odd": (7, 11), "padded": (8, 9)}
POSITION_GRID, MID_GRID = (7, 11), (6, 10)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def detect(golden, **changes):
    """Outputs of the three pictures in one batch of one bucket, in the order of CASES."""
    state = {n.removeprefix("state/"): golden[n] for n in golden if n.startswith("state/")}
    values = dict(common.get_config().model.items()) | dict(
        dtype="float32", width=66, depth=4, heads=6, mlp_width=264,
        position_grid=POSITION_GRID, mid_position_grid=MID_GRID, **changes,
    )  # fmt: skip
    model = build_model(values, 3)
    params = params_from_yolos(
        state, depth=4, num_queries=100, grid=POSITION_GRID, mid_grid=MID_GRID
    )
    patches, grids = [], []
    for case, expected_grid in CASES.items():
        rows, grid = to_patches(golden[f"{case}_x"], 16)
        assert grid == expected_grid
        patches.append(np.pad(rows[0], ((0, 80 - rows.shape[1]), (0, 0))))
        grids.append(grid)
    batch = Batch(np.stack(patches), np.array(grids, np.int32), np.ones(len(CASES), bool))
    apply = jax.jit(lambda params, batch: model.apply(params, batch, bounds=(8, 11)))
    with jax.default_matmul_precision("highest"):
        return apply(params, batch)


@pytest.fixture(scope="module")
def outputs(golden):
    return detect(golden)


@pytest.mark.parametrize("case", CASES)
def test_the_originals_numbers(case, golden, outputs):
    row = list(CASES).index(case)
    logits, boxes = outputs.pred_logits[0, row], outputs.pred_boxes[0, row]
    np.testing.assert_allclose(logits, golden[f"{case}_logits"][0], atol=5e-5, rtol=0)
    np.testing.assert_allclose(boxes, golden[f"{case}_boxes"][0], atol=5e-6, rtol=0)


def test_another_epsilon_would_show(golden):
    """With the 1e-12 of transformers' files: the parity above does test the epsilon."""
    moved = np.abs(detect(golden, layer_norm_eps=1e-12).pred_logits[0, 0] - golden["init_logits"])
    assert moved.max() > 0.01
