"""COCO files as columns: what is kept, what is dropped, and what a user is told."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from yolos_jax.data.coco import read_coco
from yolos_jax.data.index import load_coco
from yolos_jax.data.truth import ground_truth
from yolos_jax.labels import LabelMap

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "transforms.json").read_text())
CATEGORIES = [{"id": 3, "name": "disc"}, {"id": 1, "name": "cell"}]


def image(number, width=640, height=480, **more):
    return {"id": number, "file_name": f"{number}.jpg", "width": width, "height": height, **more}


def box(number, image_id, bbox=(10, 20, 30, 40), category_id=1, **more):
    entry = {"id": number, "image_id": image_id, "category_id": category_id, "bbox": list(bbox)}
    return {**entry, "area": 1200, "iscrowd": 0, **more}


def coco(images, annotations, categories=None):
    return {"images": images, "annotations": annotations, "categories": categories or CATEGORIES}


@pytest.fixture
def load(tmp_path):
    def write_and_load(content, **options):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "a.json").write_text(text)
        return load_coco(tmp_path, "a.json", "pictures", **options)

    return write_and_load


def test_columns_by_hand(load, tmp_path):
    images = [image(9), image(4, 100, 50, file_name="é/4.jpg"), image(7)]
    annotations = [
        box(1, 7, (1, 2, 3, 4), category_id=3),
        box(2, 9),
        box(3, 7, (0.5, 0.25, 10, 10)),
        box(4, 9, iscrowd=1),
    ]
    index = load(coco(images, annotations))
    assert index.image_ids.tolist() == [9, 4, 7]  # the file's order
    assert index.path(1) == f"{tmp_path}/pictures/é/4.jpg"
    assert index.heights.tolist() == [480, 50, 480] and index.widths.tolist() == [640, 100, 640]
    assert index.box_offsets.tolist() == [0, 1, 1, 3]
    assert index.labels.tolist() == [0, 1, 0]  # slots by category id: cell, disc
    expected = [[10, 20, 40, 60], [1, 2, 4, 6], [0.5, 0.25, 10.5, 10.25]]
    assert index.boxes_xyxy_px.tolist() == expected
    dtypes = {"image_ids": "int64", "heights": "int32", "widths": "int32", "orientation": "uint8"}
    dtypes |= {"box_offsets": "int64", "boxes_xyxy_px": "float32", "labels": "int32"}
    assert {name: str(getattr(index, name).dtype) for name in dtypes} == dtypes
    assert index.orientation.tolist() == [1, 1, 1]
    assert len(index) == 3 and index.max_boxes == 2
    assert index.dropped.counts == {"crowd": 1, "empty image": 1}
    assert "3 images (1 without boxes), 3 boxes, at most 2" in index.describe()


def test_subset_and_select_keep_boxes_with_their_images(load):
    annotations = [box(n, n % 3 + 1, (n, n, 5, 5)) for n in range(1, 8)]
    index = load(coco([image(1), image(2), image(3)], annotations))
    first = index.subset(2)
    assert first.image_ids.tolist() == [1, 2] and first.box_offsets.tolist() == [0, 2, 5]
    assert first.boxes_xyxy_px[:, 0].tolist() == [3, 6, 1, 4, 7]
    turned = index.select(np.array([2, 0]))
    assert turned.image_ids.tolist() == [3, 1]
    assert turned.boxes_xyxy_px[:, 0].tolist() == [2, 5, 3, 6]
    assert len(index.subset(0)) == len(index.subset(99)) == 3
    assert index.select(np.array([], int)).max_boxes == 0


@pytest.mark.parametrize("case", GOLDEN["prepare_cases"], ids=lambda case: case["name"])
def test_boxes_are_what_the_original_makes_of_them(case, load):
    annotations = [dict(a, id=n) for n, a in enumerate(case["annotations"])]
    width, height = case["image_wh"]
    categories = [{"id": i, "name": str(i)} for i in range(1, 91)]
    index = load(coco([image(7, width, height)], annotations, categories))
    if case["name"] == "area missing":  # the original raises KeyError; nothing here needs it
        assert index.boxes_xyxy_px.tolist() == [[5, 6, 12, 14]]
        return
    expected = np.array(case["output"]["boxes"], np.float32).reshape(-1, 4)
    np.testing.assert_array_equal(index.boxes_xyxy_px, expected)
    assert index.label_map.ids(index.labels).tolist() == case["output"]["labels"]


# Entries that make no sense: what is added to a clean file, and what the message must hold.
BAD_ANNOTATIONS = {
    "unknown image": (box(50, 999), "annotation 50: image_id 999"),
    "image id as a text": (box(50, "1"), "image_id '1'"),
    "unknown category": (box(50, 1, category_id=99), "category_id 99; expected one of 1, 3"),
    "category zero": (box(50, 1, category_id=0), "category_id 0"),
    "three numbers": (box(50, 1, (1, 2, 3)), "bbox is [1, 2, 3]; expected bbox as four finite"),
    "no box": ({"id": 50, "image_id": 1, "category_id": 1}, "bbox is None"),
    "null box": (dict(box(50, 1), bbox=None), "bbox is None"),
    "text in a box": (box(50, 1, (1, 2, "3", 4)), "bbox is [1, 2, '3', 4]"),
    "nan": (box(50, 1, (1, 2, float("nan"), 4)), "nan"),
    "infinity": (box(50, 1, (1, 2, float("inf"), 4)), "inf"),
    "number beyond float": (box(50, 1, (1, 2, 10**400, 4)), "expected bbox as four finite"),
    "null": (None, "None; expected an object"),
    "list for an image id": (box(50, [1]), "image_id is [1]"),
    "no category": (box(50, 1, category_id=None), "category_id is None"),
    "iscrowd as a text": (box(50, 1, iscrowd="1"), "iscrowd is '1'; expected 0 or 1"),
    "id twice": (box(1, 1, (7, 7, 7, 7)), "annotation 1: also the id of an annotation of image 1"),
}


@pytest.mark.parametrize("name", BAD_ANNOTATIONS)
def test_annotations_that_make_no_sense(name, load):
    bad, message = BAD_ANNOTATIONS[name]
    content = coco([image(1), image(2)], [box(1, 1), box(2, 2), bad])
    with pytest.raises(ValueError) as error:
        load(content)
    text = str(error.value)
    assert "a.json" in text and message in text and "data.on_error='skip'" in text
    index = load(content, on_error="skip")
    assert index.dropped.errors == 1 and message in index.dropped.describe()
    # A box whose id is taken is still a box; everything else is left out.
    assert len(index.labels) == (3 if name == "id twice" else 2)


BAD_IMAGES = {
    "no id": ({"file_name": "x.jpg", "width": 5, "height": 5}, "id is None; expected an integer"),
    "id as a text": (image("12"), "image '12' (12.jpg): id is '12'"),
    "fraction": (image(1.5), "id is 1.5"),
    "id beyond 64 bits": (image(2**70), "expected an integer"),
    "no name": ({"id": 8, "width": 5, "height": 5}, "image 8: file_name is None"),
    "empty name": (image(8, file_name=" "), "file_name is ' '"),
    "half a character": (image(8, file_name="\ud800.jpg"), "file_name is"),
    "no width": (image(8, width=None), "image 8 (8.jpg): width is None"),
    "no height": ({"id": 8, "file_name": "8.jpg", "width": 5}, "height is None"),
    "height zero": (image(8, height=0), "height is 0; expected a whole number"),
    "negative": (image(8, width=-640), "width is -640"),
    "text": (image(8, width="640"), "width is '640'"),
    "fraction of a pixel": (image(8, width=640.5), "width is 640.5"),
    "not an object": ("8.jpg", "'8.jpg'; expected an object"),
    "id of another picture": (image(1, file_name="x.jpg"), "also the id of 1.jpg, 640x480"),
    "the same entry twice": (image(1), "the same entry a second time"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_images_that_make_no_sense(name, load):
    bad, message = BAD_IMAGES[name]
    content = coco([image(1), image(2), bad], [box(1, 1), box(2, 2)])
    with pytest.raises(ValueError) as error:
        load(content)
    assert message in str(error.value) and "a.json" in str(error.value)
    index = load(content, on_error="skip")
    # Two pictures of one id: no one knows whose boxes are whose, so both are left out.
    both = name == "id of another picture"
    assert index.image_ids.tolist() == ([2] if both else [1, 2])
    assert index.dropped.counts.get("left out with image", 0) == (1 if both else 0)


def test_whole_numbers_written_as_fractions_are_numbers(load):
    content = coco([image(5.0, 640.0, 480.0)], [box(1.0, 5, category_id=1.0)])
    index = load(content)
    assert index.image_ids.tolist() == [5] and len(index.labels) == 1
    truth = ground_truth(content)
    assert truth["images"][0]["id"] == 5 and truth["annotations"][0]["category_id"] == 1


def test_boxes_without_area_are_dropped_counted_and_the_first_ten_listed(load):
    bad = [box(100 + n, 1, (700, 500, 50, 60)) for n in range(12)]
    index = load(coco([image(1)], [box(1, 1), *bad, box(2, 1, (600, 440, 120, 90))]))
    assert index.boxes_xyxy_px.tolist() == [[10, 20, 40, 60], [600, 440, 640, 480]]
    assert index.dropped.counts == {"no area": 12, "outside": 1}
    text = str(index.dropped)
    assert "12 boxes without any area" in text and "annotation 109: bbox [700," in text
    assert "annotation 110:" not in text and "... and 2 more" in text


def test_what_is_not_needed_may_be_missing(load):
    entry = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}
    index = load(coco([image(1)], [entry, dict(entry, bbox=[5, 6, 7, 8])]))
    assert len(index.labels) == 2 and index.dropped.counts == {}


def test_images_without_boxes_are_kept_unless_told(load):
    content = coco([image(1), image(2), image(3)], [box(1, 2), box(2, 3, iscrowd=1)])
    assert load(content).image_ids.tolist() == [1, 2, 3]
    assert load(content, keep_empty=False).image_ids.tolist() == [2]
    assert load(coco([image(1)], [])).max_boxes == 0
    with pytest.raises(ValueError, match="no image is left of 1"):
        load(coco([image(1)], []), keep_empty=False)


def test_coco91_knows_only_the_files_categories(load):
    person = [{"id": 1, "name": "person"}]
    index = load(coco([image(1)], [box(1, 1)], person), labels="coco91")
    assert index.label_map == LabelMap.coco91() and index.labels.tolist() == [1]
    with pytest.raises(ValueError, match="category_id 12; expected one of 1"):
        load(coco([image(1)], [box(1, 1, category_id=12)], person), labels="coco91")
    with pytest.raises(ValueError, match=r"a\.json: data\.labels is 'coco91'"):
        load(coco([image(1)], [box(1, 1)]), labels="coco91")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [{"id": 1, "file_na', "not JSON, or truncated (30 bytes"),
        ("", "not JSON, or truncated (0 bytes"),
        ("[]", "holds a list, as a results file does"),
        ("3", "holds a int; expected a COCO file"),
        ("{}", "no 'images' (its keys: none)"),
        ('{"images": [], "categories": []}', "no 'annotations' (its keys: categories, images)"),
        ('{"images": [], "annotations": {}, "categories": []}', "'annotations' is a dict"),
        ('{"images": [], "annotations": [], "categories": []}', "list of images is empty"),
        ('{"images": [{}], "annotations": [], "categories": []}', "at least one category"),
    ],
)
def test_files_that_are_not_coco(text, message, load):
    with pytest.raises(ValueError) as error:
        load(text)
    assert message in str(error.value) and "a.json" in str(error.value)


def test_paths_that_do_not_exist(tmp_path):
    with pytest.raises(ValueError, match=r"data\.root: no such folder"):
        load_coco(tmp_path / "gone", "a.json", "pictures")
    with pytest.raises(ValueError, match=r"a\.json: cannot read these annotations: No such file"):
        load_coco(tmp_path, "a.json", "pictures")
    (tmp_path / "a.json").write_text(json.dumps(coco([image(1)], [])))
    with pytest.raises(ValueError, match=r"no such folder of pictures: .*pictures"):
        load_coco(tmp_path, "a.json", "pictures")
    with pytest.raises(ValueError, match=r"data\.exif is 'yes'"):
        load_coco(tmp_path, "a.json", "pictures", exif="yes")


def test_masks_and_byte_order_marks(tmp_path):
    entry = box(1, 1, segmentation={"counts": [1, 2], "size": [480, 640]})
    content = coco([image(1)], [entry, box(2, 1, segmentation=[[1.5, 2, 3, 4]])])
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "a.json").write_text(json.dumps(content), encoding=encoding)
        read = read_coco(tmp_path / "a.json")
        assert [sorted(a) for a in read["annotations"]] == [sorted(box(1, 1))] * 2


def test_exif_orientation_becomes_a_column(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "pictures").mkdir()
    for number in (1, 2, 3):  # stored 40 wide, 30 high; upright 30 wide, 40 high
        Image.new("RGB", (40, 30)).save(tmp_path / "pictures" / f"{number}.jpg", exif=exif)
    images = [image(1, 40, 30), image(2, 30, 40), image(3, 99, 99), image(4, 50, 60)]
    content = coco(images, [box(1, 1, (0, 32, 5, 5)), box(2, 2, (0, 32, 5, 50))])
    (tmp_path / "a.json").write_text(json.dumps(content))

    ignored = load_coco(tmp_path, "a.json", "pictures")
    assert ignored.orientation.tolist() == [1] * 4 and ignored.widths.tolist() == [40, 30, 99, 50]
    assert len(ignored.labels) == 1

    applied = load_coco(tmp_path, "a.json", "pictures", exif="apply")
    assert applied.orientation.tolist() == [6, 6, 6, 1]  # the last has no picture
    assert applied.widths.tolist() == [30, 30, 99, 50]
    assert applied.heights.tolist() == [40, 40, 99, 60]
    assert applied.boxes_xyxy_px.tolist() == [[0, 32, 5, 37], [0, 32, 5, 40]]
    assert len(ground_truth(content)["annotations"]) == 1
    assert len(ground_truth(content, applied)["annotations"]) == 2


def test_ground_truth_is_fit_for_pycocotools():
    annotations = [
        {"id": 0, "image_id": 1, "category_id": 1, "bbox": [-5, 1, 20, 4]},
        box(0, 1, (1, 2, 3, 4), area=None, iscrowd=1),
        box(7, 1, (1, 1, 0, 5)),
        box(8, 999),
        box(9, 1, category_id=99),
        box(10, 2, area=3.5),
    ]
    content = coco([image(1), image(2)], annotations)
    before = copy.deepcopy(content)
    truth = ground_truth(content)
    assert content == before
    # Boxes as stated, areas and iscrowd filled in, ids from 1: to pycocotools 0 is no match.
    assert truth["annotations"] == [
        dict(id=1, image_id=1, category_id=1, bbox=[-5, 1, 20, 4], area=80, iscrowd=0),
        dict(id=2, image_id=1, category_id=1, bbox=[1, 2, 3, 4], area=12, iscrowd=1),
        dict(id=3, image_id=2, category_id=1, bbox=[10, 20, 30, 40], area=3.5, iscrowd=0),
    ]
    assert [i["id"] for i in truth["images"]] == [1, 2] and len(truth["categories"]) == 2
