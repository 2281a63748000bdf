"""Two checkpoints of any known kind, the same pictures, and the differences stage by stage.

    python -m yolos_jax.convert.compare yolos_s.pth runs/yolos_s
    python -m yolos_jax.convert.compare hustvl/yolos-tiny runs/yolos_ti street.jpg

Checkpoints of other projects run in torch, those of this project in JAX, both in float32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from yolos_jax import batch, detector
from yolos_jax.convert import read, reference, systems, weights
from yolos_jax.convert.conversion import Converted, Options
from yolos_jax.convert.read import Source
from yolos_jax.data import image as image_lib
from yolos_jax.data import patches as patches_lib
from yolos_jax.models.build import layout_of

TOLERANCE = 1e-4  # of logits and boxes, both sides in float32 at the highest precision
_GENERATED = ((480, 640), (500, 333))  # pictures when none are given, height and width
# Fields of detector.RawOutputs, as reference.run calls them.
_STAGES = {
    "embed": "embed",
    "blocks": "block",
    "norm": "norm",
    "feature": "backbone",
    "memory": "encoder",
    "decoder": "decoder",
    "pred_logits": "logits",
    "pred_boxes": "boxes",
}
_STACKED = ("blocks", "decoder")  # one for each layer

Run = Callable[[np.ndarray], dict[str, np.ndarray]]


def runner(converted: Converted, source: Source | None, path: str) -> Run:
    """What runs a checkpoint: its own code in torch, or ours where it is one of ours."""
    if source is not None:
        return lambda pixels: reference.run(converted, source, pixels)
    return ours(detector.Detector(converted.params, converted.metadata(path), dtype="float32"))


def ours(model: detector.Detector) -> Run:
    """A detector of ours as a function from pixels to stages, named as in ``reference.run``."""

    def run(pixels: np.ndarray) -> dict[str, np.ndarray]:
        found = model.outputs(pixels, capture=True)
        stages: dict[str, np.ndarray] = {}
        for field, name in _STAGES.items():
            array = getattr(found, field)
            if array is not None and field in _STACKED:
                stages |= {f"{name} {i}": layer for i, layer in enumerate(array)}
            elif array is not None:
                stages[name] = array
        return stages

    return run


def differences(a: Run, b: Run, pixels: np.ndarray) -> dict[str, float]:
    """Largest absolute difference of each stage.

    Args:
      a: one model.
      b: another.
      pixels: float32 [B, H, W, 3], normalised.

    Raises:
      ValueError: the two do not have the same stages.
    """
    first, second = a(pixels), b(pixels)
    shapes = [{name: array.shape for name, array in found.items()} for found in (first, second)]
    if shapes[0] != shapes[1]:
        others = [
            f"{name}: {shapes[0].get(name, 'absent')} and {shapes[1].get(name, 'absent')}"
            for name in {**shapes[0], **shapes[1]}
            if shapes[0].get(name) != shapes[1].get(name)
        ]
        raise ValueError(f"these are different models; their stages differ in {'; '.join(others)}.")
    return {name: float(np.abs(first[name] - second[name]).max()) for name in first}


def pixels_of(picture: str | np.ndarray, preprocess: Mapping[str, Any], patch: int) -> np.ndarray:
    """A picture as detectors see it: resized and normalised, float32 [1, H, W, 3].

    Args:
      picture: its path, or uint8 [height, width, 3].
      preprocess: the keys of ``config.preprocess``.
      patch: pixels of which sides are multiples: ``unit_of`` the detector.
    """
    image = picture if isinstance(picture, np.ndarray) else image_lib.decode(picture)
    patches, grid = image_lib.preprocess(image, preprocess, patch)
    normalised = batch.normalise(patches, preprocess["mean"], preprocess["std"])
    return patches_lib.unpatchify(normalised, grid, patch)[None]


def unit_of(converted: Converted) -> int:
    """Pixels of which the sides of a detector's pictures are multiples."""
    return layout_of(converted.model).patch_size


