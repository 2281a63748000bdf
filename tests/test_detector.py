"""A detector as its users call it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import yolos_jax
from tests import convert_sources, tiny_checkpoint
from yolos_jax import checkpoint, detector
from yolos_jax.batch import Batch, normalise
from yolos_jax.data import image as image_lib
from yolos_jax.labels import LabelMap

ROOT = Path(__file__).resolve().parent.parent
LABELS = LabelMap((10, 20, 30), ("apple", "bean", "carrot"))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_checkpoint.write(tmp_path_factory.mktemp("model") / "checkpoint", LABELS)


@pytest.fixture(scope="module")
def loaded(path):
    return yolos_jax.load(path)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def everything(loaded):
    return loaded.predict(picture(64, 64), threshold=0)[0]


def test_every_token_best_first(loaded, everything):
    queries = loaded.model.config.num_queries
    assert everything.boxes_xyxy_px.shape == (queries, 4)
    assert everything.boxes_xyxy_px.dtype == everything.scores.dtype == np.float32
    assert (np.diff(everything.scores) <= 0).all()
    assert set(everything.category_ids) <= {10, 20, 30}
    by_id = dict(zip(LABELS.category_ids, LABELS.names, strict=True))
    assert everything.names == tuple(by_id[i] for i in everything.category_ids)


def test_threshold_and_top_k(loaded, everything):
    scores = everything.scores
    middle = float(scores[3])
    found = loaded.predict(picture(64, 64), threshold=middle)[0]
    np.testing.assert_array_equal(found.scores, scores[:4])  # a score equal to it is kept
    found = loaded.predict(picture(64, 64), threshold=0, top_k=2)[0]
    np.testing.assert_array_equal(found.boxes_xyxy_px, everything.boxes_xyxy_px[:2])
    nothing = loaded.predict(picture(64, 64), threshold=1)[0]
    assert nothing.boxes_xyxy_px.shape == (0, 4) and nothing.names == ()


@pytest.mark.parametrize("wrong", [{"threshold": 50}, {"threshold": -0.1}, {"top_k": -1}])
def test_no_threshold_and_no_count(loaded, wrong):
    (key,) = wrong
    with pytest.raises(ValueError, match=f"{key} is"):
        loaded.predict(picture(64, 64), **wrong)


def test_boxes_are_in_pixels_of_the_picture_as_it_came(loaded):
    """Against the model itself, softmax and box arithmetic by hand."""
    image = picture(90, 120)
    patches, grid = image_lib.preprocess(image, loaded.preprocess, loaded.model.config.patch_size)
    batch = Batch(
        normalise(patches[None], loaded.preprocess["mean"], loaded.preprocess["std"]),
        np.asarray([grid], np.int32),
        np.ones(1, bool),
    )
    with jax.default_matmul_precision("highest"):
        outputs = loaded.model.apply(loaded.params, batch, bounds=grid)
    logits, boxes = (np.asarray(array[-1, 0], np.float64) for array in outputs)
    exponent = np.exp(logits - logits.max(-1, keepdims=True))
    scores = (exponent / exponent.sum(-1, keepdims=True))[:, :-1]
    order = np.argsort(-scores.max(-1), kind="stable")
    (x, y, w, h), size = boxes[order].T, (120, 90, 120, 90)
    expected = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1) * size
    found = loaded.predict(image, threshold=0)[0]
    np.testing.assert_allclose(found.scores, scores.max(-1)[order], atol=1e-5)
    np.testing.assert_allclose(found.boxes_xyxy_px, expected, atol=1e-2)
    ids = np.asarray(LABELS.category_ids)[scores.argmax(-1)[order]]
    np.testing.assert_array_equal(found.category_ids, ids)


def test_pictures_of_all_kinds_and_sizes_at_once(loaded, everything, tmp_path):
    image = picture(64, 64)
    Image.fromarray(image).save(tmp_path / "a.png")
    kinds = [
        str(tmp_path / "a.png"),
        picture(90, 120, seed=1),
        tmp_path / "a.png",
        Image.fromarray(image),
        Image.fromarray(image).convert("RGBA"),
        image,
    ]
    found = loaded.predict(kinds, threshold=0)
    assert len(found) == 6
    for same in (found[0], *found[2:]):
        np.testing.assert_allclose(same.boxes_xyxy_px, everything.boxes_xyxy_px, atol=1e-3)
    assert np.abs(found[1].boxes_xyxy_px[:3] - everything.boxes_xyxy_px[:3]).max() > 1
    assert len(loaded.predict(str(tmp_path / "a.png"))) == 1
    assert loaded.predict([]) == []


def test_batches_do_not_change_predictions(path, loaded, everything):
    """As accelerators run: several pictures of one shape at once, the last batch padded."""
    batched = detector.load(path)
    batched._batch_size = 4
    images = [picture(64, 64, seed=seed) for seed in (1, 0, 2)]
    found = batched.predict(images, threshold=0)
    np.testing.assert_allclose(found[1].scores, everything.scores, atol=1e-5)
    np.testing.assert_allclose(found[1].boxes_xyxy_px, everything.boxes_xyxy_px, atol=1e-3)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        ("absent.png", "absent.png"),
        ("text.png", r"text.png.*not a picture"),
        (np.zeros((8, 8), np.uint8), r"uint8 \(8, 8\)"),
        (np.zeros((8, 8, 3), np.float32), "float32"),
    ],
)
def test_what_is_no_picture(loaded, tmp_path, monkeypatch, thing, message):
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("hello")
    with pytest.raises(ValueError, match=message):
        loaded.predict([thing])


def test_outputs_see_the_whole_canvas(loaded):
    patch = loaded.model.config.patch_size
    random = np.random.default_rng(0)
    pixels = random.normal(size=(2, 5 * patch + 3, 3 * patch, 3)).astype(np.float32)
    found = loaded.outputs(pixels, capture=True)
    queries, tokens = loaded.model.config.num_queries, 1 + loaded.model.config.num_queries + 15
    assert found.pred_logits.shape == (2, queries, 4) and found.pred_boxes.shape == (2, queries, 4)
    assert found.attention.shape == (2, loaded.model.config.heads, tokens, tokens)
    np.testing.assert_allclose(found.attention.sum(-1), 1, atol=1e-5)
    assert found.blocks.shape == (1, 2, tokens, loaded.model.config.width)
    # The remainder is cut, zeros are pixels like others.
    cut = loaded.outputs(pixels[:, : 5 * patch], capture=True)
    np.testing.assert_array_equal(found.pred_logits, cut.pred_logits)
    padded = np.pad(pixels[:, : 4 * patch], ((0, 0), (0, patch), (0, 0), (0, 0)))
    assert np.abs(loaded.outputs(padded, capture=True).pred_logits - cut.pred_logits).max() > 1e-3


def test_outputs_are_those_of_torch(tmp_path):
    torch = pytest.importorskip("torch", reason="what the outputs are compared with")
    from yolos_jax.convert import original, reference
    from yolos_jax.convert.conversion import Options
    from yolos_jax.convert.read import Source

    source = Source("random", convert_sources.yolos())
    converted = original.convert(source, Options(3, (48, 64), (48, 64)))
    pixels = np.random.default_rng(0).normal(size=(2, 70, 85, 3)).astype(np.float32)
    model = detector.Detector(converted.params, converted.metadata("test"))
    found = model.outputs(pixels, capture=True)
    with torch.no_grad():
        expected = reference.run(converted, source, pixels)
    np.testing.assert_allclose(found.pred_logits, expected["logits"], atol=5e-5)
    np.testing.assert_allclose(found.pred_boxes, expected["boxes"], atol=5e-6)
    np.testing.assert_allclose(found.embed, expected["embed"], atol=5e-5)
    for i in range(convert_sources.DEPTH):
        np.testing.assert_allclose(found.blocks[i], expected[f"block {i}"], atol=5e-5)


@pytest.mark.parametrize(
    "pixels", [np.zeros((8, 8, 3)), np.zeros((1, 3, 64, 64)), np.zeros((1, 4, 64, 3))]
)
def test_outputs_of_something_else(loaded, pixels):
    with pytest.raises(ValueError, match=r"expected \[B, H, W, 3\]"):
        loaded.outputs(pixels.astype(np.float32))
    with pytest.raises(ValueError, match="uint8"):
        loaded.outputs(np.zeros((1, 64, 64, 3), np.uint8))


def test_results_are_json(everything):
    stored = json.loads(json.dumps(everything.to_dict()))
    assert stored["names"] == list(everything.names)
    np.testing.assert_allclose(stored["boxes_xyxy_px"], everything.boxes_xyxy_px)


def test_overrides(path):
    smaller = detector.load(path, size=32, max_size=48, dtype="bfloat16", attention="stock")
    assert (smaller.preprocess["size"], smaller.preprocess["max_size"]) == (32, 48)
    assert smaller.model.config.dtype == "bfloat16"
    assert smaller.model.config.attention == "stock"
    with pytest.raises(ValueError, match="float16"):
        detector.load(path, dtype="float16")
    for wrong in ({"size": 65}, {"max_size": 63}, {"size": 7}, {"size": -8}):
        with pytest.raises(ValueError, match=r"size is .* and max_size"):
            detector.load(path, **wrong)
    assert detector.load(path, size=65, max_size=0).preprocess["size"] == 65


@pytest.mark.parametrize("kernel", ["cudnn", "splash"])
def test_another_machine_has_not_the_kernel_it_was_trained_with(path, loaded, kernel):
    params, metadata = checkpoint.load_params(path)
    trained = {**metadata, "model": {**metadata["model"], "attention": kernel, "dtype": "bfloat16"}}
    found = detector.Detector(params, trained)
    one, other = (each.predict(picture(64, 64), threshold=0)[0] for each in (found, loaded))
    np.testing.assert_array_equal(one.boxes_xyxy_px, other.boxes_xyxy_px)
    with pytest.raises(ValueError, match=r"needs model\.dtype"):
        detector.Detector(params, trained, attention=kernel)


def test_a_start_for_training_is_no_detector_yet(path, tmp_path):
    params, metadata = checkpoint.load_params(path)
    checkpoint.save_params(tmp_path / "start", params, metadata | {"new": ["class_head"]})
    with pytest.warns(UserWarning, match="no detector yet"):
        detector.load(tmp_path / "start")


@pytest.mark.parametrize("name", ["absent", "."])
def test_no_checkpoint(tmp_path, name):
    with pytest.raises(ValueError, match=r"no such folder|not a checkpoint"):
        yolos_jax.load(tmp_path / name)


def test_orientation_is_seen_as_in_training(path, tmp_path, monkeypatch):
    """EXIF is ignored, unless the run that made the checkpoint applied it."""
    params, metadata = checkpoint.load_params(path)
    seen = []
    monkeypatch.setattr(
        image_lib, "decode", lambda source, exif: seen.append(exif) or picture(64, 64)
    )
    monkeypatch.setattr(detector, "_detections", no_detections)
    assert metadata["preprocess"]["exif"] == "ignore"
    apply = metadata | {"preprocess": metadata["preprocess"] | {"exif": "apply"}}
    for stored in (metadata, apply):
        detector.Detector(params, stored).predict("a.jpg")
    assert seen == ["ignore", "apply"]
    # Of a run that wrote it in its configuration only.
    config = {"data": {"exif": "apply"}}
    old = {key: value for key, value in metadata["preprocess"].items() if key != "exif"}
    checkpoint.save_params(
        tmp_path / "old", params, metadata | {"config": config, "preprocess": old}
    )
    assert detector.load(tmp_path / "old").exif == "apply"


def no_detections(model, params, batch, original_size, bounds, mean, std):
    rows, queries = len(original_size), model.config.num_queries
    zeros = np.zeros((rows, queries), np.float32)
    return detector.Detections(zeros, zeros.astype(np.int32), np.zeros((rows, queries, 4)))


HIDE = """
import sys
for name in ("tensorflow", "pycocotools", "matplotlib", "torch", "transformers"):
    sys.modules[name] = None  # importing it fails
import numpy as np, yolos_jax
found = yolos_jax.load(sys.argv[1]).predict(np.zeros((64, 64, 3), np.uint8), threshold=0)
print(len(found[0].scores))
"""


def test_without_what_only_training_needs(path, loaded):
    done = subprocess.run(
        [sys.executable, "-c", HIDE, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(loaded.model.config.num_queries)


def test_importing_the_package_does_not_start_jax():
    code = "import sys, yolos_jax; print(yolos_jax.__version__, 'jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.split() == ["0.1.0", "False"]
    with pytest.raises(AttributeError, match="nothing"):
        _ = yolos_jax.nothing
