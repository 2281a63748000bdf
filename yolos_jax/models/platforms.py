"""Forms of one computation, of which each platform's compiler gets the one it likes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def on_gpus(form: Callable[..., Any], other: Callable[..., Any], *args: Any) -> Any:
    """``form(*args)`` in programs for GPUs; elsewhere ``other(*args)``, which computes the same."""
    return jax.lax.platform_dependent(*args, cuda=form, rocm=form, default=other)
