"""How wide this machine's vector registers are, where what is fastest on a CPU depends on it."""

from __future__ import annotations

import functools
import pathlib

CPUINFO = pathlib.Path("/proc/cpuinfo")


@functools.cache
def are_avx2() -> bool:
    """Whether they have 256 bits: AVX2 without AVX-512.

    False where the system does not say (no Linux), and on processors of another kind, on which
    nothing of what depends on it was measured.
    """
    try:
        flags = CPUINFO.read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return False
    return "avx2" in flags and "avx512f" not in flags
