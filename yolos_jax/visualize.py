"""Boxes drawn on pictures, and sheets of pictures: PIL alone."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from yolos_jax import lettering
from yolos_jax.data import image as image_lib
from yolos_jax.data.index import Index

MIN_SIDE = 320  # pixels: smaller pictures are enlarged before they are drawn on
GAP = 12  # pixels between the pictures of a sheet
TITLE = 26  # pixels for the line above them


class Boxes(NamedTuple):
    """Boxes of one picture, as they are drawn."""

    boxes_xyxy_px: np.ndarray  # float [n, 4] in pixels of the picture
    labels: Sequence[int]  # [n]: colours go with them, whatever their numbering
    names: Sequence[str]  # [n], as ``lettering.class_names`` has them
    scores: Sequence[float] | None = None  # [n]; None for ground truth


class Panel(NamedTuple):
    """One picture of a sheet: what is there beside what was found."""

    image: np.ndarray  # uint8 [h, w, 3]
    truth: Boxes
    predicted: Boxes
    title: str


def colour(label: int) -> tuple[int, int, int]:
    """Returns the colour of a class: the same everywhere, neighbours far apart."""
    # Steps of the golden ratio around the circle of hues never repeat; lightness alternates too.
    hue = (0.02 + label * 0.618033988749895) % 1.0
    red, green, blue = colorsys.hls_to_rgb(hue, (0.5, 0.38, 0.62)[label % 3], 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw(image: np.ndarray, boxes: Boxes, scale: float | None = None) -> Image.Image:
    """Draws boxes with names and scores; the best scores end on top.

    Args:
      image: uint8 [h, w, 3].
      boxes: what to draw, in pixels of the image.
      scale: enlarges or shrinks the picture before it is drawn on. By default pictures whose
        shorter side is less than 320 pixels grow by a whole number, so that names are legible.

    Returns:
      An RGB picture.
    """
    height, width = image.shape[:2]
    if scale is None:
        # A strip of one pixel by thousands would become a poster: 4096 pixels at most.
        grown = min(-(-MIN_SIDE // min(height, width)), 4096 // max(height, width))
        scale = max(1, grown)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # Enlarged pixels stay visible as what they are.
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    canvas = Image.fromarray(image).convert("RGB").resize(size, how)
    pen = ImageDraw.Draw(canvas)
    line = max(2, round(min(size) / 200))
    font = lettering.font(max(12, round(min(size) / 32)))
    scores = boxes.scores
    order = range(len(boxes.names)) if scores is None else np.argsort(scores, kind="stable")
    corners = {}
    # All outlines before the first name: no box hides the name of another.
    for i in order:
        x0, y0, x1, y1 = np.asarray(boxes.boxes_xyxy_px[i], np.float64) * scale
        # A model that has learnt little puts boxes outside the picture.
        x0, x1 = np.clip((x0, max(x0, x1)), 0, size[0] - 1)
        y0, y1 = np.clip((y0, max(y0, y1)), 0, size[1] - 1)
        corners[i] = x0, y0
        # A white rim: the object may have the colour of its class.
        pen.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline="white", width=line + 2)
        pen.rectangle((x0, y0, x1, y1), outline=colour(boxes.labels[i]), width=line)
    for i, corner in corners.items():
        text = boxes.names[i] if scores is None else f"{boxes.names[i]} {scores[i]:.2f}"
        _write_name(pen, size, font, text, corner, colour(boxes.labels[i]))
    return canvas


def _write_name(pen, size, font, text, corner, background):
    """Writes a name on a patch of its class's colour: above the box, or inside near the edge."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, bottom - top + 6
    x = max(0, min(corner[0], size[0] - width))
    y = corner[1] - height if corner[1] >= height else min(corner[1], size[1] - height)
    pen.rectangle((x, y, x + width, y + height), fill=background)
    # Black on light colours, white on dark ones (luminance as ITU-R BT.601 weighs it).
    ink = "black" if np.dot(background, (0.299, 0.587, 0.114)) > 130 else "white"
    pen.text((x + 3 - left, y + 3 - top), text, font=font, fill=ink)


