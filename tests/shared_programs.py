"""Has tests compile each program once, whichever of them asks for it."""

from __future__ import annotations

import functools
from collections.abc import Callable

from jax._src import cache_key


def same_names(replace: Callable = setattr) -> None:
    """Keeps a program under one name, whichever process compiles it and whichever asks for it.

    On CPUs the key under which jax keeps a program depends on the process (its topology's
    fingerprint and its numbers of devices do). Here it depends on the kinds of the devices alone,
    as on GPUs.

    Args:
      replace: such that it can be undone, ``monkeypatch.setattr``.
    """
    options = functools.partial(_hash_options, HASH_OPTIONS)
    replace(cache_key, "_hash_accelerator_config", cache_key._hash_devices)
    replace(cache_key, "_hash_serialized_compile_options", options)


HASH_OPTIONS = cache_key._hash_serialized_compile_options


def _hash_options(original, hash_obj, options, **unused):
    original(hash_obj, options, strip_device_assignment=True)
