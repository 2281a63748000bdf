"""Which pictures share a step: those of one bucket, at random, others in every epoch."""

from __future__ import annotations

import numpy as np

from tests import test_plan
from tests.test_plan import SMALL, index_of, plan_of
from yolos_jax.data.buckets import choose_buckets, smallest_bucket

coco, buckets = test_plan.coco, test_plan.buckets  # fixtures


def test_few_steps_are_of_two_buckets(coco, buckets):
    """One less than there are buckets, at most: no window of the epoch has leftovers of its own."""
    for epoch in range(4):
        plan = plan_of(coco, buckets, epoch=epoch)
        needed = smallest_bucket(plan.grid.reshape(-1, 2), buckets).reshape(plan.rows.shape)
        assert (needed != plan.bucket[:, None]).any(axis=1).sum() < len(buckets)
        assert (needed.max(axis=1) == plan.bucket).mean() > 0.99  # bounds may ask for a larger one


def test_a_picture_meets_others_in_every_epoch():
    index = index_of([(64, 64)] * 64)
    buckets = choose_buckets(index, SMALL._replace(crop=0.0), 2, 8, 9)
    recipe = SMALL._replace(crop=0.0, scales=(64,))
    steps = [
        tuple(sorted(step))
        for epoch in range(9)
        for step in plan_of(index, buckets, recipe, epoch=epoch, batch_size=8).rows.tolist()
    ]
    assert len(set(steps)) == len(steps) == 9 * 8


def test_two_buckets_of_a_step_are_mixed(coco, buckets):
    seen = 0
    for epoch in range(8):
        plan = plan_of(coco, buckets, epoch=epoch, batch_size=64)
        needed = smallest_bucket(plan.grid.reshape(-1, 2), buckets).reshape(plan.rows.shape)
        for step in needed:
            if np.bincount(step == step.max()).min() > 5 and len(np.unique(step)) == 2:
                seen += 1
                assert (np.diff(step) != 0).sum() > 1  # not one block of each
    assert seen > 10


def test_steps_are_shuffled_and_so_are_the_rows_of_a_bucket(coco, buckets):
    plan = plan_of(coco, buckets)
    assert (np.diff(plan.bucket) == 0).mean() < 0.5
    lengths = plan.grid.prod(-1)
    assert 0.3 < (np.diff(lengths.mean(axis=1)) > 0).mean() < 0.7
    assert 0.4 < (np.diff(lengths, axis=1) > 0).sum() / (np.diff(lengths, axis=1) != 0).sum() < 0.6
    needed = smallest_bucket(plan.grid.reshape(-1, 2), buckets).reshape(lengths.shape)
    pure = (needed == plan.bucket[:, None]).all(axis=1)
    assert pure.mean() > 0.9
    for number in np.unique(plan.bucket[pure]):
        # Not sorted by length: steps of a bucket differ as means of random pictures of it do.
        own = lengths[pure & (plan.bucket == number)]
        expected = own.std() / np.sqrt(own.shape[1])
        assert own.mean(axis=1).std() < 2 * expected  # sorted: 4 times