def sheet(panels: Sequence[Panel], columns: int = 2, side: int = 420) -> Image.Image:
    """Lays pictures out in a grid, each with its ground truth on the left, predictions beside it.

    Args:
      panels: at least one.
      columns: pairs side by side.
      side: longer side of a picture on the sheet, pixels.
    """
    if not panels:
        raise ValueError("a sheet needs at least one picture")
    font = lettering.font(15)
    pairs = []
    for panel in panels:
        scale = side / max(panel.image.shape[:2])
        left, right = (draw(panel.image, b, scale) for b in (panel.truth, panel.predicted))
        pair = Image.new("RGB", (2 * side + GAP, left.height + TITLE), "white")
        pen = ImageDraw.Draw(pair)
        truth = f"{lettering.title(panel.title)}: ground truth ({len(panel.truth.names)})"
        found = f"predicted ({len(panel.predicted.names)})"
        pen.text((0, 4), truth, font=font, fill="black")
        pen.text((side + GAP, 4), found, font=font, fill="black")
        pair.paste(left, (0, TITLE))
        pair.paste(right, (side + GAP, TITLE))
        pairs.append(pair)
    columns = min(columns, len(pairs))
    rows = [pairs[i : i + columns] for i in range(0, len(pairs), columns)]
    heights = [max(pair.height for pair in row) for row in rows]
    page = Image.new(
        "RGB",
        (columns * (2 * side + 4 * GAP) - GAP, sum(heights) + GAP * (len(rows) + 1)),
        "white",
    )
    y = GAP
    for row, height in zip(rows, heights, strict=True):
        for i, pair in enumerate(row):
            page.paste(pair, (GAP + i * (2 * side + 4 * GAP), y))
        y += height + GAP
    return page


def split_sheet(
    index: Index, results: Sequence[dict], count: int, threshold: float = 0.5
) -> Image.Image:
    """Draws pictures of a split, evenly chosen, with what an evaluation found on them.

    Args:
      index: the split.
      results: COCO results (``evaluation.Evaluation.results``).
      count: pictures; fewer when the split has fewer. Others take the place of those that cannot
        be read; where none can, the sheet says so.
      threshold: least score that is drawn.
    """
    count = min(count, len(index))
    chosen = np.unique(np.linspace(0, len(index) - 1, count).astype(int))
    found: dict[int, list[dict]] = {int(image_id): [] for image_id in index.image_ids}
    for result in results:
        if result["score"] >= threshold:
            found[result["image_id"]].append(result)
    panels: list[Panel] = []
    for row in [*chosen, *np.setdiff1d(np.arange(len(index)), chosen)]:
        if len(panels) == count:
            break
        exif = "apply" if index.orientation[row] > 1 else "ignore"
        try:
            image = image_lib.decode(index.read(row), exif, index.path(row))
        except ValueError:
            continue  # named and counted by the evaluation
        panels.append(_panel(index, row, image, found[int(index.image_ids[row])]))
    if not panels:
        page = Image.new("RGB", (420, TITLE), "white")
        ImageDraw.Draw(page).text((4, 4), "no picture of the split can be read", fill="black")
        return page
    return sheet(panels)


def _panel(index: Index, row: int, image: np.ndarray, found: Sequence[dict]) -> Panel:
    """A picture of a split, and the COCO results to draw on it."""
    names = lettering.class_names(index.label_map)
    boxes = slice(index.box_offsets[row], index.box_offsets[row + 1])
    labels = index.labels[boxes]
    truth = Boxes(index.boxes_xyxy_px[boxes], labels, [names[label] for label in labels])
    slots = {category: slot for slot, category in enumerate(index.label_map.category_ids)}
    labels = [slots[result["category_id"]] for result in found]
    xywh = np.array([result["bbox"] for result in found], np.float64).reshape(-1, 4)
    predicted = Boxes(
        np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], -1),
        labels,
        [names[label] for label in labels],
        [result["score"] for result in found],
    )
    return Panel(image, truth, predicted, bytes(index.file_names[row]).decode())
