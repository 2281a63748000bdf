"""A builder with the features of coco/2017 gives the plan and the pictures of the COCO folder."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from configs import common
from yolos_jax import datasets, evaluator
from yolos_jax.data import image, pipeline, shapes
from yolos_jax.data.augment import EvalRecipe, Recipe
from yolos_jax.data.plan import choose_buckets, make_eval_plan, make_plan
from yolos_jax.labels import LabelMap

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")

TRAIN = Recipe(0.5, (48, 64, 80), 104, 0.5, (56, 72, 88), (40, 72), 8)
EVAL = EvalRecipe(48, 80, 8)
SPLITS = {"train": "train2017", "validation": "val2017"}
# Of TFDS, in an order and with numbers that are not the annotations'.
NAMES = ["triangle", "rectangle", "ellipse"]


class TinyCoco(tfds.core.GeneratorBasedBuilder):
    """The features of coco/2017, of the folder ``root``."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = (
        None  # nothing is downloaded; TFDS would look for a file, with a library that it lacks
    )
    root = None

    def _info(self):
        objects = {
            "id": np.int64,
            "area": np.int64,
            "bbox": tfds.features.BBoxFeature(),
            "label": tfds.features.ClassLabel(names=NAMES),
            "is_crowd": np.bool_,
        }
        features = {
            "image": tfds.features.Image(encoding_format="png"),
            "image/filename": tfds.features.Text(),
            "image/id": np.int64,
            "objects": tfds.features.Sequence(objects),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(images) for name, images in SPLITS.items()}

    def _generate_examples(self, images_dir):
        coco = json.loads((self.root / f"annotations/instances_{images_dir}.json").read_text())
        names = {entry["id"]: entry["name"] for entry in coco["categories"]}
        for entry in coco["images"]:
            objects = []
            for box in coco["annotations"]:
                if box["image_id"] == entry["id"]:
                    x, y, width, height = box["bbox"]
                    y0, y1 = y / entry["height"], (y + height) / entry["height"]
                    x0, x1 = x / entry["width"], (x + width) / entry["width"]
                    objects.append(
                        {
                            "id": box["id"],
                            "area": int(box["area"]),
                            "bbox": tfds.features.BBox(y0, x0, y1, x1),
                            "label": names[box["category_id"]],
                            "is_crowd": bool(box["iscrowd"]),
                        }
                    )
            yield (
                entry["file_name"],
                {
                    "image": str(self.root / images_dir / entry["file_name"]),
                    "image/filename": entry["file_name"],
                    "image/id": entry["id"],
                    "objects": objects,
                },
            )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    shapes.write(root, seed=0, train=40, val=8, size=64)
    for images_dir in SPLITS.values():
        path = root / f"annotations/instances_{images_dir}.json"
        coco = json.loads(path.read_text())
        # Fractions and a crowd; ids that are no count; an order that is not the ids'.
        for number, box in enumerate(coco["annotations"]):
            x, y, width, height = box["bbox"]
            box["bbox"] = [x + 0.13, y + 0.29, width - 0.31, height - 0.47]
            box["area"] = 0.7 * width * height
            box["iscrowd"] = int(number == 3)
            box["category_id"] *= 7
        for category in coco["categories"]:
            category["id"] *= 7
        coco["images"].reverse()
        path.write_text(json.dumps(coco))
    return root


