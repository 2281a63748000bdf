"""Where a TPU's time goes beside the attention kernels, by the compiler's own estimates.

    pip install -e '.[scale]' -c constraints.txt
    python -m benchmarks.tpu_cycles --recipe yolos_s --chip v5e --images 8 --out cycles.json

Compiles forward and update of a recipe's longest bucket for 8 chips that are not here, and adds up
what the compiler writes beside every instruction (``estimated_cycles``), loops as often as they
run. Kernels and some reshapes have no estimate, and nobody measured the others: figures are for
comparing two forms of the same program. Above all they show activations being moved.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import jax

from benchmarks import hlo, planned, report, scale, slices

CHIPS = 8
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN = 1 << 62  # and more: the compiler's way of saying that it does not know
COLUMNS = {
    "program": "", "kcycles": ",.0f", "share": ".1%", "times": "d", "does": "", "gives": "",
    "source": "",
}  # fmt: skip


def costs(text: str) -> list[dict[str, Any]]:
    """What every instruction of a program costs, the dearest first.

    Args:
      text: of ``jax.stages.Compiled.as_text``, compiled for a TPU.

    Returns:
      Rows of ``kcycles`` (thousands, of all its executions), ``share`` of the program, ``times`` it
      is executed, ``does`` (its opcode), ``gives`` (its first array), ``source`` (jax's operation).
    """
    computations = hlo.read(text)
    times = hlo.executions(computations)
    rows = []
    for name, instructions in computations.items():
        for one in instructions:
            found = _CYCLES.search(one.rest)
            cycles = int(found.group(1)) if found else 0
            if not 0 < cycles < _UNKNOWN:
                continue
            dtype, shape = one.arrays[0] if one.arrays else ("", ())
            rows.append(
                {
                    "kcycles": cycles * times[name][0] / 1e3,
                    "times": times[name][0],
                    "does": one.opcode,
                    "gives": f"{dtype}{list(shape)}",
                    "source": "/".join(one.source.split("/")[-4:]),
                }
            )
    total = sum(row["kcycles"] for row in rows)
    rows = [row | {"share": row["kcycles"] / total} for row in rows]
    return sorted(rows, key=lambda row: -row["kcycles"])


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--recipe", default="yolos_s", choices=scale.RECIPES)
    parser.add_argument("--chip", default="v5e", choices=tuple(slices.CHIPS))
    parser.add_argument("--images", type=int, default=8, help="of each chip")
    parser.add_argument("--top", type=int, default=16, help="instructions of a program to print")
    arguments = parser.parse_args()
    scale.prepare()
    recipe, images = arguments.recipe, arguments.images
    if arguments.quick:
        recipe, images = "yolos_ti", 1
    case = planned.Case(arguments.chip, CHIPS, recipe, 1, images)
    print(f"{case}: compiling ...", flush=True)
    found = {kind: costs(text) for kind, text in texts(case).items()}
    rows = [{"program": kind} | row for kind, some in found.items() for row in some]
    for kind, some in found.items():
        print(report.table([{"program": kind} | row for row in some[: arguments.top]], COLUMNS))
        print(f"{kind}: {sum(row['kcycles'] for row in some) / 1e3:.1f} million cycles\n")
    report.write(arguments.out, "tpu_cycles", rows, case=str(case))


def texts(case: planned.Case) -> dict[str, str]:
    """The text of 'forward' and 'update' as compiled; ends the process where there is none."""
    try:
        _, programs = planned.compile_step(*planned.arguments(case))
        return {kind: program.compiled.as_text() for kind, program in programs.items()}
    except jax.errors.JaxRuntimeError as error:  # no room, or a compiler newer than this jaxlib
        sys.exit(f"{case}: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
