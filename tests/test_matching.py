from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from tests import golden_losses
from yolos_jax import matching
from yolos_jax.batch import Outputs, Targets

assign_device = jax.jit(matching.assign_device)
costs = jax.jit(partial(matching.costs, weights=golden_losses.MATCHER_WEIGHTS))


def on_device(cost, valid):
    matched_query, nonfinite = assign_device(cost, valid)
    assert matched_query.dtype == np.int32
    return np.asarray(matched_query), int(nonfinite)


WAYS = pytest.mark.parametrize("assign", [matching.assign_host, on_device], ids=["host", "device"])


def totals(cost: np.ndarray, matched_query: np.ndarray) -> np.ndarray:
    """Cost of an assignment per layer and image; checks that it is one."""
    result = np.zeros(cost.shape[:2])
    for layer, image in np.ndindex(*result.shape):
        targets = np.flatnonzero(matched_query[layer, image] >= 0)
        queries = matched_query[layer, image, targets]
        assert len(set(queries.tolist())) == len(queries)
        result[layer, image] = cost[layer, image, targets, queries].astype(np.float64).sum()
    return result


def scipy_totals(cost: np.ndarray, valid: np.ndarray) -> np.ndarray:
    result = np.zeros(cost.shape[:2])
    for layer, image in np.ndindex(*result.shape):
        matrix = cost[layer, image, valid[image]].astype(np.float64)
        result[layer, image] = matrix[linear_sum_assignment(matrix)].sum()
    return result


def check(assign, cost, valid):
    matched_query, nonfinite = assign(cost, valid)
    assert nonfinite == 0
    assert (matched_query[:, ~valid] == -1).all()
    count = np.minimum(valid.sum(1), cost.shape[3])
    np.testing.assert_array_equal((matched_query >= 0).sum(-1), [count] * cost.shape[0])
    assert (matched_query < cost.shape[3]).all()
    expected = scipy_totals(cost, valid)
    np.testing.assert_allclose(totals(cost, matched_query), expected, rtol=1e-5, atol=1e-4)


def test_costs_by_hand():
    logits = np.log(np.float32([[[[0.5, 0.25, 0.25], [0.1, 0.7, 0.2]]]]))
    predicted = np.float32([[[[0.5, 0.5, 0.5, 0.5], [0.25, 0.25, 0.5, 0.5]]]])
    targets = Targets(
        labels=np.int32([[1, 0]]),
        boxes_cxcywh=np.float32([[[0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0]]]),
        target_valid=np.array([[True, False]]),
    )
    weights = matching.MatcherWeights(class_cost=3.0, l1_cost=5.0, giou_cost=2.0)
    result = matching.costs(Outputs(logits, predicted), targets, weights)
    assert result.shape == (1, 1, 2, 2) and result.dtype == np.float32
    # The second query's box shares 1/16 with the target; the union is 7/16, the enclosure 9/16.
    second = -3 * 0.7 + 5 * 0.5 - 2 * (1 / 7 - 2 / 9)
    np.testing.assert_allclose(result[0, 0, 0], [-3 * 0.25 + 0 - 2, second], rtol=1e-5)


@pytest.mark.parametrize("name", golden_losses.NAMES)
def test_costs_and_assignment_are_the_original_s(name):
    case = golden_losses.load(name)
    cost = np.asarray(costs(case.outputs, case.targets))
    if "cost" in case.arrays:
        difference = cost[0] - case.arrays["cost"].swapaxes(1, 2)
        difference = difference[case.targets.target_valid]
        assert np.abs(difference).max(initial=0) <= 5e-5
    ways = [matching.assign_host]
    if name in ("c02", "c03", "c05"):  # many targets, more of them than queries, ties
        ways.append(on_device)
    for assign in ways:
        matched_query, nonfinite = assign(cost, case.targets.target_valid)
        assert nonfinite == 0
        np.testing.assert_array_equal(
            matched_query[:, case.unique], case.matched_query[:, case.unique]
        )
        np.testing.assert_allclose(  # where several are the cheapest, any of them
            totals(cost, matched_query), totals(cost, case.matched_query), atol=1e-5
        )


