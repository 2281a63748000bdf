"""Chips and slices as their makers publish them: what forecasts rest on besides programs.

Of GPUs, which stand in one machine, nothing is forecast but what fits: links are not described.

Sources, as read in November 2026:
    docs.cloud.google.com/tpu/docs/v5e, v5p, v6e   peak, bandwidths, systolic arrays, shapes
    jax-ml.github.io/scaling-book/tpus             which slices have links that close a ring
    nvidia.com/en-us/data-center/h200              peak, bandwidths, 141 GB
A TPU's memory is what the compiler of libtpu 0.0.51 grants to programs, as its out-of-memory
message says; the published 16 GB, 95 GB and 32 GB hold the system's share too. A GPU's is 95 % of
what is published, for processes with ``XLA_CLIENT_MEM_FRACTION=0.95``; on its own jax takes 75 %.
"""

from __future__ import annotations

import math
from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One chip, which the compiler sees as one device whatever the number of its cores."""

    name: str
    flops: float  # bfloat16 operations per second, at most
    memory: int  # bytes that programs can use
    hbm_bandwidth: float  # bytes per second
    ici_bandwidth: float  # bytes per second, all links to other chips, both ways together
    systolic: int  # rows and columns of a matrix unit: narrower operands leave the rest idle
    ring: int  # an axis of a slice closes to a ring when its length is a multiple of this
    shapes: dict[int, tuple[int, ...]]  # of slices, by number of chips
    platform: str = "tpu"  # or 'cuda': whose topologies jax is asked for


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v5e", 197e12, int(15.75 * GIB), 819e9, 400e9, 128, 16,
            {8: (2, 4), 64: (8, 8), 256: (16, 16)},
        ),
        Chip(
            "v5p", 459e12, int(95.73 * GIB), 2765e9, 1200e9, 128, 4,
            {8: (2, 2, 2), 64: (4, 4, 4), 256: (4, 8, 8)},
        ),
        Chip(
            "v6e", 918e12, int(31.24 * GIB), 1638e9, 800e9, 256, 16,
            {8: (2, 4), 64: (8, 8), 256: (16, 16)},
        ),
        Chip(
            "h200", 989e12, int(0.95 * 141e9), 4.8e12, 0, 0, 1,
            {1: (1,), 8: (8,)}, "cuda",
        ),
    )
}  # fmt: skip
TPUS = tuple(name for name, chip in CHIPS.items() if chip.platform == "tpu")
FLOAT32_FLOPS = {"h200": 67e12}  # of GPUs, without tensor cores


def topology(chip: str, chips: int) -> str:
    """The slice's name as ``jax.experimental.topologies`` takes it: 'v5e:2x4'.

    Raises:
      ValueError: for a chip, or a number of chips, that has no entry here.
    """
    if chip not in CHIPS:
        raise ValueError(f"the chip is {chip!r}; expected one of {', '.join(CHIPS)}")
    shapes = CHIPS[chip].shapes
    if chips not in shapes:
        raise ValueError(
            f"a slice of {chips} {chip} chips; expected one of {', '.join(map(str, shapes))}"
        )
    return f"{chip}:{'x'.join(map(str, shapes[chips]))}"


def group_bandwidth(chip: Chip, chips: int, group: int) -> float:
    """Bytes per second that a chip sends in a collective of ``group`` of the slice's chips.

    All the links of the slice's axes for a collective of all chips, those of one axis (the least
    well connected) for one of fewer. An axis that is no ring leaves the chips at its ends one
    link of two, and the slowest chip sets the pace.
    """
    shape = chip.shapes[chips]
    per_axis = chip.ici_bandwidth / 2 / len(shape)
    shares = [1.0 if size % chip.ring == 0 else 0.5 for size in shape]
    return per_axis * (math.fsum(shares) if group == chips else min(shares))


def link_bandwidth(chip: Chip, chips: int) -> float:
    """Bytes per second over one link in one direction."""
    return chip.ici_bandwidth / 2 / (2 * len(chip.shapes[chips]))


def hops(chip: Chip, chips: int) -> int:
    """Links between the two chips of a slice that are farthest apart."""
    shape = chip.shapes[chips]
    return sum(size // 2 if size % chip.ring == 0 else size - 1 for size in shape)
