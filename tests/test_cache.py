"""Annotations are parsed once; damage, changes and folders that cannot be written stop nobody."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pytest

from configs import common
from tests.processes import Processes, free_address
from yolos_jax import datasets
from yolos_jax.data import cache, shapes
from yolos_jax.data import coco as coco_lib

TRAIN, VAL = (f"annotations/instances_{split}2017.json" for split in ("train", "val"))


@pytest.fixture
def root(tmp_path):
    shapes.write(tmp_path / "data", seed=0, train=12, val=5, size=32)
    # What a file may hold: areas of fractions, crowds, boxes that are dropped, names in folders.
    path = tmp_path / "data" / VAL
    content = json.loads(path.read_text())
    content["annotations"][0] |= {"area": 3.25, "iscrowd": 1}
    content["annotations"][1]["bbox"] = [1.5, 2.25, 7.125, 8]
    content["annotations"][2]["bbox"] = [500, 500, 5, 5]
    content["images"][1]["file_name"] = "é/ü.png"
    path.write_text(json.dumps(content))
    return tmp_path / "data"


@pytest.fixture
def parsed(monkeypatch):
    """The annotation files that were parsed."""
    seen = []
    parse = coco_lib.read_coco
    monkeypatch.setattr(
        "yolos_jax.data.index.read_coco", lambda path: (seen.append(str(path)), parse(path))[1]
    )
    return seen


def read(root, folder, which=1, said=None, **changes):
    data = common.get_config().data
    data.root = str(root)
    data.update(changes)
    said = [] if said is None else said
    return datasets.read_split(data, datasets.splits_of(data)[which], folder, said.append)


def assert_same(one, other):
    for field in dataclasses.fields(one.index):
        ours, theirs = (getattr(cached.index, field.name) for cached in (one, other))
        if isinstance(ours, np.ndarray):
            np.testing.assert_array_equal(ours, theirs, err_msg=field.name)
            assert ours.dtype == theirs.dtype, field.name
        elif field.name == "dropped":
            assert (ours.counts, str(ours)) == (theirs.counts, str(theirs))
        else:
            assert ours == theirs, field.name


def test_what_comes_back_is_what_was_read(root, tmp_path, parsed):
    for which in (0, 1):
        first, again = (read(root, tmp_path / "cache", which) for _ in range(2))
        assert_same(first, again)
        assert len(parsed) == which + 1  # once for the index and the ground truth together
    truth = first.ground_truth
    assert truth["annotations"] == again.ground_truth["annotations"]
    assert truth["categories"] == again.ground_truth["categories"]
    assert truth["annotations"][0]["area"] == 3.25 and truth["annotations"][0]["iscrowd"] == 1
    assert again.ground_truth["images"] == [
        {key: entry[key] for key in ("id", "file_name", "height", "width")}
        for entry in truth["images"]
    ]
    assert read(root, tmp_path / "cache", 0).ground_truth is None


def test_whatever_changes_is_read_again(root, tmp_path, parsed):
    folder = tmp_path / "cache"
    read(root, folder)
    read(root, folder, keep_empty=False)  # of training only
    assert len(parsed) == 1
    read(root, folder, exif="apply")
    read(root, folder, labels="dataset", on_error="skip")
    assert len(parsed) == 3 and len(list(folder.iterdir())) == 3
    stat = (root / VAL).stat()
    os.utime(root / VAL, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    read(root, folder)
    assert len(parsed) == 4 and len(list(folder.iterdir())) == 3  # in the place of the old one
    content = (root / VAL).read_text()
    (root / VAL).write_text(content.replace("triangle", "pyramid"))
    assert "pyramid" in read(root, folder).index.label_map.names
    assert len(parsed) == 5


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "text", "column", "pickle"])
def test_a_damaged_cache_is_rebuilt_with_one_line(damage, root, tmp_path, parsed):
    folder, said = tmp_path / "cache", []
    first = read(root, folder)
    (path,) = folder.iterdir()
    content = path.read_bytes()
    if damage == "flipped":
        place = content.index(b"boxes_xyxy_px") + 300  # of the column itself
        content = content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]
    elif damage in ("column", "pickle"):
        with np.load(path) as stored:
            columns = {name: stored[name] for name in stored.files if name != "labels"}
        more = {"labels": np.array([{}], object)} if damage == "pickle" else {}
        np.savez(path, **columns, **more)
        content = path.read_bytes()
    path.write_bytes(
        {"truncated": content[:-40], "empty": b"", "text": b"not an archive"}.get(damage, content)
    )
    again = read(root, folder, said=said)
    assert_same(first, again)
    assert len(said) == 1 and "\n" not in said[0] and str(path) in said[0]
    assert "damaged" in said[0] and said[0].endswith("the annotations are read again")
    assert len(parsed) == 2
    read(root, folder, said=said)
    assert len(parsed) == 2 and len(said) == 1  # it was written anew


def test_a_folder_that_cannot_be_written_is_one_line(root, tmp_path):
    (tmp_path / "cache").write_text("a file")
    said = []
    assert len(read(root, tmp_path / "cache", said=said).index) == 5
    assert len(said) == 1 and "cannot be written" in said[0]


def test_code_that_reads_otherwise_takes_no_cache(root, tmp_path, parsed, monkeypatch):
    read(root, tmp_path / "cache")
    monkeypatch.setattr(cache, "SOURCES", ("data/clean.py",))
    read(root, tmp_path / "cache")
    assert len(parsed) == 2


PROGRAM = """
import sys
import jax
from configs import common
from yolos_jax import datasets, launch
from yolos_jax.data import index

root, folder, address, number = sys.argv[1:]
config = common.get_config()
config.data.root = root
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, int(number))
parsed = []
read_coco = index.read_coco
index.read_coco = lambda path: (parsed.append(path), read_coco(path))[1]
split = datasets.splits_of(config.data)[0]
for name in ("shared", f"own_{number}"):
    parsed.clear()
    found = datasets.read_split(config.data, split, f"{folder}/{name}", print)
    print(f"{name}: {len(found.index)} images, parsed {len(parsed)} times", flush=True)
jax.distributed.shutdown()
"""


def test_the_first_of_two_processes_parses_for_both(root, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    common_arguments = [str(tmp_path / "program.py"), str(root), str(tmp_path), free_address()]
    commands = [[*common_arguments, str(number)] for number in range(2)]
    with Processes(commands, tmp_path / "printed") as group:
        assert group.wait(60) == [0, 0], group.printed()
        for number, times in enumerate((1, 0)):
            assert f"shared: 12 images, parsed {times} times" in group.output(number)
            # Not seen by the other one, which reads for itself.
            assert f"own_{number}: 12 images, parsed 1 times" in group.output(number)
