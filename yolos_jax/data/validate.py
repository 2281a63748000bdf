"""What is wrong with a dataset, and where: every entry is checked, every picture decoded.

    python -m yolos_jax.data.validate ROOT
    python -m yolos_jax.data.validate ROOT --annotations a.json b.json --images a_dir b_dir

Without file names it checks the published layout's train and val splits, those that are there. One
line per problem (the first ten warnings or notes of a kind), then a summary; exit status 1 when
anything is an error. Several splits are compared with each other: a picture of two splits makes
scores too good.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from etils import epath

from yolos_jax import interrupt
from yolos_jax.data import clean, files, shards
from yolos_jax.data.coco import read_coco
from yolos_jax.data.index import picture_path
from yolos_jax.data.problems import KINDS, Problems
from yolos_jax.data.validate_pictures import Picture, check_pictures, check_unlisted
from yolos_jax.labels import LabelMap

PUBLISHED = tuple(
    (f"annotations/instances_{split}2017.json", f"{split}2017") for split in ("train", "val")
)
LISTED = 10  # warnings and notes of a kind; errors are all to be mended
# Rounding of exporters; and masks thinner than this share of their box are rare.
AREA_TOLERANCE, LEAST_AREA_SHARE = 1.02, 0.01


class Split(NamedTuple):
    """A split as checked: its problems, and its pictures by file name."""

    problems: Problems
    pictures: dict[str, Picture]
    summary: str
    folder: str = ""  # of the pictures; '' when they are packed, or there is none


def validate(
    root: str | os.PathLike, splits: Sequence[tuple[str, str]], exif: str = "ignore"
) -> list[Split]:
    """Checks splits, and each against those before it.

    Args:
      root: folder or gs:// path.
      splits: annotation file and picture folder of each, relative to root.
      exif: as the config's data.exif, 'ignore' or 'apply'.
    """
    checked: list[Split] = []
    for annotation_file, images_dir in splits:
        split = check_split(root, annotation_file, images_dir, exif)
        for other in checked:
            _check_leak(split, other)
        checked.append(split)
    for folder in dict.fromkeys(split.folder for split in checked if split.folder):
        # Splits may share a folder, whose other files are said of the first.
        sharing = [split for split in checked if split.folder == folder]
        names = {name for split in sharing for name in split.pictures}
        check_unlisted(folder, names, sharing[0].problems)
    return checked


def check_split(
    root: str | os.PathLike, annotation_file: str, images_dir: str, exif: str = "ignore"
) -> Split:
    """Checks one annotation file and its pictures."""
    path = picture_path(root, "", annotation_file)
    problems = Problems(path, limit=None)
    folder = picture_path(root, images_dir, "")
    try:
        coco = read_coco(path)
        if not files.is_folder(folder):
            raise ValueError(f"no such folder of pictures: {folder}")
        packed = shards.find(folder)
        label_map = LabelMap.from_categories(coco["categories"])
    except ValueError as error:
        problems.add("file", None, None, str(error))
        return Split(problems, {}, "not checked")
    images = clean.clean_images(coco["images"], problems)
    pictures = check_pictures(folder, packed, images, exif, problems)
    known = set(label_map.category_ids)
    found = clean.clean_annotations(coco["annotations"], images, label_map, known, problems)
    _check_annotations(coco["annotations"], images, found, label_map, problems)
    boxes = int((~found.crowd).sum())
    summary = f"{len(images.ids)} images, {boxes} boxes, {label_map.num_classes} classes"
    return Split(problems, pictures, summary, "" if packed else folder.rstrip("/"))


def _check_annotations(
    annotations: list,
    images: clean.Images,
    found: clean.Annotations,
    label_map: LabelMap,
    problems: Problems,
) -> None:
    """What loading takes as it is, and people may want to know."""
    first: dict[tuple, Any] = {}
    for t, position in enumerate(found.positions):
        entry, image_entry = annotations[position], images.entries[found.rows[t]]
        number, box, area = entry.get("id"), entry["bbox"], entry.get("area")
        key = (found.rows[t], found.labels[t], bool(found.crowd[t]), *box)
        if key in first:
            value = f"bbox {box} is annotation {first[key]!r}'s"
            problems.add("same box", image_entry, number, value, "one annotation per object")
        first.setdefault(key, number)
        if min(box[2:]) < 1:
            problems.add("tiny", image_entry, number, f"bbox {box}", "sides of a pixel or more")
        whole = box[2] * box[3]
        if not isinstance(area, int | float | None):
            expected = f"a number, about {whole:g}"
            problems.add("area", image_entry, number, f"area is {area!r}", expected)
        elif area is not None and not _is_near(area, whole):
            value = f"area {area:g} of bbox {box}"
            problems.add("area", image_entry, number, value, f"at most {whole:g}, and near it")
        missing = [key for key in ("id", "area", "iscrowd") if entry.get(key) is None]
        missing += ["segmentation"] if "segmentation" in entry else []  # only empty ones are kept
        if missing:
            problems.add("default", image_entry, number, f"no {', '.join(missing)}")
    used = set(found.labels[~found.crowd].tolist())
    for slot, name in enumerate(label_map.names):
        if slot not in used:
            problems.add("unused category", None, None, f"{name!r}")


def _is_near(area: float, whole: float) -> bool:
    return whole * LEAST_AREA_SHARE <= area <= whole * AREA_TOLERANCE + 1


def _check_leak(split: Split, other: Split) -> None:
    """Pictures of one split that are byte for byte in another."""
    theirs = {picture.digest: name for name, picture in other.pictures.items() if picture.digest}
    for name, picture in split.pictures.items():
        if picture.digest in theirs:
            value = f"{name}: the same bytes as {theirs[picture.digest]} of {other.problems.file}"
            split.problems.add("leak", None, None, value, "pictures of one split only")
        elif picture.digest and name in other.pictures and other.pictures[name].digest:
            split.problems.add("same name", None, None, name)


def report(splits: Sequence[Split]) -> tuple[str, int]:
    """The text for people, and how many errors there are."""
    lines, totals = [], dict.fromkeys(("error", "warning", "note"), 0)
    for problems, _, summary, _ in splits:
        lines.append(f"{problems.file}: {summary}")
        kinds = [(kind, *about) for kind, about in KINDS.items() if kind in problems.counts]
        for kind, severity, _, _ in kinds:
            listed = problems.listed[kind][: None if severity == "error" else LISTED]
            lines += [f"{severity}: {kind}: {problem}" for problem in listed]
            if len(listed) < problems.counts[kind]:
                lines.append(f"{severity}: {kind}: and {problems.counts[kind] - len(listed)} more")
        for kind, severity, what, done in kinds:
            count = problems.counts[kind]
            lines.append(f"  {count:>7} {severity + 's' * (count > 1):8} {what} ({done})")
            totals[severity] += count
    lines.append(", ".join(f"{n} {name + 's' * (n != 1)}" for name, n in totals.items()))
    return "\n".join(lines), totals["error"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m yolos_jax.data.validate", description=__doc__.splitlines()[0]
    )
    parser.add_argument("root", help="folder that the other paths are relative to")
    parser.add_argument("--annotations", nargs="+", help="COCO files, one per split")
    parser.add_argument("--images", nargs="+", help="picture folders, as many")
    parser.add_argument("--exif", choices=("ignore", "apply"), default="ignore", help="data.exif")
    flags = parser.parse_args(arguments)
    try:
        if not files.is_folder(flags.root):
            parser.error(f"no such folder: {flags.root!r}")
    except ValueError as error:
        parser.error(str(error))
    if len(flags.annotations or ()) != len(flags.images or ()):
        parser.error("--annotations and --images go together, one folder per file")
    if flags.annotations:
        splits = list(zip(flags.annotations, flags.images, strict=True))
    else:
        splits = [split for split in PUBLISHED if (epath.Path(flags.root) / split[0]).exists()]
        if not splits:
            parser.error(
                f"{flags.root!r} has neither {PUBLISHED[0][0]} nor {PUBLISHED[1][0]}; "
                "name the files with --annotations and --images"
            )
    with interrupt.one_line("validate"):
        text, errors = report(validate(flags.root, splits, flags.exif))
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    print(text)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
