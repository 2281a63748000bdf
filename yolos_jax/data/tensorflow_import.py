"""TensorFlow as this package wants it: for reading pictures, on the CPU, without a word."""

from __future__ import annotations

import contextlib
import ctypes
import os

# Both are read at import. Pictures that cannot be read are named by the pipeline; the second
# silences a greeting, and an error message for every transposition of bytes.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import tensorflow as tf

M_ARENA_MAX = -8  # of glibc's malloc.h

# It would take all memory of a GPU that it sees.
tf.config.set_visible_devices([], "GPU")

if "MALLOC_ARENA_MAX" not in os.environ:
    # Every epoch starts threads, and glibc gives new threads memory of their own: up to eight
    # pieces per core, each of which keeps what decoding a few pictures took. One per core will do.
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, os.cpu_count() or 1)

__all__ = ["tf"]
