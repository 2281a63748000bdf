"""DETR's parameter groups, learning rates and schedules: the original's, name by name."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest

from configs import common, detr_r50, detr_r50_dc5, detr_r101
from tests import tiny_detr
from tests.golden_losses import GOLDENS
from yolos_jax import optimizer
from yolos_jax.convert import detr_names
from yolos_jax.models.build import build_model
from yolos_jax.schedules import make_schedule

REDUCED = {
    "trace": {"blocks": (2, 1, 2, 1), "num_queries": 10},
    "learned": {"blocks": (1, 1, 1, 1), "num_queries": 10, "position": "learned"},
}


@functools.cache
def golden() -> dict:
    """facebookresearch/detr (commit 29901c5): groups of two reduced models, three schedules."""
    return json.loads((GOLDENS / "detr_optim.json").read_text())


def of_recipe(model):
    """Trainable and constant parameters, as shapes, under the recipe's ``freeze``."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    freeze = detr_r50.get_config().optimizer.freeze
    return optimizer.partition(shapes, (*model.constants, *freeze))


def count(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", REDUCED)
def test_groups_are_the_original_s(name):
    model_config = tiny_detr.model_config(
        stem_width=8, width=32, heads=4, mlp_width=64, encoder_depth=2, decoder_depth=3,
        **REDUCED[name],
    )  # fmt: skip
    model = build_model(model_config, 5)
    trainable, frozen = of_recipe(model)
    places = detr_names.table(model_config, 5)
    theirs = golden()["models"][name]
    config = detr_r50.get_config().optimizer

    table = optimizer.group_table(trainable, model.rules)
    for group in ("main", "backbone"):
        paths = {path for name in theirs[group]["params"] for path in places[name].paths}
        assert paths == {path for path, rule in table.items() if rule.group == group}
        rules = {rule for rule in table.values() if rule.group == group}
        rates = {config.lr * optimizer.lr_factor(config, rule) for rule in rules}
        np.testing.assert_allclose(list(rates), theirs[group]["lr"])
        assert all(rule.decay for rule in rules) and config.weight_decay == 1e-4
    assert count(trainable) == theirs["trainable_count"]
    assert {path for name in theirs["frozen"] for path in places[name].paths} == {
        path for path in optimizer.paths(frozen) if path.endswith("kernel")
    }


def test_updates_of_the_backbone_are_a_tenth():
    params = {"backbone": {"conv1": np.ones(3)}, "query_embed": np.ones(3)}
    config = detr_r50.get_config().optimizer
    rules = build_model(detr_r50.get_config().model, 91).rules
    chain = optimizer.make_optimizer(config, params, rules)
    updates, _ = chain.update(params, chain.init(params), params)
    body, queries = updates["backbone"]["conv1"], updates["query_embed"]
    np.testing.assert_allclose(body, 0.1 * np.asarray(queries), rtol=1e-6)
    assert "learning rate 1e-05" in optimizer.describe_groups(params, {}, config, rules)


@pytest.mark.parametrize("name", ["default", "long_schedule", "short"])
def test_rates_drop_when_the_original_s_do(name):
    theirs = golden()["schedules"][name]
    arguments = theirs["args"]
    config = common.get_config().optimizer
    config.schedule, config.lr = "step", arguments["lr"]
    config.lr_drop = arguments["lr_drop"]
    epochs = arguments["epochs"]
    schedule = make_schedule(config, steps_per_epoch=7, total_steps=7 * epochs, epochs=epochs)
    for epoch, lr, _ in theirs["changes"]:
        np.testing.assert_allclose(schedule(7 * epoch), lr, rtol=1e-9)
        if epoch:
            np.testing.assert_allclose(schedule(7 * epoch - 1), lr * 10, rtol=1e-9)
    assert schedule(7 * epochs - 1) == schedule(7 * theirs["changes"][-1][0])


@pytest.mark.parametrize(
    ("recipe", "trainable"),
    [(detr_r50, 41_302_368), (detr_r50_dc5, 41_302_368), (detr_r101, 60_242_272)],
)
def test_published_recipes_train_as_many_parameters(recipe, trainable):
    """As the original's own count, printed in its logs (41302368 for ResNet-50)."""
    model = build_model(recipe.get_config().model, 91)
    assert count(of_recipe(model)[0]) == trainable
