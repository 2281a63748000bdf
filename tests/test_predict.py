"""The command that draws what a detector finds, as its users call it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import tiny_checkpoint
from yolos_jax import detector, predict
from yolos_jax.labels import LabelMap

LABELS = LabelMap((10, 20, 30), ("apple", "bean", "carrot"))
# What hosts that only predict do not have.
HIDE = """
import sys
for name in ("tensorflow", "pycocotools", "matplotlib", "torch"):
    sys.modules[name] = None  # importing it fails, and looking for it finds nothing
from yolos_jax import detector, predict
predict.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint.write(tmp_path_factory.mktemp("model") / "checkpoint", LABELS)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for name, size in {"a.png": (64, 64), "b.jpg": (80, 64)}.items():
        pixels = random.integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("not a picture, and not looked at")
    return folder


def run(*arguments):
    """Returns the exit status: None when all went well, else a message."""
    try:
        predict.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code
    return None


def test_without_what_only_training_needs(checkpoint, pictures, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", HIDE, checkpoint, pictures, "--out", out, "--threshold", "0"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png", "results.json"]
    results = json.loads((out / "results.json").read_text())
    first, second = results["pictures"]
    assert first["file"] == str(pictures / "a.png") and first["annotated"] == "a.png"
    assert (second["height"], second["width"]) == (80, 64)
    for found in (first, second):
        assert len(found["scores"]) == len(found["boxes_xyxy_px"]) == len(found["names"]) == 8
        assert found["scores"] == sorted(found["scores"], reverse=True)
        names = dict(zip(LABELS.category_ids, LABELS.names, strict=True))
        assert [names[i] for i in found["category_ids"]] == found["names"]
        assert (
            f"{found['file']}: 8 boxes: {found['names'][0]} {found['scores'][0]:.2f}" in done.stdout
        )
    assert Image.open(out / "b.png").size == (320, 400)  # enlarged by five
    assert results["unreadable"] == []


