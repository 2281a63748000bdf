"""The blocks that a TPU's kernels take at a time."""

from __future__ import annotations

import math

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from yolos_jax.models import splash_attention
from yolos_jax.models.splash_attention import TILE, block_sizes


def in_tiles(queries, keys):
    """Tiles of queries and of keys, of the three kernels."""
    sizes = block_sizes(queries, keys)
    pairs = (
        (sizes.block_q, sizes.block_kv),
        (sizes.block_q_dkv, sizes.block_kv_dkv),
        (sizes.block_q_dq, sizes.block_kv_dq),
    )
    assert not any(side % TILE for pair in pairs for side in pair)
    return [(q // TILE, k // TILE) for q, k in pairs]


@pytest.mark.parametrize(
    ("tiles", "few", "long"),
    [(1, 1, 1), (5, 5, 5), (8, 8, 8), (13, 1, 13), (16, 4, 16), (20, 2, 20), (34, 1, 34),
     (48, 1, 48), (49, 2, 25), (100, 1, 34)],
)  # fmt: skip
def test_a_few_queries_for_all_keys_and_a_few_keys_for_all_queries(tiles, few, long):
    tokens = tiles * TILE
    assert in_tiles(tokens, tokens) == [(few, long), (long, few), (few, long)]
    assert in_tiles(tokens - TILE + 1, tokens) == in_tiles(tokens, tokens)


def test_the_first_tokens_alone():
    assert in_tiles(101, 4352) == [(1, 34), (1, 2), (1, 34)]


@pytest.mark.parametrize("given", [None, splash.BlockSizes(256, 256, 128, 256, 384, 128, 256, 128)])
def test_the_kernel_gets_its_blocks_and_what_they_ask_for(given, monkeypatch):
    asked = {}

    def record(mask, **options):
        asked.update(options, shape=mask.shape)
        raise StopIteration

    monkeypatch.setattr(splash, "make_splash_mha_single_device", record)
    q, k = jnp.ones((1, 101, 2, 8)), jnp.ones((1, 1900, 2, 8))
    with pytest.raises(StopIteration):
        splash_attention.attend(q, k, k, jnp.array([1900]), "kept", given)
    assert asked["block_sizes"] == (given or block_sizes(101, 1900))
    assert asked["residual_checkpoint_name"] == "kept"
    # Of 15 tiles of keys; of whole blocks of 256 and 384 tokens as well.
    assert asked["shape"] == ((2, 256, 2304) if given else (2, 128, 1920))


@given(queries=st.integers(1, 20_000), more=st.integers(0, 20_000))
def test_blocks_divide_sequences_and_are_neither_small_nor_too_large(queries, more):
    keys = queries + more
    pairs = in_tiles(queries, keys)
    for tokens, sides in zip((queries, keys), zip(*pairs, strict=True), strict=True):
        tiles = -(-tokens // TILE)
        longest = max(sides)
        padded = -(-tiles // longest) * longest
        assert not any(padded % side for side in sides)
        if tiles <= 48:
            assert padded == tiles
        assert padded < tiles + -(-tiles // 48)
    assert all(max(pair) <= 48 and min(pair) <= 8 and math.prod(pair) <= 64 for pair in pairs)
