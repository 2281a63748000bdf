"""How many of the patches, or pixels, that the device computes are padding.

    python -m benchmarks.padding --out padding.json

By recipe, batch and buckets, over sizes like COCO's. Beside it: pictures in the order of the
permutation, not grouped by shape, and the square canvas of the largest side (1333 x 1333) that
others pad to.
"""

from __future__ import annotations

import argparse
import importlib

from benchmarks import report
from benchmarks.coco_like import coco_like
from yolos_jax.data.plan import Recipe, make_plan
from yolos_jax.models.build import layout_of

# S-dWr and B augment as S does, all DETRs alike.
RECIPES = ("yolos_ti", "yolos_s", "detr_r50")
BATCHES = (8, 16, 64, 256, 1024)


def measure(recipe_name: str, images: int, window: int) -> list[dict]:
    """One dictionary per number of buckets and batch size; ``window`` 0: the recipe's."""
    config = importlib.import_module(f"configs.{recipe_name}").get_config()
    index, layout = coco_like(images, 7 * images), layout_of(config.model)
    recipe = Recipe.from_config(config, layout.patch_size)
    canvas = (recipe.max_size // recipe.multiple) ** 2
    found = []
    for count in sorted({8, config.buckets.count, 16}):
        buckets = layout.buckets(index, recipe, count, config.buckets.multiple)
        for batch_size in BATCHES:
            row = {"recipe": recipe_name, "buckets": count, "batch_size": batch_size}
            for name, steps in (("grouped", window or config.buckets.window), ("not_grouped", 1)):
                plan = make_plan(
                    index, recipe, buckets, seed=0, epoch=0, batch_size=batch_size, window=steps
                )
                row[name] = plan.waste()
            row["canvas"] = 1 - float(plan.grid.prod(axis=-1).mean()) / canvas
            found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="", help="JSON file to write")
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--window", type=int, default=0, help="steps (0: the recipe's)")
    arguments = parser.parse_args()
    print("recipe       buckets  batch  grouped  not grouped  canvas")
    rows = []
    for recipe_name in RECIPES:
        for row in measure(recipe_name, arguments.images, arguments.window):
            print(
                f"{row['recipe']:12s} {row['buckets']:7d} {row['batch_size']:6d} "
                f"{row['grouped']:8.1%} {row['not_grouped']:12.1%} {row['canvas']:7.1%}"
            )
            rows.append(row)
    report.write(arguments.out, "padding", rows)


if __name__ == "__main__":
    main()
