"""What attention leaves of a TPU's memory: splash against stock, compiled without a TPU.

    pip install -e '.[scale]' -c constraints.txt
    python -m benchmarks.tpu_memory --out tpu_memory.json

Temporaries of the two programs of a training step (what the compiler reserves besides arguments
and results), for the longest bucket of S and B on v5e chips, divided by the images of a chip.
Below 1 the fused kernel needs less. Results are kept as those of ``benchmarks.scale`` are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import planned, report, scale

CHIP, CHIPS = "v5e", 8
RECIPES = ("yolos_s", "yolos_b")
FORMS = ("splash", "stock")
MIB = 2**20
COLUMNS = {
    "recipe": "", "tokens": "d", "images": "d", "program": "", "splash_MiB": ".0f",
    "stock_MiB": ".0f", "ratio": ".2f",
}  # fmt: skip


def compare(recipe: str, images: int, cache: Path) -> list[dict[str, Any]]:
    """Compiles one recipe with both forms.

    Args:
      recipe: a file of configs/.
      images: of each chip.
      cache: folder of results.

    Returns:
      A row for the forward pass and one for the update.

    Raises:
      RuntimeError: when the compiler finds no room for one of them.
    """
    found = {}
    for form in FORMS:
        case = planned.Case(CHIP, CHIPS, recipe, 1, images, form)
        print(f"{case}: compiling ...", flush=True)
        found[form] = planned.facts(case, cache)
        if "error" in found[form]:
            raise RuntimeError(f"{case}: {found[form]['error']}")
    prefix = 1 + planned.read_recipe(recipe).model.num_queries
    rows = []
    for program in ("forward", "update"):
        splash, stock = (found[form]["programs"][program]["temp"] / images for form in FORMS)
        rows.append(
            {
                "recipe": recipe,
                "tokens": prefix + found["splash"]["bucket"][0],
                "images": images,
                "program": program,
                "splash_MiB": splash / MIB,
                "stock_MiB": stock / MIB,
                "ratio": splash / stock,
            }
        )
    return rows


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=scale.RECIPES)
    parser.add_argument("--images", type=int, default=2, help="of each chip")
    parser.add_argument("--cache", default="runs/scale", help="folder of results")
    arguments = parser.parse_args()
    scale.prepare()
    recipes = ("yolos_ti",) if arguments.quick else arguments.recipes
    images = 1 if arguments.quick else arguments.images
    rows = [row for recipe in recipes for row in compare(recipe, images, Path(arguments.cache))]
    print("per image:")
    print(report.table(rows, COLUMNS))
    report.write(arguments.out, "tpu_memory", rows, chip=CHIP)


if __name__ == "__main__":
    main()
