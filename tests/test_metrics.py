"""The numbers of a step: read by name, fetched at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from yolos_jax.metrics import Metrics


@jax.jit
def compiled(loss):
    return Metrics.of({"loss": loss, "images": jnp.int32(2**24), "finite": jnp.isfinite(loss)})


def test_every_number_is_found_under_its_name():
    metrics = compiled(jnp.float32(0.25))
    assert dict(metrics) == {"finite": 1.0, "images": 2.0**24, "loss": 0.25}
    assert list(metrics) == sorted(metrics) and len(metrics) == 3
    assert all(type(value) is float for value in metrics.values())
    assert "grad_norm" not in metrics
    with pytest.raises(KeyError, match="grad_norm"):
        metrics["grad_norm"]


def test_what_is_not_finite_stays_so():
    metrics = compiled(jnp.float32(np.nan))
    assert np.isnan(metrics["loss"]) and metrics["finite"] == 0


def test_they_can_be_waited_for():
    metrics = compiled(jnp.float32(1))
    assert metrics.block_until_ready() is metrics and jax.block_until_ready(metrics)["loss"] == 1
    assert repr(metrics) == "Metrics(finite, images, loss)"


def test_they_leave_the_device_as_one_array():
    metrics = compiled(jnp.float32(1))
    (leaf,) = jax.tree.leaves(metrics)
    assert leaf.shape == (3,) and leaf.dtype == np.float32
    doubled = jax.tree.map(lambda array: 2 * array, metrics)
    assert doubled["loss"] == 2 and doubled["finite"] == 2
