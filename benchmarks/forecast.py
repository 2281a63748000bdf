"""What a step should take on a slice: arithmetic over compiled programs and published figures.

Every figure is a bound or an assumption, named in ``ASSUMPTIONS``; nothing here is a measurement of
time. Times are least times, so the share of a step that collectives take is at its largest, and the
scaling efficiency that follows at its lowest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks import flops, slices

HOP_SECONDS = 1e-6
# Matrix products in float32 precision run as this many in bfloat16.
FLOAT32_PASSES = 6
# Matrix products of an attention kernel per direction: scores and values; in the backward pass the
# scores and the gradient of the weights, both twice, and the gradients of q, k and v.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 7

ASSUMPTIONS = (
    "computing: the model's matrix products, recomputed ones included, at the published bfloat16 "
    "peak; those of attention are as wide as the matrix unit, 128 or 256, where heads are "
    f"narrower; resizing position tables takes {FLOAT32_PASSES} passes (float32). The compiler's "
    "own count (cost_analysis) is not used: it counts a loop's body once and no kernel at all",
    "memory traffic: every argument read and every result written once, every temporary once each, "
    "at the published HBM bandwidth; a program takes the longer of computing and traffic",
    "collectives: of n chips (n-1)/n of the bytes leave each chip (all-reduce: twice that), over "
    "the links that every chip of the slice has (published ICI bandwidth, half of it each way), "
    f"plus {HOP_SECONDS * 1e6:.0f} microsecond per hop across the slice",
    "overlap: asynchronous collectives hide behind computing, up to its time; synchronous ones add",
    "efficiency: the same programs with collectives that take no time, over those with",
    "not counted: matching on the host between the two programs, reading pictures, slices joined "
    "by the data centre's network",
)
NEAR = 8  # images by which a line through two known needs may be wrong


class Work(NamedTuple):
    """Operations for one image: what the chip's matrix units do, and what of it is the model."""

    forward: float
    update: float
    model: float  # as ``flops.training_flops`` counts: nothing recomputed or widened


class Seconds(NamedTuple):
    """Least times of one step."""

    compute: float
    traffic: float
    collectives: float  # of which asynchronous ones may hide
    exposed: float
    step: float

    @property
    def efficiency(self) -> float:
        """Against chips that need not talk."""
        return (self.step - self.exposed) / self.step


