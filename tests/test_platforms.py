"""Forms of a computation that are for GPUs: the same numbers, and what their compiler is told.

Programs are lowered for GPUs here, which needs none; the forms are run on this machine's devices.
"""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests import tiny_detr
from tests.tiny import BUCKET, CLASSES, make_batch, make_config, mesh_of
from yolos_jax import programs
from yolos_jax.mesh import ROWS
from yolos_jax.models import norm, platforms, position
from yolos_jax.models.build import build_model
from yolos_jax.models.repeat import repeat

LAYOUT = "LayoutConstraint"


@pytest.fixture
def as_on_gpus(monkeypatch):
    """Lets this machine's compiler have the forms for GPUs; their names."""
    taken = []

    def take(form, other, *args):
        taken.append(form.__name__)
        return form(*args)

    monkeypatch.setattr(platforms, "on_gpus", take)
    return taken


def test_only_programs_for_gpus_get_the_form():
    lowered = {
        platform: jax.jit(lambda x: platforms.on_gpus(jnp.sin, jnp.cos, x))
        .trace(jnp.ones(3))
        .lower(lowering_platforms=(platform,))
        .as_text()
        for platform in ("cpu", "tpu", "cuda", "rocm")
    }
    sines = {platform for platform, text in lowered.items() if "stablehlo.sine" in text}
    assert sines == {"cuda", "rocm"}
    assert all(("stablehlo.cosine" in text) != (name in sines) for name, text in lowered.items())


def test_repeated_for_every_image():
    x = jnp.arange(6.0).reshape(2, 3)
    out, pullback = jax.vjp(lambda x: repeat(x, 4), x)
    np.testing.assert_array_equal(out, np.stack([x] * 4))
    cotangent = np.random.default_rng(0).integers(-9, 9, out.shape).astype(np.float32)
    np.testing.assert_array_equal(pullback(cotangent)[0], cotangent.sum(0))


def test_the_form_for_gpus_sums_what_devices_share(as_on_gpus):
    rows = NamedSharding(mesh_of(4), PartitionSpec(ROWS))
    cotangent = np.random.default_rng(0).integers(-9, 9, (8, 2, 3)).astype(np.float32)

    @jax.jit
    def gradient(cotangent):
        return jax.vjp(lambda x: repeat(x, 8), jnp.ones((2, 3)))[1](cotangent)[0]

    found = gradient(jax.device_put(cotangent, rows))
    assert as_on_gpus == ["_images_outermost"]
    np.testing.assert_array_equal(found, cotangent.sum(0))


@pytest.mark.parametrize(("platform", "told"), [("cpu", False), ("tpu", False), ("cuda", True)])
def test_gradients_of_tokens_stay_as_they_lie_on_gpus(platform, told):
    gradient = jax.jit(jax.grad(lambda x: (repeat(x, 64) ** 2).sum()))
    text = gradient.trace(jnp.ones((2, 3))).lower(lowering_platforms=(platform,)).as_text()
    assert (LAYOUT in text) == told


def test_all_that_a_model_repeats_is_told():
    """YOLOS's first tokens, those of the first position table, and of the others in their loop."""
    model = build_model(make_config().model, CLASSES)
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = make_batch(0).batch
    batch = batch._replace(patches=batch.patches.astype(np.float32))

    def loss(params):
        outputs = model.apply(params, batch, bounds=(BUCKET.rows, BUCKET.cols))
        return outputs.pred_logits.sum() + outputs.pred_boxes.sum()

    lowered = jax.jit(jax.grad(loss)).trace(params).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count(f"@{LAYOUT}") == 3


@pytest.mark.parametrize(("position", "count"), [("sine", 1), ("learned", 2)])
def test_all_that_a_detr_repeats_is_told(position, count):
    """Its queries, and learned tables of positions."""
    model = tiny_detr.make_model(position=position)
    params = jax.eval_shape(model.init, jax.random.key(0))
    canvas = tiny_detr.make_canvas([(64, 64)] * 2, (64, 64))

    def loss(params):
        return model.apply(params, canvas).pred_boxes.sum()

    lowered = jax.jit(jax.grad(loss)).trace(params).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count(f"@{LAYOUT}") == count


def test_resized_tables_are_the_same(as_on_gpus):
    draw = np.random.default_rng(0).normal
    table, rows, cols = (
        jnp.asarray(draw(size=size), jnp.float32) for size in ((5, 7, 4), (2, 6, 5), (2, 8, 7))
    )
    values, pullback = jax.vjp(position.resize, table, rows, cols)
    assert as_on_gpus == ["columns_first"]
    expected = np.einsum("brh,bcw,hwd->brcd", rows, cols, table).reshape(2, 48, 4)
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)
    cotangent = draw(size=values.shape).astype(np.float32)
    cells = cotangent.reshape(2, 6, 8, 4)
    expected = np.einsum("brh,bcw,brcd->hwd", rows, cols, cells)
    np.testing.assert_allclose(pullback(cotangent)[0], expected, rtol=1e-4, atol=1e-4)


def test_layer_norm_has_the_same_gradients(as_on_gpus, monkeypatch):
    draw = np.random.default_rng(0).normal
    x, scale, bias = (jnp.asarray(draw(size=size), jnp.float32) for size in ((3, 5, 8), 8, 8))
    cotangent = jnp.asarray(draw(size=x.shape), jnp.float32)

    def gradients():
        return jax.vjp(lambda *args: norm.layer_norm(1e-6, *args), x, scale, bias)[1](cotangent)

    found = gradients()
    assert as_on_gpus == ["optimization_barrier"]
    monkeypatch.undo()
    for a, b in zip(found, gradients(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("", {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}),
        ("--xla_gpu_enable_triton_gemm=true", {"xla_gpu_dot_merger_threshold_mb": 0}),
        ("--xla_gpu_dot_merger_threshold_mb=9 --xla_gpu_enable_triton_gemm=false", None),
    ],
)
def test_products_are_cublas_s_unless_flags_say_other(flags, told, monkeypatch):
    seen = []
    monkeypatch.setattr(jax, "jit", lambda function, **options: seen.append(options))
    monkeypatch.setenv("XLA_FLAGS", flags)
    card = SimpleNamespace(platform="gpu")
    programs.jit(jnp.sin, SimpleNamespace(devices=np.array([[card]])), backward=True)
    assert seen == [{"compiler_options": told}]


def test_the_compiler_knows_what_it_is_told_of_gpus():
    """Options are of all platforms, so this one's compiler would refuse a name that is gone."""
    told = jax.jit(jnp.matmul, compiler_options=programs._ON_GPUS)
    np.testing.assert_array_equal(told(jnp.ones((2, 3)), jnp.ones((3, 4))), 3)
    with pytest.raises(Exception, match="xla_gpu_no_such_option"):
        jax.jit(jnp.sin, compiler_options={"xla_gpu_no_such_option": 0})(jnp.ones(3))
