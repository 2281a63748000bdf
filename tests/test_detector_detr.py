"""A DETR as its users call it: pictures of any size on canvases, as the model itself sees them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests import tiny_detr
from yolos_jax import detector
from yolos_jax.batch import Canvas
from yolos_jax.labels import LabelMap

LABELS = LabelMap((7, 8, 30, 31), ("apple", "bean", "carrot", "date"))


@pytest.fixture(scope="module")
def loaded():
    metadata = {
        "model": tiny_detr.model_config(),
        "num_classes": 4,
        "label_map": LABELS.to_json(),
        "preprocess": {"size": 50, "max_size": 90, "mean": [0.5] * 3, "std": [0.25] * 3},
    }
    return detector.Detector(tiny_detr.make_params(tiny_detr.make_model()), metadata)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_a_picture_is_predicted_on_its_canvas(loaded):
    """Against the model itself: not resized (its shorter side is 50), the canvas 64 x 96."""
    image = picture(50, 75)
    canvas = Canvas(
        np.zeros((1, 64, 96, 3), np.float32), np.array([[50, 75]], np.int32), np.ones(1, bool)
    )
    canvas.pixels[0, :50, :75] = (image / np.float32(255) - 0.5) / 0.25
    with jax.default_matmul_precision("highest"):
        outputs, _ = detector._forward(loaded.model, loaded.params, canvas, (64, 96), True)
    logits, boxes = (np.asarray(array[-1, 0], np.float64) for array in outputs)
    exponent = np.exp(logits - logits.max(-1, keepdims=True))
    scores = (exponent / exponent.sum(-1, keepdims=True))[:, :-1]
    order = np.argsort(-scores.max(-1), kind="stable")
    (x, y, w, h), size = boxes[order].T, (75, 50, 75, 50)
    expected = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1) * size
    found, other = loaded.predict([image, image[:, ::-1]], threshold=0)
    np.testing.assert_allclose(found.scores, scores.max(-1)[order], atol=1e-5)
    np.testing.assert_allclose(found.boxes_xyxy_px, expected, atol=1e-2)
    ids = np.asarray(LABELS.category_ids)[scores.argmax(-1)[order]]
    np.testing.assert_array_equal(found.category_ids, ids)
    assert np.abs(other.boxes_xyxy_px - found.boxes_xyxy_px).max() > 5e-3


def test_outputs_see_the_whole_canvas(loaded):
    pixels = np.random.default_rng(0).normal(size=(1, 64, 96, 3)).astype(np.float32)
    found = loaded.outputs(pixels, capture=True)
    assert found.pred_logits.shape == (1, 5, 5) and found.pred_boxes.shape == (1, 5, 4)
    assert found.feature.shape == (1, 2, 3, 128) and found.real.all()
    assert found.memory.shape == found.position.shape == (1, 2, 3, 16)
    assert found.decoder.shape == (2, 1, 5, 16)
    np.testing.assert_allclose(found.attention.sum(-1), 1, atol=1e-5)
