"""The model as two pure functions: parameters, forms of the same computation, padding, captures."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs import common
from yolos_jax.batch import Batch
from yolos_jax.models import vit
from yolos_jax.models.build import Model, build_model

QUERIES, CLASSES = 5, 3


def model_config(**changes):
    values = dict(common.get_config().model.items())
    values.update(patch_size=8, width=32, depth=3, heads=2, mlp_width=64, num_queries=QUERIES)
    values.update(position_grid=(4, 5), mid_position_grid=(3, 4), dtype="float32")
    values.update(changes)
    return values


def tiny(**changes) -> Model:
    return build_model(model_config(**changes), CLASSES)


@functools.cache
def params_of(seed: int = 0):
    """Larger than ``init`` draws, so that what is wrong anywhere shows in the outputs."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(tiny().init, jax.random.key(0))
    return jax.tree.map(lambda p: rng.normal(size=p.shape, scale=0.1).astype(np.float32), shapes)


def draw_batch(grid, num_patches, seed=0) -> Batch:
    """Pictures whose patches depend on seed and row alone; padding is NaN."""
    grid = np.asarray(grid, np.int32).reshape(-1, 2)
    patches = np.full((len(grid), num_patches, 192), np.nan, np.float32)
    for row, (rows, cols) in enumerate(grid):
        rng = np.random.default_rng((seed, row))
        patches[row, : rows * cols] = rng.normal(size=(rows * cols, 192))
    return Batch(patches, grid, np.ones(len(grid), bool))


@functools.cache
def forward(bounds, capture=False, **changes):
    model = tiny(**changes)
    return jax.jit(functools.partial(model.apply, bounds=bounds, capture=capture))


@functools.cache
def gradient(bounds, **changes):
    model = tiny(**changes)

    def score(params, batch, row_weight):
        outputs = model.apply(params, batch, bounds=bounds)
        per_image = jnp.square(outputs.pred_logits).sum((0, 2, 3))
        per_image += jnp.square(outputs.pred_boxes).sum((0, 2, 3))
        return (per_image * row_weight).sum()

    return jax.jit(jax.grad(score))


