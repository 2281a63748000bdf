"""How many of the patches that the device computes are padding, by recipe, batch and buckets.

    python -m benchmarks.padding --out padding.json

Over sizes like COCO's. Beside it: pictures in the order of the permutation, not grouped by length,
and the square canvas of the largest side (1333 x 1333) that others pad to.
"""

from __future__ import annotations

import argparse
import importlib

from benchmarks import report
from benchmarks.coco_like import coco_like
from yolos_jax.data.plan import Recipe, choose_buckets, make_plan

RECIPES = ("yolos_ti", "yolos_s")  # S-dWr and B augment as S does
BATCHES = (8, 16, 64, 256, 1024)


def measure(recipe_name: str, images: int, window: int) -> list[dict]:
    """One dictionary per number of buckets and batch size."""
    config = importlib.import_module(f"configs.{recipe_name}").get_config()
    index = coco_like(images, 7 * images)
    recipe = Recipe.from_config(config, config.model.patch_size)
    canvas = (recipe.max_size // recipe.multiple) ** 2
    found = []
    for count in sorted({8, config.buckets.count, 16}):
        buckets = choose_buckets(
            index, recipe, count, config.buckets.multiple, 1 + config.model.num_queries
        )
        for batch_size in BATCHES:
            row = {"recipe": recipe_name, "buckets": count, "batch_size": batch_size}
            for name, steps in (("grouped", window), ("not_grouped", 1)):
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
    parser.add_argument("--window", type=int, default=64, help="steps")
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
