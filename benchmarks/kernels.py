"""What the kernels of a program compiled for a GPU move and multiply, read from its text.

The text is what ``jax.stages.Compiled.as_text`` gives. XLA makes one kernel of every instruction
that is left in it, but for those that only name memory, so their operands and results are what goes
through the card's memory. Nothing here is a time: caches may hold what was just written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks import hlo

# Names for memory, loops around kernels, and ends of what began before.
_NO_KERNELS = (
    *("", "parameter", "constant", "iota", "bitcast", "tuple", "get-tuple-element"),
    *("while", "call", "conditional", "after-all"),
    *("async-start", "async-update", "async-done", "fusion-start", "fusion-done"),
)
_STARTS = ("fusion-start", "async-start")  # run a computation, whose instructions are kernels
_SLICES = ("dynamic-slice", "slice")
_UPDATE = "dynamic-update-slice"
_WORKSPACE = ("s8", "u8")  # types of what a library's call has for itself
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_CUBLAS_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_CONTRACTED = re.compile(r"\blhs_contracting_dims=\{([\d,]*)\}")
# Products of two operands' size: scores and values; of the backward pass five.
_ATTENTION = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}


class Kernel(NamedTuple):
    """One kernel, all of its executions in a run of the program."""

    does: str  # its opcode, or the library's function
    times: int
    bytes: float  # read and written
    flops: float  # of matrix products
    wide: bool  # these are of float32
    gives: str  # its first result
    source: str  # the operation of jax it stems from, '' where unknown

    def seconds(self, bandwidth: float, flops: float, wide_flops: float) -> float:
        """Least time, at a card's bytes and operations (of float32: the last) per second."""
        return max(self.bytes / bandwidth, self.flops / (wide_flops if self.wide else flops))


def read(text: str) -> list[Kernel]:
    """Every kernel of a program."""
    computations = hlo.read(text)
    times = hlo.executions(computations)
    inside = {  # computations that are parts of kernels
        called
        for instructions in computations.values()
        for one in instructions
        if one.opcode not in ("while", "call", "conditional", *_STARTS)
        for called in hlo.callees(one)
    }
    found = []
    for name, instructions in computations.items():
        if name in inside:
            continue
        arrays = {one.name: one.arrays for one in instructions}
        for one in instructions:
            if one.opcode in _NO_KERNELS:
                continue
            parts = [part for called in hlo.callees(one) for part in computations.get(called, [])]
            count = times[name][0]
            flops, wide = _products(one, arrays, parts)
            target = _TARGET.search(one.rest)
            found.append(
                Kernel(
                    does=target.group(1) if target else one.opcode,
                    times=count,
                    bytes=count * (_taken(one, arrays, parts) + _given(one, arrays, parts)),
                    flops=count * flops,
                    wide=wide,
                    gives="".join(f"{dtype}{list(shape)}" for dtype, shape in one.arrays[:1]),
                    source="/".join(one.source.split("/")[-4:]),
                )
            )
    return found


def _size(arrays: Sequence[tuple[str, tuple[int, ...]]]) -> int:
    return sum(hlo.array_bytes(*array) for array in arrays)


def _taken(one: hlo.Instruction, arrays: dict, parts: list[hlo.Instruction]) -> int:
    """Bytes that are read; of an operand of which slices are used, those."""
    if one.opcode == _UPDATE:
        return _size(arrays[one.operands[1]])
    if one.opcode in _SLICES:
        return _size(one.arrays)
    inner = parts if one.opcode == "fusion" else []
    return sum(
        _sliced(place, _size(arrays.get(name, ())), inner)
        for place, name in enumerate(one.operands)
    )


def _sliced(place: int, whole: int, parts: list[hlo.Instruction]) -> int:
    """Bytes of an operand that a fusion reads."""
    names = {part.name for part in parts if part.opcode == "parameter" and part.value == str(place)}
    users = [part for part in parts if names & set(part.operands)]
    if users and all(user.opcode in _SLICES and user.operands[0] in names for user in users):
        return sum(_size(user.arrays) for user in users)
    if users and all(user.opcode == _UPDATE and user.operands[0] in names for user in users):
        return 0
    return whole


def _given(one: hlo.Instruction, arrays: dict, parts: list[hlo.Instruction]) -> int:
    """Bytes that are written; of an array that is updated in place, the update."""
    if one.opcode == _UPDATE:
        return _size(arrays[one.operands[1]])
    if one.opcode != "fusion" or not parts:
        return _size([array for array in one.arrays if array[0] not in _WORKSPACE])
    inner = {part.name: part for part in parts}
    root = parts[-1]
    results = root.operands if root.opcode == "tuple" else (root.name,)
    written = [inner[name] for name in results if name in inner]
    return sum(_written(part, inner) for part in written if part.arrays[0][0] not in _WORKSPACE)


def _written(part: hlo.Instruction, inner: dict[str, hlo.Instruction]) -> int:
    """Bytes of one result of a fusion."""
    before = part
    while before.opcode in ("bitcast", "copy", "convert") and before.operands[0] in inner:
        before = inner[before.operands[0]]
    if before.opcode == _UPDATE and before.operands[1] in inner:
        return _size(inner[before.operands[1]].arrays)
    return _size(part.arrays)


def _products(
    one: hlo.Instruction, arrays: dict, parts: list[hlo.Instruction]
) -> tuple[float, bool]:
    """Operations of the matrix products in a kernel, and whether they are of float32."""
    target = _TARGET.search(one.rest)
    name = target.group(1) if target else ""
    if name in _ATTENTION:  # queries and keys [B, T, H, d]
        queries, keys = (arrays[operand][0][1] for operand in one.operands[:2])
        return 2.0 * _ATTENTION[name] * math.prod(queries) * keys[1], False
    if "cublas" in name:
        contracted = _CUBLAS_CONTRACTED.search(one.rest).group(1).replace('"', "")
        return _product(one, arrays, contracted)
    inner = {part.name: part.arrays for part in parts}
    dots = [(one, arrays)] if one.opcode == "dot" else []
    dots += [(part, inner) for part in parts if part.opcode == "dot"]
    found = [_product(dot, known, _CONTRACTED.search(dot.rest).group(1)) for dot, known in dots]
    return sum(flops for flops, _ in found), any(wide for _, wide in found)


def _product(one: hlo.Instruction, arrays: dict, contracted: str) -> tuple[float, bool]:
    dtype, shape = arrays[one.operands[0]][0]
    depth = math.prod(shape[int(axis)] for axis in contracted.split(",") if axis)
    return 2.0 * math.prod(one.arrays[0][1]) * depth, dtype == "f32"
