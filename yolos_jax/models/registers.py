"""How wide this machine's vector registers are, where what is fastest on a CPU depends on it."""

from __future__ import annotations

import functools
import pathlib

CPUINFO = pathlib.Path("/proc/cpuinfo")


@functools.cache
def bits() -> int:
    """512 where the processor has AVX-512; 256 where it has not, or does not say (no Linux)."""
    try:
        flags = CPUINFO.read_text(encoding="ascii", errors="replace").split()
    except OSError:
        flags = []
    return 512 if "avx512f" in flags else 256
