"""Draws what a detector finds on pictures.

    python -m yolos_jax.predict runs/demo photo.jpg folder_of_photos --out found

Writes each picture with its boxes, and ``results.json``; needs neither tensorflow nor pycocotools.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from etils import epath
from PIL import Image, PngImagePlugin

from yolos_jax import interrupt, lettering, visualize
from yolos_jax.data import files
from yolos_jax.data import image as image_lib
from yolos_jax.labels import LabelMap

if TYPE_CHECKING:  # It starts jax: not before the command line makes sense.
    from yolos_jax import detector

SOFTWARE = "yolos_jax.predict"  # in the text of pictures written here, which may be replaced
NAMED = 6  # boxes that the line of a picture names


class Picture(NamedTuple):
    """A picture to look at."""

    path: epath.Path  # local, or in an object store
    target: Path  # where the annotated picture goes


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; None: of this process. Ends the program where it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m yolos_jax.predict", description="Draws what a detector finds on pictures."
    )
    parser.add_argument("checkpoint", help="folder of a run, or of converted weights")
    parser.add_argument("pictures", nargs="+", help="picture, or folder of them; gs:// too")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score (0.5)")
    parser.add_argument("--top_k", type=int, default=0, help="boxes per picture at most (0: all)")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures at once (8)")
    args = parser.parse_args(argv)
    if not 0 <= args.threshold <= 1:
        parser.error(f"--threshold {args.threshold}: expected a score, 0 to 1")
    if files.is_remote(args.out):
        parser.error(f"--out {args.out}: expected a local folder")
    if args.top_k < 0 or args.batch_size < 1:
        parser.error("--top_k must not be negative, --batch_size at least 1")
    return args


def find_pictures(names: Sequence[str], out: Path) -> list[Picture]:
    """Lists the pictures that were named, those of folders by name.

    Raises:
      ValueError: no such file or folder, a folder without pictures, or pictures that lie where
        the annotated ones would go.
    """
    paths: list[epath.Path] = []
    for name in names:
        path = files.path_of(name)
        if files.is_folder(path):
            paths += pictures_in(path, out)
        elif files.exists(path):
            paths.append(path)
        else:
            raise ValueError(f"{path}: no such picture or folder")
    paths = list(dict.fromkeys(paths))
    for path in paths:
        if not files.is_remote(path) and Path(path).resolve().parent == out.resolve():
            raise ValueError(f"--out {out} holds the picture {path.name}: choose another folder")
    taken: set[str] = set()
    pictures = []
    for path in paths:
        # Pictures of two folders may have one name.
        names_free = (path.stem + end for end in ("", *(f"_{n}" for n in range(2, len(paths) + 2))))
        stem = next(name for name in names_free if name.lower() not in taken)
        taken.add(stem.lower())
        pictures.append(Picture(path, out / f"{stem}.png"))
    return pictures


def pictures_in(folder: epath.Path, out: Path) -> list[epath.Path]:
    """The pictures of a folder by name; says on stderr that folders inside are left out, if any.

    Raises:
      ValueError: there are none.
    """
    entries = sorted(folder.iterdir())
    inside = [path for path in entries if path.suffix.lower() in image_lib.SUFFIXES]
    if not files.is_remote(folder):  # A store would be asked once for every picture.
        inside = [path for path in inside if not path.is_dir()]
    if not inside:
        raise ValueError(
            f"{folder}: no picture there ({', '.join(image_lib.SUFFIXES)}); folders inside are not "
            "looked into"
        )
    others = [path for path in entries if path not in inside and not path.name.startswith(".")]
    # Where an earlier call has put its own pictures, nobody expects to be looked into.
    count = sum(path.is_dir() and Path(path).resolve() != out.resolve() for path in others)
    if count:
        folders = "1 folder inside is" if count == 1 else f"{count} folders inside are"
        print(f"{folder}: {folders} not looked into", file=sys.stderr)
    return inside


def refuse_others(out: Path, names: Sequence[str]) -> None:
    """Raises ValueError for the first file in the way that no earlier call has written."""
    results, ours = out / "results.json", set()
    try:
        earlier = json.loads(results.read_text(encoding="utf-8"))
        if {"checkpoint", "threshold", "unreadable"} <= set(earlier):
            ours = {results.name, *(record["annotated"] for record in earlier["pictures"])}
    except (OSError, ValueError, TypeError, KeyError):
        pass  # not one of ours
    for name in (results.name, *names):
        if (out / name).exists() and name not in ours and not _is_marked(out / name):
            raise ValueError(
                f"--out {out} holds a {name} that predict does not know as its own (older versions "
                "did not mark theirs): choose another folder"
            )


def _is_marked(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            return picture.info.get("Software") == SOFTWARE
    except (OSError, ValueError, Image.DecompressionBombError):
        return False


def predict_chunk(model: detector.Detector, paths: Sequence[os.PathLike]) -> list:
    """Decodes pictures and predicts them together.

    Returns:
      For each picture (pixels, prediction), or the ValueError that says what is wrong with it.
    """
    outcomes: list = []
    for path in paths:
        try:
            outcomes.append(image_lib.decode(path, exif=model.exif))
        except ValueError as error:
            outcomes.append(error)
    readable = [i for i, outcome in enumerate(outcomes) if isinstance(outcome, np.ndarray)]
    predictions = model.predict([outcomes[i] for i in readable], threshold=0.0)
    for i, prediction in zip(readable, predictions, strict=True):
        outcomes[i] = outcomes[i], prediction
    return outcomes


def summary_line(name: str, prediction: detector.Prediction, kept: int, threshold: float) -> str:
    """Says in one line what was found on a picture: the first ``kept`` predictions."""
    scored = zip(prediction.names[:kept][:NAMED], prediction.scores, strict=False)
    named = ", ".join(f"{what} {score:.2f}" for what, score in scored)
    if kept:
        more = f", and {kept - NAMED} more" if kept > NAMED else ""
        return f"{name}: {kept} box{'es' if kept > 1 else ''}: {named}{more}"
    if not len(prediction.scores):
        return f"{name}: no score is a number; the parameters of this checkpoint are no use"
    best, score = prediction.names[0], float(prediction.scores[0])
    return (
        f"{name}: nothing scores {threshold:g} or more; the best is {best} {score:.3f}, "
        f"try --threshold {0.9 * score:.2g}"
    )


def run(args: argparse.Namespace) -> list[str]:
    """Predicts, draws and writes; returns a message for every picture that could not be read."""
    out = Path(args.out)
    pictures = find_pictures(args.pictures, out)
    refuse_others(out, [picture.target.name for picture in pictures])
    from yolos_jax import detector

    model = detector.load(args.checkpoint)
    interrupt.make_folder(out)
    records, unreadable = [], []
    for start in range(0, len(pictures), args.batch_size):
        chunk = pictures[start : start + args.batch_size]
        outcomes = predict_chunk(model, [picture.path for picture in chunk])
        for picture, outcome in zip(chunk, outcomes, strict=True):
            if isinstance(outcome, ValueError):
                unreadable.append(str(outcome))
                print(f"cannot be used: {outcome}", file=sys.stderr)
                continue
            pixels, prediction = outcome
            kept = int((prediction.scores >= args.threshold).sum())
            kept = min(kept, args.top_k or kept)
            records.append(write_picture(picture, pixels, prediction, kept, model.label_map))
            print(summary_line(str(picture.path), prediction, kept, args.threshold), flush=True)
    results = {
        "checkpoint": os.path.abspath(args.checkpoint),
        "threshold": args.threshold,
        "pictures": records,
        "unreadable": unreadable,
    }
    with interrupt.complete_or_nothing(out / "results.json") as path:
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return unreadable


def write_picture(
    picture: Picture,
    pixels: np.ndarray,
    prediction: detector.Prediction,
    kept: int,
    label_map: LabelMap,
) -> dict:
    """Draws the first ``kept`` predictions; returns what results.json says about the picture."""
    prediction = dataclasses.replace(
        prediction,
        boxes_xyxy_px=prediction.boxes_xyxy_px[:kept],
        scores=prediction.scores[:kept],
        category_ids=prediction.category_ids[:kept],
        names=prediction.names[:kept],
    )
    slots, names = label_map.slots(prediction.category_ids), lettering.class_names(label_map)
    boxes = visualize.Boxes(
        prediction.boxes_xyxy_px, slots, [names[slot] for slot in slots], prediction.scores
    )
    text = PngImagePlugin.PngInfo()
    text.add_text("Software", SOFTWARE)
    with interrupt.complete_or_nothing(picture.target) as path:
        visualize.draw(pixels, boxes).save(path, "PNG", pnginfo=text)
    return {
        "file": str(picture.path),
        "annotated": picture.target.name,
        "height": pixels.shape[0],
        "width": pixels.shape[1],
        **prediction.to_dict(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Predicts as the command line says; ends with 1 and one message where it cannot."""
    args = parse(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    with interrupt.one_line("predict"):
        from yolos_jax.programs import one_message

        with one_message("predict", "a smaller --batch_size needs less"):
            unreadable = run(args)
    print(f"pictures with boxes and results.json are in {args.out}")
    if unreadable:
        sys.exit(
            f"predict: {len(unreadable)} of the pictures could not be used; they are named above"
        )


if __name__ == "__main__":
    main()
