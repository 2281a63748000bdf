"""Where a GPU's time goes, as far as the compiler tells without one: bytes and products by kernel.

    pip install 'jax[cuda13]'
    python -m benchmarks.gpu_kernels --recipe yolos_s --images 64 --out kernels.json

Compiles forward and update of a recipe's longest bucket for a GPU that is not here, and adds up
what every kernel reads, writes and multiplies, loops as often as they run. ``us`` is the least time
of an image by the card's published bandwidth and peaks: no kernel reaches both, none is measured.
It is for comparing two forms of the same program; above all it shows activations being moved.
"""

from __future__ import annotations

from typing import Any

from benchmarks import kernels, planned, report, scale, slices

MIB, GIGA, MICRO = 2**20, 1e9, 1e-6
CARDS = tuple(name for name, chip in slices.CHIPS.items() if chip.platform == "cuda")
COLUMNS = {
    "program": "", "us": ".1f", "share": ".1%", "MiB": ".1f", "gflop": ".1f", "times": "d",
    "does": "", "gives": "", "source": "",
}  # fmt: skip


def costs(found: list[kernels.Kernel], card: str, images: int) -> list[dict[str, Any]]:
    """A row per kernel, of one image, the dearest first.

    Args:
      found: of a program.
      card: a key of ``slices.CHIPS``.
      images: of the program.
    """
    chip = slices.CHIPS[card]
    peaks = (chip.hbm_bandwidth, chip.flops, slices.FLOAT32_FLOPS[card])
    total = sum(kernel.seconds(*peaks) for kernel in found)
    rows = [
        {
            "us": kernel.seconds(*peaks) / images / MICRO,
            "share": kernel.seconds(*peaks) / total,
            "MiB": kernel.bytes / images / MIB,
            "gflop": kernel.flops / images / GIGA,
            "times": kernel.times,
            "does": kernel.does,
            "gives": kernel.gives,
            "source": kernel.source,
        }
        for kernel in found
    ]
    return sorted(rows, key=lambda row: -row["us"])


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--recipe", default="yolos_s", choices=scale.RECIPES)
    parser.add_argument("--card", default="h200", choices=CARDS)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--top", type=int, default=16, help="kernels of a program to print")
    arguments = parser.parse_args()
    scale.prepare([arguments.card])
    recipe, images = arguments.recipe, arguments.images
    if arguments.quick:
        recipe, images = "yolos_ti", 2
    case = planned.Case(arguments.card, 1, recipe, 1, images)
    print(f"{case}: compiling ...", flush=True)
    _, programs = planned.compile_step(*planned.arguments(case))
    rows = []
    for kind, program in programs.items():
        some = costs(kernels.read(program.compiled.as_text()), arguments.card, images)
        rows += [{"program": kind} | row for row in some]
        print(report.table([{"program": kind} | row for row in some[: arguments.top]], COLUMNS))
        kept = program.compiled.memory_analysis().temp_size_in_bytes / images / MIB
        print(
            f"{kind}: at least {sum(row['us'] for row in some):.0f} us an image, "
            f"{sum(row['MiB'] for row in some):.0f} MiB moved, {kept:.0f} MiB of temporaries\n"
        )
    report.write(arguments.out, "gpu_kernels", rows, case=str(case))


if __name__ == "__main__":
    main()
