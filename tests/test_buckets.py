"""Buckets: least padding, and large enough for whatever an epoch may draw."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_plan import SMALL, index_of, plan_of
from yolos_jax.batch import Bucket
from yolos_jax.data import augment, buckets
from yolos_jax.data.augment import EvalRecipe


def padded_tokens(candidates, weights, chosen):
    sizes = np.array(candidates)[chosen]
    return (np.array(weights) * sizes[np.searchsorted(chosen, np.arange(len(candidates)))]).sum()


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=7, unique=True),
    st.lists(st.integers(0, 20), min_size=7, max_size=7),
    st.integers(1, 8),
)
def test_no_other_choice_pads_less(candidates, weights, count):
    candidates, weights = np.sort(candidates), np.array(weights[: len(candidates)])
    chosen = buckets._least_padding(candidates, weights, count)
    last = len(candidates) - 1
    assert len(chosen) <= count and chosen[-1] == last and chosen == sorted(set(chosen))
    least = min(
        padded_tokens(candidates, weights, [*some, last])
        for some in itertools.chain.from_iterable(
            itertools.combinations(range(last), k) for k in range(min(count, last + 1))
        )
    )
    assert padded_tokens(candidates, weights, chosen) == least


PICTURES = [(48, 64), (64, 48), (60, 60), (40, 100), (300, 90), (30, 31), (25, 80)]


@pytest.mark.parametrize("crop", [0.0, 0.5, 1.0])
def test_possible_grids_are_exactly_what_can_be_drawn(crop):
    recipe = SMALL._replace(crop=crop, scales=(32, 48), crop_range=(36, 44))
    index = index_of(PICTURES * 20)
    possible = {tuple(grid) for grid in buckets.possible_grids(index, recipe).tolist()}
    drawn = set()
    for epoch in range(100):
        size = augment.draw(index, recipe, 0, epoch).size // 8
        drawn |= {tuple(grid) for grid in size.tolist()}
    assert drawn == possible


def test_possible_grids_of_evaluation():
    grids = buckets.possible_grids(index_of(PICTURES[:4]), EvalRecipe(48, 64, 8))
    assert grids.tolist() == [[3, 8], [6, 6], [6, 8], [8, 6]]


def test_buckets_by_hand():
    index = index_of([(64, 64)] * 6 + [(64, 128)] * 3 + [(128, 64)] * 1)
    recipe = EvalRecipe(64, 0, 16)
    assert buckets.choose_buckets(index, recipe, 1, 1, 5) == (Bucket(32, 8, 8),)
    # Nothing has to be rounded: 16 patches of 4 x 4, 32 of 4 x 8 or 8 x 4.
    assert buckets.choose_buckets(index, recipe, 4, 1, 5) == (Bucket(16, 4, 4), Bucket(32, 8, 8))
    # Sequences of 5 + 16 and 5 + 32 tokens become 24 and 40.
    assert buckets.choose_buckets(index, recipe, 4, 8, 5) == (Bucket(19, 4, 4), Bucket(35, 8, 8))
    # Both become 64.
    assert buckets.choose_buckets(index, recipe, 4, 64, 5) == (Bucket(59, 8, 8),)


def test_panoramas_do_not_widen_the_smaller_buckets():
    # Grids of 3 x 3, 3 x 6, and one of 1 x 9.
    index = index_of([(48, 48)] * 2000 + [(48, 96)] * 2000 + [(16, 144)])
    small, large = buckets.choose_buckets(index, EvalRecipe(48, 144, 16), 2, 1, 1)
    assert small == Bucket(9, 3, 3) and large == Bucket(18, 3, 9)
    assert buckets.smallest_bucket(np.array([[3, 3], [1, 9]]), (small, large)).tolist() == [0, 1]


def test_smallest_bucket_looks_at_length_and_bounds():
    available = (Bucket(12, 3, 4), Bucket(20, 5, 5), Bucket(40, 8, 10))
    grids = np.array([[3, 4], [4, 3], [1, 1], [2, 6], [5, 4], [5, 5], [4, 10]])
    found = buckets.smallest_bucket(grids, available)
    assert found.tolist() == [0, 1, 0, 2, 1, 2, 2]
    with pytest.raises(ValueError, match="9 x 4 patches does not fit the largest bucket"):
        buckets.smallest_bucket(np.array([[1, 1], [9, 4]]), available)


def test_senseless_arguments_are_refused():
    index = index_of([(64, 64)])
    with pytest.raises(ValueError, match=r"buckets\.count 0"):
        buckets.choose_buckets(index, SMALL, 0, 8, 9)
    with pytest.raises(ValueError, match=r"a\.json: no picture"):
        buckets.choose_buckets(index.select(np.arange(0)), SMALL, 1, 8, 9)


def test_a_picture_keeps_a_patch_however_thin_it_is():
    index = index_of([(64, 64), (64, 64), (6, 640)])
    for recipe in (SMALL, EvalRecipe(48, 96, 8)):
        two = buckets.choose_buckets(index, recipe, 2, 8, 9)
        assert two[-1].cols == 12  # 96 pixels of 640, and one patch high
    whole = SMALL._replace(crop=0.0)
    plan = plan_of(index, buckets.choose_buckets(index, whole, 2, 8, 9), whole, batch_size=3)
    assert plan.grid.min() == 1
