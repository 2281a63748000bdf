"""What validate says of a folder with one of everything, and its exit status."""

from __future__ import annotations

import io
import json
import os
import re
import sys

import numpy as np
import pytest
from PIL import Image

from yolos_jax.data import validate

CATEGORIES = [{"id": 1, "name": "cell"}, {"id": 2, "name": "never used"}]


def noise(seed: int, mode: str = "RGB", size=(40, 30), **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.fixture
def write(tmp_path):
    """Writes a split: pictures by name (bytes or None), and a box in each."""

    def write_split(split, pictures, annotations=None, first_id=1):
        folder = tmp_path / f"{split}2017"
        folder.mkdir()
        (tmp_path / "annotations").mkdir(exist_ok=True)
        images = []
        for number, (name, data) in enumerate(pictures.items(), first_id):
            images.append({"id": number, "file_name": name, "width": 40, "height": 30})
            if data is not None:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(data)
        if annotations is None:
            ids = [entry["id"] for entry in images]
            annotations = [annotation(i, i) for i in ids]
        content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        path = tmp_path / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(content))
        return tmp_path

    return write_split


def annotation(number, image_id, bbox=(1, 2, 10, 10), **more):
    entry = {"id": number, "image_id": image_id, "category_id": 1, "bbox": list(bbox)}
    segmentation = [[1, 2, 11, 2, 11, 12]]
    return {**entry, "area": bbox[2] * bbox[3], "iscrowd": 0, "segmentation": segmentation, **more}


def test_a_clean_folder(write, capsys):
    root = write("train", {"a.jpg": noise(1), "b.jpg": noise(2)})
    write("val", {"c.jpg": noise(3)})
    assert validate.main([str(root)]) == 0
    out = capsys.readouterr().out
    assert "2 images, 2 boxes, 2 classes" in out and "1 images, 1 boxes" in out
    assert out.endswith("0 errors, 0 warnings, 2 notes\n")  # the category without a box, twice


PICTURES = {
    "missing.jpg": (None, r"error: picture: image 1 \(x\): .*cannot be read: No such file"),
    "cut.jpg": (noise(5)[:-300], r"error: picture: image 1 \(x\): .*cannot be decoded.*truncated"),
    "text.jpg": (b"<html>", r"error: picture: image 1 \(x\): .*not a picture of a known kind"),
    "small.jpg": (
        noise(5, size=(20, 30)),
        r"error: size: image 1 \(x\): stated 40x30, the picture is 20x30; expected",
    ),
    "swapped.jpg": (
        noise(5, size=(30, 40)),
        r"error: size: image 1 \(x\): .*the picture is 30x40 \(width and height swapped\)",
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_are_errors(name, write, capsys):
    data, pattern = PICTURES[name]
    root = write("train", {name: data, "good.jpg": noise(6)})
    assert validate.main([str(root)]) == 1
    out = capsys.readouterr().out
    assert re.search(pattern.replace(r"\(x\)", re.escape(f"({name})")), out), out
    assert "\n1 error, 0 warnings" in out


def test_pictures_and_boxes_that_are_worth_a_look(write, capsys):
    pictures = {"grey.jpg": noise(1, "L"), "cmyk.jpg": noise(2, "CMYK"), "twice.jpg": noise(3)}
    pictures |= {"again.jpg": noise(3), "empty.jpg": noise(4)}
    annotations = [
        annotation(1, 1),
        annotation(2, 1),  # the same box
        annotation(3, 2, area="large"),
        annotation(4, 2, (5, 5, 10, 10), area=1e4),
        annotation(5, 3, (5, 5, 0.5, 10)),
        annotation(6, 3, (50, 5, 5, 5)),
        annotation(7, 4, (35, 5, 50, 5)),
        annotation(8, 4, (3, 5, 5, 5), iscrowd=1),
        {k: v for k, v in annotation(9, 4).items() if k != "iscrowd"},
        annotation(10, 4, (4, 5, 5, 5), segmentation=[]),
    ]
    root = write("train", pictures, annotations)
    (root / "train2017" / "extra.jpg").write_bytes(noise(9))
    assert validate.main([str(root)]) == 0
    out = capsys.readouterr().out
    for line in (
        "warning: same box: image 1 (grey.jpg), annotation 2: bbox [1, 2, 10, 10] is annotation 1",
        "warning: area: image 2 (cmyk.jpg), annotation 3: area is 'large'; expected a number",
        "warning: area: image 2 (cmyk.jpg), annotation 4: area 10000 of bbox",
        "warning: tiny: image 3 (twice.jpg), annotation 5: bbox [5, 5, 0.5, 10]",
        "warning: no area: image 3 (twice.jpg), annotation 6: bbox [50, 5, 5, 5]; expected a box",
        "warning: outside: image 4 (again.jpg), annotation 7",
        "warning: same picture: image 4 (again.jpg): the same bytes as twice.jpg",
        "note: mode: image 1 (grey.jpg): mode L",
        "note: mode: image 2 (cmyk.jpg): mode CMYK",
        "note: crowd: image 4 (again.jpg), annotation 8",
        "note: empty image: image 5 (empty.jpg)",
        "note: default: image 4 (again.jpg), annotation 9: no iscrowd",
        "note: default: image 4 (again.jpg), annotation 10: no segmentation",
        "note: unused category: 'never used'",
        "note: unlisted: extra.jpg",
    ):
        assert line in out, line
    assert "0 errors, 7 warnings" in out


def test_two_splits_of_one_folder(write, capsys):
    root = write("train", {"a.jpg": noise(1), "b.jpg": noise(2)})
    coco = json.loads((root / "annotations" / "instances_train2017.json").read_text())
    for number in range(2):
        part = {"images": [coco["images"][number]], "annotations": [coco["annotations"][number]]}
        (root / f"{number}.json").write_text(json.dumps(coco | part))
    (root / "train2017" / "forgotten.jpg").write_bytes(noise(3))
    folders = ["--images", "train2017", "train2017/"]
    assert validate.main([str(root), "--annotations", "0.json", "1.json", *folders]) == 0
    out = capsys.readouterr().out
    assert out.count("unlisted: ") == 1 and "note: unlisted: forgotten.jpg" in out


def test_names_that_no_terminal_can_print(write, capsys, monkeypatch):
    root = write("train", {"a.jpg": noise(1)})
    with open(os.fsencode(root / "train2017") + b"/\xff.jpg", "wb") as file:
        file.write(noise(2))
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, "utf-8", "strict"))
    assert validate.main([str(root)]) == 0
    sys.stdout.flush()
    assert b"note: unlisted: \\udcff.jpg" in printed.getvalue()


