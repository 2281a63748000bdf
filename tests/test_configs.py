"""Every recipe is complete, every published model has its published size."""

from __future__ import annotations

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.common import CHANGEABLE_ON_RESUME, get_config
from train import leaves
from yolos_jax import checks, settings
from yolos_jax.models.build import build_model

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("[a-z]*.py"))


def load(name):
    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_common_keys_and_types(name):
    common, recipe = leaves(get_config()), leaves(load(name))
    assert recipe.keys() == common.keys()
    for key, value in recipe.items():
        assert type(value) is type(common[key]), key


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith("finetune")])
def test_a_recipe_passes_its_own_checks(name):
    config = load(name)
    config.data.root = "somewhere"
    checks.check_values(settings.complete(config, None))


def test_keys_that_may_change_on_resume_exist():
    assert set(CHANGEABLE_ON_RESUME) <= leaves(get_config()).keys()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("yolos_ti", 6_488_736),
        ("yolos_s", 30_684_768),
        ("yolos_s_dwr", 27_561_696),
        ("yolos_b", 127_798_368),
    ],
)
def test_published_models_have_their_published_size(name, count):
    model = build_model(load(name).model, 91)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == count


def test_published_recipes_scale_as_published():
    tiny, small = load("yolos_ti"), load("yolos_s")
    assert (tiny.augment.scales[0], tiny.augment.scales[-1]) == (256, 608)
    assert tiny.augment.max_size == 608 * 1333 // 800
    assert (small.augment.scales[0], small.augment.scales[-1]) == (480, 800)
    assert (tiny.batch_size, tiny.optimizer.lr) == (16, 5e-5)
    assert (small.batch_size, small.optimizer.lr) == (8, 2.5e-5)
