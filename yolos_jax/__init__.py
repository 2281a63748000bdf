"""Set-prediction detectors (YOLOS, DETR) in JAX: train on pods, bring PyTorch weights."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Importing the package must not start jax: tools that only read data use it too.
    if name == "load":
        from yolos_jax.detector import load

        return load
    raise AttributeError(f"module 'yolos_jax' has no attribute {name!r}")