def assert_trees_close(ours, theirs, tolerance):
    """Largest differences relative to each array's largest value."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        error = np.abs(a - b).max() / np.abs(b).max()
        assert error <= tolerance, (jax.tree_util.keystr(path), error)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_and_its_slope_are_those_of_the_definition(dtype):
    x = np.linspace(-9, 9, 1001).astype(dtype)
    value, pullback = jax.vjp(vit.gelu, jnp.asarray(x))
    slope = pullback(jnp.full_like(x, 2))[0]
    assert value.dtype == slope.dtype == dtype
    wide = x.astype(np.float64)
    cdf, density = scipy.stats.norm.cdf(wide), scipy.stats.norm.pdf(wide)
    close = functools.partial(
        np.testing.assert_allclose, rtol={"float32": 1e-6, "bfloat16": 2**-8}[dtype], atol=1e-6
    )
    close(np.asarray(value, np.float64), wide * cdf)
    close(np.asarray(slope, np.float64), 2 * (cdf + wide * density))


@pytest.mark.slow
def test_scanned_and_unrolled_rematerialised_or_not_are_one_computation():
    batch = draw_batch([[4, 5], [2, 3]], 24)
    weight = np.ones(2, np.float32)
    with jax.default_matmul_precision("highest"):
        ours = gradient((5, 5))(params_of(), batch, weight)
        for remat in ("none", "default"):
            theirs = gradient((5, 5), scan=False, remat=remat)(params_of(), batch, weight)
            assert_trees_close(ours, theirs, 1e-5)


@pytest.mark.parametrize("remat", ["none", "default"])
def test_unrolled_blocks_keep_arrays_of_their_own(remat):
    """Nothing is copied into arrays of all blocks, and out of them again."""
    batch = draw_batch([[4, 5]] * 3, 24)

    def of_all_blocks(scan):
        model = tiny(scan=scan, remat=remat)

        def pullback(params):
            return jax.vjp(lambda p: model.apply(p, batch, bounds=(4, 5)), params)[1]

        kept = jax.tree.leaves(jax.eval_shape(pullback, params_of()))
        return [leaf for leaf in kept if leaf.shape[:3] == (2, 3, 30)]

    assert of_all_blocks(scan=True) and not of_all_blocks(scan=False)


def test_rematerialisation_keeps_less():
    batch = draw_batch([[4, 5]] * 2, 24)

    def kept(remat):
        def pullback(params):
            return jax.vjp(lambda p: tiny(remat=remat).apply(p, batch, bounds=(4, 5)), params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(pullback, params_of()))
        whole = {leaf.shape for leaf in jax.tree.leaves(params_of())}
        # Blocks' kernels: of all but the last, of one.
        kernels = {shape[1:] for shape in whole if len(shape) == 3 and shape[0] == 3}
        picked = (kernels | {(2, *shape) for shape in kernels}) - whole  # the heads' are whole
        assert remat == "none" or not picked & {leaf.shape for leaf in leaves}
        return sum(leaf.size for leaf in leaves if leaf.shape not in whole | picked)

    none, default, full = kept("none"), kept("default"), kept("full")
    # The attention's output: of two blocks [B, T, D], of the last its first tokens alone.
    assert default - full == 2 * 2 * 30 * 32 + 2 * 6 * 32
    assert none > 3 * default


sizes = st.tuples(st.integers(1, 7), st.integers(1, 7)).filter(lambda s: s[0] * s[1] <= 30)


@settings(max_examples=8)
@given(st.lists(sizes, min_size=3, max_size=3), st.integers(0, 1000))
def test_a_prediction_depends_neither_on_neighbours_nor_on_the_bucket(grid, seed):
    with jax.default_matmul_precision("highest"):
        together = forward((7, 7))(params_of(), draw_batch(grid, 30, seed))
        for row, size in enumerate(grid):
            picture = draw_batch([size] * (row + 1), 49, seed)
            alone = Batch(*(x[row:] for x in picture))
            alone = forward((9, 8))(params_of(), alone)
            logits = together.pred_logits[:, row : row + 1]
            boxes = together.pred_boxes[:, row : row + 1]
            np.testing.assert_allclose(logits, alone.pred_logits, atol=5e-5, rtol=0)
            np.testing.assert_allclose(boxes, alone.pred_boxes, atol=5e-6, rtol=0)


def test_a_long_sequence_through_another_backend():
    batch = draw_batch([[20, 20], [3, 30]], 400)
    with jax.default_matmul_precision("highest"):
        ours = forward((30, 30))(params_of(), batch)  # 'heads'
        stock = forward((30, 30), attention="stock")(params_of(), batch)
    np.testing.assert_allclose(ours.pred_logits, stock.pred_logits, atol=5e-5, rtol=0)
    np.testing.assert_allclose(ours.pred_boxes, stock.pred_boxes, atol=5e-6, rtol=0)


def test_what_is_not_real_leaves_no_trace():
    batch = draw_batch([[4, 5], [1, 1]], 24)
    weight = np.array([1, 0], np.float32)  # the loss leaves out what is not valid

    def run(fill):
        batch.patches[1] = fill
        unreadable = Batch(batch.patches, batch.grid, np.array([True, False]))
        outputs = forward((5, 5))(params_of(), unreadable)
        return outputs, gradient((5, 5))(params_of(), unreadable, weight)

    outputs, gradients = run(np.nan)
    assert all(np.isfinite(leaf).all() for leaf in outputs)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))
    assert_trees_close(gradients, run(1e6)[1], 0)


def test_captures():
    batch = draw_batch([[4, 5], [2, 3]], 24)
    outputs, captured = forward((5, 5), capture=True)(params_of(), batch)
    plain = forward((5, 5))(params_of(), batch)
    np.testing.assert_allclose(outputs.pred_logits, plain.pred_logits, atol=1e-5)
    assert {name: value.shape for name, value in captured.items()} == {
        "embed": (2, 30, 32),
        "blocks": (3, 2, 30, 32),
        "norm": (2, 30, 32),
        "attention": (2, 2, 30, 30),
    }
    attention_map = np.asarray(captured["attention"])
    np.testing.assert_allclose(attention_map.sum(axis=-1), 1, atol=1e-5)
    assert attention_map.dtype == np.float32
    assert not attention_map[0, ..., 26:].any() and not attention_map[1, ..., 12:].any()
    assert attention_map[1, ..., 11].all()
    # After the last block nothing is added: the normalised tokens follow from it.
    last = np.asarray(captured["blocks"])[-1]
    centred = last - last.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + 1e-6)
    norm = params_of()["backbone"]["norm"]
    np.testing.assert_allclose(captured["norm"], normed * norm["scale"] + norm["bias"], atol=1e-4)


@pytest.mark.parametrize("mid", [(), (3, 4)])
def test_a_single_block_is_the_last(mid):
    batch = draw_batch([[4, 5], [2, 3]], 24)
    changes = {"depth": 1, "mid_position_grid": mid}
    params = jax.jit(tiny(**changes).init)(jax.random.key(0))
    outputs, captured = forward((5, 5), capture=True, **changes)(params, batch)
    plain = forward((5, 5), **changes)(params, batch)
    assert captured["blocks"].shape == (1, 2, 30, 32)
    np.testing.assert_allclose(outputs.pred_logits, plain.pred_logits, atol=1e-6)


def test_devices_share_a_batch():
    batch = draw_batch([[4, 5], [2, 3], [5, 4], [1, 1]] * 2, 24)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    shared = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    with jax.default_matmul_precision("highest"):
        ours = forward((5, 5))(params_of(), shared)
        alone = forward((5, 5))(params_of(), batch)
    assert ours.pred_logits.sharding.num_devices == 8
    np.testing.assert_allclose(ours.pred_logits, alone.pred_logits, atol=5e-5, rtol=0)


@pytest.mark.slow
def test_twelve_layers_depend_neither_on_neighbours_nor_on_the_bucket():
    """Rounding adds up over layers: the full depth of the detectors, scanned, with mid tables."""
    model = tiny(width=48, depth=12, heads=3, mlp_width=192, num_queries=20)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda p: rng.normal(size=p.shape, scale=0.3).astype(np.float32), shapes)
    grid = [[5, 6], [9, 3], [12, 10], [1, 1]]
    apply = jax.jit(model.apply, static_argnames="bounds")
    with jax.default_matmul_precision("highest"):
        together = apply(params, draw_batch(grid, 130), bounds=(12, 12))
        alone = apply(params, draw_batch(grid[:1], 30), bounds=(5, 6))
        other = apply(params, draw_batch(grid[:1], 30, seed=1), bounds=(5, 6))
    # What the picture holds shows in the outputs far beyond the tolerances.
    assert np.abs(other.pred_logits - alone.pred_logits).max() > 0.01
    assert np.abs(other.pred_boxes - alone.pred_boxes).max() > 0.01
    logits, boxes = together.pred_logits[:, :1], together.pred_boxes[:, :1]
    np.testing.assert_allclose(logits, alone.pred_logits, atol=1e-4, rtol=0)
    np.testing.assert_allclose(boxes, alone.pred_boxes, atol=5e-6, rtol=0)
