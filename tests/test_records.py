"""Packed folders train like loose ones; kills, damage and other annotations are found and said."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from yolos_jax.data import files, index, pipeline, records, shapes, shards, validate
from yolos_jax.data.augment import EvalRecipe, Recipe
from yolos_jax.data.plan import choose_buckets, make_eval_plan, make_plan

pytest.importorskip("array_record")

ROOT = Path(__file__).resolve().parent.parent
ANNOTATIONS, IMAGES = "annotations/instances_train2017.json", "train2017"
TRAIN = Recipe(0.5, (48, 64, 80), 104, 0.5, (56, 72, 88), (40, 72), 8)
EVAL = EvalRecipe(48, 80, 8)


@pytest.fixture(scope="module")
def loose(tmp_path_factory):
    root = tmp_path_factory.mktemp("loose")
    shapes.write(root, seed=0, train=60, val=9, size=64)
    return root


@pytest.fixture(scope="module")
def packed(loose, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed")
    records.main([str(loose), str(out), "--shards", "4"])
    return out


@pytest.fixture
def copy(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "copy")
    return tmp_path / "copy"


def load(root, **options):
    return index.load_coco(root, ANNOTATIONS, IMAGES, **options)


def shards_of(root):
    return sorted((root / IMAGES).glob("*.array_record"))


def batches(data, plan):
    return list(pipeline.host_batches(data, plan, host_rows=np.arange(plan.batch_size), workers=2))


def train_plan(data):
    buckets = choose_buckets(data, TRAIN, 3, 8, 9)
    return make_plan(data, TRAIN, buckets, seed=0, epoch=0, batch_size=8)


def eval_plan(data, batch_size=16):
    return make_eval_plan(data, EVAL, choose_buckets(data, EVAL, 2, 8, 9), batch_size=batch_size)


def test_the_same_plan_and_the_same_batches_bit_for_bit(loose, packed, monkeypatch):
    ours, theirs = load(packed), load(loose)
    assert ours.store is not None and theirs.store is None
    assert len(shards_of(packed)) == 4 and not list((packed / IMAGES).glob("*.png"))
    reads = []
    read = shards.Shards.read
    monkeypatch.setattr(
        shards.Shards,
        "read",
        lambda self, numbers: (reads.append(len(numbers)), read(self, numbers))[1],
    )
    for make in (train_plan, eval_plan):
        plan = make(ours)
        assert plan.fingerprint() == make(theirs).fingerprint()
        expected = batches(theirs, plan)
        reads.clear()
        found = batches(ours, plan)
        # One read per host batch; the last one of an evaluation is not full.
        assert len(reads) == plan.steps and sum(reads) == (plan.rows >= 0).sum()
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one.batch.patches, other.batch.patches)
            np.testing.assert_array_equal(one.batch.grid, other.batch.grid)
            np.testing.assert_array_equal(one.image_ids, other.image_ids)
            assert one.batch.image_valid[one.image_ids >= 0].all() and not one.unreadable


def test_a_truncated_or_missing_shard_is_one_error(copy):
    whole = shards_of(copy)[1].read_bytes()
    shards_of(copy)[1].write_bytes(whole[: len(whole) // 2])
    shards_of(copy)[3].unlink()
    with pytest.raises(ValueError) as error:
        load(copy)
    text = str(error.value)
    assert "2 of 4 shards are not what records.json says" in text
    assert f"{len(whole) // 2} bytes, expected {len(whole)} bytes" in text
    assert "pictures-00003-of-00004.array_record: missing" in text


def test_a_record_with_another_checksum_is_a_picture_that_cannot_be_read(copy):
    listed = json.loads((copy / IMAGES / shards.MANIFEST).read_text())
    listed["tables"][1]["crc32"][2] ^= 1
    (copy / IMAGES / shards.MANIFEST).write_text(json.dumps(listed))
    content = bytearray(shards_of(copy)[2].read_bytes())
    middle = content.index(b"\x89PNG", 1000)  # of a record's own bytes
    content[middle + 60] ^= 255
    shards_of(copy)[2].write_bytes(content)
    data = load(copy)
    found = batches(data, eval_plan(data))
    unreadable = [message for batch in found for message in batch.unreadable]
    assert len(unreadable) == 2 and sum(b.batch.image_valid.sum() for b in found) == 58
    (ours,) = (m for m in unreadable if "checksum" in m)
    name = listed["tables"][1]["pictures"][2][0]
    assert (
        "pictures-00001-of-00004.array_record: record 2" in ours and f"({name}) is damaged" in ours
    )
    (theirs,) = (m for m in unreadable if m is not ours)
    assert "pictures-00002-of-00004.array_record" in theirs and "is damaged" in theirs
    with pytest.raises(ValueError, match="is damaged: checksum"):
        data.read(data.file_names.tolist().index(name.encode()))


def test_validate_reads_shards_too(loose, copy):
    (split,) = validate.validate(copy, [(ANNOTATIONS, IMAGES)])
    (other,) = validate.validate(loose, [(ANNOTATIONS, IMAGES)])
    assert split.problems.counts == other.problems.counts and len(split.pictures) == 60
    listed = json.loads((copy / IMAGES / shards.MANIFEST).read_text())
    listed["tables"][0]["crc32"][0] ^= 1
    (copy / IMAGES / shards.MANIFEST).write_text(json.dumps(listed))
    (split,) = validate.validate(copy, [(ANNOTATIONS, IMAGES)])
    assert split.problems.counts["picture"] == 1
    assert "is damaged: checksum" in str(split.problems)


def test_shards_of_other_annotations_are_refused(copy):
    coco = json.loads((copy / ANNOTATIONS).read_text())
    (copy / ANNOTATIONS).write_text(json.dumps(coco | {"info": {"description": "others"}}))
    with pytest.raises(ValueError, match=r"packed from other annotations \(sha256"):
        load(copy)
    (copy / IMAGES / shards.MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match=r"records\.json: not a list of shards"):
        load(copy)


def test_missing_and_broken_pictures(tmp_path, capsys):
    loose, out = tmp_path / "loose", tmp_path / "out"
    shapes.write(loose, seed=2, train=20, val=0, size=64)
    pictures = sorted((loose / IMAGES).iterdir())
    pictures[3].unlink()
    pictures[11].write_bytes(pictures[11].read_bytes()[:-30])
    arguments = [str(loose), str(out), "--split", "train", "--shards", "4"]
    with pytest.raises(SystemExit) as error:
        records.main(arguments)
    text = str(error.value)
    assert "2 of 20 pictures cannot be packed" in text and "--on_error skip" in text
    assert f"{pictures[3].name}: cannot be read: No such file" in text
    assert f"{pictures[11].name}: cannot be decoded" in text
    assert shards.find(out / IMAGES) is None and len(shards_of(out)) == 2
    records.main([*arguments, "--on_error", "skip"])
    said = capsys.readouterr().out
    assert "18 pictures in 4 shards (2 there before)" in said and pictures[3].name in said
    # Training sees what it sees of the loose folder: every row, two of them unreadable.
    ours, theirs = load(out), load(loose)
    plan = eval_plan(ours, 8)
    for one, other in zip(batches(ours, plan), batches(theirs, plan), strict=True):
        np.testing.assert_array_equal(one.batch.patches, other.batch.patches)
        np.testing.assert_array_equal(one.batch.image_valid, other.batch.image_valid)
        assert len(one.unreadable) == len(other.unreadable)
        assert all("left out when" in message for message in one.unreadable)


def test_exif_headers_come_from_records_too(tmp_path):
    tags = Image.Exif()
    tags[0x0112] = 6
    (tmp_path / "in" / "pictures").mkdir(parents=True)
    Image.new("RGB", (40, 24)).save(tmp_path / "in" / "pictures" / "a.jpg", exif=tags)
    image = {"id": 1, "file_name": "a.jpg", "width": 40, "height": 24}
    coco = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "in" / "a.json").write_text(json.dumps(coco))
    names = ["--annotations", "a.json", "--images", "pictures"]
    records.main([str(tmp_path / "in"), str(tmp_path / "out"), *names])
    data = index.load_coco(tmp_path / "out", "a.json", "pictures", exif="apply")
    assert data.store is not None
    assert (data.orientation[0], data.heights[0], data.widths[0]) == (6, 40, 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{loose}", "{loose}"], "OUT is ROOT"),
        (["{loose}", "gs://bucket/out"], "writes local files only"),
        (["{loose}/gone", "{out}"], "no such folder"),
        (["{out}", "{out}/x"], "has neither annotations/instances_train2017.json"),
        (["{packed}", "{out}"], "is packed already"),
        (["{loose}", "{out}", "--annotations", "a.json"], "go together"),
        (["{loose}", "{out}", "--shards", "-1"], "must not be negative"),
        (["{loose}", "{out}", "--annotations", "/a.json", "--images", "x"], "/a.json: expected a"),
        (["{loose}", "{out}", "--annotations", "a.json", "--images", "../x"], "../x: expected a"),
    ],
)
def test_what_cannot_be_packed(arguments, message, loose, packed, tmp_path, capsys):
    arguments = [text.format(loose=loose, packed=packed, out=tmp_path) for text in arguments]
    with pytest.raises(SystemExit) as error:
        records.main(arguments)
    assert message in str(error.value) + capsys.readouterr().err


def test_two_splits_of_one_folder(tmp_path):
    loose, out = tmp_path / "loose", tmp_path / "out"
    shapes.write(loose, seed=2, train=20, val=0, size=64)
    coco = json.loads((loose / ANNOTATIONS).read_text())
    for name, part in {"train.json": coco["images"][:15], "val.json": coco["images"][15:]}.items():
        ids = {image["id"] for image in part}
        boxes = [entry for entry in coco["annotations"] if entry["image_id"] in ids]
        (loose / name).write_text(json.dumps(coco | {"images": part, "annotations": boxes}))
    names = ["--annotations", "train.json", "val.json", "--images", IMAGES, f"./{IMAGES}/"]
    for _ in range(2):
        records.main([str(loose), str(out), *names])
    for name, count in {"train": 15, "val": 5}.items():
        ours = index.load_coco(out, f"{name}.json", f"{IMAGES}/{name}")
        theirs = index.load_coco(loose, f"{name}.json", IMAGES)
        assert len(ours) == count and ours.store is not None
        assert [ours.read(row) for row in range(count)] == [theirs.read(r) for r in range(count)]
    # Files of one name in two folders are told apart.
    asked = [("a/x.json", "i"), ("b/x.json", "i"), ("c/x.json", "j")]
    places = [records.shards_dir(*split, asked) for split in asked]
    assert places == ["i/a/x", "i/b/x", "j"]
    # One after the other, the second would put the first one's list away.
    alone = [str(loose), str(tmp_path / "alone"), "--images", IMAGES, "--annotations"]
    records.main([*alone, "train.json"])
    with pytest.raises(SystemExit, match="holds the pictures of train"):
        records.main([*alone, "val.json"])
    # Neither did an earlier version say whose shards they are, nor do lists of single shards.
    manifest = tmp_path / "alone" / IMAGES / shards.MANIFEST
    written = json.loads(manifest.read_text())
    del written["annotations"]
    manifest.write_text(json.dumps(written))
    with pytest.raises(SystemExit, match="holds the pictures of another split; pack both"):
        records.main([*alone, "val.json"])
    (manifest.parent / "README.txt").touch()
    records.main([*alone, "train.json"])
    assert json.loads(manifest.read_text())["annotations"] == "train.json"


def test_another_dataset_is_not_written_into(loose, tmp_path):
    other = tmp_path / "other"
    shapes.write(other, seed=3, train=5, val=0, size=64)
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    arguments = [str(loose), str(other), "--split", "train"]
    with pytest.raises(SystemExit, match="which is no shard; choose another OUT"):
        records.main(arguments)
    (other / IMAGES).rename(other / "elsewhere")
    with pytest.raises(SystemExit, match="another file is there already"):
        records.main(arguments)
    (other / "elsewhere").rename(other / IMAGES)
    assert before == {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}


def test_records_in_an_object_store_are_refused_in_words(packed, monkeypatch):
    monkeypatch.setattr(files, "is_remote", lambda path: True)
    with pytest.raises(ValueError, match="array_record reads local files only; mount the bucket"):
        shards.find(os.fspath(packed / IMAGES))
