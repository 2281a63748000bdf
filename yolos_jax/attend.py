"""Draws what a detector looks at for each of its answers.

    python -m yolos_jax.attend runs/demo-0/run photo.jpg --out attention.png

A row for every box: the box on the picture, then the last layer's attention from its query to the
picture, the mean over heads first. Of a YOLOS queries are detection tokens among all tokens, of a
DETR those of the decoder, which look at the encoder's cells.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from yolos_jax import interrupt, lettering, visualize
from yolos_jax.data import files
from yolos_jax.data import image as image_lib
from yolos_jax.data.patches import unpatchify

if TYPE_CHECKING:  # It starts jax: not before the command line makes sense.
    from yolos_jax import detector

SIDE = 240  # longer side of a picture on the sheet, pixels
GAP = 6  # pixels between pictures
TITLE = 22  # pixels for the line above a row
# Dark to bright in even steps, no two of one lightness.
_HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)])


class Attended(NamedTuple):
    """Every query's answer for one picture, and where it looked."""

    scores: np.ndarray  # float32 [Q], of the best class
    labels: np.ndarray  # int32 [Q], slots of the label map
    boxes_xyxy_px: np.ndarray  # float32 [Q, 4], in pixels of the picture
    # float32 [H, Q, rows, columns], weights of the cells of the picture; of a YOLOS the rest to a
    # sum of 1 is for class and detection tokens.
    maps: np.ndarray


def attend(model: detector.Detector, image: np.ndarray) -> Attended:
    """Runs the model on one picture, in float32, and keeps its last layer's attention.

    Args:
      model: a YOLOS or a DETR.
      image: uint8 [height, width, 3].

    Raises:
      ValueError: no answer is a number.
    """
    from yolos_jax import losses
    from yolos_jax.batch import Outputs, normalise

    patch_size = model.model.layout.patch_size
    cells, grid = image_lib.preprocess(image, model.preprocess, patch_size)
    pixels = normalise(
        unpatchify(cells, grid, patch_size), model.preprocess["mean"], model.preprocess["std"]
    )
    found = model.outputs(np.asarray(pixels)[None], capture=True)
    outputs = Outputs(found.pred_logits[None], found.pred_boxes[None])
    answers = losses.postprocess(outputs, np.array([image.shape[:2]], np.int32))
    if not np.isfinite(answers.scores).all():
        raise ValueError("scores are no numbers; the parameters of this checkpoint are no use")
    rows, cols = grid if found.real is None else found.real.shape[1:]
    maps, queries = found.attention[0], found.pred_logits.shape[1]
    if maps.shape[1] != queries:  # of all tokens among themselves: class, detection, patches
        maps = maps[:, 1 : 1 + queries]
    maps = maps[..., -rows * cols :].reshape(len(maps), queries, rows, cols)
    return Attended(*(np.asarray(part[0]) for part in answers), maps)


