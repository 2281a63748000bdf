"""Programs that compile quickly and run slowly: most tests ask what is computed, not how fast.

Besides what jax leaves out, XLA's emitters of fused loops on CPUs: without optimisations they are
most of what compiling takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax._src import compiler

EMITTERS = "xla_cpu_use_fusion_emitters"
HAS_OTHERS = jax.__version_info__ < (0, 11)  # Later ones have no such option.
# Of a process that is started, and what to add to its XLA_FLAGS.
ENVIRONMENT = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
XLA_FLAGS = f"--{EMITTERS}=false" if HAS_OTHERS else ""


def heed(replace: Callable = setattr) -> None:
    """Has this process leave the emitters out as long as jax leaves most optimisations out.

    Args:
      replace: such that it can be undone, ``monkeypatch.setattr``.
    """
    original = compiler.get_compile_options

    def options(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        if HAS_OTHERS and jax.config.values["jax_disable_most_optimizations"]:
            found.env_option_overrides = [*found.env_option_overrides, (EMITTERS, False)]
        return found

    replace(compiler, "get_compile_options", options)
