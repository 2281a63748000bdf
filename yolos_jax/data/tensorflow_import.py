"""TensorFlow as this package wants it: for reading pictures, on the CPU, without a word."""

from __future__ import annotations

import os

# Both are read at import. The second silences a greeting, and an error message for every picture
# that its transposition of bytes takes another way.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import tensorflow as tf

# It would take all memory of a GPU that it sees.
tf.config.set_visible_devices([], "GPU")

__all__ = ["tf"]
