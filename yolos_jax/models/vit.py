"""The plain vision transformer's blocks, and the stack of them, scanned or unrolled.

Dosovitskiy et al., "An image is worth 16x16 words", with the mid position tables of Fang et al.,
"You only look at one sequence": one more table is added after every block but the last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from yolos_jax.models import attention, position
from yolos_jax.models.linear import Linear, Projections
from yolos_jax.models.norm import LayerNorm

Array = jax.Array
Attend = Callable[[Array, Array, Array, Array], Array]
Place = Callable[[Array], Array]

REMAT = ("none", "default", "full")

# The reference draws from a normal cut at +-2, which is a hundred standard deviations.
weight_init = nn.initializers.normal(0.02)


class Mid(NamedTuple):
    """The mid position tables, and what resizes them to the batch."""

    tables: dict[str, Array]  # as ``position.token_positions`` takes them, L - 1 on axis 0.
    resizer: position.Resizer

    def positions(self, index: Array, place: Place) -> Array:
        """float32 [B, T, D] to add after block ``index``; zeros after the last.

        Picked inside the scanned block, one table is alive at a time; the gradient is added in
        place. (Scanned over with zeros for the last block, the tables would be copied whole, in
        both passes.)
        """
        last = self.tables["cls"].shape[0]

        def pick(tables):
            return jnp.where(index < last, tables[jnp.minimum(index, last - 1)], 0)

        return position.token_positions(jax.tree.map(pick, self.tables), self.resizer, place)


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """The exact GELU by ``erf``, as torch computes it, in float32 inside.

    ``jax.nn.gelu(approximate=False)`` goes through ``erfc``, which makes the whole MLP's step 1.8
    times slower on the CPU.
    """
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _gelu_backward(x: Array, cotangent: Array) -> tuple[Array]:
    # On the CPU a number more in memory is slower than ``erf`` once more. The barrier hides that it
    # is what a rematerialised forward pass computes, too.
    x = jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)
    wide = x.astype(jnp.float32)
    density = np.float32((2 * np.pi) ** -0.5) * jnp.exp(-0.5 * wide * wide)
    slope = _normal_cdf(wide) + wide * density
    return ((slope * cotangent.astype(jnp.float32)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1 + jax.lax.erf(x * np.float32(0.5**0.5)))


def on_its_device(x: Array, mesh: Mesh | None) -> Array:
    """Keeps every image's part of ``x`` [B, ...] whole, on the device that the batch is split to.

    Args:
      x: tokens or features.
      mesh: the devices that batches are sharded over, all of its axes; None: one device.
    """
    if mesh is None or mesh.size == 1:
        return x
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.lax.with_sharding_constraint(x, rows)


class SelfAttention(nn.Module):
    """Query, key and value projections (each head-major), attention, output projection."""

    heads: int
    dtype: Any
    attend: Attend

    @nn.compact
    def __call__(self, tokens: Array, lengths: Array) -> tuple[Array, tuple[Array, Array]]:
        """float [B, T, D], int32 [B] -> [B, T, D] and the queries and keys [B, T, H, d]."""
        width = tokens.shape[-1]
        qkv = Projections(3, width, self.dtype, weight_init, name="qkv")(tokens)
        q, k, v = (x.reshape(*tokens.shape[:2], self.heads, -1) for x in qkv)
        out = self.attend(q, k, v, lengths).reshape(tokens.shape)
        return Linear(width, dtype=self.dtype, kernel_init=weight_init, name="out")(out), (q, k)


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        hidden = Linear(self.width, dtype=self.dtype, kernel_init=weight_init, name="fc1")(tokens)
        hidden = gelu(hidden)
        return Linear(tokens.shape[-1], dtype=self.dtype, kernel_init=weight_init, name="fc2")(
            hidden
        )


class Block(nn.Module):
    """Pre-norm attention and MLP, then the mid position table, if there is one."""

    heads: int
    mlp_width: int
    layer_norm_eps: float
    dtype: Any
    attend: Attend
    place: Place  # says where tokens live; without it the compiler spreads widths over devices
    capture: bool

    @nn.compact
    def __call__(
        self, tokens: Array, index: Array, lengths: Array, mid: Mid | None
    ) -> tuple[Array, tuple[Array, Array, Array] | None]:
        """One block.

        Args:
          tokens: float32 [B, T, D].
          index: int32 [], which block this is.
          lengths: int32 [B].
          mid: the tables of all blocks but the last.

        Returns:
          The next block's tokens and, when capturing, (tokens without the mid table, queries,
          keys).
        """
        attend = SelfAttention(self.heads, self.dtype, self.attend, name="attention")
        tokens = self.place(tokens)
        attended, (q, k) = attend(LayerNorm(self.layer_norm_eps, name="norm1")(tokens), lengths)
        tokens = self.place(tokens + attended)
        normed = LayerNorm(self.layer_norm_eps, name="norm2")(tokens)
        tokens = self.place(tokens + Mlp(self.mlp_width, self.dtype, name="mlp")(normed))
        captured = (tokens, q, k) if self.capture else None
        if mid is not None:
            tokens += mid.positions(index, self.place)
        return tokens, captured


def blocks(
    *,
    depth: int,
    heads: int,
    mlp_width: int,
    layer_norm_eps: float,
    dtype: Any,
    attend: Attend,
    place: Place,
    scan: bool,
    remat: str,
    capture: bool,
) -> nn.Module:
    """A stack of blocks named ``blocks`` whose parameters are stacked on axis 0.

    Args:
      depth, heads, mlp_width, dtype: of the blocks.
      attend: (q, k, v [B, T, H, d], lengths [B]) -> [B, T, H, d].
      place: tokens [B, T, D] -> the same, each image's on the device that has the image.
      scan: one compiled block, run ``depth`` times; False: ``depth`` blocks in the program.
      remat: what the forward pass keeps for the backward pass: 'none' (everything), 'default'
        (a block's input and its attention's output), 'full' (a block's input).
      capture: also return what every block computed, stacked on axis 0.

    Returns:
      A module with Block's signature, to be called with ``jnp.arange(depth)`` for the index.
    """
    block = Block
    if remat != "none":
        policy = attention.save_attention if remat == "default" else None
        block = nn.remat(Block, policy=policy, prevent_cse=not scan)
    stack = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        length=depth,
        unroll=1 if scan else depth,
    )
    return stack(heads, mlp_width, layer_norm_eps, dtype, attend, place, capture, name="blocks")
