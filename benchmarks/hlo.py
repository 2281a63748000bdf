"""Which collectives a compiled program holds, read from its text.

The text is what ``jax.stages.Compiled.as_text`` gives: HLO after partitioning and optimisation, for
one device of all. Read are the forms that the compilers for CPU, GPU and TPU write: plain ones,
pairs of ``-start`` and ``-done``, those inside ``async-start`` and inside fusions, of which TPU
spreads one over several.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Collective(NamedTuple):
    """One collective instruction."""

    kind: str  # of KINDS; a fusion of all-reduce and slice on TPU is a 'reduce-scatter'
    arrays: tuple[tuple[str, tuple[int, ...]], ...]  # dtype and shape of every array it gives
    bytes: int  # of the whole arrays, gathered or not yet scattered, on one device
    group: int  # devices that take part together; 0: all
    asynchronous: bool  # other work may run between its start and its end
    in_loop: bool
    times: int  # how often a run of the program executes it, where loops say so; else 1
    source: str  # the operation of jax it stems from, '' where unknown

    @property
    def total_bytes(self) -> int:
        """Over one run of the program."""
        return self.bytes * self.times


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    opcode: str
    operands: tuple[str, ...]
    value: str  # of a constant: what stands for its operands
    rest: str  # attributes

    @property
    def source(self) -> str:
        """The operation of jax it stems from, '' where unknown."""
        found = _SOURCE.search(self.rest)
        return found.group(1) if found else ""


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b(pred|bf16|f8\w*|[fsuc]\d+)\[([\d,]*)\]")
_OPCODE = re.compile(r"(?:^|\s)([a-z][\w\-]*)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_INDEX = re.compile(r"\bindex=(\d+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_MESH_AXIS = re.compile(r"'?([^',=\s]+)'?=(\d+)")
_GROUP_AXIS = re.compile(r"'?([^',:\s]+)'?(?::\(\d+\)(\d+))?")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_SOURCE = re.compile(r'op_name="([^"]*)"')


def collectives(text: str) -> list[Collective]:
    """Returns every collective of a program, in the order of its text.

    One that stands in a loop stands here once, with the number of times it is executed.

    Args:
      text: of ``jax.stages.Compiled.as_text``.
    """
    computations = read(text)
    times = executions(computations)
    wrapped = {  # computations that run beside others, between a start and a done
        called
        for instructions in computations.values()
        for one in instructions
        if one.opcode == "async-start"
        for called in callees(one)
    }
    starting, begun = _starting_fusions(computations)
    scattering = _scattering_fusions(computations)
    found = []
    for name, instructions in computations.items():
        types = {one.name: one.arrays for one in instructions}
        for one in instructions:
            kind = one.opcode.removesuffix("-start")
            if kind not in KINDS or (_channel(one) in begun and name not in starting):
                continue
            arrays, size = _payload(one, types)
            count, in_loop = times.get(name, (1, False))
            beside = name in wrapped or name in starting
            found.append(
                Collective(
                    kind="reduce-scatter" if name in scattering else kind,
                    arrays=arrays,
                    bytes=size,
                    group=_group(one.rest),
                    asynchronous=one.opcode.endswith("-start") or beside,
                    in_loop=in_loop,
                    times=count,
                    source=one.source,
                )
            )
    return found


def array_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array of a type as HLO names it: ``f32``, ``bf16``, ``pred``."""
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype).group())
    return math.ceil(math.prod(shape) * bits / 8)


def read(text: str) -> dict[str, list[Instruction]]:
    """Every computation of a module by name, callees before callers: the entry comes last."""
    computations, name, instructions = {}, None, []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name, instructions = match.group(1), []
        elif line.startswith("}") and not line.startswith("}}") and name is not None:
            computations[name] = instructions
            name = None
        elif name is not None and (match := _INSTRUCTION.match(line)):
            instructions.append(_instruction(*match.groups()))
    return computations


def _instruction(name: str, definition: str) -> Instruction:
    opcode = _OPCODE.search(definition)
    if opcode is None:
        return Instruction(name, (), "", (), "", "")
    end = _closing(definition, opcode.end())
    operands, rest = definition[opcode.end() : end], definition[end + 1 :]
    return Instruction(
        name,
        _arrays(definition[: opcode.start()]),
        opcode.group(1),
        tuple(_OPERAND.findall(operands)),
        operands,
        rest,
    )


