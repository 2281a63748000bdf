"""DETR as a whole: what its outputs depend on, and what makes no model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from tests import tiny_detr
from tests.tiny import mesh_of
from yolos_jax import optimizer
from yolos_jax.models.build import build_model

# Optimised they are in the tests of parity.
pytestmark = pytest.mark.usefixtures("quick_to_compile")
SIZES, CANVAS = ((64, 50), (40, 96)), (70, 96)
# Recipes freeze these, as the original does: constants, the stem and the first stage.
FROZEN = (r"backbone/.*bn\d?/.*", r"backbone/conv1/.*", r"backbone/layer1/.*")


@pytest.fixture(scope="module")
def tiny(quick_to_compile):
    """A model, parameters, a batch, and its outputs."""
    model = tiny_detr.make_model()
    params = tiny_detr.make_params(model)
    canvas = tiny_detr.make_canvas(SIZES, CANVAS)
    apply = jax.jit(lambda params, canvas: model.apply(params, canvas))
    return model, params, canvas, apply, apply(params, canvas)


def close(a, b, atol=1e-5):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, atol=atol, rtol=0)


def test_outputs_have_a_layer_axis_and_are_float32(tiny):
    outputs = tiny[-1]
    assert outputs.pred_logits.shape == (2, 2, tiny_detr.QUERIES, tiny_detr.CLASSES + 1)
    assert outputs.pred_boxes.shape == (2, 2, tiny_detr.QUERIES, 4)
    assert outputs.pred_logits.dtype == outputs.pred_boxes.dtype == jnp.float32
    assert (outputs.pred_boxes > 0).all() and (outputs.pred_boxes < 1).all()
    assert np.abs(outputs.pred_logits[0] - outputs.pred_logits[1]).max() > 0.1


def test_nothing_outside_of_the_images_matters(tiny):
    _, params, canvas, apply, outputs = tiny
    pixels = tiny_detr.zero_outside(canvas).pixels
    pixels[0, 64:], pixels[0, :, 50:], pixels[1, 40:] = np.nan, np.inf, -1e9
    close(apply(params, canvas._replace(pixels=pixels)), outputs, atol=0)


def test_neither_neighbours_nor_unreadable_pictures_matter(tiny):
    _, params, canvas, apply, outputs = tiny
    other = canvas.pixels.copy()
    other[1] = np.nan
    size, valid = np.array([SIZES[0], (1, 1)], np.int32), np.array([True, False])
    found = apply(params, canvas._replace(pixels=other, size=size, image_valid=valid))
    close((x[:, 0] for x in found), (x[:, 0] for x in outputs))
    assert all(np.isfinite(x).all() for x in found)


def test_the_size_of_an_image_matters(tiny):
    """Its mask and its positions: the picture itself is black beyond."""
    _, params, canvas, apply, outputs = tiny
    canvas = tiny_detr.zero_outside(canvas)._replace(size=np.array([CANVAS] * 2, np.int32))
    assert np.abs(apply(params, canvas).pred_logits - outputs.pred_logits).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pre_norm", "form"),
    [(False, dict(scan=False, remat="none")), (True, dict(remat="full"))],
    ids=("unrolled", "pre-norm"),
)
def test_gradients_are_finite_and_the_same_in_every_form(pre_norm, form):
    """Scanned or not, with rematerialisation or without; whatever lies outside of the images."""
    canvas = tiny_detr.make_canvas(SIZES, CANVAS)
    pixels = canvas.pixels.copy()
    pixels[0, 64:] = np.nan
    canvas = canvas._replace(pixels=pixels)

    def gradients(**form):
        model = tiny_detr.make_model(pre_norm=pre_norm, **form)
        params = tiny_detr.make_params(model)
        trainable, frozen = optimizer.partition(params, FROZEN)

        def score(trainable, frozen, canvas):
            outputs = model.apply(optimizer.merge(trainable, frozen), canvas)
            return (outputs.pred_logits**2).sum() + (outputs.pred_boxes**2).sum()

        return jax.jit(jax.value_and_grad(score))(trainable, frozen, canvas)

    (score, found), (plain, expected) = gradients(**form), gradients()
    np.testing.assert_allclose(score, plain, rtol=1e-5)
    norm = float(optax.tree.norm(expected))
    assert np.isfinite(norm) and norm > 1
    for path, leaf in zip(optimizer.paths(expected), jax.tree.leaves(expected), strict=True):
        # All keys moved by as much change no softmax.
        assert np.abs(leaf).max() > 0 or path.endswith("key/bias"), path
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4 * norm), found, expected)


def test_dropout_is_for_training_and_follows_its_key(tiny):
    model, params, canvas, _, outputs = tiny
    train = jax.jit(lambda params, canvas, key: model.apply(params, canvas, rng=key))
    one, other = (train(params, canvas, jax.random.key(seed)) for seed in (0, 1))
    assert np.abs(one.pred_logits - outputs.pred_logits).max() > 1e-2
    assert np.abs(one.pred_logits - other.pred_logits).max() > 1e-2
    close(one, train(params, canvas, jax.random.key(0)), atol=0)


@pytest.mark.slow
def test_bfloat16_moves_boxes_a_little(tiny):
    _, params, canvas, _, outputs = tiny
    model = tiny_detr.make_model(dtype="bfloat16")
    found = jax.jit(lambda params, canvas: model.apply(params, canvas))(params, canvas)
    assert found.pred_logits.dtype == jnp.float32
    assert 1e-4 < np.abs(found.pred_boxes - outputs.pred_boxes).max() < 0.05


@pytest.mark.slow
def test_devices_share_a_batch(tiny):
    _, params, _, apply, _ = tiny
    sizes = [(64, 50), (40, 96), (70, 96), (33, 20)]
    canvas = tiny_detr.make_canvas(sizes, CANVAS)
    mesh = mesh_of(4, fsdp=2)
    model = tiny_detr.make_model(mesh)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    found = jax.jit(lambda params, canvas: model.apply(params, canvas))(
        params, jax.tree.map(lambda x: jax.device_put(x, rows), canvas)
    )
    close(found, apply(params, canvas))


@pytest.mark.parametrize(
    ("blocks", "trainable", "total"),
    [
        ((3, 4, 6, 3), 41_302_368, 41_631_008),
        pytest.param((3, 4, 23, 3), 60_242_272, 60_675_360, marks=pytest.mark.slow),
    ],
    ids=("r50", "r101"),
)
def test_published_models_have_their_published_size(blocks, trainable, total):
    values = common.get_config().model.to_dict() | dict(
        name="detr", width=256, heads=8, mlp_width=2048, num_queries=100
    )
    values["detr"]["blocks"] = blocks
    shapes = jax.eval_shape(build_model(values, 91).init, jax.random.key(0))
    parts = optimizer.partition(shapes, FROZEN)
    counts = [sum(int(np.prod(x.shape)) for x in jax.tree.leaves(part)) for part in parts]
    assert (counts[0], sum(counts)) == (trainable, total)


@pytest.mark.slow
def test_new_parameters_start_as_the_originals():
    model = tiny_detr.make_model(width=64, mlp_width=256, position="learned")
    params = jax.jit(model.init)(jax.random.key(0))
    attention = params["encoder"]["layers"]["self_attention"]

    def bound(leaf, expected):
        assert 0.97 * expected < np.abs(leaf).max() <= expected * (1 + 1e-6)

    bound(attention["query"]["kernel"], (6 / (4 * 64)) ** 0.5)  # one of three, drawn as one matrix
    bound(attention["out"]["kernel"], (6 / (2 * 64)) ** 0.5)
    bound(params["encoder"]["layers"]["mlp"]["linear1"]["kernel"], (6 / (64 + 256)) ** 0.5)
    bound(params["decoder"]["layers"]["mlp"]["linear2"]["bias"], 256**-0.5)
    bound(params["class_head"]["kernel"], 64**-0.5)
    assert not np.any(attention["key"]["bias"]) and not np.any(attention["out"]["bias"])
    assert abs(params["query_embed"].std() - 1) < 0.15
    assert 0 <= params["position"]["row"].min() < 0.01 < 0.99 < params["position"]["row"].max() < 1
    convolution = params["backbone"]["layer4"]["block_0"]["conv2"]["kernel"]
    assert abs(convolution.std() - (2 / (9 * convolution.shape[3])) ** 0.5) < 0.01
    np.testing.assert_array_equal(params["backbone"]["bn1"]["running_var"], 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(heads=3), "model.width 16 is not a multiple of model.heads 3"),
        (dict(width=18), "model.width 18: positions need a width divisible by 4"),
        (dict(position="cosine"), "model.detr.position is 'cosine'; expected one of"),
        (dict(dtype="float16"), "model.dtype is 'float16'; expected one of"),
        (dict(remat="some"), "model.remat is 'some'"),
        (dict(blocks=(3, 4, 6)), r"model.detr.blocks is \(3, 4, 6\); expected 4 numbers"),
        (dict(decoder_depth=0), "model.detr.decoder_depth is 0; expected at least 1"),
        (dict(dropout=1.0), "model.detr.dropout is 1.0; expected 0 to less than 1"),
    ],
)
def test_values_that_make_no_model(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_detr.make_model(**changes)


def test_another_attention_is_refused():
    with pytest.raises(ValueError, match=r"model.attention is 'splash'.* expected 'auto'"):
        build_model(tiny_detr.model_config() | {"attention": "splash"}, 3)


def test_missing_and_unknown_keys_are_named():
    values = tiny_detr.model_config()
    del values["width"], values["detr"]["blocks"]
    values["detr"]["layers"] = 3
    with pytest.raises(
        ValueError, match=r"missing keys \['width', 'detr.blocks'\].*\['detr.layers'\]"
    ):
        build_model(values, 3)
