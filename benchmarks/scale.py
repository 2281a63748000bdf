"""What training takes on TPU slices and GPUs, from the real compiler, without one of them.

    pip install -e '.[scale]' -c constraints.txt
    python -m benchmarks.scale                      # a choice of cases: minutes of two cores
    python -m benchmarks.scale --all --out all.json  # every chip, slice and recipe: hours
    python -m benchmarks.scale --chips v5e --sizes 64 --recipes yolos_b --fsdp 8 --images 4
    python -m benchmarks.scale --largest            # the most images per chip, by recipe and chip
    python -m benchmarks.scale --chips h200 --sizes 8 --recipes yolos_s   # wants jax[cuda13]

Compiles forward and update of the longest bucket that the recipe needs on a dataset like COCO, for
slices of ``jax.experimental.topologies``. Prints for each case the bytes per chip and the
collectives as the compiler reports them, and a least step time and the scaling efficiency from
published bandwidths, assumptions named. Ends with 1 if a case does not fit the chip's memory.
Results are kept (``--cache``) until code, configuration or compiler change.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import forecast, slices
from benchmarks.planned import NUM_CLASSES, Case, facts, read_recipe

# The compiler is asked about devices that are not here: it must not look for the machine that it
# runs on, nor keep other processes from asking too.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # of no slice in particular; without it, it complains
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
COMPILERS = {  # by platform: a module that comes with it, and how to get it
    "tpu": ("libtpu", "pip install -e '.[scale]' -c constraints.txt"),
    "cuda": ("jax_cuda13_plugin", "pip install 'jax[cuda13]'"),
}
RECIPES = ("yolos_ti", "yolos_s", "yolos_b")
IMAGES = {"yolos_ti": 64, "yolos_s": 16, "yolos_b": 8}  # per chip, where nothing else is asked for
CHOICE = tuple(
    Case(chip, chips, recipe, fsdp, IMAGES[recipe])
    for chip, chips, recipe, fsdp in (
        ("v5e", 8, "yolos_ti", 1),
        ("v5e", 8, "yolos_s", 1),
        ("v5e", 8, "yolos_b", 1),
        ("v5e", 8, "yolos_b", 8),
        ("v5p", 64, "yolos_b", 8),
        ("v6e", 256, "yolos_b", 1),
    )
)


def main() -> None:
    arguments = parse()
    prepare(arguments.chips or slices.TPUS)
    cache = Path(arguments.cache)
    for line in forecast.ASSUMPTIONS:
        print(f"assumed: {line}")
    if arguments.largest:
        rows = [largest(case, cache) for case in cases_to_search(arguments)]
        print(table_of_largest(rows))
        failed = [row for row in rows if not row["images"]]
    else:
        rows = [examine(case, cache) for case in cases(arguments)]
        print(table(rows))
        failed = [row for row in rows if row.get("error")]
    if arguments.out:
        Path(arguments.out).write_text(
            json.dumps({"assumptions": forecast.ASSUMPTIONS, "rows": rows}, indent=1)
        )
    for row in failed:
        print(f"does not fit: {row['name']}: {row['error']}", file=sys.stderr)
    sys.exit(1 if failed else 0)


def prepare(chips: Sequence[str] = slices.TPUS) -> None:
    """Lets this process ask the compilers for these chips; ends it where one is missing."""
    for platform in {slices.CHIPS[chip].platform for chip in chips}:
        module, advice = COMPILERS[platform]
        try:
            importlib.import_module(module)
        except ImportError:
            sys.exit(f"no {module} here: {advice}")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one case of the choice")
    parser.add_argument("--all", action="store_true", help="every chip, slice, recipe; fsdp 1, 8")
    parser.add_argument("--largest", action="store_true", help="search the most images per chip")
    parser.add_argument("--chips", nargs="+", choices=tuple(slices.CHIPS), help="kinds of chips")
    parser.add_argument("--sizes", nargs="+", type=int, choices=(1, 8, 64, 256), help="of slices")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES)
    parser.add_argument("--fsdp", nargs="+", type=int, help="chips that share the parameters")
    parser.add_argument("--images", type=int, default=0, help="per chip; 0: as the recipe suits")
    parser.add_argument("--cache", default="runs/scale", help="folder of results")
    parser.add_argument("--out", default="", help="JSON file to write")
    return parser.parse_args()


def cases(arguments: argparse.Namespace) -> list[Case]:
    """What the command line asks for; without any choice the representative cases."""
    chosen = (arguments.chips, arguments.sizes, arguments.recipes, arguments.fsdp)
    if not arguments.all and not any(chosen) and not arguments.images:
        return list(CHOICE[:1] if arguments.quick else CHOICE)
    return [
        Case(chip, chips, recipe, fsdp, arguments.images or IMAGES[recipe])
        for recipe, chip in itertools.product(
            arguments.recipes or RECIPES, arguments.chips or slices.TPUS
        )
        for chips, fsdp in itertools.product(
            arguments.sizes or slices.CHIPS[chip].shapes,
            arguments.fsdp or ((1, 8) if arguments.all else (1,)),
        )
        if chips % fsdp == 0 or arguments.fsdp
    ]


def cases_to_search(arguments: argparse.Namespace) -> list[Case]:
    """On slices of eight: larger ones hold as much per chip, the batch being spread over them."""
    return [
        Case(chip, chips, recipe, fsdp, arguments.images or IMAGES[recipe])
        for recipe, chip, chips, fsdp in itertools.product(
            arguments.recipes or RECIPES,
            arguments.chips or slices.TPUS,
            arguments.sizes or (8,),
            arguments.fsdp or (1, 8),
        )
        if fsdp == 1 or recipe == "yolos_b" or arguments.fsdp
    ]


def examine(case: Case, cache: Path) -> dict:
    """Compiles a case, prints what came out, and returns it as a row."""
    print(f"\n{case}: compiling ...", flush=True)
    found = facts(case, cache)
    row = {"name": str(case), "case": dataclasses.asdict(case), **found}
    if "error" in found:
        print(f"  {found['error']}")
        return row
    chip, model = slices.CHIPS[case.chip], read_recipe(case.recipe).model
    row |= {"memory": forecast.memory(found)}
    if chip.platform == "tpu":
        work = forecast.work(model, NUM_CLASSES, found["bucket"], chip.systolic)
        seconds = forecast.step_seconds(found["programs"], work, case.images, chip, case.chips)
        unread = any(program["unread"] for program in found["programs"].values())
        row |= {
            "seconds_of_step": seconds._asdict(),
            "efficiency": None if unread else seconds.efficiency,
            "mfu": work.model * case.images / chip.flops / seconds.step,
        }
    if row["memory"] > chip.memory:
        row["error"] = f"needs {gib(row['memory'])} of {gib(chip.memory)}"
    print(report(row, model, chip), flush=True)
    return row


def report(row: dict, model: Any, chip: slices.Chip) -> str:
    """What is to know of one case; ``model`` is its ``config.model``."""
    lines = [f"  sequences of {1 + model.num_queries + row['bucket'][0]} tokens"]
    for kind, program in row["programs"].items():
        lines.append(
            f"  {kind:7s} {gib(forecast.peak(program))}: arguments {gib(program['argument'])}, "
            f"results {gib(program['output'])}, temporaries {gib(program['temp'])}; "
            f"compiled in {program['seconds']:.0f} s"
        )
        unread = program["unread"] and [f"collectives are not known: {program['unread']}"]
        lines += [f"    {line}" for line in unread or collectives_by_kind(program["collectives"])]
    lines.append(
        f"  a chip needs {gib(row['memory'])} of {gib(chip.memory)}: the state "
        f"{gib(row['state_bytes'])}, what backward keeps {gib(row['residual_bytes'])}"
    )
    if "seconds_of_step" not in row:
        return "\n".join(lines)
    times = forecast.Seconds(**row["seconds_of_step"])
    lines.append(
        f"  step at least {ms(times.step)}: computing {ms(times.compute)}, memory traffic "
        f"{ms(times.traffic)}, {collecting(row, times)}, model operations at most "
        f"{row['mfu']:.1%} of the peak"
    )
    return "\n".join(lines)


def collectives_by_kind(found: list[dict]) -> list[str]:
    """One line per kind, group and way of running."""
    groups = collections.defaultdict(list)
    for one in found:
        groups[one["kind"], one["group"], one["asynchronous"], one["in_loop"]].append(one)
    lines = []
    for (kind, group, asynchronous, in_loop), members in sorted(groups.items()):
        executed = sum(one["times"] for one in members)
        total = sum(one["bytes"] * one["times"] for one in members)
        largest_one = max(members, key=lambda one: one["bytes"])
        among = f"over {group or 'all'} chips" if "permute" not in kind else "to neighbours"
        shape = " ".join(f"{dtype}{list(sizes)}" for dtype, sizes in largest_one["arrays"][:1])
        lines.append(
            f"{executed:4d} x {kind}{'' if asynchronous else ', synchronous'}, {among}"
            f"{', in a loop' if in_loop else ''}: {mib(total)} a step, the largest "
            f"{mib(largest_one['bytes'])} ({shape})"
        )
    return lines or ["no collectives"]


def table(rows: list[dict]) -> str:
    """A line per case."""
    lines = [f"\n{'case':58s} {'memory':>10s} {'step':>9s} {'exposed':>9s} {'efficiency':>10s}"]
    for row in rows:
        if "seconds_of_step" not in row:
            known = f"{gib(row['memory']):>10s}" if "memory" in row else "does not compile"
            lines.append(f"{row['name']:58s} {known}")
            continue
        times = forecast.Seconds(**row["seconds_of_step"])
        lines.append(
            f"{row['name']:58s} {gib(row['memory']):>10s} {ms(times.step):>9s} "
            + (
                f"{'-':>9s} {'-':>10s}"
                if row["efficiency"] is None
                else f"{ms(times.exposed):>9s} {row['efficiency']:10.1%}"
            )
        )
    return "\n".join(lines)


def collecting(row: dict, times: forecast.Seconds) -> str:
    """What collectives cost, where they are known."""
    if row["efficiency"] is None:
        return "collectives not counted"
    return (
        f"collectives {ms(times.collectives)} of which {ms(times.exposed)} exposed; efficiency "
        f"{row['efficiency']:.1%}"
    )


def largest(case: Case, cache: Path) -> dict:
    """Searches the most images per chip; prints each try."""
    limit = slices.CHIPS[case.chip].memory
    row = {"name": str(case), **dataclasses.asdict(case), "tried": {}}

    def need(images: int) -> int | None:
        tried = dataclasses.replace(case, images=images)
        print(f"{tried}: compiling ...", flush=True)
        found = facts(tried, cache)
        if "error" in found:
            print(f"  {found['error']}", flush=True)
            row["tried"][images] = None
            return None
        row["tried"][images] = forecast.memory(found)
        print(f"  needs {gib(row['tried'][images])} of {gib(limit)}", flush=True)
        return row["tried"][images]

    row["images"] = forecast.largest(need, limit, case.images)
    if not row["images"]:
        row["error"] = f"not one image fits the {gib(limit)} of a chip"
    return row


def table_of_largest(rows: list[dict]) -> str:
    """Markdown, for docs/pods.md; global batches on 8, 64, 256 chips, on 1 and 8 GPUs."""
    lines = [
        "| recipe | chip | fsdp | images per chip | memory | global batch by chips |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        images, chip = row["images"], slices.CHIPS[row["chip"]]
        needed = f"{gib(row['tried'][images])} of {gib(chip.memory)}" if images else "-"
        batches = ", ".join(f"{images * chips:,}" for chips in chip.shapes)
        lines.append(
            f"| {row['recipe']} | {row['chip']} | {row['fsdp']} | {images} | {needed} | {batches} |"
        )
    return "\n".join(lines)


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


if __name__ == "__main__":
    main()