def _closing(text: str, start: int) -> int:
    """Place of the parenthesis that closes one opened before ``start``; layouts hold pairs."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    return len(text)


def _arrays(types: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(types)
    )


def callees(instruction: Instruction) -> list[str]:
    """The computations that it runs or holds."""
    names = _CALLED.findall(instruction.rest)
    for branches in _BRANCHES.findall(instruction.rest):
        names += [name.strip().lstrip("%") for name in branches.split(",")]
    return names


def executions(computations: dict[str, list[Instruction]]) -> dict[str, tuple[int, bool]]:
    """How often every computation of ``read`` runs, and whether in a loop."""
    times: dict[str, tuple[int, bool]] = {}
    for name in reversed(computations):
        count, in_loop = times.setdefault(name, (1, False))
        for one in computations[name]:
            looped = one.opcode == "while"
            inner = count * (_trips(one, computations) if looped else 1)
            for called in callees(one):
                before, was_in_loop = times.get(called, (0, False))
                times[called] = (max(before, inner), was_in_loop or in_loop or looped)
    return times


def _trips(loop: Instruction, computations: dict) -> int:
    """How often a loop runs its body: as it says or, on TPU, as its computations do; else 1.

    There the condition is that a counter, one of the loop's values, be less than a constant; it
    starts at zero, and the body adds a constant to it.
    """
    if match := _TRIPS.search(loop.rest):
        return int(match.group(1))
    condition, body = (
        computations.get(match.group(1), []) if (match := pattern.search(loop.rest)) else []
        for pattern in (_CONDITION, _BODY)
    )
    tests = [one for one in condition if one.opcode == "compare" and "direction=LT" in one.rest]
    if len(tests) != 1 or not body:
        return 1
    counters = [_INDEX.search(one.rest) for one in condition if one.name == tests[0].operands[0]]
    limit = _constant(tests[0], condition)
    if limit is None or not counters or counters[0] is None:
        return 1
    following = body[-1].operands[int(counters[0].group(1))]
    added = [one for one in body if one.name == following and one.opcode == "add"]
    step = _constant(added[0], body) if added else None
    return -(-limit // (step or 1))


def _constant(instruction: Instruction, computation: list[Instruction]) -> int | None:
    """The operand of an instruction that is a whole number, if there is one."""
    values = [
        int(one.value)
        for one in computation
        if one.opcode == "constant" and one.name in instruction.operands and one.value.isdigit()
    ]
    return values[0] if values else None


def _starting_fusions(computations: dict) -> tuple[set[str], set[str]]:
    """Computations of TPU fusions that start a collective, and its channels.

    The same instruction stands in further fusions, which carry the collective on beside other
    work, and in the one that ends it.
    """
    starting = {
        name
        for name, instructions in computations.items()
        if any('custom_call_target="AsyncCollectiveStart"' in one.rest for one in instructions)
    }
    channels = {_channel(one) for name in starting for one in computations[name]} - {""}
    return starting, channels


def _channel(instruction: Instruction) -> str:
    match = _CHANNEL.search(instruction.rest)
    return match.group(1) if match else ""


def _scattering_fusions(computations: dict) -> set[str]:
    """Computations of fusions that reduce and keep a slice: reduce-scatters as TPUs run them."""
    return {
        called
        for instructions in computations.values()
        for one in instructions
        if one.opcode == "fusion"
        for called in callees(one)
        if (one.name + called).find("all-reduce-scatter") >= 0
    }


def _payload(
    one: Instruction, types: dict[str, tuple]
) -> tuple[tuple[tuple[str, tuple[int, ...]], ...], int]:
    """What a collective gives, and bytes of the larger of what it takes and what it gives."""
    taken = [array for operand in one.operands for array in types.get(operand, ())]
    given = one.arrays
    if one.opcode in ("all-gather-start", "collective-permute-start"):
        # Their type is a tuple: operands, results, and contexts on some devices.
        given = given[len(taken) : 2 * len(taken)] if taken else given[len(given) // 2 :]
    sizes = [sum(array_bytes(*array) for array in arrays) for arrays in (taken, given)]
    return tuple(given), max(sizes)


def _group(attributes: str) -> int:
    """How many devices take part together, by ``replica_groups`` in any of its forms; 0: all.

    One form names axes of a mesh, ``mesh['data'=8,'fsdp'=2] {'data':(4)2,'fsdp'}``:
    a group spans those in braces. ``:(4)2`` is a part of an axis as Shardy writes it, here of 2
    devices where 4 lie before it: ``data`` is split into 4, 2 and what is left. No axis: alone.
    """
    if match := _IOTA_GROUPS.search(attributes):
        return int(match.group(2))
    if match := _MESH_GROUPS.search(attributes):
        sizes = dict(_MESH_AXIS.findall(match.group(1)))
        axes = _GROUP_AXIS.findall(match.group(2))
        return math.prod(int(part or sizes[name]) for name, part in axes)
    if match := _GROUPS.search(attributes):
        return len([member for member in match.group(1).split(",") if member])
    return 0
