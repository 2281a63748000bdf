"""What a conversion is asked, what it infers, and what it answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from yolos_jax.convert import read
from yolos_jax.labels import UNUSED, LabelMap

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Published(NamedTuple):
    """What the published models of a width have, where a checkpoint does not say."""

    heads: int
    position_grid: tuple[int, int]
    mid_position_grid: tuple[int, ...]
    size: int  # shorter side of pictures at evaluation, pixels


PUBLISHED = {
    192: Published(3, (50, 83), (), 512),  # YOLOS-Ti
    330: Published(6, (32, 54), (32, 54), 800),  # YOLOS-S (dWr)
    384: Published(6, (32, 54), (32, 54), 800),  # YOLOS-S
    768: Published(12, (50, 84), (50, 84), 800),  # YOLOS-B
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What flags say of a checkpoint that does not say it itself; None: not given."""

    num_heads: int | None = None
    init_pe_size: tuple[int, int] | None = None  # height and width in pixels, as the original's
    mid_pe_size: tuple[int, ...] | None = None  # likewise; () for a model without these tables
    dilation: bool | None = None  # of a DETR's last stage
    labels: str | None = None  # a COCO JSON whose categories the class head has
    size: int | None = None  # shorter side of pictures, pixels
    max_size: int | None = None
    seed: int | None = None  # of parameters that a start does not have; None is 0


class Row(NamedTuple):
    """One tensor of a conversion."""

    action: str  # 'loaded', 'resized', 'new' or 'unused'
    name: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Converted:
    """A checkpoint in our form, not yet written."""

    kind: str  # what the source is, in words
    params: dict
    model: dict[str, Any]  # the keys of config.model
    label_map: LabelMap
    preprocess: dict[str, Any]  # the keys of config.preprocess, and exif
    rows: tuple[Row, ...]  # every tensor of the source and every parameter that is new
    new: tuple[str, ...] = ()  # paths of the parameters that were drawn at random
    notes: tuple[str, ...] = ()  # what had to be assumed

    def metadata(self, source: str) -> dict[str, Any]:
        """What travels with the parameters."""
        return {
            "model": self.model,
            "num_classes": self.label_map.num_classes,
            "label_map": self.label_map.to_json(),
            "preprocess": self.preprocess,
            "step": 0,
            "epoch": 0,
            "plan_fingerprint": "",
            "config": None,
            "source": f"{self.kind}: {source}",
            "new": list(self.new),
        }

    def describe(self) -> str:
        """One line per tensor, then a summary and what had to be assumed."""
        width = max(len(row.name) for row in self.rows)
        lines = [f"{row.action:8}{row.name:{width}}  {row.detail}".rstrip() for row in self.rows]
        counts = {action: 0 for action in ("loaded", "resized", "new", "unused")}
        for row in self.rows:
            counts[row.action] += 1
        summary = ", ".join(f"{count} {action}" for action, count in counts.items())
        return "\n".join([*lines, f"{self.kind}: tensors {summary}", *self.notes])


def model_config(**values: Any) -> dict[str, Any]:
    """The keys of ``config.model``: the given ones, and the recipes' defaults for the rest."""
    defaults = {
        "name": "yolos",
        "position_init": "normal",
        "det_token_std": 0.02,
        "layer_norm_eps": 1e-6,
        "dtype": "bfloat16",
        "attention": "auto",
        "scan": True,
        "remat": "default",
    }
    return defaults | values


def heads_of(width: int, options: Options) -> int:
    """The number of heads, which no tensor tells: from the flag, else from a published width."""
    heads = options.num_heads or (PUBLISHED[width].heads if width in PUBLISHED else 0)
    if not heads:
        raise ValueError(
            f"width {width} is none of the published {sorted(PUBLISHED)}, and tensors do not tell "
            "the number of attention heads: give --num_heads."
        )
    if heads < 0 or width % heads:
        raise ValueError(f"--num_heads {heads} does not divide the width {width}.")
    return heads