# One shape for all examples of a property: two layers, three images, and as many queries as asked.
@st.composite
def problems(draw, queries: int, targets: int):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    cost = rng.normal(size=(2, 3, targets, queries)).astype(np.float32)
    cost = cost * np.float32(draw(st.sampled_from([1e-3, 1.0, 50.0])))
    if draw(st.booleans()):
        cost = np.round(cost)  # ties
    valid = rng.random((3, targets)) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    return cost, valid, rng


@WAYS
@pytest.mark.parametrize("queries,targets", [(12, 8), (5, 16), (8, 8)])
def test_cost_is_scipy_s(assign, queries, targets):
    @given(problems(queries, targets))
    def property(problem):
        check(assign, *problem[:2])

    property()


@WAYS
def test_order_does_not_matter(assign):
    @given(problems(12, 8))
    def property(problem):
        cost, valid, rng = problem
        query, target = rng.permutation(12), rng.permutation(8)
        shuffled = cost[..., query][:, :, target], valid[:, target]
        check(assign, *shuffled)
        np.testing.assert_allclose(
            totals(shuffled[0], assign(*shuffled)[0]),
            totals(cost, assign(cost, valid)[0]),
            rtol=1e-4,
        )

    property()


@WAYS
def test_no_targets_and_no_columns(assign):
    cost = np.ones((2, 3, 8, 12), np.float32)
    matched_query, nonfinite = assign(cost, np.zeros((3, 8), bool))
    assert (matched_query == -1).all() and nonfinite == 0 and isinstance(nonfinite, int)
    matched_query, nonfinite = assign(cost[:, :, :0], np.zeros((3, 0), bool))
    assert matched_query.shape == (2, 3, 0) and nonfinite == 0


@WAYS
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_costs_that_are_not_finite_are_counted_and_avoided(assign, bad):
    rng = np.random.default_rng(0)
    cost = rng.normal(size=(2, 3, 8, 12)).astype(np.float32)
    valid = np.arange(8) < np.array([[8], [3], [0]])
    cost[0, 0, :, 4:] = bad  # only 4 of 12 queries are left for 8 targets
    cost[1, 1, 1] = bad  # a target that no query can have
    cost[:, :, 7] = np.where(valid[:, 7, None], cost[:, :, 7], bad)  # padding: not counted
    matched_query, nonfinite = assign(cost, valid)
    assert nonfinite == 8 * 8 + 12
    np.testing.assert_array_equal((matched_query >= 0).sum(-1), [[8, 3, 0]] * 2)
    assert set(matched_query[0, 0].tolist()) >= {0, 1, 2, 3}
    clean = cost[1:, 1:2, [0, 2]]
    pairs = matched_query[1:, 1:2, [0, 2]]
    np.testing.assert_allclose(
        totals(clean, pairs), scipy_totals(clean, np.ones((1, 2), bool)), rtol=1e-5
    )


@WAYS
def test_no_saving_elsewhere_makes_up_for_a_cost_that_is_not_finite(assign):
    cost = np.array([[0, 10], [10, np.nan]], np.float32)[None, None]
    matched_query, nonfinite = assign(cost, np.ones((1, 2), bool))
    assert matched_query.tolist() == [[[1, 0]]] and nonfinite == 1


@WAYS
def test_nothing_finite_still_ends(assign):
    cost = np.full((2, 3, 8, 12), np.nan, np.float32)
    matched_query, nonfinite = assign(cost, np.ones((3, 8), bool))
    assert nonfinite == cost.size and (matched_query >= 0).all()
    cost = np.full((2, 3, 8, 12), np.finfo(np.float32).max, np.float32)
    cost[..., 0, 0], cost[..., 0, 1] = np.finfo(np.float32).min, np.inf
    matched_query, nonfinite = assign(cost, np.ones((3, 8), bool))
    assert nonfinite == 6 and (matched_query[..., 0] == 0).all()