def test_files_that_no_entry_names(write, capsys):
    root = write("train", {"a/1.jpg": noise(1), "./a/2.jpg": noise(2), "b/3.jpg": None})
    for name in ("a/extra.jpg", "above.jpg", "other/none_of_ours.jpg"):
        path = root / "train2017" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(noise(9))
    assert validate.main([str(root)]) == 1
    out = capsys.readouterr().out
    assert "note: unlisted: a/extra.jpg\n" in out and "picture: image 3 (b/3.jpg)" in out
    assert out.count("unlisted: ") == 1


def test_entries_that_make_no_sense_are_all_listed(write, capsys):
    annotations = [annotation(n, 999) for n in range(25)]
    root = write("train", {"a.jpg": noise(1)}, annotations)
    assert validate.main([str(root)]) == 1
    out = capsys.readouterr().out
    assert out.count("error: unknown image: annotation ") == 25 and "25 errors" in out


def test_areas_may_be_missing(write, capsys):
    annotations = [annotation(n, 1, (n, 0, 5, 5), area=None) for n in range(1, 8)]
    annotations += [annotation(n, 1, (n, 0, 5, 5)) for n in range(8, 20)]
    for entry in annotations[7:]:
        del entry["area"]
    root = write("train", {"a.jpg": noise(1)}, annotations)
    assert validate.main([str(root)]) == 0
    out = capsys.readouterr().out
    assert "0 errors, 0 warnings" in out
    assert out.count("no area") == 10 and "note: default: and 9 more" in out
    assert "19 notes    annotations without id, area" in out


def test_of_warnings_of_one_kind_the_first_are_listed(write, capsys):
    annotations = [annotation(n, 1, (n, 0, 5, 5), area=999) for n in range(1, 26)]
    root = write("train", {"a.jpg": noise(1)}, annotations)
    assert validate.main([str(root)]) == 0
    out = capsys.readouterr().out
    assert out.count("warning: area: image 1") == 10 and "warning: area: and 15 more" in out
    assert "0 errors, 25 warnings" in out


def test_boxes_of_a_misstated_size_are_those_that_loading_drops(write, capsys):
    # The picture is 60 wide, stated 40: training clips to the stated size, so validate does.
    root = write("train", {"a.jpg": noise(1, size=(60, 30))}, [annotation(1, 1, (45, 5, 9, 9))])
    assert validate.main([str(root)]) == 1
    expected = (
        "no area: image 1 (a.jpg), annotation 1: bbox [45, 5, 9, 9]; expected a box inside 40x30"
    )
    assert expected in capsys.readouterr().out


def test_turned_pictures(write, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    root = write("train", {"a.jpg": noise(1, size=(30, 40), exif=exif)})  # upright 40x30, as stated
    assert validate.main([str(root)]) == 1
    out = capsys.readouterr().out
    assert "stated 40x30, the picture is 30x40 (turned by its EXIF tag)" in out
    assert "or data.exif='apply'" in out
    assert validate.main([str(root), "--exif", "apply"]) == 0
    assert "note: turned: image 1 (a.jpg): EXIF orientation 6" in capsys.readouterr().out


def test_a_picture_of_two_splits_is_an_error_and_a_name_of_two_is_not(write, capsys):
    root = write("train", {"a.jpg": noise(1), "b.jpg": noise(2), "gone.jpg": None})
    write("val", {"renamed.jpg": noise(1), "b.jpg": noise(7), "gone.jpg": None})
    assert validate.main([str(root)]) == 1
    out = capsys.readouterr().out
    assert "error: leak: renamed.jpg: the same bytes as a.jpg of" in out
    assert out.count("error: leak") == 1 and "note: same name: b.jpg" in out
    assert "same name: gone.jpg" not in out


def test_one_file_under_two_names_of_images(write, capsys):
    root = write("train", {"a.jpg": noise(1)})
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["images"].append({**content["images"][0], "id": 2})
    path.write_text(json.dumps(content))
    assert validate.main([str(root)]) == 0
    assert "warning: same file: image 2 (a.jpg): file_name a.jpg" in capsys.readouterr().out


def test_files_that_cannot_be_used(write, tmp_path, capsys):
    root = write("train", {"a.jpg": noise(1)})
    names = ["--annotations", "annotations/instances_train2017.json", "--images"]
    assert validate.main([str(root), *names, "gone"]) == 1
    assert "error: file: no such folder of pictures" in capsys.readouterr().out
    (root / "cut.json").write_text('{"images": [')
    assert validate.main([str(root), "--annotations", "cut.json", "--images", "train2017"]) == 1
    assert "cut.json: not JSON, or truncated" in capsys.readouterr().out
    for wrong in ([str(tmp_path / "gone")], [str(tmp_path / "train2017")], [str(root), *names[:2]]):
        with pytest.raises(SystemExit) as stopped:
            validate.main(wrong)
        assert stopped.value.code == 2
