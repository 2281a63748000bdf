"""TensorFlow as this package wants it: for reading pictures, on the CPU, without a word."""

from __future__ import annotations

import os

# Both are read at import. Pictures that cannot be read are named by the pipeline; the second
# silences a greeting, and an error message for every transposition of bytes.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import tensorflow as tf

# It would take all memory of a GPU that it sees.
tf.config.set_visible_devices([], "GPU")

__all__ = ["tf"]
