"""Every attention backend against the definition in float64: values, gradients, lengths."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.tiny import CLASSES, make_config, mesh_of
from yolos_jax.models import attention, head_attention, splash_attention
from yolos_jax.models.build import build_model

BATCH, TOKENS, HEADS, WIDTH = 2, 299, 2, 11
LENGTHS = np.array([299, 77], np.int32)
BACKENDS = ("stock", "chunked", "heads", "splash")


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU kernel runs in the interpreter."""
    kernel = functools.partial(attention._splash, interpret=True)
    monkeypatch.setattr(attention, "_splash", kernel)


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """Of a hundred queries or less, the last not full, in the backends that know chunks.

    Where there are blocks they are of two tiles, of which the last one's second is padding.
    """
    for module in (attention, head_attention):
        monkeypatch.setattr(module, "_CHUNK", 128)
    for name in ("_MOST_LONG", "_MOST_AREA"):
        monkeypatch.setattr(splash_attention, name, 2)


def draw(*shape):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for _ in range(4)]


def attend_with(backend, mesh=None):
    return jax.jit(functools.partial(attention.attention, backend=backend, mesh=mesh))


def definition(q, k, v, cotangent, lengths):
    """Values, map and gradients by hand, float64."""
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    scale = q.shape[-1] ** -0.5
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    valid = np.arange(k.shape[1]) < lengths[:, None]
    logits = np.where(valid[:, None, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    out = np.einsum("bhqk,bkhd->bqhd", weights, v)
    d_weights = np.einsum("bqhd,bkhd->bhqk", cotangent, v)
    d_logits = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True)) * scale
    gradients = (
        np.einsum("bhqk,bkhd->bqhd", d_logits, k),
        np.einsum("bhqk,bqhd->bkhd", d_logits, q),
        np.einsum("bhqk,bqhd->bkhd", weights, cotangent),
    )
    return out, weights, gradients


@pytest.mark.parametrize(
    ("backend", "chunk"), [*((name, 128) for name in BACKENDS), ("heads", 200), ("heads", 300)]
)
def test_values_and_gradients(backend, chunk, interpreted, monkeypatch):
    monkeypatch.setattr(head_attention, "_CHUNK", chunk)
    q, k, v, cotangent = draw(BATCH, TOKENS, HEADS, WIDTH)
    valid = (np.arange(TOKENS) < LENGTHS[:, None])[..., None, None]
    cotangent = np.where(valid, cotangent, 0)  # nothing is asked of what padding gets
    expected, _, expected_gradients = definition(q, k, v, cotangent, LENGTHS)

    @jax.jit
    def run(q, k, v):
        attend = functools.partial(attention.attention, lengths=LENGTHS, backend=backend)
        out, pullback = jax.vjp(attend, q, k, v)
        return out, pullback(jnp.asarray(cotangent))

    with jax.default_matmul_precision("highest"):
        out, gradients = run(q, k, v)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(np.where(valid, out, 0), np.where(valid, expected, 0), atol=5e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [1, 53, 190])
