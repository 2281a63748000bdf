"""Packing again, after kills, repairs and refusals: what is finished and still true is kept."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from yolos_jax.data import index, packing, records, shapes, shards

pytest.importorskip("array_record")

ROOT = Path(__file__).resolve().parent.parent
ANNOTATIONS, IMAGES = "annotations/instances_train2017.json", "train2017"


@pytest.fixture
def loose(tmp_path):
    shapes.write(tmp_path / "loose", seed=0, train=60, val=0, size=64)
    return tmp_path / "loose"


@pytest.fixture
def arguments(loose, tmp_path):
    return [str(loose), str(tmp_path / "packed"), "--split", "train", "--shards", "4"]


@pytest.fixture
def packed(arguments):
    records.main(arguments)
    return Path(arguments[1])


def load(root):
    return index.load_coco(root, ANNOTATIONS, IMAGES)


def shards_of(root):
    return sorted((root / IMAGES).glob("*.array_record"))


def states(root):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in shards_of(root)}


def test_what_is_finished_is_not_written_again(loose, arguments, packed, capsys):
    before = states(packed)
    records.main(arguments)
    assert states(packed) == before
    assert "60 pictures in 4 shards (4 there before)" in capsys.readouterr().out
    # Other annotations of the same pictures: a new list, the same shards.
    changed = json.loads((loose / ANNOTATIONS).read_text())
    changed["annotations"] = changed["annotations"][1:]
    (loose / ANNOTATIONS).write_text(json.dumps(changed))
    records.main(arguments)
    assert len(load(packed).labels) == len(changed["annotations"])
    assert states(packed) == before


def test_a_finished_folder_outlives_a_refused_run(loose, arguments, packed, capsys):
    before = states(packed)
    broken = sorted((loose / IMAGES).iterdir())[20]  # of the second shard
    content = broken.read_bytes()
    broken.write_bytes(bytes(len(content)))  # as large, so that no other shard changes
    with pytest.raises(SystemExit, match="1 of 60 pictures cannot be packed"):
        records.main(arguments)
    assert load(packed).read(20) == content and states(packed) == before
    records.main([*arguments, "--on_error", "skip"])
    assert "59 pictures in 4 shards (3 there before)" in capsys.readouterr().out
    assert sum(state == before[path] for path, state in states(packed).items()) == 3


def test_what_was_finished_is_known_after_a_kill_of_a_later_run(arguments, packed):
    before = states(packed)
    packing.reopen(packed / IMAGES)
    assert shards.find(packed / IMAGES) is None
    second = shards_of(packed)[1]
    second.unlink()
    records.main(arguments)
    assert shards.find(packed / IMAGES) is not None
    after = states(packed)
    assert after.pop(second) != before.pop(second) and after == before


def test_a_full_disk_takes_nothing_that_is_finished(loose, arguments, packed, monkeypatch):
    before = states(packed)
    next((loose / IMAGES).iterdir()).touch()

    def full(path, content):
        raise ValueError(f"{path}: cannot be written: No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="No space left"):
        patch.setattr(packing, "_write_whole", full)
        records.main(arguments)
    assert states(packed) == before and len(load(packed)) == 60
    leftovers = {path.suffix for path in (packed / IMAGES).iterdir()}
    assert leftovers == {".json", shards.SUFFIX}


def test_a_list_of_an_older_version_learns_the_times_of_its_pictures(arguments, packed, capsys):
    manifest = packed / IMAGES / shards.MANIFEST
    whole = manifest.read_text()
    older = json.loads(whole)
    for table in older["tables"]:
        del table["written"]
    manifest.write_text(json.dumps(older))
    records.main(arguments)
    assert "(4 there before)" in capsys.readouterr().out
    assert json.loads(manifest.read_text()) == json.loads(whole)


def test_what_was_left_out_is_tried_again_unless_skipped(loose, arguments, packed):
    broken = sorted((loose / IMAGES).iterdir())[20]
    broken.write_bytes(bytes(broken.stat().st_size))
    records.main([*arguments, "--on_error", "skip"])
    before = states(packed)
    with pytest.raises(SystemExit, match="1 of 60 pictures cannot be packed"):
        records.main(arguments)
    records.main([*arguments, "--on_error", "skip"])
    assert states(packed) == before and len(load(packed).store.left_out) == 1


def test_another_picture_of_the_same_size_is_packed_anew(tmp_path):
    loose, out = tmp_path / "loose", tmp_path / "out"
    shapes.write(loose, seed=3, train=4, val=0, size=16)
    arguments = [str(loose), str(out), "--split", "train", "--shards", "2"]
    picture = Path(load(loose).path(0))
    for color in ("red", "blue"):
        Image.new("RGB", (16, 16), color).save(picture, "BMP")
        records.main(arguments)
        assert load(out).read(0) == picture.read_bytes()


def test_killed_in_the_middle_and_run_again(tmp_path):
    loose, out = tmp_path / "loose", tmp_path / "out"
    shapes.write(loose, seed=1, train=600, val=0, size=64)
    arguments = [str(loose), str(out), "--split", "train", "--shards", "60", "--workers", "2"]
    command = [sys.executable, "-m", "yolos_jax.data.records", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while len(shards_of(out)) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    said = process.communicate()[0].decode()
    assert process.returncode == -signal.SIGKILL, said
    finished = {path: path.stat().st_mtime_ns for path in shards_of(out)}
    assert 5 <= len(finished) < 60
    assert shards.find(out / IMAGES) is None  # not taken for a packed folder
    records.main(arguments)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert len(shards_of(out)) == 60
    leftovers = {path.suffix for path in (out / IMAGES).iterdir() if path.name != shards.MANIFEST}
    assert leftovers == {shards.SUFFIX}
    data, pictures = load(out), load(loose)
    assert all(data.read(row) == pictures.read(row) for row in range(600))
