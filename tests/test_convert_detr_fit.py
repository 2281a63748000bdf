"""A DETR's checkpoint is made to fit the model of the run that starts from it."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests import convert_sources as sources
from tests import tiny_detr
from yolos_jax.convert import names, start
from yolos_jax.labels import LabelMap
from yolos_jax.models.build import build_model

LABELS = LabelMap((1, 2, 5, 6), ("apple", "bean", "carrot", "date"))
MODEL = tiny_detr.model_config()


@pytest.fixture(autouse=True)
def quick_draws(monkeypatch):
    """Random parameters without compiling anything: what they are does not matter."""
    monkeypatch.setattr(start, "draw", tiny_detr.numpy_draw)


def initial(new=MODEL, old=MODEL, labels=LABELS, fresh=()):
    """Which parameters are not the checkpoint's, and the report."""
    params = tiny_detr.numpy_draw(build_model(old, 4), jax.random.key(0))
    flat = names.flatten(params)
    metadata = {"model": old, "num_classes": 4, "label_map": LABELS.to_json(), "source": "test"}
    metadata["new"] = [path for path in flat if path.startswith(tuple(fresh))]
    model = build_model(new, labels.num_classes)
    found, report = start.initial_params(
        model, params, metadata, jax.random.key(1), labels.to_json()
    )
    shapes = jax.tree.map(np.shape, start.draw(model, jax.random.key(1)))
    assert jax.tree.map(np.shape, found) == shapes
    found = names.flatten(found)
    changed = {p for p in found if p not in flat or not np.array_equal(found[p], flat[p])}
    return changed, report


def test_everything_is_kept_where_nothing_differs():
    changed, report = initial(tiny_detr.model_config(scan=False, dtype="bfloat16", dropout=0.3))
    assert not changed and report.endswith("kept as is")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (LabelMap((1, 2), ("apple", "bean")), "4 classes in the checkpoint, 2 in this run"),
        (LabelMap((1, 2, 5, 6), ("apple", "bean", "cola", "date")), "'carrot' -> 'cola'"),
    ],
)
def test_other_classes_get_a_new_head(labels, said):
    changed, report = initial(labels=labels)
    assert changed == {"class_head/kernel", "class_head/bias"}
    assert report.count("NEW CLASS HEAD") == 2 and said in report


def test_other_numbers_of_queries_are_new_and_dilation_is_said():
    changed, report = initial(tiny_detr.model_config(num_queries=9, dilation=True))
    assert changed == {"query_embed"}
    assert "new: query_embed (9, 16): the checkpoint has (5, 16)" in report
    assert "model.detr.dilation is True, the checkpoint's is False" in report


BACKBONE_ONLY = ("class_head", "box_head", "query_embed", "input_proj", "encoder", "decoder")


def test_a_backbone_takes_any_transformer():
    new = tiny_detr.model_config(
        width=32, heads=4, num_queries=3, pre_norm=True, position="learned", decoder_depth=1
    )
    changed, report = initial(new, fresh=BACKBONE_ONLY)
    assert changed and not any(path.startswith("backbone/") for path in changed)
    assert "new: position/row (50, 16): nothing of position/ is trained" in report


@pytest.mark.parametrize("fresh", [(), BACKBONE_ONLY], ids=["detector", "backbone"])
def test_a_backbone_of_another_depth_is_one_line_naming_both(fresh):
    new, old = (tiny_detr.model_config(blocks=blocks) for blocks in ((3, 4, 6, 3), (3, 4, 23, 3)))
    with pytest.raises(ValueError) as caught:
        initial(new, old, fresh=fresh)
    assert str(caught.value) == (
        "the checkpoint does not fit the run's model: model.detr.blocks is (3, 4, 6, 3) "
        "(ResNet-50), the checkpoint's is (3, 4, 23, 3) (ResNet-101)"
    )


def test_another_network_is_refused():
    with pytest.raises(ValueError, match=r"model.heads is 4, .* 2; model.detr.position is learned"):
        initial(tiny_detr.model_config(heads=4, position="learned"))
    with pytest.raises(ValueError, match="encoder/layers/mlp/linear1/bias has shape"):
        initial(tiny_detr.model_config(mlp_width=40))


@pytest.mark.parametrize(
    ("new", "theirs"), [(sources.yolos_model(), "detr"), (MODEL, "yolos")], ids=["yolos", "detr"]
)
def test_a_yolos_is_no_detr_nor_the_other_way_round(new, theirs):
    model = build_model(new, 4)
    with pytest.raises(ValueError) as caught:
        start.initial_params(model, {}, {"model": {"name": theirs}}, jax.random.key(1))
    assert str(caught.value).endswith(
        f"model.name is {model.name!r}, the checkpoint's is {theirs!r}"
    )