def test_values_and_gradients_of_the_first_tokens(backend, queries, interpreted):
    q, k, v, cotangent = draw(BATCH, TOKENS, HEADS, WIDTH)
    q, cotangent = q[:, :queries], cotangent[:, :queries]
    cotangent = np.where((np.arange(queries) < LENGTHS[:, None])[..., None, None], cotangent, 0)
    expected, _, gradients = definition(q, k, v, cotangent, LENGTHS)
    with jax.default_matmul_precision("highest"):
        out, *found = differentiate(backend, q, k, v, LENGTHS, cotangent)
    assert out.shape == q.shape
    np.testing.assert_allclose(out[0], expected[0], atol=5e-6)
    np.testing.assert_allclose(out[1, :77], expected[1, :77], atol=5e-6)
    for ours, theirs in zip(found, gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_reaches_nothing(backend, interpreted):
    q, k, v, _ = draw(1, 40, 1, 8)
    lengths = np.array([13], np.int32)
    other = [np.concatenate([x[:, :13], 1e4 + 0 * x[:, 13:]], axis=1) for x in (q, k, v)]
    attend = attend_with(backend)
    ours, theirs = attend(q, k, v, lengths), attend(*other, lengths)
    np.testing.assert_array_equal(ours[:, :13], theirs[:, :13])
    assert np.isfinite(theirs).all()


def differentiate(backend, q, k, v, lengths, cotangent, mesh=None):
    """Values and gradients."""

    @jax.jit
    def run(q, k, v, cotangent):
        attend = functools.partial(attention.attention, lengths=lengths, backend=backend, mesh=mesh)
        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(cotangent)

    return run(q, k, v, cotangent)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("above", [50.0, 80.0, 90.0, 140.0, 3000.0])
def test_logits_far_above_the_others(backend, above, interpreted):
    """Without a maximum, 83 above the mean is the limit, and float32's powers end at 130."""
    q, k, v, _ = draw(BATCH, TOKENS, HEADS, WIDTH)
    towards = np.zeros(WIDTH, np.float32)
    towards[0] = np.sqrt(above * WIDTH**0.5)
    q[1, :150], k[1, :3] = towards, towards * np.array([[[1.0]], [[0.999]], [[0.5]]])
    valid = (np.arange(TOKENS) < LENGTHS[:, None])[..., None, None]
    expected, _, gradients = definition(q, k, v, valid * v, LENGTHS)
    out, *found = differentiate(backend, q, k, v, LENGTHS, valid * v)
    tolerance = 1e-5 * max(above / 50, 1)  # logits are rounded relative to their size
    np.testing.assert_allclose(valid * out, valid * expected, atol=tolerance)
    # Of two keys that are nearly one, what their parts of a query's gradient leave of each other is
    # as exact as the parts are.
    part = towards[0] * WIDTH**-0.5
    for ours, theirs in zip(found, gradients, strict=True):
        most = max(np.abs(theirs).max(), 2 * part)
        np.testing.assert_allclose(ours, theirs, atol=tolerance * most)


def test_a_query_that_needs_its_maximum_changes_no_other_of_its_chunk():
    q, k, v, _ = draw(1, 100, 1, WIDTH)
    lengths = np.array([100], np.int32)
    plain = attend_with("heads")(q, k, v, lengths)
    q[0, 3] *= 1000
    other = attend_with("heads")(q, k, v, lengths)
    rest = np.arange(100) != 3
    np.testing.assert_array_equal(other[0, rest], plain[0, rest])
    _, weights, _ = definition(q, k, v, v, lengths)
    np.testing.assert_allclose(other[0, 3, 0], weights[0, 0, 3] @ v[0, :, 0], atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 1e5), ("float32", 1e6), ("bfloat16", 400), ("bfloat16", 1000)]
)
def test_powers_that_would_all_vanish(dtype, size):
    """Rounding puts logits of queries across a few large keys far below their own mean."""
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, 200, 3, 1, 64)) * np.array([size, 1]).reshape(2, 1, 1, 1, 1)
    across = rng.normal(size=64) / 8
    k -= (k @ across)[..., None] * across / (across @ across)
    q = np.broadcast_to(across * size * 8, k.shape)
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    out = attend_with("heads")(q, k, v, np.full(200, 3, np.int32))
    assert np.isfinite(np.asarray(out, np.float32)).all()


def test_powers_of_two():
    exp2 = jax.jit(head_attention.exp2, static_argnums=1)
    x = np.random.default_rng(0).uniform(-126, 127.4, 100_000).astype(np.float32)
    for shift in (0, 60):
        whole = np.arange(-126, 128, dtype=np.float32)
        np.testing.assert_array_equal(exp2(whole + shift, shift), np.exp2(whole.astype(float)))
        np.testing.assert_array_equal(exp2(np.float32([-127, -1e30, -np.inf]) + shift, shift), 0)
        over = np.float32([127.5, 128, 129, 1e30, np.inf]) + shift
        np.testing.assert_array_equal(exp2(over, shift), np.inf)
    np.testing.assert_allclose(exp2(x, 0), np.exp2(x.astype(np.float64)), rtol=2e-7)
    assert np.isnan(exp2(np.float32(np.nan), 0))


@pytest.mark.parametrize("what", ["query", "key"])
def test_what_is_not_a_number_stays_in_its_image(what):
    q, k, v, cotangent = draw(2, 300, 1, 8)
    lengths = np.array([300, 300], np.int32)
    plain = differentiate("heads", q, k, v, lengths, cotangent)
    {"query": q, "key": k}[what][1, 5] = np.nan
    for found, before in zip(
        differentiate("heads", q, k, v, lengths, cotangent), plain, strict=True
    ):
        np.testing.assert_array_equal(found[0], before[0])
        assert np.isnan(found[1]).any()
    out = attend_with("heads")(q, k, v, lengths)
    assert np.isnan(out[1]).sum() == {"query": 8, "key": 8 * 300}[what]


