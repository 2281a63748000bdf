"""A checkpoint of ours is made to fit the model of the run that starts from it."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests import convert_sources as sources
from yolos_jax.convert import names, start
from yolos_jax.labels import LabelMap
from yolos_jax.models.build import build_model


@pytest.fixture(autouse=True)
def quick_draws(monkeypatch):
    """Random parameters without compiling anything: what they are does not matter."""
    monkeypatch.setattr(start, "draw", sources.numpy_draw)


MODEL = sources.yolos_model()
LABELS = LabelMap((1, 2, 5), ("apple", "bean", "carrot"))


def initial(old, new, labels=LABELS, old_labels=LABELS, fresh=()):
    params = start.draw(build_model(old, old_labels.num_classes), jax.random.key(0))
    metadata = {
        "model": old,
        "num_classes": old_labels.num_classes,
        "label_map": old_labels.to_json(),
        "source": "test",
        "new": list(fresh),
    }
    model = build_model(new, labels.num_classes)
    found, report = start.initial_params(
        model, params, metadata, jax.random.key(1), labels.to_json()
    )
    shapes = jax.eval_shape(model.init, jax.random.key(1))
    assert jax.tree.map(np.shape, found) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    old_flat, new_flat = names.flatten(params), names.flatten(found)
    changed = {
        path
        for path, array in new_flat.items()
        if path not in old_flat or not np.array_equal(array, old_flat[path])
    }
    return changed, report, old_flat, new_flat


def test_everything_is_kept_where_nothing_differs():
    changed, report, _, _ = initial(MODEL, MODEL | {"dtype": "float32", "scan": False})
    assert not changed
    assert report.endswith("kept as is")


HEAD = {"class_head/layers_2/kernel", "class_head/layers_2/bias"}


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (LabelMap((1, 2), ("apple", "bean")), "3 classes in the checkpoint, 2 in this run"),
        (LabelMap((1, 2, 5), ("apple", "bean", "date")), "slot 2 'carrot' -> 'date'"),
    ],
)
def test_other_classes_get_a_new_head(labels, said):
    changed, report, _, _ = initial(MODEL, MODEL, labels)
    assert changed == HEAD
    assert "NEW CLASS HEAD" in report and said in report


def test_other_ids_of_the_same_names_keep_the_head():
    changed, _, _, _ = initial(MODEL, MODEL, LabelMap((7, 8, 9), LABELS.names))
    assert not changed


def test_other_grids_are_resized():
    new = MODEL | {"position_grid": (5, 2), "mid_position_grid": (4, 6)}
    changed, report, old, found = initial(MODEL, new)
    assert changed == {"backbone/position/grid", "backbone/mid_position/grid"}
    assert report.count("resized") == 2
    torch = pytest.importorskip("torch", reason="it resizes as the original does")
    for path, grid in (("position", (5, 2)), ("mid_position", (4, 6))):
        table = torch.from_numpy(np.array(old[f"backbone/{path}/grid"]))
        table = table.reshape(-1, 3, 4, 24).permute(0, 3, 1, 2)
        expected = torch.nn.functional.interpolate(table, grid, mode="bicubic")
        expected = (
            expected.permute(0, 2, 3, 1).numpy().reshape(found[f"backbone/{path}/grid"].shape)
        )
        np.testing.assert_allclose(found[f"backbone/{path}/grid"], expected, atol=1e-6)


def test_other_numbers_of_detection_tokens_are_new():
    changed, report, _, _ = initial(MODEL, MODEL | {"num_queries": 9})
    assert changed == {
        "backbone/det_tokens", "backbone/position/det", "backbone/mid_position/det"
    }  # fmt: skip
    assert report.count("new:") == 3


def test_mid_tables_may_be_new_but_not_dropped():
    without = MODEL | {"mid_position_grid": ()}
    changed, _, _, _ = initial(without, MODEL)
    assert changed == {f"backbone/mid_position/{part}" for part in ("cls", "det", "grid")}
    with pytest.raises(ValueError, match="not in the run's model: backbone/mid_position/cls"):
        initial(MODEL, without)


def test_mid_tables_of_a_start_were_never_trained_and_may_be_dropped():
    without = MODEL | {"mid_position_grid": ()}
    fresh = [f"backbone/mid_position/{part}" for part in ("cls", "det", "grid")]
    changed, _, _, _ = initial(MODEL, without, fresh=fresh)
    assert not changed


def test_what_was_random_is_drawn_again():
    fresh = ("backbone/det_tokens", "box_head/layers_0/bias")
    changed, report, _, _ = initial(MODEL, MODEL, fresh=fresh)
    assert changed == set(fresh)
    assert report.count("random too") == 2


def test_another_network_is_refused_with_all_its_differences():
    with pytest.raises(ValueError) as caught:
        initial(MODEL, MODEL | {"mlp_width": 32, "depth": 3})
    message = str(caught.value)
    assert "backbone/blocks/mlp/fc1/kernel has shape (2, 24, 40), the run's model (3, 24, 32)" in (
        message
    )
    assert "backbone/norm/bias" not in message
    with pytest.raises(ValueError, match=r"model.heads is 4, the checkpoint's is 3"):
        initial(MODEL, MODEL | {"heads": 4})
