"""Which query answers for which target: a cost matrix, then the cheapest assignment.

After models/matcher.py of facebookresearch/detr. Every prediction layer is matched on its own. Two
ways to the same total cost: on the host with scipy (the default: exact and fast, 64 images in one
or two milliseconds) or on the device with optax, inside a compiled program.

Of more targets than queries the cheapest ones are matched, as scipy does. Costs that are not finite
would make scipy raise and optax loop for ever: they are replaced by a number larger than any finite
cost of their image, and counted.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from optax import assignment
from scipy.optimize import linear_sum_assignment

from yolos_jax import boxes
from yolos_jax.batch import Array, Outputs, Targets


class MatcherWeights(NamedTuple):
    """How much each part of the cost counts."""

    class_cost: float
    l1_cost: float
    giou_cost: float


def costs(outputs: Outputs, targets: Targets, weights: MatcherWeights) -> Array:
    """Cost of every query for every target: -probability of its class, L1 and -GIoU of the boxes.

    Args:
      outputs: predictions of all layers, [A, B, Q, ...].
      targets: ground truth, [B, M, ...].
      weights: of the three parts.

    Returns:
      float32 [A, B, M, Q]: what the host fetches of a target lies in one piece. Rows of padded
      targets hold numbers without meaning.
    """
    logits = outputs.pred_logits.astype(jnp.float32)
    predicted = outputs.pred_boxes.astype(jnp.float32)
    labels = jnp.broadcast_to(
        targets.labels[None, :, None, :], (*logits.shape[:3], targets.labels.shape[1])
    )
    probability = jnp.take_along_axis(jax.nn.softmax(logits), labels, axis=-1).swapaxes(-1, -2)
    actual = jnp.asarray(targets.boxes_cxcywh, jnp.float32)[None]
    l1 = sum(jnp.abs(actual[..., :, None, i] - predicted[..., None, :, i]) for i in range(4))
    giou = boxes.pairwise_giou(boxes.cxcywh_to_xyxy(actual), boxes.cxcywh_to_xyxy(predicted))
    return weights.l1_cost * l1 - weights.class_cost * probability - weights.giou_cost * giou


def assign_host(cost: np.ndarray, target_valid: np.ndarray) -> tuple[np.ndarray, int]:
    """The cheapest assignment, by scipy.

    Args:
      cost: float32 [A, B, M, Q].
      target_valid: bool [B, M].

    Returns:
      matched_query: int32 [A, B, M], the query that each target is matched to; -1 for padding and
        for targets left over when there are more of them than queries.
      nonfinite: how many costs of valid targets were not finite.
    """
    # The costs of all real targets at once, [A, N, Q]: the step waits for this function.
    layers, images, targets, queries = cost.shape
    places = np.flatnonzero(target_valid)
    real = cost.reshape(layers, images * targets, queries).take(places, axis=1)
    real = real.astype(np.float64)  # as scipy makes them
    finite = np.isfinite(real)
    nonfinite = int(finite.size - np.count_nonzero(finite))
    ends = np.count_nonzero(target_valid, axis=1).cumsum().tolist()
    spans = [(start, end) for start, end in itertools.pairwise([0, *ends]) if start < end]
    query = [np.empty(0, np.int64)]  # there may be no target at all
    for layer, (start, end) in itertools.product(range(len(real)), spans):
        matrix = real[layer, start:end]
        if nonfinite:
            matrix = _replaced(matrix, finite[layer, start:end], np)
        target, matched = linear_sum_assignment(matrix)
        if len(target) < end - start:  # more targets than queries
            matched = _by_target(target, matched, end - start)
        query.append(matched)
    matched_query = np.full((layers, images * targets), -1, np.int32)
    matched_query[:, places] = np.concatenate(query).reshape(layers, len(places))
    return matched_query.reshape(layers, images, targets), nonfinite


def assign_device(
    cost: Array, target_valid: Array, mesh: Mesh | None = None
) -> tuple[Array, Array]:
    """The cheapest assignment inside a compiled program, by optax; equal total cost to scipy's.

    Args:
      cost: float32 [A, B, M, Q].
      target_valid: bool [B, M].
      mesh: the devices that B is sharded over, all of its axes: each matches its own images, and
        none waits in every round for the longest search of all. None: one device.

    Returns:
      As ``assign_host``, on the device: int32 [A, B, M] and int32 [].
    """
    if cost.shape[2] == 0:
        return jnp.full((*cost.shape[:2], 0), -1, jnp.int32), jnp.int32(0)
    assign = jax.vmap(jax.vmap(_assign_one, in_axes=(0, 0)), in_axes=(0, None))
    if mesh is not None and mesh.size > 1:
        rows, layers_rows = PartitionSpec(mesh.axis_names), PartitionSpec(None, mesh.axis_names)
        assign = jax.shard_map(
            assign,
            mesh=mesh,
            in_specs=(layers_rows, rows),
            out_specs=layers_rows,
            check_vma=False,
        )
    matched_query, nonfinite = assign(cost, target_valid)
    return matched_query, nonfinite.sum()


def _assign_one(cost: Array, target_valid: Array) -> tuple[Array, Array]:
    """Matches one image: [M, Q] and [M] -> [M] and []."""
    targets, queries = cost.shape
    real = target_valid[:, None]
    bad = ~jnp.isfinite(cost) & real
    cost = jnp.where(real, _replaced(cost, ~bad & real, jnp), 0)
    cost = jnp.clip(cost, -1e30, 1e30)  # an overflow to infinity would never end
    # One more query for each target, that costs a valid target more than any real query: only
    # targets left over take one. A padded target takes its own, for nothing, in a single step of
    # the algorithm, where a row of equal costs would search through the queries taken before.
    own = ~real & jnp.eye(targets, dtype=bool)
    spare = jnp.where(own, -1.0, cost.max() + 1.0)
    target, query = assignment.hungarian_algorithm(jnp.concatenate([cost, spare], axis=1))
    matched_query = jnp.zeros(targets, jnp.int32).at[target].set(query.astype(jnp.int32))
    matched_query = jnp.where(target_valid & (matched_query < queries), matched_query, -1)
    return matched_query, bad.sum()


def _by_target(target: np.ndarray, query: np.ndarray, count: int) -> np.ndarray:
    """From pairs of a target and its query: the query of each target, -1 for those without."""
    result = np.full(count, -1, query.dtype)
    result[target] = query
    return result


def _replaced(cost: Array, usable: Array, xp) -> Array:
    """Puts in place of what is not usable a cost that no set of finite ones could outweigh."""
    highest = xp.max(xp.where(usable, cost, -xp.inf), initial=-xp.inf)
    lowest = xp.min(xp.where(usable, cost, xp.inf), initial=xp.inf)
    large = highest + (highest - lowest) * cost.shape[-1] + 1
    return xp.where(usable, cost, xp.where(highest < lowest, 1, large))