def work(model: Any, num_classes: int, bucket: Sequence[int], systolic: int) -> Work:
    """Counts the operations of a training step on one image.

    Args:
      model: ``config.model`` of a YOLOS.
      num_classes: K.
      bucket: patches, rows and columns.
      systolic: width of the chip's matrix unit.
    """
    patches, rows, cols = bucket
    width, mlp = model.width, model.mlp_width
    tokens = 1 + model.num_queries + patches
    embed = 2 * patches * 3 * model.patch_size**2 * width
    # Of the last block's tokens all are keys and values, and the first ones are what is wanted.
    wanted = (model.depth - 1) * tokens + 1 + model.num_queries
    keys_and_values = model.depth * 2 * tokens * 2 * width**2
    linear = keys_and_values + 2 * wanted * (2 * width**2 + 2 * width * mlp)
    # All of a block but the second layer of its MLP, whose result is the next block's input.
    again = keys_and_values + 2 * wanted * (2 * width**2 + width * mlp)
    product = 2 * wanted * tokens * width
    wide = product * max(1.0, systolic / (width // model.heads))
    tables = [model.position_grid] + [model.mid_position_grid] * (model.depth - 1)
    positions = sum(
        2 * (rows * high * across + rows * cols * across) * width
        for high, across in filter(None, tables)
    )
    recomputed = 0.0
    if model.remat != "none":
        recomputed = again + (FORWARD_PRODUCTS * wide if model.remat == "full" else 0)
    return Work(
        forward=embed + linear + FORWARD_PRODUCTS * wide + FLOAT32_PASSES * positions,
        # Pictures and the resize's weights get no gradient.
        update=embed
        + 2 * linear
        + recomputed
        + BACKWARD_PRODUCTS * wide
        + FLOAT32_PASSES * positions,
        model=flops.training_flops(model, num_classes, patches),
    )


def collective_seconds(collective: dict, chip: slices.Chip, chips: int) -> float:
    """Time of every execution of a collective in one run of its program.

    Args:
      collective: the fields of ``hlo.Collective``.
      chip: of the slice.
      chips: of the slice.
    """
    group = collective["group"] or chips
    size, kind = collective["bytes"], collective["kind"]
    delay = HOP_SECONDS * slices.hops(chip, chips)
    if kind == "collective-permute":  # from neighbour to neighbour
        once = size / slices.link_bandwidth(chip, chips) + HOP_SECONDS
    else:
        rounds = 2 if kind == "all-reduce" else 1
        sent = rounds * size * (group - 1) / group
        once = sent / slices.group_bandwidth(chip, chips, group) + rounds * delay
    return once * collective["times"]


def step_seconds(
    programs: dict[str, dict], operations: Work, images: int, chip: slices.Chip, chips: int
) -> Seconds:
    """Least times of a step.

    Args:
      programs: 'forward' and 'update', as ``planned.describe`` gives them.
      operations: of one image.
      images: of each chip.
      chip: of the slice.
      chips: of the slice.
    """
    compute = traffic = collectives = exposed = total = 0.0
    for kind, program in programs.items():
        computing = getattr(operations, kind) * images / chip.flops
        moved = program["argument"] + program["output"] + 2 * program["temp"]
        moving = moved / chip.hbm_bandwidth
        busy = max(computing, moving)
        times = {True: 0.0, False: 0.0}
        for collective in program["collectives"]:
            times[collective["asynchronous"]] += collective_seconds(collective, chip, chips)
        waiting = times[False] + max(0.0, times[True] - busy)
        compute, traffic = compute + computing, traffic + moving
        collectives, exposed = collectives + sum(times.values()), exposed + waiting
        total += busy + waiting
    return Seconds(compute, traffic, collectives, exposed, total)


def memory(facts: dict) -> int:
    """Bytes that a chip needs for training: the larger program, and what waits beside it.

    Beside the forward pass the optimiser's state waits; beside both the next batch.
    """
    programs = facts["programs"]
    beside = facts["state_bytes"] - facts["params_bytes"]
    largest_program = max(peak(programs["forward"]) + beside, peak(programs["update"]))
    return largest_program + facts["batch_bytes"]


def peak(program: dict) -> int:
    """Bytes of a program on one device: what the compiler states as its peak, or what the parts
    make when all are there at once, whichever is more; and its code.
    """
    parts = program["argument"] + program["output"] - program["alias"] + program["temp"]
    return max(program["peak"], parts) + program["generated_code"]


def largest(need: Callable[[int], int | None], limit: int, first: int, tries: int = 5) -> int:
    """The most images per chip whose programs fit, by few compilations.

    Need grows about linearly, so that two points tell where to look next.

    Args:
      need: bytes for so many images per chip; None: the compiler found no room.
      limit: bytes of a chip.
      first: where to begin.
      tries: compilations at most.

    Returns:
      A number that was compiled and fits (0: not even one image does). When the tries did not run
      out, the next number was compiled and does not fit, or by the last two points would not.
    """
    known: dict[int, int | None] = {}
    fits, over, guess = 0, None, first
    while guess > fits and (over is None or guess < over) and len(known) < tries:
        known[guess] = need(guess)
        if known[guess] is not None and known[guess] <= limit:
            fits = guess
        else:
            over = guess
        guess = _next(known, fits, over, limit)
    return fits


def _next(known: dict[int, int | None], fits: int, over: int | None, limit: int) -> int:
    """Where the line through the two largest known needs meets the limit, or a step beyond them.

    Never beyond twice what is known to fit; halfway where the line leads to what does not.
    """
    points = sorted((images, size) for images, size in known.items() if size is not None)[-2:]
    if fits == 0:
        return (over or 1) // 2
    if len(points) == 1:
        # Through the origin: what does not grow with the images makes this a guess too small.
        guess = max(fits + 1, int(fits * limit / points[0][1]))
    else:
        (low, small), (high, large) = points
        slope = (large - small) / (high - low)
        # Near the limit the compiler may find savings: needs hardly grow, or fall.
        guess = int(low + (limit - small) / slope) if slope > 0 else high + 1
        guess = min(guess, 2 * high)
    if over is not None and guess >= over:
        near = len(points) > 1 and over - fits <= NEAR  # else the line has misled
        guess = over - 1 if near else (fits + over) // 2
    return guess