def generated_picture(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: soft gradients, hard edges and noise, always the same."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    soft = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (height + width)], axis=-1)
    image = soft + random.normal(0, 12, soft.shape)
    for _ in range(6):
        top, left = random.integers(0, height - 40), random.integers(0, width - 40)
        bottom, right = (
            top + random.integers(20, height // 2),
            left + random.integers(20, width // 2),
        )
        image[top:bottom, left:right] = random.integers(0, 256, 3)
    return np.clip(image, 0, 255).astype(np.uint8)


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """A line per stage, a column per picture under the end of its name."""
    stages = list(next(iter(found.values())))
    lines = [f"{'largest difference':20}" + "".join(f"{name[-22:]:>24}" for name in found)]
    for stage in stages:
        lines.append(f"{stage:20}" + "".join(f"{row[stage]:24.3g}" for row in found.values()))
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Flags for what a checkpoint does not say itself."""
    parser.add_argument(
        "--num_heads", type=_positive, help="attention heads; published widths imply them"
    )
    for name, what in (("init", "first position table"), ("mid", "tables after each block")):
        parser.add_argument(
            f"--{name}_pe_size",
            nargs="+",
            metavar="PIXELS",
            help=f"height and width in pixels that the {what} {'is' if name == 'init' else 'are'} "
            f"for{'' if name == 'init' else ', or none'}",
        )
    parser.add_argument(
        "--dilation",
        action=argparse.BooleanOptionalAction,
        help="of a DETR whose last stage keeps its resolution (DC5)",
    )
    parser.add_argument("--labels", help="COCO JSON with the categories of the class head")
    parser.add_argument("--size", type=_positive, help="shorter side of pictures, pixels")
    parser.add_argument(
        "--max_size",
        type=_positive,
        help="longer side of pictures at most, pixels; with --size alone 1333/800 of it",
    )
    parser.add_argument("--seed", type=int, help="of what a start does not have; default 0")


def options_of(args: argparse.Namespace) -> Options:
    """The flags as Options.

    Raises:
      ValueError: a size that is not two numbers.
    """
    return Options(
        num_heads=args.num_heads,
        init_pe_size=_pixels(args.init_pe_size, "init_pe_size"),
        mid_pe_size=()
        if args.mid_pe_size == ["none"]
        else _pixels(args.mid_pe_size, "mid_pe_size"),
        dilation=args.dilation,
        labels=args.labels,
        size=args.size,
        max_size=args.max_size,
        seed=args.seed,
    )


def _positive(word: str) -> int:
    """An argument that counts something; argparse prints the error after the flag's name."""
    if not (word.isascii() and word.isdigit() and int(word) > 0):
        raise argparse.ArgumentTypeError(f"{word!r} is no positive integer")
    return int(word)


def _pixels(words: Sequence[str] | None, flag: str) -> tuple[int, ...] | None:
    if words is None:
        return None
    if len(words) != 2 or not all(word.isdigit() and int(word) > 0 for word in words):
        raise ValueError(f"--{flag} {' '.join(words)}: expected height and width in pixels.")
    return tuple(int(word) for word in words)


def compare(args: argparse.Namespace) -> bool:
    """Prints the differences; whether logits and boxes agree within the tolerance."""
    options = options_of(args)
    opened = [weights.open_checkpoint(path, options) for path in (args.a, args.b)]
    runs = [runner(*one, path) for one, path in zip(opened, (args.a, args.b), strict=True)]
    for path, (converted, source) in zip((args.a, args.b), opened, strict=True):
        print(f"{path}: {converted.kind}, {'JAX' if source is None else 'torch'}")
    first, second = (converted for converted, _ in opened)
    names = [systems.system_of(converted.model).title for converted in (first, second)]
    if names[0] != names[1]:
        raise ValueError(f"{args.a} is a {names[0]}, {args.b} a {names[1]}: nothing to compare.")
    for what in ("preprocess", "label_map"):
        if _comparable(getattr(first, what)) != _comparable(getattr(second, what)):
            print(f"they differ in {what}; pictures are prepared as {args.a} wants them")
    pictures = {path: path for path in args.pictures} or {
        f"generated {h}x{w}": generated_picture(h, w) for h, w in _GENERATED
    }
    found = {
        name: differences(*runs, pixels_of(picture, first.preprocess, unit_of(first)))
        for name, picture in pictures.items()
    }
    print(table(found))
    # NaN where any is, unlike Python's max.
    worst = np.max([[row["logits"], row["boxes"]] for row in found.values()])
    same = worst <= TOLERANCE
    print(f"logits and boxes: {worst:.3g}, {'within' if same else 'MORE THAN'} {TOLERANCE:g}")
    return same


def _comparable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: list(v) if isinstance(v, list | tuple) else v for key, v in value.items()}
    return value


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: exits 1 where logits or boxes differ by more than the tolerance."""
    parser = argparse.ArgumentParser(
        prog="python -m yolos_jax.convert.compare",
        description="Runs two checkpoints on the same pictures and prints where they differ.",
    )
    parser.add_argument("a", help="checkpoint: file, folder, run, or hub name")
    parser.add_argument("b", help="another")
    parser.add_argument("pictures", nargs="*", help="pictures; without any, generated ones")
    add_options(parser)
    try:
        same = compare(parser.parse_intermixed_args(argv))  # flags between pictures
    except (ValueError, OSError) as error:
        sys.exit(f"compare: {error}")
    except ImportError as error:
        sys.exit(f"compare: {read.missing(error)}")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