def heat(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Lays a map over a picture: dark where nothing looks, bright where most does.

    Args:
      image: uint8 [height, width, 3].
      weights: float [rows, columns], not negative; cells of the whole picture.

    Returns:
      uint8 [height, width, 3]; the largest weight is the brightest, whatever it is.
    """
    height, width = image.shape[:2]
    scaled = Image.fromarray(np.float32(weights / max(weights.max(), 1e-30)))
    level = np.asarray(scaled.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
    steps = np.linspace(0, 1, len(_HEAT))
    colour = np.stack([np.interp(level, steps, channel) for channel in _HEAT.T], -1)
    grey = np.asarray(Image.fromarray(image).convert("L"), np.float64)[..., None]
    return (0.3 * grey + 0.7 * colour).round().astype(np.uint8)


def sheet(
    image: np.ndarray, attended: Attended, queries: Sequence[int], names: Sequence[str]
) -> Image.Image:
    """Lays rows of pictures out: the box, the mean over heads, every head.

    Args:
      image: uint8 [height, width, 3].
      attended: of it.
      queries: which to draw, a row for each.
      names: of classes, by slot, as ``lettering.class_names`` has them.
    """
    scale = SIDE / max(image.shape[:2])
    width, height = (max(1, round(side * scale)) for side in image.shape[1::-1])
    small = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
    heads = len(attended.maps)
    column_width, row_height = SIDE + GAP, TITLE + height + GAP
    size = (heads + 2) * column_width + GAP, len(queries) * row_height + GAP
    page = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(page), lettering.font(14)
    for row, query in enumerate(queries):
        label, score = attended.labels[query], float(attended.scores[query])
        box = visualize.Boxes(attended.boxes_xyxy_px[[query]], [label], [names[label]], [score])
        maps = attended.maps[:, query]
        pictures = [np.asarray(visualize.draw(image, box, scale).resize((width, height)))]
        pictures += [heat(small, weights) for weights in (maps.mean(0), *maps)]
        titles = [f"query {query}", f"all heads ({maps.sum() / heads:.0%} on the picture)"]
        titles += [f"head {head} ({weights.sum():.0%})" for head, weights in enumerate(maps, 1)]
        top = GAP + row * row_height
        for column, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
            left = GAP + column * column_width
            pen.text((left, top + 2), title, font=font, fill="black")
            page.paste(Image.fromarray(picture), (left, top + TITLE))
    return page


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; None: of this process. Ends the program where it makes no sense."""
    parser = argparse.ArgumentParser(
        prog="python -m yolos_jax.attend", description="Draws what a detector looks at."
    )
    parser.add_argument("checkpoint", help="folder of a run, or of converted weights")
    parser.add_argument("picture", help="a picture; gs:// too")
    parser.add_argument("--out", required=True, help="PNG to write")
    parser.add_argument("--top_k", type=int, default=4, help="boxes, best scores first (4)")
    parser.add_argument("--queries", type=int, nargs="+", help="draw these instead, from 0")
    args = parser.parse_args(argv)
    if files.is_remote(args.out) or not args.out.lower().endswith(".png"):
        parser.error(f"--out {args.out}: expected a local file that ends in .png")
    if os.path.isdir(args.out):
        parser.error(f"--out {args.out}: is a folder, expected a file")
    there = os.path.exists(args.picture) and os.path.exists(args.out)
    if there and os.path.samefile(args.picture, args.out):
        parser.error(f"--out {args.out}: is the picture itself, expected another file")
    if args.top_k < 1:
        parser.error("--top_k must be at least 1")
    return args


def run(args: argparse.Namespace) -> None:
    """Looks, draws and writes; a line for every row.

    Raises:
      ValueError: no detector, no picture, or a query that the detector does not have.
    """
    from yolos_jax import detector

    model = detector.load(args.checkpoint)
    count = model.model.config.num_queries
    if wrong := [query for query in args.queries or () if not 0 <= query < count]:
        raise ValueError(f"--queries {wrong[0]}: the detector has queries 0 to {count - 1}")
    image = image_lib.decode(args.picture, model.exif)
    try:
        attended = attend(model, image)
    except ValueError as error:
        raise ValueError(f"{args.picture}: {error}") from error
    best = np.argsort(-attended.scores, kind="stable")[: args.top_k].tolist()
    queries = args.queries or best
    names = model.label_map.names
    page = sheet(image, attended, queries, lettering.class_names(model.label_map))
    with interrupt.complete_or_nothing(args.out) as path:
        page.save(path, "PNG")
    for query in queries:
        print(f"query {query}: {names[attended.labels[query]]} {attended.scores[query]:.2f}")


def main(argv: Sequence[str] | None = None) -> None:
    """Draws as the command line says; ends with 1 and one message where it cannot."""
    args = parse(argv)
    with interrupt.one_line("attend"):
        from yolos_jax.programs import one_message

        with one_message("attend", "a smaller picture needs less"):
            run(args)
    print(f"attention is in {args.out}")


if __name__ == "__main__":
    main()
