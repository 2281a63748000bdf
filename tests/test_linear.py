"""Products and their gradients, in every platform's form; by itself the CPU's alone runs here."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from yolos_jax.models import linear

CLOSE, ROUNDED = dict(rtol=1e-5, atol=1e-5), dict(rtol=2e-2, atol=5e-2)


def arrays(shape, dtype, width=7):
    rng = np.random.default_rng(0)
    sizes = (*shape, 5), (5, width), (*shape, width)
    return [jnp.asarray(rng.normal(size=size), dtype) for size in sizes]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "width"), [((6,), 7), ((2, 6), 7), ((2, 3, 4), 7), ((2, 6), 3)])
def test_both_forms_of_the_weights_gradient_are_the_plain_products(shape, width, dtype):
    x, kernel, cotangent = arrays(shape, dtype, width)
    values, pullback = jax.vjp(linear.product, x, kernel)
    expected, plain = jax.vjp(lambda x, kernel: x @ kernel, x, kernel)
    np.testing.assert_array_equal(values, expected)
    tolerance = {"float32": 1e-5, "bfloat16": 5e-2}[dtype]
    # Not plain(cotangent)[1]: since jax 0.12 sums over two axes are rounded to bfloat16 between.
    rows = (np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (x, cotangent))
    weights = np.einsum("ri,ro->io", *rows)
    for ours, theirs in (
        (pullback(cotangent)[0], plain(cotangent)[0]),
        (pullback(cotangent)[1], weights),
        (linear._over_axes(x, cotangent), weights),
        (linear._over_rows(x, cotangent), weights),
    ):
        assert ours.dtype == jnp.dtype(dtype)
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=tolerance
        )


def test_the_weights_gradient_on_the_cpu_has_no_more_rows_than_columns():
    @jax.jit
    def gradient(x, kernel, cotangent):
        return jax.vjp(linear.product, x, kernel)[1](cotangent)[1]

    compiled = gradient.lower(*arrays((2000,), jnp.float32, 3)).compile()
    products = [line for line in compiled.as_text().splitlines() if " dot(" in line]
    assert len(products) == 1
    assert "f32[3,5]" in products[0].split(" dot(")[0]


@pytest.mark.parametrize(("platform", "axes"), [("tpu", True), ("cuda", True), ("cpu", False)])
def test_activations_keep_their_axes_but_on_the_cpu(platform, axes):
    x, kernel, cotangent = arrays((2, 6), jnp.float32)

    @jax.jit
    def gradient(x, kernel, cotangent):
        return jax.vjp(linear.product, x, kernel)[1](cotangent)[1]

    lowered = gradient.trace(x, kernel, cotangent).lower(lowering_platforms=(platform,))
    assert ("contracting_dims = [0, 1] x [0, 1]" in lowered.as_text()) == axes


def test_projections_are_the_parts_of_one_layer():
    module = linear.Projections(3, 4, jnp.float32, jax.nn.initializers.normal(1.0))
    x = arrays((2, 6), jnp.float32)[0]
    params = module.init(jax.random.key(0), x, x, x)["params"]
    params["bias"] = jnp.arange(12.0)
    whole = x @ params["kernel"] + params["bias"]
    parts = module.apply({"params": params}, x[:1], x, x)
    assert [part.shape[0] for part in parts] == [1, 2, 2]
    for part, expected in zip(parts, jnp.split(whole, 3, axis=-1), strict=True):
        np.testing.assert_allclose(part, expected[: len(part)], atol=1e-5)


def test_what_would_be_ignored_is_refused():
    x, kernel, _ = arrays((2,), jnp.float32)
    with pytest.raises(TypeError, match="bfloat16 and float32"):
        linear.product(x.astype(jnp.bfloat16), kernel)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_is_that_of_flax_with_its_parameters(dtype):
    x, _, cotangent = arrays((2, 6), dtype)
    init = jax.nn.initializers.normal(1.0)
    ours = linear.Linear(7, dtype=dtype, kernel_init=init, bias_init=init)
    theirs = nn.Dense(7, dtype=dtype, kernel_init=init, bias_init=init)
    params = theirs.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(0), x), params)

    def values_and_gradients(module):
        out, pullback = jax.vjp(module.apply, params, x)
        return out, pullback(cotangent)

    for a, b in zip(*map(jax.tree.leaves, map(values_and_gradients, (ours, theirs))), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, **{"float32": CLOSE, "bfloat16": ROUNDED}[dtype])


def test_the_gradient_of_a_bias_is_summed_in_float32():
    """GPUs that add bfloat16 would add 1 to 256 and have 256."""
    shape = jax.ShapeDtypeStruct((4, 5000, 3), jnp.bfloat16)

    def gradient(x):
        return jax.grad(lambda b: linear.add_bias(x, b).astype(jnp.float32).sum())(jnp.zeros(3))

    for platform in ("tpu", "cuda"):
        text = jax.jit(gradient).trace(shape).lower(lowering_platforms=(platform,)).as_text()
        sums = [line for line in text.splitlines() if "stablehlo.reduce(" in line]
        assert len(sums) == 1 and "xf32>" in sums[0] and "bf16" not in sums[0]
    np.testing.assert_array_equal(jax.jit(gradient)(jnp.zeros(shape.shape, shape.dtype)), 20000)