@pytest.fixture(scope="module")
def prepared(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    TinyCoco.root = root
    builder = TinyCoco(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return folder


def config_of(root, prepared=None, **changes):
    data = common.get_config().data
    data.root = str(root)
    if prepared is not None:
        data.tfds_name, data.tfds_dir = "tiny_coco", str(prepared)
    data.update(changes)
    return data


def read(data, folder, which=0, said=None):
    split = datasets.splits_of(data)[which]
    return datasets.read_split(data, split, folder, [].append if said is None else said.append)


def batches(index, plan):
    return pipeline.host_batches(index, plan, host_rows=np.arange(plan.batch_size), workers=2)


def test_the_same_plan_and_the_same_pictures(root, prepared, tmp_path):
    ours = read(config_of(root, prepared), tmp_path / "a").index
    theirs = read(config_of(root), tmp_path / "a").index
    for name in ("image_ids", "file_names", "heights", "widths", "labels", "box_offsets"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    assert ours.label_map == theirs.label_map and ours.label_map.category_ids == (7, 14, 21)
    assert ours.dropped.counts == theirs.dropped.counts and ours.dropped.counts["crowd"] == 1
    np.testing.assert_allclose(ours.boxes_xyxy_px, theirs.boxes_xyxy_px, rtol=0, atol=1e-3)

    plans = []
    for index in (ours, theirs):
        buckets = choose_buckets(index, TRAIN, 3, 8, 9)
        options = {"seed": 0, "epoch": 0, "batch_size": 8}
        plans.append(make_plan(index, TRAIN, buckets, **options))
    for name in ("rows", "flip", "crop", "size", "grid", "bucket", "labels", "box_offsets"):
        np.testing.assert_array_equal(getattr(plans[0], name), getattr(plans[1], name))
    np.testing.assert_allclose(plans[0].boxes_cxcywh, plans[1].boxes_cxcywh, atol=1e-4)
    for one, other in zip(batches(ours, plans[0]), batches(theirs, plans[1]), strict=True):
        np.testing.assert_array_equal(one.batch.patches, other.batch.patches)
        assert one.batch.image_valid.all()


def test_evaluation_is_by_the_annotation_file(root, prepared, tmp_path):
    ours = read(config_of(root, prepared), tmp_path, 1)
    theirs = read(config_of(root), tmp_path, 1)
    assert ours.ground_truth == theirs.ground_truth
    areas = {box["area"] for box in ours.ground_truth["annotations"]}
    assert any(area % 1 for area in areas)  # TFDS knows integers only


def test_a_checkpoint_is_evaluated_on_it(root, prepared):
    config = common.get_config()
    config.data.tfds_name, config.data.tfds_dir = "tiny_coco", str(prepared)
    split = evaluator.Split(str(root), "annotations/instances_val2017.json", "val2017", 5)
    trained = LabelMap((1, 2, 3), ("ellipse", "triangle", "rectangle"))
    index, truth, category_ids = evaluator.load_split(split, config, trained, print)
    assert len(index) == 5 and index.store is not None and len(truth["images"]) == 8
    assert category_ids.tolist() == [14, 21, 7]


def test_the_index_is_built_once(root, prepared, tmp_path, monkeypatch):
    first = read(config_of(root, prepared), tmp_path).index
    monkeypatch.setattr("yolos_jax.data.tfds.open_tfds", None)
    again = read(config_of(root, prepared), tmp_path).index
    np.testing.assert_array_equal(first.records, again.records)
    assert again.read(5) == (root / "train2017" / again.file_names[5].decode()).read_bytes()


def test_a_damaged_record_is_a_picture_that_cannot_be_read(root, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "tfds")
    data = config_of(root, tmp_path / "tfds")
    index = read(data, tmp_path / "cache").index
    (shard,) = (tmp_path / "tfds").rglob("*train.array_record-*")
    content, times = bytearray(shard.read_bytes()), shard.stat()
    content[content.index(b"\x89PNG", 1000) + 60] ^= 255
    shard.write_bytes(content)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    index = read(data, tmp_path / "cache").index  # as cached: nothing was read yet
    plan = make_eval_plan(index, EVAL, choose_buckets(index, EVAL, 1, 8, 9), batch_size=20)
    found = list(batches(index, plan))
    (message,) = (message for batch in found for message in batch.unreadable)
    assert "(train): record" in message and "Corrupted" in message
    assert sum(batch.batch.image_valid.sum() for batch in found) == 39
    with pytest.raises(ValueError, match=r"\(train\): records 0 to 39: Corrupted"):
        read(data, tmp_path / "other")


def test_a_picture_whose_size_nobody_knows_is_left_out(root, prepared, tmp_path, monkeypatch):
    coco = json.loads((root / "annotations/instances_train2017.json").read_text())
    del coco["images"][0]["height"]
    (root / "unsized.json").write_text(json.dumps(coco))
    path = root / "train2017" / coco["images"][0]["file_name"]
    read_header = image.read_header

    def unreadable(content):
        if content == path.read_bytes():
            raise ValueError("no header")
        return read_header(content)

    monkeypatch.setattr(image, "read_header", unreadable)
    data = config_of(root, prepared, train_annotations="unsized.json")
    with pytest.raises(ValueError, match=rf"{path.name}\): height is None"):
        read(data, tmp_path)
    data.on_error = "skip"
    assert len(read(data, tmp_path).index) == 39


REFUSED = {
    "no such dataset": ({"tfds_name": "nothing_of_this_name"}, "data.tfds_name='nothing_of_this"),
    "no such split": ({"tfds_train": "trains"}, "no split 'trains'; its splits: train, validation"),
    "other annotations": (
        {"train_annotations": "annotations/instances_val2017.json"},
        "which the annotations do not list",
    ),
    "other classes": ({"train_annotations": "renamed.json"}, "classes 'triangle' are not among"),
    "more pictures": ({"train_annotations": "more.json"}, r"1 of the 41 pictures of .*more\.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, root, prepared, tmp_path):
    coco = json.loads((root / "annotations/instances_train2017.json").read_text())
    more = dict(coco, images=[*coco["images"], dict(coco["images"][0], id=999, file_name="x.png")])
    (root / "more.json").write_text(json.dumps(more))
    coco["categories"][2]["name"] = "tripod"
    (root / "renamed.json").write_text(json.dumps(coco))
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as error:
        read(config_of(root, prepared, **changes), tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_prepared_in_another_format(root, tmp_path):
    TinyCoco.root = root
    TinyCoco(data_dir=tmp_path / "tfds", file_format="tfrecord").download_and_prepare()
    with pytest.raises(ValueError, match="--file_format=array_record"):
        read(config_of(root, tmp_path / "tfds"), tmp_path)
