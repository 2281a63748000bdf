"""What convert_torch_weights.py does: read, report, write, verify, and only then rename."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from yolos_jax import interrupt
from yolos_jax.convert import compare, export, weights
from yolos_jax.convert.conversion import Converted, Options
from yolos_jax.convert.read import Source


def convert(args: argparse.Namespace) -> None:
    """Converts a checkpoint.

    Args:
      args: ``source``, ``destination``, ``to``, ``overwrite``, ``verify`` and the options.

    Raises:
      ValueError: the source cannot be converted, the destination is taken, or the two differ.
      OSError: the destination cannot be written.
    """
    export.check_destination(args.source, args.destination, args.overwrite)
    options = compare.options_of(args)
    converted, source = weights.open_checkpoint(args.source, options)
    if options.seed is not None and (source is None or not converted.new):
        raise ValueError(f"{args.source}: --seed {options.seed}, but nothing of it is drawn.")
    print(converted.describe())
    print(f"{weights.count_parameters(converted.params):,} parameters")
    print(converted.label_map.describe())
    with interrupt.complete_or_nothing(args.destination) as path:
        export.WRITERS[args.to](converted, path, args.source)
        if args.verify is not None:
            verify(converted, source, args.source, path, args.verify)
    print(f"written: {args.destination}")
    if converted.new:
        print(f"a start for training: --config.init={args.destination}")


def verify(
    converted: Converted, source: Source | None, name: str, written: Path, picture: str
) -> None:
    """Runs the source and what was written on one picture and prints where they differ.

    Raises:
      ValueError: logits or boxes differ by more than the tolerance.
    """
    image = picture or compare.generated_picture(480, 640)
    pixels = compare.pixels_of(image, converted.preprocess, compare.unit_of(converted))
    result = weights.open_checkpoint(written, Options())
    runs = compare.runner(converted, source, name), compare.runner(*result, str(written))
    found = compare.differences(*runs, pixels)
    print(compare.table({picture or "generated picture": found}))
    worst = np.max([found["logits"], found["boxes"]])  # NaN where one is, unlike Python's max
    if not worst <= compare.TOLERANCE:
        raise ValueError(
            f"--verify: logits or boxes differ by {worst:.3g}, more than {compare.TOLERANCE:g}; "
            "nothing was written."
        )
    print(f"verified: logits and boxes differ by at most {worst:.3g}")
