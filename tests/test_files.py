"""A COCO folder in an object store: TensorFlow's file system in memory stands for gs://.

Both take the same way: etils hands such paths to TensorFlow's gfile, and graphs read them with
``tf.io.read_file``. Only the letters before :// differ.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
from etils import epath
from etils.epath import backend, gpath, register
from PIL import Image

from yolos_jax import predict
from yolos_jax.data import files, image, index, pipeline, records, shapes, validate
from yolos_jax.data.augment import EvalRecipe
from yolos_jax.data.plan import choose_buckets, make_eval_plan
from yolos_jax.data.tensorflow_import import tf

ANNOTATIONS, IMAGES = "annotations/instances_train2017.json", "train2017"
EVAL = EvalRecipe(48, 80, 8)


@pytest.fixture
def store(monkeypatch):
    """A path of an object store to write below."""
    monkeypatch.setattr(gpath, "_URI_PREFIXES", (*gpath._URI_PREFIXES, "ram://"))
    monkeypatch.setattr(gpath, "_URI_SCHEMES", gpath._URI_SCHEMES | {"ram"})
    monkeypatch.setitem(gpath._URI_MAP_ROOT, "ram://", "/ram/")
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "ram", backend.tf_backend)
    monkeypatch.setitem(register._URI_PREFIXES_TO_CLS, "ram://", gpath.PosixGPath)
    return "ram://bucket"


@pytest.fixture
def roots(store, tmp_path):
    """The same COCO folder on a local disk and in the store."""
    shapes.write(tmp_path / "coco", seed=0, train=9, val=0, size=64)
    tags = Image.Exif()
    tags[image.ORIENTATION_TAG] = 6
    first = sorted((tmp_path / "coco" / IMAGES).iterdir())[0]
    Image.open(first).save(first, "JPEG", exif=tags)
    for path in sorted((tmp_path / "coco").rglob("*")):
        name = f"{store}/coco/{path.relative_to(tmp_path / 'coco')}"
        if path.is_dir():
            tf.io.gfile.makedirs(name)
        else:
            tf.io.gfile.GFile(name, "wb").write(path.read_bytes())
    yield str(tmp_path / "coco"), f"{store}/coco"
    tf.io.gfile.rmtree(f"{store}/coco")


def batches(data):
    plan = make_eval_plan(data, EVAL, choose_buckets(data, EVAL, 1, 8, 9), batch_size=4)
    return list(pipeline.host_batches(data, plan, host_rows=np.arange(4), workers=2))


@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_the_same_plan_and_pictures_as_on_a_local_disk(exif, roots):
    local, remote = (index.load_coco(root, ANNOTATIONS, IMAGES, exif=exif) for root in roots)
    assert remote.path(0) == f"{roots[1]}/{IMAGES}/{local.file_names[0].decode()}"
    for name in ("image_ids", "heights", "widths", "orientation", "boxes_xyxy_px", "labels"):
        np.testing.assert_array_equal(getattr(local, name), getattr(remote, name))
    assert remote.orientation.max() == (6 if exif == "apply" else 1)
    assert remote.read(3) == local.read(3)
    for one, other in zip(batches(remote), batches(local), strict=True):
        assert one.batch.image_valid.sum() == (one.image_ids >= 0).sum()
        np.testing.assert_array_equal(one.batch.patches, other.batch.patches)


def test_damage_there_is_said_as_here(roots):
    name = f"{roots[1]}/{IMAGES}/000000000004.png"
    tf.io.gfile.remove(name)
    remote = index.load_coco(roots[1], ANNOTATIONS, IMAGES)
    (message,) = (message for batch in batches(remote) for message in batch.unreadable)
    assert message.startswith(f"{name}: cannot be read: ")
    with pytest.raises(ValueError, match=r"000000000004\.png: cannot be read"):
        image.read_header(name)
    (split,) = validate.validate(roots[1], [(ANNOTATIONS, IMAGES)])
    assert split.problems.counts["picture"] == 1
    with pytest.raises(ValueError, match=r"no such folder of pictures: 'ram://bucket/coco/gone'"):
        index.load_coco(roots[1], ANNOTATIONS, "gone")
    with pytest.raises(ValueError, match=r"ram://bucket/coco/a\.json: cannot read these annot"):
        index.load_coco(roots[1], "a.json", IMAGES)
    with pytest.raises(ValueError, match="no such folder: 'ram://bucket/gone'"):
        index.load_coco("ram://bucket/gone", ANNOTATIONS, IMAGES)


def test_pictures_there_are_found_to_predict_on(roots, tmp_path):
    found = predict.find_pictures([f"{roots[1]}/{IMAGES}"], tmp_path)
    one = predict.find_pictures([f"{roots[1]}/{IMAGES}/000000000002.png"], tmp_path)
    assert len(found) == 9 and str(found[1].path) == str(one[0].path)
    pixels = image.decode(f"{roots[0]}/{IMAGES}/000000000002.png")
    np.testing.assert_array_equal(image.decode(one[0].path), pixels)


def test_a_folder_there_is_packed_here(roots, tmp_path):
    records.main([roots[1], str(tmp_path / "out"), "--split", "train"])
    packed = index.load_coco(tmp_path / "out", ANNOTATIONS, IMAGES)
    local = index.load_coco(roots[0], ANNOTATIONS, IMAGES)
    assert [packed.read(row) for row in range(9)] == [local.read(row) for row in range(9)]


def test_paths_stay_what_they_are():
    assert index.picture_path("gs://bucket/coco", "train2017", "a.jpg") == (
        "gs://bucket/coco/train2017/a.jpg"
    )
    assert index.picture_path("gs://bucket/coco/", "", "annotations/a.json") == (
        "gs://bucket/coco/annotations/a.json"
    )
    assert os.fspath(epath.Path("gs://bucket") / "a//b") == "gs://bucket/a/b"
    assert files.is_remote("gs://bucket") and not files.is_remote("/data/coco")


@pytest.mark.parametrize("root", ["/data/coco/", "gs://bucket/coco", "data"])
def test_paths_of_many_are_the_paths_of_each(root, tmp_path):
    names = ["1.jpg", "a/b.c/2.jpg", "./3.jpg", "a//4.jpg", "/abs/5.jpg", "é.jpg", "a/../6.jpg"]
    names += [".hidden.jpg", "a/.h/7.jpg", "x/"]
    shapes.write(tmp_path, seed=0, train=len(names), val=0, size=16)
    data = dataclasses.replace(
        index.load_coco(tmp_path, ANNOTATIONS, IMAGES),
        root=root,
        file_names=np.array([name.encode() for name in names]),
    )
    rows = np.arange(len(names))
    assert data.paths(rows) == [data.path(row) for row in rows]


def test_a_store_that_nobody_knows():
    with pytest.raises(ValueError, match="no file system is known for ftp://"):
        index.load_coco("ftp://host/coco", ANNOTATIONS, IMAGES)


@pytest.mark.parametrize("raised", [RuntimeError("denied\nat length"), KeyError("x")])
def test_whatever_a_file_system_raises_is_one_kind_of_error(raised, monkeypatch):
    def fail(self):
        raise raised

    monkeypatch.setattr(gpath.PosixGPath, "read_bytes", fail)
    with pytest.raises(OSError, match=r"denied$|x"):
        files.read_bytes("/data/a.json")
    with pytest.raises(ValueError, match=r"/data/a\.json: cannot read these annotations: "):
        index.read_coco("/data/a.json")
