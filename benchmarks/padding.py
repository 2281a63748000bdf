"""How much of what the device computes is padding.

    python -m benchmarks.padding --out padding.json

By recipe, batch and buckets, over sizes like COCO's: the share of all tokens of a sequence, class
and detection tokens among them, and of the patches alone; of a DETR, of the pixels of a canvas.
Sequences are multiples of 128 tokens, a TPU's tile, as in the recipes, and of 8, which a CPU does
with. Beside them: steps formed at random, not grouped by shape, and the square canvas of the
largest side (1333 x 1333) that others pad to.
"""

from __future__ import annotations

import argparse
import importlib
import itertools

from benchmarks import report
from benchmarks.coco_like import coco_like
from yolos_jax.data.layout import Canvases
from yolos_jax.data.plan import Recipe, make_plan
from yolos_jax.models.build import layout_of

# S-dWr and B augment as S does, all DETRs alike.
RECIPES = ("yolos_ti", "yolos_s", "detr_r50")
BATCHES = (8, 16, 64, 256, 1024)
WITHOUT_TILES = 8  # buckets.multiple where no kernel takes a tile of tokens
COLUMNS = {
    "recipe": "", "buckets": "d", "multiple": "d", "batch_size": "d",
    "tokens": ".1%", "patches": ".1%", "not_grouped": ".1%", "canvas": ".1%",
}  # fmt: skip


def measure(recipe_name: str, images: int) -> list[dict]:
    """One dictionary per multiple, number of buckets and batch size."""
    config = importlib.import_module(f"configs.{recipe_name}").get_config()
    index, layout = coco_like(images, 7 * images), layout_of(config.model)
    recipe = Recipe.from_config(config, layout.patch_size)
    canvas = (recipe.max_size // recipe.multiple) ** 2
    multiples = [config.buckets.multiple, WITHOUT_TILES][: 1 if isinstance(layout, Canvases) else 2]
    found = []
    for multiple, count in itertools.product(multiples, sorted({8, config.buckets.count, 16})):
        buckets = layout.buckets(index, recipe, count, multiple)
        for batch_size in BATCHES:
            plan, at_random = (
                make_plan(
                    index, recipe, buckets, seed=0, epoch=0, batch_size=batch_size, grouped=grouped
                )
                for grouped in (True, False)
            )
            row = {"recipe": recipe_name, "buckets": count, "multiple": multiple}
            row["batch_size"] = batch_size
            row["tokens"] = plan.waste(getattr(layout, "num_prefix", 0))
            row["patches"], row["not_grouped"] = plan.waste(), at_random.waste()
            row["canvas"] = 1 - float(plan.grid.prod(axis=-1).mean()) / canvas
            found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="", help="JSON file to write")
    parser.add_argument("--images", type=int, default=118_000)
    arguments = parser.parse_args()
    rows = [row for name in RECIPES for row in measure(name, arguments.images)]
    print(report.table(rows, COLUMNS))
    report.write(arguments.out, "padding", rows)


if __name__ == "__main__":
    main()