def refuse_contradictions(model: Mapping[str, Any], options: Options, where: str) -> None:
    """Raises ValueError naming each flag that says otherwise than the checkpoint itself.

    Args:
      model: the keys of ``config.model`` that the checkpoint says.
      options: the flags.
      where: what to call the checkpoint.
    """
    wrong, patch = [], model["patch_size"]
    if options.num_heads not in (None, model["heads"]):
        wrong.append(f"--num_heads {options.num_heads}, but the checkpoint has {model['heads']}")
    for flag, key in (("init_pe_size", "position_grid"), ("mid_pe_size", "mid_position_grid")):
        pixels, stored = getattr(options, flag), [side * patch for side in model[key]]
        if pixels is not None and [side // patch * patch for side in pixels] != stored:
            given, has = (" ".join(map(str, sides)) or "none" for sides in (pixels, stored))
            wrong.append(f"--{flag} {given}, but the checkpoint has {has}")
    if options.dilation is not None:
        wrong.append(f"--{'' if options.dilation else 'no-'}dilation, but a YOLOS has no stages")
    if wrong:
        raise ValueError(f"{where}: {'; '.join(wrong)}.")


def target_grid(
    pixels: Sequence[int] | None, published: tuple[int, ...] | None, patch_size: int, flag: str
) -> tuple[int, ...]:
    """The grid of a table that a start is to have: the flag's pixels, else the published one."""
    if pixels is not None:
        grid = tuple(int(side) // patch_size for side in pixels)
        if any(side < 1 for side in grid):
            raise ValueError(f"--{flag} {' '.join(map(str, pixels))}: less than one patch.")
        return grid
    if published is None:
        raise ValueError(
            f"this width has no published size of position tables: give --{flag} HEIGHT WIDTH in "
            f"pixels{' (or none)' if flag == 'mid_pe_size' else ''}."
        )
    return published


def table_grid(
    rows: int,
    candidates: Sequence[tuple[str, Sequence[int] | None]],
    patch_size: int,
    flag: str,
) -> tuple[int, int]:
    """The grid of a stored table: the first candidate, unless it contradicts the number of rows.

    Args:
      rows: patches of the table.
      candidates: (where it comes from, height and width in pixels or None), best first. The flag,
        called 'flag', must fit; others are passed over when they do not.
      patch_size: pixels.
      flag: its name, for errors.

    Raises:
      ValueError: nothing fits; names the grids that would.
    """
    for origin, pixels in candidates:
        if pixels is None or len(pixels) != 2:
            continue
        grid = tuple(int(side) // patch_size for side in pixels)
        if math.prod(grid) == rows:
            return grid
        if origin == "flag":
            break
    possible = [(h, rows // h) for h in range(1, rows + 1) if rows % h == 0 and h <= 4 * rows // h]
    possible = [grid for grid in possible if grid[1] <= 4 * grid[0]]
    told = "; ".join(
        f"{origin} says {pixels[0]}x{pixels[1]} pixels"
        for origin, pixels in candidates
        if pixels is not None and len(pixels) == 2
    )
    grids = ", ".join(f"{h}x{w}" for h, w in possible) or "none that is plausible"
    example = possible[0] if possible else (1, rows)
    raise ValueError(
        f"the position table has {rows} rows of patches, and their grid is not known "
        f"({told or 'nothing says it'}). Possible: {grids}. Give --{flag} in pixels, such as "
        f"--{flag} {example[0] * patch_size} {example[1] * patch_size}."
    )


def preprocess_of(
    size: int,
    max_size: int,
    options: Options,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    exif: str = "ignore",
) -> dict[str, Any]:
    """The keys of ``config.preprocess``, and ``config.data.exif``; flags win."""
    size = options.size or size
    if options.size and not options.max_size:
        max_size = longest_side(size)
    return {
        "size": size,
        "max_size": options.max_size or max_size,
        "mean": list(mean),
        "std": list(std),
        "exif": exif,
    }


def preprocess_over(stored: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """What a checkpoint says of pictures, with the flags over it."""
    kept = (stored["mean"], stored["std"], stored.get("exif", "ignore"))
    return preprocess_of(stored["size"], stored["max_size"], options, *kept)


def longest_side(size: int) -> int:
    """The original's bound of the longer side for a shorter side of ``size`` pixels."""
    return size * 1333 // 800


def label_map_of(num_classes: int, options: Options) -> LabelMap:
    """Names and ids of a head's classes: from --labels, or COCO's for 91, or generic ones.

    The original puts a category id directly into its slot, ids that are not used included; so do
    categories here whose ids are all below the number of classes. Otherwise slots are the
    categories sorted by id.
    """
    if options.labels is None:
        return LabelMap.coco91() if num_classes == 91 else generic_labels(num_classes)
    label_map = labels_of(options.labels)
    by_id = dict(zip(label_map.category_ids, label_map.names, strict=True))
    if all(0 <= category_id < num_classes for category_id in by_id):
        slots = range(num_classes)
        return LabelMap(tuple(slots), tuple(by_id.get(slot, UNUSED) for slot in slots))
    if label_map.num_classes != num_classes:
        raise ValueError(
            f"{options.labels}: {label_map.num_classes} categories with ids up to {max(by_id)}, "
            f"but the checkpoint's head has {num_classes} classes."
        )
    return label_map


def labels_of(path: str) -> LabelMap:
    """The categories of a COCO JSON, sorted by id; ValueError naming the file."""
    try:
        return LabelMap.from_categories(read.read_json(Path(path)).get("categories"))
    except ValueError as error:
        raise ValueError(f"{path}: categories: {error}") from error


def generic_labels(num_classes: int) -> LabelMap:
    """class_0, class_1, ... with their slots for ids."""
    slots = range(num_classes)
    return LabelMap(tuple(slots), tuple(f"class_{slot}" for slot in slots))


def loaded_rows(names: Mapping[str, Any]) -> tuple[Row, ...]:
    """A row per tensor that was only renamed and transposed."""
    return tuple(Row("loaded", name, str(tuple(tensor.shape))) for name, tensor in names.items())
