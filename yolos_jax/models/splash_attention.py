"""Fused attention on TPUs: jax's splash kernel over blocks that keep a core busy.

A kernel takes a block of queries and one of keys at a time, and a step costs the time of several
tiles of 128 x 128 logits before it computes the first one. So blocks are large, and such that a
sequence of whole tiles is not padded for them: where each query needs all keys (the outputs and the
gradient of the queries) a few queries and all keys, where each key needs all queries a few keys and
all queries. Of more tokens than fit, "all" is one of several equal parts.
``benchmarks/tpu_attention.py`` reads what blocks cost from the compiler's schedules.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

Array = jax.Array

TILE = 128  # tokens: sides of blocks are multiples of it
# Of a block, in tiles. For heads up to 128 wide all of it fits the 16 MiB of a core's memory that
# kernels may use, in the backward pass and on a TPU v4, too.
_MOST_LONG = 48
_MOST_SHORT = 8
_MOST_AREA = 64


def block_sizes(queries: int, keys: int) -> splash.BlockSizes:
    """What the kernels take at a time of sequences of so many tokens."""
    (q_tiles, all_q), (kv_tiles, all_kv) = _cut(queries), _cut(keys)
    few_q, few_kv = _few(q_tiles, all_kv), _few(kv_tiles, all_q)
    return splash.BlockSizes(
        **{f"block_{name}": few_q * TILE for name in ("q", "q_dq")},
        **{f"block_{name}": all_kv * TILE for name in ("kv", "kv_dq")},
        block_q_dkv=all_q * TILE,
        block_kv_dkv=few_kv * TILE,
        # As the products before leave them: heads narrower than a tile's 128 lanes, as all
        # published ones are, along its sublanes.
        **{f"{name}_layout": splash.QKVLayout.SEQ_MINOR for name in ("q", "k", "v")},
    )


def attend(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array,
    saved: str,
    sizes: splash.BlockSizes | None = None,
    interpret: bool = False,
) -> Array:
    """Softmax attention, scaled, over the first ``lengths[b]`` keys.

    Lengths become segments, so that padding attends to padding.

    Args:
      q: [B, T, H, d], T up to S.
      k, v: [B, S, H, d].
      lengths: int32 [B], at least 1.
      saved: the name, for rematerialisation, of what the backward pass needs of the forward pass.
      sizes: of the blocks; None: ``block_sizes``.
      interpret: run it without a TPU.

    Returns:
      [B, T, H, d] in the type of ``k``.
    """
    tokens, heads, width = q.shape[1:]
    sizes = sizes or block_sizes(tokens, k.shape[1])
    q = (q.astype(jnp.float32) * width**-0.5).astype(k.dtype)  # the kernel does not scale
    q = _whole_blocks(q, math.lcm(sizes.block_q, sizes.block_q_dkv, sizes.block_q_dq))
    of_kv = math.lcm(sizes.block_kv, sizes.block_kv_dkv, sizes.block_kv_dq)
    k, v = _whole_blocks(k, of_kv), _whole_blocks(v, of_kv)
    queries, keys = q.shape[2], k.shape[2]
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.FullMask((queries, keys))] * heads),
        block_sizes=sizes,
        residual_checkpoint_name=saved,
        interpret=interpret,
    )

    def one_image(q: Array, k: Array, v: Array, valid: Array) -> Array:
        segments = ((jnp.arange(length) < valid).astype(jnp.int32) for length in (queries, keys))
        return kernel(q, k, v, segment_ids=splash.SegmentIds(*segments))

    return jax.vmap(one_image)(q, k, v, lengths)[:, :, :tokens].transpose(0, 2, 1, 3)


def _cut(tokens: int) -> tuple[int, int]:
    """Tiles of the padded sequence, and of each of the equal parts it is cut into."""
    tiles = -(-tokens // TILE)
    parts = -(-tiles // _MOST_LONG)
    long = -(-tiles // parts)
    return parts * long, long


def _few(tiles: int, long: int) -> int:
    """Tiles of a block's short side, which divides ``tiles``; ``long`` are on the other."""
    fitting = range(1, min(_MOST_SHORT, _MOST_AREA // long) + 1)
    return max(few for few in fitting if tiles % few == 0)


def _whole_blocks(x: Array, size: int) -> Array:
    """[B, H, T', d] of [B, T, H, d], with zeros up to a multiple of ``size`` tokens."""
    return jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, -x.shape[1] % size), (0, 0)))
