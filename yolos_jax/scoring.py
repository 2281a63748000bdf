"""COCO results and COCO numbers: slots to the dataset's categories, pycocotools, tables."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterable, Sequence

import numpy as np

from yolos_jax.batch import Detections
from yolos_jax.labels import UNUSED, LabelMap

# The twelve numbers in the order of pycocotools: key, what, IoU, area, detections per image.
SUMMARY = (
    ("AP", "Average Precision", "0.50:0.95", "all", 100),
    ("AP50", "Average Precision", "0.50", "all", 100),
    ("AP75", "Average Precision", "0.75", "all", 100),
    ("APs", "Average Precision", "0.50:0.95", "small", 100),
    ("APm", "Average Precision", "0.50:0.95", "medium", 100),
    ("APl", "Average Precision", "0.50:0.95", "large", 100),
    ("AR1", "Average Recall", "0.50:0.95", "all", 1),
    ("AR10", "Average Recall", "0.50:0.95", "all", 10),
    ("AR100", "Average Recall", "0.50:0.95", "all", 100),
    ("ARs", "Average Recall", "0.50:0.95", "small", 100),
    ("ARm", "Average Recall", "0.50:0.95", "medium", 100),
    ("ARl", "Average Recall", "0.50:0.95", "large", 100),
)


# Names that stand for no name: of converted checkpoints that lack the classes'.
UNNAMED = re.compile(rf"(class|label)[ _]?\d+|{UNUSED}", re.IGNORECASE)


def require() -> None:
    """Raises ImportError now, where the first score would after hours."""
    import pycocotools.cocoeval  # noqa: F401


def coco_metrics(ground_truth: dict, detections: Sequence[dict], image_ids: Sequence[int]) -> dict:
    """Scores detections as pycocotools does, to the last bit.

    Args:
      ground_truth: COCO annotations, complete (``data.truth.ground_truth``); crowds included.
      detections: COCO results: image_id, category_id, bbox (x, y, width, height in pixels) and
        score. Categories that the ground truth lacks score nothing.
      image_ids: the images to score; all others are ignored.

    Returns:
      The twelve numbers by the keys of ``SUMMARY`` and ``AP_per_class``, AP by class name; -1
      where there is nothing to find. One difference from pycocotools: annotations are numbered
      anew, because it takes a match with annotation 0 for none, and one id given twice for the
      same box.

    Raises:
      ValueError: an image id of ``image_ids`` or of a detection is not in the ground truth.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    wanted = {int(image_id) for image_id in image_ids}
    known = {image["id"] for image in ground_truth["images"]}
    strangers = sorted((wanted | {d["image_id"] for d in detections}) - known)
    if strangers:
        raise ValueError(
            f"images {strangers[:10]} ({len(strangers)} in all) are not in the ground truth, "
            f"which has {len(known)} images"
        )
    truth, found = COCO(), COCO()
    images = [image for image in ground_truth["images"] if image["id"] in wanted]
    truth.dataset = {
        "images": images,
        "categories": ground_truth["categories"],
        "annotations": _numbered(a for a in ground_truth["annotations"] if a["image_id"] in wanted),
    }
    found.dataset = {
        **truth.dataset,
        "annotations": [
            {**d, "area": d["bbox"][2] * d["bbox"][3], "iscrowd": 0}
            for d in _numbered(d for d in detections if d["image_id"] in wanted)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found.createIndex()
        scorer = COCOeval(truth, found, "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    metrics = {row[0]: float(value) for row, value in zip(SUMMARY, scorer.stats, strict=True)}
    names = {c["id"]: str(c.get("name", c["id"])) for c in ground_truth["categories"]}
    # Precisions are [IoU, recall, class, area, detections]: all areas, 100 detections.
    metrics["AP_per_class"] = {
        names[category]: _mean_of_known(scorer.eval["precision"][:, :, k, 0, -1])
        for k, category in enumerate(scorer.params.catIds)
    }
    return metrics


def _numbered(annotations: Iterable[dict]) -> list[dict]:
    return [{**annotation, "id": i} for i, annotation in enumerate(annotations, start=1)]


def _mean_of_known(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(np.mean(known)) if known.size else -1.0


def format_metrics(metrics: dict) -> str:
    """Returns the twelve lines as pycocotools prints them, then AP per class."""
    lines = [
        f" {what:<18} ({key[:2]}) @[ IoU={iou:<9} | area={area:>6s} | maxDets={most:>3d} ] "
        f"= {metrics[key]:0.3f}"
        for key, what, iou, area, most in SUMMARY
    ]
    per_class = metrics["AP_per_class"]
    width = max([len("class"), *(len(name) for name in per_class)])
    lines += ["", f" {'class':<{width}}     AP"]
    lines += [
        f" {name:<{width}}  " + ("   - (nothing to find)" if ap < 0 else f"{ap:0.3f}")
        for name, ap in per_class.items()
    ]
    return "\n".join(lines)


def match_categories(trained: LabelMap, dataset: LabelMap) -> np.ndarray:
    """Says which category of a dataset each slot of a detector stands for.

    By name. Ids alone prove nothing (3 is a car in one dataset and a platelet in another), so
    they decide only for a detector whose classes were never named (``class 3``, ``LABEL_3``).

    Args:
      trained: the label map of the checkpoint.
      dataset: that of the dataset.

    Returns:
      int64 [K]: the dataset's category id of every slot, -1 for classes that it does not have.

    Raises:
      ValueError: the dataset has a category that the detector does not know.
    """
    named = not all(UNNAMED.fullmatch(name) for name in trained.names)
    known = trained.names if named else trained.category_ids
    wanted = dict(
        zip(dataset.names if named else dataset.category_ids, dataset.category_ids, strict=True)
    )
    missing = [key for key in wanted if key not in known]
    if missing:
        raise ValueError(
            f"the dataset's categories {_few(missing)} are not among the checkpoint's classes, "
            f"{_few([key for key in known if key != UNUSED])}"
        )
    return np.array([wanted.get(key, -1) for key in known], np.int64)


def _few(keys: Sequence, most: int = 12) -> str:
    shown = ", ".join(repr(key) for key in keys[:most])
    return shown + (f" ... ({len(keys)} in all)" if len(keys) > most else "")


def coco_results(
    image_id: int, detections: Detections, category_ids: np.ndarray
) -> tuple[list[dict], int]:
    """Turns the detections of one image into COCO results.

    Args:
      image_id: the dataset's id of the image.
      detections: numpy, of one image: scores [Q], labels [Q], boxes_xyxy_px [Q, 4].
      category_ids: int64 [K], -1 for slots that are no category of the dataset.

    Returns:
      The results in query order, boxes not clipped, as the reference writes them; detections
      of slots without a category left out, as scoring would. And how many others were left
      out because a number is not finite, which JSON cannot hold.
    """
    scores, labels, boxes = detections
    known = category_ids[labels] >= 0
    finite = np.isfinite(scores) & np.isfinite(boxes).all(-1)
    # Width and height in float32, as the reference subtracts them; every digit is written.
    bbox = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=-1)
    return [
        {
            "image_id": image_id,
            "category_id": int(category_ids[labels[q]]),
            "bbox": bbox[q].tolist(),
            "score": float(scores[q]),
        }
        for q in np.flatnonzero(known & finite)
    ], int((known & ~finite).sum())