@pytest.mark.parametrize("backend", ("stock", "chunked", "heads"))
def test_bfloat16_is_no_worse_than_its_roundings(backend):
    q, k, v, cotangent = (jnp.asarray(x, jnp.bfloat16) for x in draw(1, 300, 2, 64))
    lengths = np.array([290], np.int32)
    cotangent = cotangent.at[:, 290:].set(0)
    wide = [np.asarray(x, np.float64) for x in (q * 3, k + 1, v, cotangent)]
    expected, _, gradients = definition(*wide, lengths)
    found = differentiate(backend, q * 3, k + 1, v, lengths, cotangent)
    for ours, theirs in zip(found, (expected, *gradients), strict=True):
        error = np.asarray(ours, np.float64)[:, :290] - theirs[:, :290]
        assert ours.dtype == jnp.bfloat16
        assert np.sqrt((error**2).mean() / (theirs**2).mean()) < 0.008


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("backend", ("stock", "chunked", "heads"))
def test_a_single_valid_token_gets_its_own_value(backend, tokens):
    q, k, v, _ = draw(1, tokens, 1, 8)
    out = attend_with(backend)(q, k, v, np.array([1], np.int32))
    np.testing.assert_allclose(out, np.broadcast_to(v[:, :1], v.shape), atol=1e-6)


def test_the_map():
    q, k, v, cotangent = draw(BATCH, 20, HEADS, WIDTH)
    lengths = np.array([20, 5], np.int32)
    _, expected, _ = definition(q, k, v, cotangent, lengths)
    ours = jax.jit(attention.attention_map)(q, k, lengths)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("backend", ("stock", "chunked", "heads"))
def test_bfloat16_accumulates_in_float32(backend):
    # A mean over a thousand values: a sum kept in bfloat16 would stop growing at 256.
    ones = jnp.ones((1, 1000, 1, 8), jnp.bfloat16)
    out = attend_with(backend)(0 * ones, ones, ones, np.array([1000], np.int32))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1, atol=4e-3)


@pytest.mark.parametrize("backend", ["heads", "splash"])
def test_a_sharded_batch_stays_where_it_is(backend, interpreted):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp"))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    q, k, v, _ = draw(4, 130, 1, 8)
    lengths = np.array([130, 1, 60, 128], np.int32)
    attend = attend_with(backend, mesh)
    placed = jax.device_put((q, k, v, lengths), rows)
    program = attend.lower(*placed).compile()
    assert not re.search("all-(gather|reduce|to-all)|collective-permute", program.as_text())
    out = program(*placed)
    assert out.sharding.is_equivalent_to(rows, out.ndim)
    expected = attend_with("stock")(q, k, v, lengths)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(out[row, :length], expected[row, :length], atol=1e-5)


def test_parameters_can_be_drawn_whatever_attends_on_however_many_devices():
    config = make_config(**{"model.dtype": "bfloat16"}).model
    shapes = {}
    for backend in ("stock", "heads", "splash", "cudnn"):
        config.attention = backend
        model = build_model(config, CLASSES, mesh_of(8, 2))
        shapes[backend] = jax.tree.map(jnp.shape, jax.eval_shape(model.init, jax.random.key(0)))
    assert all(of_backend == shapes["stock"] for of_backend in shapes.values())


def test_cudnn_gets_a_head_width_it_takes(monkeypatch):
    """The kernel needs a GPU; what it is given is checked through XLA's form of the same call."""
    reference = jax.nn.dot_product_attention

    def kernel(q, k, v, *, implementation, **kwargs):
        assert implementation == "cudnn" and q.shape[-1] == 16
        return reference(q, k, v, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    q, k, v, cotangent = draw(BATCH, 20, HEADS, WIDTH)
    lengths = np.array([20, 5], np.int32)
    expected, _, _ = definition(q, k, v, cotangent, lengths)
    out = attend_with("cudnn")(q, k, v, lengths)
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("tokens", [100, 200, 300, 1000])
def test_heads_in_bfloat16_whatever_the_number_of_chunks(tokens):
    x = jnp.ones((1, tokens, 3, 64), jnp.bfloat16)
    lengths = jnp.array([tokens - 7])
    total = jax.jit(jax.grad(lambda x: attend_with("heads")(x, x, x, lengths).astype(float).sum()))
    assert bool(jnp.isfinite(total(x)).all())
