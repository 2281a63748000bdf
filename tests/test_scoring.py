"""COCO numbers equal pycocotools'; results carry the dataset's own ids."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolos_jax import scoring
from yolos_jax.batch import Detections
from yolos_jax.labels import LabelMap

pytest.importorskip("pycocotools")
GOLDEN = json.loads((Path(__file__).parent / "goldens" / "coco_eval_synth.json").read_text())


def ids(ground_truth):
    return [image["id"] for image in ground_truth["images"]]


def one_box(annotation_id=1, category_id=3):
    return {
        "images": [{"id": 7, "height": 100, "width": 100}, {"id": 8, "height": 9, "width": 9}],
        "categories": [{"id": 3, "name": "cell"}, {"id": 5, "name": "unseen"}],
        "annotations": [
            {
                "id": annotation_id,
                "image_id": 7,
                "category_id": category_id,
                "bbox": [10, 10, 20, 20],
                "area": 400,
                "iscrowd": 0,
            }
        ],
    }


def found(image_id=7, category_id=3, bbox=(10, 10, 20, 20), score=0.9):
    return {
        "image_id": image_id,
        "category_id": category_id,
        "bbox": list(bbox),
        "score": score,
    }


def test_twelve_numbers_and_classes_of_the_reference():
    ground_truth = GOLDEN["ground_truth"]
    metrics = scoring.coco_metrics(ground_truth, GOLDEN["detections"], ids(ground_truth))
    for name, value in zip(GOLDEN["stat_names"], GOLDEN["stats"], strict=True):
        assert metrics[name] == pytest.approx(value, abs=1e-9), name
    assert any(annotation["iscrowd"] for annotation in ground_truth["annotations"])
    per_class = list(metrics["AP_per_class"].values())
    assert np.mean([ap for ap in per_class if ap >= 0]) == pytest.approx(metrics["AP"], abs=1e-9)
    assert min(per_class) == -1  # the category without objects


def plain_pycocotools(ground_truth, detections, image_ids):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(ground_truth)
        truth.createIndex()
        scorer = COCOeval(truth, truth.loadRes(copy.deepcopy(detections)), "bbox")
        scorer.params.imgIds = sorted(image_ids)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer.stats


@given(seed=st.integers(0, 2**32 - 1), images=st.integers(1, 5))
def test_any_subset_scores_as_pycocotools_does(seed, images):
    rng = np.random.default_rng(seed)
    ground_truth = GOLDEN["ground_truth"]
    subset = [int(i) for i in rng.choice(ids(ground_truth), images, replace=False)]
    chosen = rng.random(len(GOLDEN["detections"])) < 0.8
    detections = [
        {**d, "score": float(np.round(rng.random(), 1))}
        for d, keep in zip(GOLDEN["detections"], chosen, strict=True)
        if keep
    ]
    metrics = scoring.coco_metrics(ground_truth, detections, subset)
    expected = plain_pycocotools(ground_truth, detections, subset)
    np.testing.assert_allclose(
        [metrics[row[0]] for row in scoring.SUMMARY], expected, rtol=0, atol=1e-9
    )


def test_inputs_stay_as_they_are_and_nothing_is_printed(capsys):
    before = copy.deepcopy(GOLDEN)
    scoring.coco_metrics(GOLDEN["ground_truth"], GOLDEN["detections"], ids(GOLDEN["ground_truth"]))
    assert before == GOLDEN
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("annotation_id", [0, 1])
def test_an_annotation_numbered_0_can_be_found(annotation_id):
    metrics = scoring.coco_metrics(one_box(annotation_id), [found()], [7, 8])
    assert metrics["AP"] == pytest.approx(1.0)
    assert metrics["AP_per_class"] == {"cell": pytest.approx(1.0), "unseen": -1.0}
    assert metrics["APs"] == pytest.approx(1.0) and metrics["APl"] == -1  # 400 is a small area


def test_no_detections_no_ground_truth_no_images():
    nothing_found = scoring.coco_metrics(one_box(), [], [7, 8])
    assert nothing_found["AP"] == 0 and nothing_found["AR100"] == 0
    assert scoring.coco_metrics(one_box(), [found(image_id=8)], [8])["AP"] == -1
    assert scoring.coco_metrics({**one_box(), "annotations": []}, [found()], [7])["AP"] == -1
    assert scoring.coco_metrics(one_box(), [], [])["AR1"] == -1


def test_unknown_categories_score_nothing_and_unknown_images_are_named():
    detections = [found(), found(category_id=99, score=1.0)]
    assert scoring.coco_metrics(one_box(), detections, [7])["AP"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"\[12\].*not in the ground truth.*2 images"):
        scoring.coco_metrics(one_box(), [found(image_id=12)], [7])
    with pytest.raises(ValueError, match=r"\[13\]"):
        scoring.coco_metrics(one_box(), [], [7, 13])


def test_table_names_the_numbers_as_coco_does():
    metrics = scoring.coco_metrics(one_box(), [found()], [7])
    lines = scoring.format_metrics(metrics).splitlines()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        truth = COCO()
        truth.dataset = one_box()
        truth.createIndex()
        scorer = COCOeval(truth, truth.loadRes([found()]), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    assert lines[:12] == printed.getvalue().splitlines()[-12:]
    assert lines[-2].split() == ["cell", "1.000"]
    assert lines[-1].split()[0] == "unseen" and "nothing to find" in lines[-1]


def test_results_carry_the_datasets_ids_and_boxes_in_pixels():
    detections = Detections(
        scores=np.array([0.9, 0.8, np.nan, 0.1], np.float32),
        labels=np.array([1, 0, 1, 1], np.int32),
        boxes_xyxy_px=np.array(
            [[-3, 1, 7, 11.5], [0, 0, 1, 1], [0, 0, 1, 1], [90, 90, 120, 130]], np.float32
        ),
    )
    results, nonfinite = scoring.coco_results(42, detections, np.array([-1, 17]))
    assert results == [
        {
            "image_id": 42,
            "category_id": 17,
            "bbox": [-3.0, 1.0, 10.0, 10.5],  # not clipped
            "score": pytest.approx(0.9),
        },
        {"image_id": 42, "category_id": 17, "bbox": [90, 90, 30, 40], "score": pytest.approx(0.1)},
    ]
    assert nonfinite == 1
    json.dumps(results)


def test_categories_match_by_name_not_by_id():
    trained = LabelMap((1, 2, 3), ("red", "white", "platelet"))
    renumbered = LabelMap((10, 20), ("white", "red"))
    assert scoring.match_categories(trained, renumbered).tolist() == [20, 10, -1]
    with pytest.raises(ValueError, match=r"'cat' are not among .* 'red', 'white', 'platelet'"):
        scoring.match_categories(trained, LabelMap((1, 2), ("red", "cat")))


def test_unused_slots_of_coco_have_no_category():
    coco91 = LabelMap.coco91()
    category_ids = scoring.match_categories(coco91, LabelMap((1, 90), ("person", "toothbrush")))
    assert category_ids[[0, 1, 2, 12, 90]].tolist() == [-1, 1, -1, -1, 90]
    with pytest.raises(ValueError, match="platelet") as error:
        scoring.match_categories(coco91, LabelMap((1,), ("platelet",)))
    assert len(str(error.value)) < 400  # not all ninety names


def test_classes_without_names_match_by_id():
    unnamed = LabelMap((0, 1, 2), ("class 0", "class 1", "class 2"))
    assert scoring.match_categories(unnamed, LabelMap((1, 2), ("a", "b"))).tolist() == [-1, 1, 2]
    with pytest.raises(ValueError, match="7"):
        scoring.match_categories(unnamed, LabelMap((7,), ("a",)))


def test_a_missing_library_is_known_before_the_first_epoch(monkeypatch):
    scoring.require()
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(ImportError, match="pycocotools"):
        scoring.require()
