"""What a detector looks at: the maps against the model's own attention, and the command."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests import tiny_checkpoint, tiny_detr
from yolos_jax import attend, detector
from yolos_jax.labels import LabelMap

LABELS = LabelMap((10, 20, 30), ("apple", "bean", "carrot"))
IMAGE = np.random.default_rng(0).integers(0, 256, (100, 60, 3), np.uint8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint.write(tmp_path_factory.mktemp("model") / "checkpoint", LABELS)


@pytest.fixture(scope="module")
def yolos(checkpoint):
    return detector.load(checkpoint)


@pytest.fixture(scope="module")
def detr():
    metadata = {
        "model": tiny_detr.model_config(),
        "num_classes": 4,
        "label_map": LabelMap((1, 2, 3, 4), ("a", "b", "c", "d")).to_json(),
        "preprocess": {"size": 64, "max_size": 128, "mean": [0.5] * 3, "std": [0.25] * 3},
    }
    return detector.Detector(tiny_detr.make_params(tiny_detr.make_model()), metadata)


def canvas_of(model, height, width):
    """The picture as the model sees it, resized by Pillow alone."""
    resized = Image.fromarray(IMAGE).resize((width, height), Image.Resampling.BILINEAR)
    mean, std = (np.asarray(model.preprocess[key], np.float32) for key in ("mean", "std"))
    return ((np.asarray(resized) / np.float32(255) - mean) / std)[None]


def test_maps_of_a_yolos_are_rows_of_its_attention(yolos):
    found = attend.attend(yolos, IMAGE)
    heads, queries, rows, cols = found.maps.shape
    patch = yolos.model.config.patch_size
    assert (heads, queries) == (yolos.model.config.heads, yolos.model.config.num_queries)
    assert rows > cols > 1  # as the picture is
    whole = yolos.outputs(canvas_of(yolos, rows * patch, cols * patch), capture=True)
    for head, query, row, col in ((0, 0, 0, 0), (1, 3, rows - 1, 0), (2, 7, 2, cols - 1)):
        token = 1 + queries + row * cols + col
        expected = whole.attention[0, head, 1 + query, token]
        np.testing.assert_allclose(found.maps[head, query, row, col], expected, rtol=1e-4)
    assert (found.maps.sum((-2, -1)) < 1).all()  # the rest is for tokens that are no patches


def test_maps_of_a_detr_are_the_decoders(detr):
    found = attend.attend(detr, IMAGE)
    assert found.maps.shape == (2, 5, 4, 2)  # cells of 32 pixels
    whole = detr.outputs(canvas_of(detr, 106, 64), capture=True)
    expected = whole.attention[0].reshape(2, 5, 4, 2)
    np.testing.assert_allclose(found.maps, expected, atol=1e-5)
    np.testing.assert_allclose(found.maps.sum((-2, -1)), 1, atol=1e-5)


@pytest.mark.parametrize("kind", ["yolos", "detr"])
def test_answers_are_those_of_predict(kind, request):
    model = request.getfixturevalue(kind)
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)  # on its own canvas
    found = attend.attend(model, image)
    [expected] = model.predict(image, threshold=0)
    order = np.argsort(-found.scores, kind="stable")
    np.testing.assert_allclose(found.scores[order], expected.scores, atol=1e-5)
    np.testing.assert_array_equal(model.label_map.ids(found.labels[order]), expected.category_ids)
    np.testing.assert_allclose(found.boxes_xyxy_px[order], expected.boxes_xyxy_px, atol=1e-3)


def test_heat_is_brightest_where_the_weight_is():
    weights = np.full((5, 3), 0.001)
    weights[3, 2] = 0.2
    warm = attend.heat(np.full((50, 30, 3), 120, np.uint8), weights)
    assert warm.shape == (50, 30, 3) and warm.dtype == np.uint8
    row, col = np.unravel_index(warm.sum(-1).argmax(), (50, 30))
    assert 30 <= row < 40 and col >= 20
    nothing = attend.heat(np.zeros((8, 8, 3), np.uint8), np.zeros((2, 2)))
    assert nothing.max() <= 3  # no division by zero


def run(*arguments):
    """Returns the exit status: None when all went well, else a message."""
    try:
        attend.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code
    return None


def test_command(checkpoint, yolos, tmp_path, capsys):
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    out = tmp_path / "new" / "sheet.png"
    assert run(checkpoint, tmp_path / "a.png", "--out", out, "--top_k", 2) is None
    printed = capsys.readouterr().out.splitlines()
    [best] = yolos.predict(IMAGE, threshold=0, top_k=2)
    assert [line.split(": ")[1] for line in printed[:2]] == [
        f"{name} {score:.2f}" for name, score in zip(best.names, best.scores, strict=True)
    ]
    columns = 2 + yolos.model.config.heads
    with Image.open(out) as sheet:
        assert sheet.width == columns * (attend.SIDE + attend.GAP) + attend.GAP
        two_rows = sheet.height
    assert run(checkpoint, tmp_path / "a.png", "--out", out, "--queries", 5) is None
    assert capsys.readouterr().out.startswith("query 5: ")
    with Image.open(out) as sheet:
        assert sheet.height == (two_rows + attend.GAP) / 2


def test_a_very_thin_picture(checkpoint, tmp_path):
    Image.fromarray(np.zeros((1, 2000, 3), np.uint8)).save(tmp_path / "thin.png")
    assert run(checkpoint, tmp_path / "thin.png", "--out", tmp_path / "sheet.png") is None
    assert (tmp_path / "sheet.png").exists()


def test_what_cannot_work_is_one_message(checkpoint, tmp_path, monkeypatch):
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    out = tmp_path / "sheet.png"
    assert "none.png: cannot be read" in run(checkpoint, tmp_path / "none.png", "--out", out)
    message = run(checkpoint, tmp_path / "a.png", "--out", out, "--queries", 8)
    assert message == "attend: --queries 8: the detector has queries 0 to 7"
    assert "no such folder" in run(tmp_path / "none", tmp_path / "a.png", "--out", out)
    for wrong in (["--out", "gs://bucket/o.png"], ["--out", "o.webp"], ["--top_k", "0"]):
        with pytest.raises(SystemExit):
            attend.parse(["c", "p", "--out", "o.png", *wrong])
    (tmp_path / "folder.png").mkdir()
    for taken in ("a.png", "folder.png"):  # the picture itself, and what is no file
        with pytest.raises(SystemExit):
            attend.parse(["c", str(tmp_path / "a.png"), "--out", str(tmp_path / taken)])

    def fail(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: no room for 9 bytes\nand much more")

    monkeypatch.setattr(detector.Detector, "outputs", fail)
    assert run(checkpoint, tmp_path / "a.png", "--out", out).endswith("for 9 bytes")
    assert not out.exists()


def test_parameters_that_are_no_numbers(detr):
    broken = detector.Detector(
        {**detr.params, "query_embed": np.full_like(detr.params["query_embed"], np.nan)},
        {**detr.metadata, "preprocess": detr.preprocess},
    )
    with pytest.raises(ValueError, match="no numbers"):
        attend.attend(broken, IMAGE)
