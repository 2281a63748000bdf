"""Parameters: how many, their names and how they are drawn; configs that make no model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from tests.test_models import CLASSES, QUERIES, model_config, tiny
from yolos_jax.models import yolos
from yolos_jax.models.build import build_model

PUBLISHED = {
    "ti": (dict(width=192, heads=3, position_grid=(50, 83), mid_position_grid=()), 6_488_736),
    "s": (dict(width=384, heads=6), 30_684_768),
    "s_dwr": (dict(width=330, heads=6, depth=14), 27_561_696),
    "b": (
        dict(width=768, heads=12, position_grid=(50, 84), mid_position_grid=(50, 84)),
        127_798_368,
    ),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_counts_are_the_published_ones(size):
    changes, expected = PUBLISHED[size]
    values = {**dict(common.get_config().model.items()), **changes}
    values["mlp_width"] = 4 * values["width"]
    shapes = jax.eval_shape(build_model(values, 91).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_names_and_shapes_are_those_of_checkpoints():
    width, depth = 32, 3

    def dense(inputs, outputs, *stack):
        return {"kernel": (*stack, inputs, outputs), "bias": (*stack, outputs)}

    def norm(*stack):
        return {"scale": (*stack, width), "bias": (*stack, width)}

    def head(outputs):
        sizes = enumerate((width, width, outputs))
        return {f"layers_{i}": dense(width, size) for i, size in sizes}

    expected = {
        "backbone": {
            "patch_embed": dense(192, width),
            "cls_token": (1, width),
            "det_tokens": (QUERIES, width),
            "position": {"cls": (1, width), "det": (QUERIES, width), "grid": (4, 5, width)},
            "mid_position": {
                "cls": (depth - 1, 1, width),
                "det": (depth - 1, QUERIES, width),
                "grid": (depth - 1, 3, 4, width),
            },
            "blocks": {
                "norm1": norm(depth),
                "norm2": norm(depth),
                "attention": {
                    "qkv": dense(width, 3 * width, depth),
                    "out": dense(width, width, depth),
                },
                "mlp": {"fc1": dense(width, 64, depth), "fc2": dense(64, width, depth)},
            },
            "norm": norm(),
        },
        "class_head": head(CLASSES + 1),
        "box_head": head(4),
    }
    for scan in (True, False):
        params = jax.eval_shape(tiny(scan=scan).init, jax.random.key(0))
        assert jax.tree.map(lambda leaf: leaf.shape, params) == expected
    without = jax.eval_shape(tiny(mid_position_grid=()).init, jax.random.key(0))
    assert "mid_position" not in without["backbone"]


def test_parameters_are_drawn_as_the_reference_draws_them():
    model = tiny(
        width=96, heads=3, num_queries=100, det_token_std=1.0, mid_position_grid=(16, 16),
        position_init="sincos",
    )  # fmt: skip
    params = jax.jit(model.init)(jax.random.key(0))
    backbone, box_head = params["backbone"], params["box_head"]
    for drawn in (
        backbone["position"]["det"],
        backbone["mid_position"]["grid"],
        backbone["mid_position"]["det"],
        backbone["blocks"]["attention"]["qkv"]["kernel"],
        backbone["blocks"]["mlp"]["fc2"]["kernel"],
    ):
        assert abs(np.std(drawn) / 0.02 - 1) < 0.05 and abs(np.mean(drawn)) < 1e-3
        assert np.abs(drawn).max() > 0.05  # not cut at two standard deviations
    assert abs(np.std(backbone["det_tokens"]) - 1) < 0.03
    # Every block draws its own.
    kernels = np.asarray(backbone["blocks"]["attention"]["qkv"]["kernel"])
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01

    # PyTorch's default for linear layers and convolutions: uniform within 1 / sqrt(inputs).
    for layer, inputs in ((backbone["patch_embed"], 192), (box_head["layers_0"], 96)):
        bound = inputs**-0.5
        for name in ("kernel", "bias"):
            assert 0.9 * bound < np.abs(layer[name]).max() <= bound
        assert abs(np.std(layer["kernel"]) * 3**0.5 / bound - 1) < 0.03
    assert not np.any(backbone["blocks"]["attention"]["qkv"]["bias"])
    assert np.all(backbone["norm"]["scale"] == 1) and not np.any(backbone["norm"]["bias"])
    expected = yolos.sincos_init(jax.random.key(0), (4, 5, 96))
    np.testing.assert_array_equal(backbone["position"]["grid"], expected)


def test_a_sine_cosine_table_by_hand():
    # Two frequencies, 1 and 1/100; row 3, column 2.
    expected = [np.sin(3), np.sin(0.03), np.cos(3), np.cos(0.03)]
    expected += [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)]
    table = yolos.sincos_init(jax.random.key(0), (4, 5, 8))
    np.testing.assert_allclose(table[3, 2], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(name="yolo"), "model.name is 'yolo'; known models: yolos"),
        (dict(heads=5), "model.width 32 is not a multiple of model.heads 5"),
        (dict(dtype="float16"), "model.dtype is 'float16'; expected one of"),
        (dict(remat="all"), "model.remat is 'all'; expected one of"),
        (dict(attention="flash"), "model.attention is 'flash'; expected one of"),
        (dict(attention="cudnn"), "'cudnn' needs model.dtype 'bfloat16'"),
        (dict(position_init="zeros"), "model.position_init is 'zeros'"),
        (dict(position_init="sincos", width=30), "model.width divisible by 4, not 30"),
        (dict(dropout=0.1), r"unknown keys \['dropout'\]"),
    ],
)
def test_what_makes_no_model_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_a_missing_key_is_named_and_lists_do_for_tuples():
    values = model_config()
    del values["depth"]
    with pytest.raises(ValueError, match=r"missing keys \['depth'\]"):
        build_model(values, CLASSES)
    lists = tiny(position_grid=[4, 5], mid_position_grid=[])
    assert lists.config.position_grid == (4, 5) and lists.config.mid_position_grid == ()
