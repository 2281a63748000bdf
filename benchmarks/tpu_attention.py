"""What the attention kernels of a TPU cost by the size of their blocks, without a TPU.

    pip install -e '.[scale]' -c constraints.txt
    python -m benchmarks.tpu_attention --chip v5e --out tpu_attention.json

Compiles heads of 64 and their gradients for sequences of several lengths and reads the kernels'
final schedules, which the compiler writes on request: a line per cycle, unless a transfer is late.
A step of a kernel's grid costs the lines of its loop; what only the first or the last step of a row
of blocks does is counted once per row. Nobody measured a TPU: figures compare sizes of blocks.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from benchmarks import planned, report, scale, slices
from yolos_jax import mesh as mesh_lib
from yolos_jax.models import splash_attention
from yolos_jax.models.splash_attention import TILE

CHIPS, IMAGES, HEADS, WIDTH = 8, 2, 2, 64
TOKENS = (640, 1152, 2176, 4352)  # of which Ti and S have buckets
SQUARES = (128, 256, 512, 1024)
COLUMNS = {
    "chip": "", "tokens": "d", "blocks": "", "forward_kcycles": ".1f", "of_keys_kcycles": ".1f",
    "of_queries_kcycles": ".1f", "relative": ".2f",
}  # fmt: skip
# The kernels of the outputs, of the gradient of keys and values, and of that of the queries.
KERNELS = {"forward": "fwd", "of_keys": "dkv", "of_queries": "dq"}
_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?[ :]")


class Schedule(NamedTuple):
    """What a kernel's final schedule says, in cycles."""

    step: int  # of every step of the grid
    ends: int  # of the first and the last step of a row of blocks, together


def read_schedule(text: str, steps: int) -> Schedule:
    """Reads the compiler's ``final_bundles`` of a kernel over blocks.

    Its loop holds three parts that may be jumped over: what a row of blocks begins with, the
    product, which is by far the longest, and what a row ends with. Where a row is one step, nothing
    is jumped over.

    Args:
      text: of the file.
      steps: of a row.

    Raises:
      ValueError: if the text is not of this form.
    """
    parts: list[tuple[int, bool]] = []  # lines between two branches or their targets; jumped over?
    count, loops = 0, 0
    for line in text.splitlines():
        bundle = _BUNDLE.match(line)
        if bundle and bundle[1] == "LB":
            parts, count, loops = [], 0, loops + 1
        if bundle and bundle[1] == "PF":
            parts.append((count, True))
            count = 0
        count += bool(bundle)
        if "sbr.rel" in line:
            parts.append((count, False))
            count = 0
    total, ends = sum(lines for lines, _ in parts), 0
    optional = [lines for lines, jumped in parts if jumped]
    longest = optional.index(max(optional)) if optional else 0
    if loops != 1 or (steps > 1 and not 0 < longest < len(optional) - 1):
        raise ValueError(f"not the schedule of a kernel over blocks: {loops} loops, {parts}")
    if steps > 1:
        ends = optional[longest - 1] + optional[longest + 1]
    return Schedule(total - ends, ends)


def kcycles(dump: Path, sizes: splash.BlockSizes, tokens: int) -> dict[str, float]:
    """Thousands of cycles of each kernel for one head of one image, from their schedules."""
    blocks = {
        "forward": (sizes.block_q, sizes.block_kv),
        "of_keys": (sizes.block_q_dkv, sizes.block_kv_dkv),
        "of_queries": (sizes.block_q_dq, sizes.block_kv_dq),
    }
    # Queries and keys of every kernel are padded to a multiple of the longest side.
    padded = -(-tokens // max(blocks["forward"])) * max(blocks["forward"])
    found = {}
    for name, (queries, keys) in blocks.items():
        pattern = f"*splash_mha_{KERNELS[name]}_*[0-9]-final_bundles.txt"
        files = list(dump.glob(pattern))
        if len(files) != 1:
            raise ValueError(f"{dump}: {len(files)} files {pattern}; expected one, of the compiler")
        rows, steps = padded // queries, padded // keys
        if name == "of_keys":  # a row of blocks shares its keys
            rows, steps = steps, rows
        schedule = read_schedule(files[0].read_text(), steps)
        found[name] = rows * (steps * schedule.step + schedule.ends) / 1e3
    return found


def measure(chip: str, tokens: int, side: int, dump: Path) -> dict[str, Any]:
    """Compiles attention over one length and adds its kernels' cycles up.

    Args:
      chip: of ``slices.CHIPS``.
      tokens: of the sequence.
      side: of square blocks, tokens; 0: those of training.
      dump: folder that the compiler writes schedules to.

    Ends the process where the compiler finds no room for such blocks.
    """
    sizes = square(side) if side else splash_attention.block_sizes(tokens, tokens)
    place = mesh_lib.replicated(mesh_lib.make_mesh(1, planned.slice_devices(chip, CHIPS)[:1]))
    shape = (IMAGES, tokens, HEADS, WIDTH)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
    lengths = jax.ShapeDtypeStruct((IMAGES,), jnp.int32, sharding=place)

    def total(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> jax.Array:
        out = splash_attention.attend(q, k, v, lengths, "saved", sizes)
        return out.astype(jnp.float32).sum()

    for file in dump.iterdir():
        file.unlink()
    try:
        jax.jit(jax.grad(total, (0, 1, 2))).lower(x, x, x, lengths).compile()
    except jax.errors.JaxRuntimeError as error:
        what = f"squares of {side}" if side else "the blocks of training"
        sys.exit(f"{chip}, {tokens} tokens, {what}: {str(error).splitlines()[0]}")
    found = {f"{name}_kcycles": each for name, each in kcycles(dump, sizes, tokens).items()}
    return {"chip": chip, "tokens": tokens, "blocks": str(side or "ours"), **found}


def square(side: int) -> splash.BlockSizes:
    """Blocks of as many queries as keys, otherwise as in training."""
    sizes = splash_attention.block_sizes(side, side)
    blocks = [field.name for field in dataclasses.fields(sizes) if "block_" in field.name]
    kept = {name for name in blocks if getattr(sizes, name) is not None}
    return dataclasses.replace(sizes, **dict.fromkeys(kept, side))


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--chip", default="v5e", choices=tuple(slices.CHIPS))
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--squares", type=int, nargs="*", default=SQUARES, help="sides of blocks")
    arguments = parser.parse_args()
    if wrong := [length for length in arguments.tokens if length < 1]:
        parser.error(f"--tokens {wrong[0]}: not positive")
    if wrong := [side for side in arguments.squares if side < 1 or side % TILE]:
        parser.error(f"--squares {wrong[0]}: not a multiple of {TILE}")
    tokens, squares = arguments.tokens, arguments.squares
    if arguments.quick:
        tokens, squares = TOKENS[:1], SQUARES[:1]
    rows = []
    with tempfile.TemporaryDirectory() as dump:
        told = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {told}"
        scale.prepare()
        for length in tokens:
            found = [measure(arguments.chip, length, side, Path(dump)) for side in (0, *squares)]
            sums = [sum(row[f"{name}_kcycles"] for name in KERNELS) for row in found]
            rows += [row | {"relative": s / sums[0]} for row, s in zip(found, sums, strict=True)]
    print("a head of one image, cycles in thousands; relative to the blocks of training:")
    print(report.table(rows, COLUMNS))
    report.write(arguments.out, "tpu_attention", rows)


if __name__ == "__main__":
    main()
