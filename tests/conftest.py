"""Tests run on eight virtual CPU devices, whatever accelerator the machine has."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Before anything imports jax: both are read once, when its first backend starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Compiling is most of what the tests do; `make test-all` compiles as users do.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Programs that several tests, or processes that they start, have in common are compiled once.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-for-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest
from hypothesis import settings

from tests import quick

quick.heed()
# Every example of a property that compiles costs seconds: few of them, the same on every run.
settings.register_profile("fast", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("fast")


@pytest.fixture(scope="module")
def quick_to_compile():
    """For models whose optimised programs take minutes to compile and a moment to run."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def pytest_configure(config):
    # Here, not in pyproject.toml, which pytest reads before the environment above is set.
    config.addinivalue_line("filterwarnings", "error::yolos_jax.programs.UnexpectedProgram")


def pytest_collection_modifyitems(items):
    # Files with long tests first: what is left for the end is short, whichever process runs it.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
