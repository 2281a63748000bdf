"""float32 is float32 on accelerators, whose products round it unless they are told not to."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny, tiny_detr
from yolos_jax.batch import Batch, Canvas
from yolos_jax.models.build import build_model

PRODUCT = re.compile(r"stablehlo\.(?:dot_general|convolution)\b.*")
OF_FLOAT32 = re.compile(r": \(tensor<[0-9x]*f32>, tensor<[0-9x]*f32>\) ->")


def products_of_float32(text):
    """Of a lowered program: those of two float32 arrays; how many of them are whole."""
    found = [line for line in PRODUCT.findall(text) if OF_FLOAT32.search(line)]
    return len(found), sum(line.count("HIGHEST") >= 1 and "DEFAULT" not in line for line in found)


def lowered(kind, platform, function, **changes):
    """The text of ``function`` of a loss of parameters, for a platform that is not here."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    one, pair = np.ones(1, bool), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    if kind == "yolos":
        model = build_model(tiny.make_config().model.to_dict() | changes, tiny.CLASSES)
        batch, bounds = Batch(shape((1, 12, 192)), pair, one), (4, 4)
    else:
        model = tiny_detr.make_model(**changes)
        batch, bounds = Canvas(shape((1, 64, 96, 3)), pair, one), (64, 96)

    def loss(params, batch):
        outputs = model.apply(params, batch, bounds=bounds)
        return outputs.pred_logits.sum() + outputs.pred_boxes.sum()

    params = jax.eval_shape(model.init, jax.random.key(0))
    traced = jax.jit(function(loss)).trace(params, batch)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("yolos", {"attention": "stock"}),
        ("yolos", {"attention": "chunked"}),
        ("yolos", {"attention": "heads"}),
        ("detr", {}),
    ],
)
def test_all_products_of_a_float32_model(kind, changes, platform):
    found, whole = products_of_float32(lowered(kind, platform, jax.grad, **changes))
    assert found == whole > 20


@pytest.mark.parametrize(("kind", "heads"), [("yolos", 6), ("detr", 4)])
def test_heads_of_a_bfloat16_model(kind, heads):
    """The heads' products and, of a YOLOS, two for each of the two position tables."""
    text = lowered(kind, "tpu", lambda loss: loss, dtype="bfloat16")
    tables = {"yolos": 4, "detr": 0}[kind]
    assert products_of_float32(text) == (heads + tables,) * 2