def test_unreadable_pictures_are_named_and_the_others_done(checkpoint, pictures, tmp_path, capsys):
    (pictures / "broken.jpg").write_bytes((pictures / "b.jpg").read_bytes()[:300])
    (pictures / "empty.png").write_bytes(b"")
    Image.fromarray(np.zeros((1, 2000, 3), np.uint8)).save(pictures / "thin.png")
    status = run(checkpoint, pictures, "--out", tmp_path / "out", "--threshold", "0.0")
    assert "2 of the pictures could not be used" in status
    printed = capsys.readouterr()
    for name in ("broken.jpg", "empty.png"):
        assert sum(name in line for line in printed.err.splitlines()) == 1, printed.err
    assert "picture 0" not in printed.err
    assert all(f"{name}: 8 boxes" in printed.out for name in ("a.png", "b.jpg", "thin.png"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [Path(r["file"]).name for r in results["pictures"]] == ["a.png", "b.jpg", "thin.png"]
    assert len(results["unreadable"]) == 2


def test_a_name_that_is_no_text(checkpoint, pictures, tmp_path, monkeypatch):
    name = os.fsdecode(os.fsencode(pictures) + b"/\xff.png")
    os.rename(pictures / "a.png", name)
    written = io.BytesIO()
    strict = io.TextIOWrapper(written, encoding="utf-8", errors="strict", write_through=True)
    monkeypatch.setattr("sys.stdout", strict)
    assert run(checkpoint, pictures, "--out", tmp_path / "out") is None
    assert b"\\udcff.png: " in written.getvalue()
    assert (tmp_path / "out" / "results.json").exists()


def test_threshold_and_top_k(checkpoint, pictures, tmp_path, capsys):
    picture = pictures / "a.png"
    assert run(checkpoint, picture, "--out", tmp_path / "all", "--threshold", "0") is None
    scores = json.loads((tmp_path / "all" / "results.json").read_text())["pictures"][0]["scores"]
    assert (
        run(checkpoint, picture, "--out", tmp_path / "k", "--threshold", "0", "--top_k", 2) is None
    )
    kept = json.loads((tmp_path / "k" / "results.json").read_text())["pictures"][0]
    assert kept["scores"] == scores[:2] and len(kept["boxes_xyxy_px"]) == 2
    threshold = (scores[2] + scores[3]) / 2
    assert run(checkpoint, picture, "--out", tmp_path / "t", "--threshold", threshold) is None
    kept = json.loads((tmp_path / "t" / "results.json").read_text())["pictures"][0]
    assert kept["scores"] == scores[:3]
    capsys.readouterr()
    assert run(checkpoint, picture, "--out", tmp_path / "n", "--threshold", "1") is None
    line = capsys.readouterr().out.splitlines()[0]
    assert f"the best is {kept['names'][0]} {scores[0]:.3f}, try --threshold" in line
    assert json.loads((tmp_path / "n" / "results.json").read_text())["pictures"][0]["scores"] == []


def test_pictures_of_one_name_do_not_overwrite_each_other(pictures, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("a.png", "A.jpg", "a_2.png"):
        (other / name).write_bytes((pictures / "a.png").read_bytes())
    found = predict.find_pictures([str(pictures), str(other), str(pictures / "a.png")], tmp_path)
    assert [p.path.name for p in found] == ["a.png", "b.jpg", "A.jpg", "a.png", "a_2.png"]
    targets = [p.target.name.lower() for p in found]
    assert len(set(targets)) == 5 and targets[:3] == ["a.png", "b.png", "a_2.png"]


def test_folders_inside_are_named_where_they_are_left_out(pictures, tmp_path, capsys):
    def said():
        found = predict.find_pictures([str(pictures)], pictures / "out")
        assert [p.path.name for p in found] == ["a.png", "b.jfif"]
        return capsys.readouterr().err

    (pictures / "out").mkdir()
    (pictures / ".cache").mkdir()
    (pictures / "list.txt").touch()
    (pictures / "b.jpg").rename(pictures / "b.jfif")
    assert said() == ""
    (pictures / "more").mkdir()
    assert said() == f"{pictures}: 1 folder inside is not looked into\n"
    (pictures / "even more.jpg").mkdir()
    assert said() == f"{pictures}: 2 folders inside are not looked into\n"


def test_what_cannot_work_is_one_message(checkpoint, pictures, tmp_path):
    out = tmp_path / "out"
    assert "nowhere.png: no such picture or folder" in run(checkpoint, "nowhere.png", "--out", out)
    (tmp_path / "void").mkdir()
    assert "ftp://b.jpg: no file system is known for ftp://" in run(
        checkpoint, "ftp://b.jpg", "--out", out
    )
    assert "no file system is known for ftp://" in run("ftp://a", pictures, "--out", out)
    assert "void: no picture there" in run(checkpoint, tmp_path / "void", "--out", out)
    assert "choose another folder" in run(checkpoint, pictures / "a.png", "--out", pictures)
    assert "no such folder" in run(tmp_path / "none", pictures, "--out", out)
    assert not out.exists()  # nothing half-written
    for wrong in (["--threshold", "2"], ["--out", "gs://bucket/o"]):
        with pytest.raises(SystemExit):
            predict.parse(["c", "p", "--out", "o", *wrong])


@pytest.mark.parametrize("name", ["a.png", "results.json"])
def test_files_of_others_are_not_replaced(checkpoint, pictures, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    before = (pictures / "a.png").read_bytes() if name == "a.png" else b"[]"
    (out / name).write_bytes(before)
    message = run(checkpoint, pictures, "--out", out)
    assert f"--out {out} holds a {name} that predict does not know as its own" in message
    assert [path.read_bytes() for path in out.iterdir()] == [before]
    # What an earlier call wrote is replaced, also one that was interrupted before its results.
    (out / name).unlink()
    for _ in range(2):
        assert run(checkpoint, pictures, "--out", out) is None
        (out / "results.json").unlink(missing_ok=True)
    assert run(checkpoint, pictures, "--out", out) is None
    for path in out.glob("*.png"):  # as earlier versions wrote them
        Image.open(path).convert("RGB").save(path)
    assert run(checkpoint, pictures, "--out", out) is None


def test_no_room_is_one_message(checkpoint, pictures, tmp_path, monkeypatch):
    def fail(error):
        def predict(*_, **__):
            raise error

        monkeypatch.setattr(detector.Detector, "predict", predict)

    arguments = checkpoint, pictures, "--out", tmp_path / "out"
    fail(RuntimeError("RESOURCE_EXHAUSTED: no room for 9 bytes\nand much more"))
    assert run(*arguments) == (
        "predict: out of memory; a smaller --batch_size needs less: RESOURCE_EXHAUSTED: no room "
        "for 9 bytes"
    )
    fail(RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        run(*arguments)
