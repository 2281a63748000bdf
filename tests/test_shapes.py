"""The generated demo set: the same for the same seed, and its boxes touch its shapes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from yolos_jax.data import shapes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    shapes.write(folder, seed=3, train=150, val=20, size=48)
    return folder


def read(root, split):
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def test_counts_ids_and_sizes(root):
    train, val = read(root, "train2017"), read(root, "val2017")
    assert (len(train["images"]), len(val["images"])) == (150, 20)
    images = train["images"] + val["images"]
    annotations = train["annotations"] + val["annotations"]
    assert len({image["id"] for image in images}) == 170
    assert len({a["id"] for a in annotations}) == len(annotations)
    assert {a["category_id"] for a in annotations} == {1, 2, 3}
    per_image = np.bincount([a["image_id"] for a in annotations])[1:]
    assert per_image.min() == 1 and per_image.max() == 3
    for image in images[:10]:
        picture = Image.open(root / "train2017" / image["file_name"])
        assert picture.size == (48, 48) and picture.mode == "RGB"


def test_boxes_of_lone_shapes_are_tight(root):
    train = read(root, "train2017")
    boxes = {}
    for annotation in train["annotations"]:
        boxes.setdefault(annotation["image_id"], []).append(annotation)
    checked = set()
    for image in train["images"]:
        annotations = boxes[image["id"]]
        if len(annotations) == 1:
            pixels = np.asarray(Image.open(root / "train2017" / image["file_name"])).astype(int)
            y, x = np.nonzero(np.ptp(pixels, axis=-1))  # the ground is grey, the shapes are not
            tight = [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            assert annotations[0]["bbox"] == tight
            checked.add(annotations[0]["category_id"])
    assert checked == {1, 2, 3}


def test_same_seed_same_files_other_seed_other_files(root, tmp_path):
    shapes.write(tmp_path / "same", seed=3, train=150, val=20, size=48)
    shapes.write(tmp_path / "other", seed=4, train=150, val=20, size=48)
    assert read(tmp_path / "same", "train2017") == read(root, "train2017")
    assert read(tmp_path / "other", "train2017") != read(root, "train2017")
    name = "train2017/000000000007.png"
    assert (tmp_path / "same" / name).read_bytes() == (root / name).read_bytes()


def test_senseless_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="size is 8"):
        shapes.write(tmp_path / "none", size=8)
    assert not (tmp_path / "none").exists()


def test_a_place_that_cannot_be_written_is_one_message(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["shapes", str(tmp_path / "file"), "--train=1", "--val=1"])
    with pytest.raises(SystemExit):
        shapes.main()
    assert "file" in capsys.readouterr().err.splitlines()[-1]
