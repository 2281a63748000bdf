"""Configurations are completed from checkpoints and refused before anything is built."""

from __future__ import annotations

import pytest

from configs import finetune, finetune_detr, shapes
from tests import tiny_detr
from yolos_jax import settings

METADATA = {
    "model": {
        "name": "yolos",
        "patch_size": 8,
        "width": 96,
        "depth": 3,
        "heads": 3,
        "mlp_width": 384,
        "num_queries": 8,
        "position_grid": [8, 8],
        "mid_position_grid": [],
        "layer_norm_eps": 1e-6,
    },
    "preprocess": {"size": 64, "max_size": 64, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
}


def test_open_keys_come_from_the_checkpoint_and_given_ones_stay():
    config = finetune.get_config()
    config.model.num_queries = 32
    config.preprocess.size = 192
    complete = settings.complete(config, METADATA)
    assert complete.model.width == 96
    assert complete.model.num_queries == 32
    assert complete.model.position_grid == (8, 8)
    assert complete.model.mid_position_grid == ()
    assert (complete.preprocess.size, complete.preprocess.max_size) == (192, 64)
    assert complete.preprocess.mean == (0.5, 0.5, 0.5)
    assert config.model.width == 0, "the caller's configuration must not change"


def test_no_limit_and_no_normalisation_are_values():
    """Not "as in the checkpoint", neither of a recipe nor of a fine-tuning."""
    for recipe in (finetune, shapes):
        config = recipe.get_config()
        config.preprocess.max_size = 0
        config.preprocess.mean, config.preprocess.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        complete = settings.complete(config, METADATA).preprocess
        assert complete.max_size == 0
        assert (complete.mean, complete.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_open_keys_without_a_checkpoint_are_refused():
    with pytest.raises(ValueError, match=r"model.patch_size.*--config.init"):
        settings.complete(finetune.get_config(), None)


DETR = tiny_detr.model_config(dilation=True, position="learned")
KEPT = ("name", "width", "heads", "mlp_width", "num_queries", "layer_norm_eps")


def test_a_detr_opens_its_section_as_a_whole():
    own = {**DETR["detr"], "blocks": list(DETR["detr"]["blocks"]), "dropout": 0.3}
    model = {key: DETR[key] for key in KEPT} | {"detr": own}  # as converted ones have it
    complete = settings.complete(finetune_detr.get_config(), METADATA | {"model": model}).model
    assert {key: complete[key] for key in KEPT} == {key: DETR[key] for key in KEPT}
    assert complete.detr.to_dict() == DETR["detr"] | {"dropout": 0.1}


@pytest.mark.parametrize(
    ("recipe", "ours", "theirs"),
    [(finetune, "yolos", "detr"), (finetune_detr, "detr", "yolos"), (shapes, "yolos", "detr")],
)
def test_a_checkpoint_of_the_other_model_is_refused(recipe, ours, theirs):
    metadata = METADATA | {"model": METADATA["model"] | {"name": theirs}}
    with pytest.raises(ValueError, match=f"model.name is '{ours}', .* is a '{theirs}'"):
        settings.complete(recipe.get_config(), metadata)


def test_an_open_key_that_the_checkpoint_lacks_is_refused():
    config = finetune.get_config()
    config.model.name = "detr"
    metadata = METADATA | {"model": {key: DETR[key] for key in KEPT}}
    with pytest.raises(ValueError, match=r"model.patch_size is 0.* runs/detr_r50 has none"):
        settings.complete(config, metadata, "runs/detr_r50")


def test_no_mid_tables_stays_no_mid_tables():
    config = shapes.get_config()
    assert settings.complete(config, METADATA).model.mid_position_grid == ()
