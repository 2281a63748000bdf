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
Params = dict[str, Any]

REMAT = ("none", "default", "full")

# The reference draws from a normal cut at +-2, which is a hundred standard deviations.
weight_init = nn.initializers.normal(0.02)


class Mid(NamedTuple):
    """The mid position tables, and what resizes them to the batch."""

    tables: dict[str, Array]  # as ``position.token_positions`` takes them, L - 1 on axis 0.
    resizer: position.Resizer

    def positions(self, index: Array, place: Place) -> Array:
        """float32 [B, T, D] to add after block ``index``, which is not the last.

        Picked inside the scanned block, one table is alive at a time; the gradient is added in
        place. (Scanned over, the tables would be copied whole, in both passes.)
        """
        return position.token_positions(_pick(self.tables, index), self.resizer, place)


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
    place: Place

    @nn.compact
    def __call__(
        self, tokens: Array, lengths: Array, wanted: int
    ) -> tuple[Array, tuple[Array, Array]]:
        """What the first tokens see in all.

        Args:
          tokens: float [B, T, D].
          lengths: int32 [B].
          wanted: W, how many.

        Returns:
          [B, W, D], and the queries [B, W, H, d] and keys [B, T, H, d].
        """
        width = tokens.shape[-1]
        project = Projections(3, width, self.dtype, weight_init, name="qkv")
        qkv = project(self.place(tokens[:, :wanted]), tokens, tokens)
        q, k, v = (self.place(x.reshape(*x.shape[:2], self.heads, -1)) for x in qkv)
        out = self.place(self.attend(q, k, v, lengths))
        out = out.reshape(*out.shape[:2], width)
        return Linear(width, dtype=self.dtype, kernel_init=weight_init, name="out")(out), (q, k)


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between."""

    width: int
    dtype: Any
    place: Place

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        hidden = Linear(self.width, dtype=self.dtype, kernel_init=weight_init, name="fc1")(tokens)
        hidden = self.place(gelu(hidden))
        return Linear(tokens.shape[-1], dtype=self.dtype, kernel_init=weight_init, name="fc2")(
            hidden
        )


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    heads: int
    mlp_width: int
    layer_norm_eps: float
    dtype: Any
    attend: Attend
    place: Place  # says where tokens live; without it the compiler spreads widths over devices

    @nn.compact
    def __call__(
        self, tokens: Array, lengths: Array, wanted: int
    ) -> tuple[Array, tuple[Array, Array]]:
        """One block, for the first ``wanted`` tokens.

        Args:
          tokens: float32 [B, T, D].
          lengths: int32 [B].
          wanted: W.

        Returns:
          float32 [B, W, D], and what attention compared, queries and keys.
        """
        attend = SelfAttention(self.heads, self.dtype, self.attend, self.place, name="attention")
        tokens = self.place(tokens)
        normed = LayerNorm(self.layer_norm_eps, name="norm1")(tokens)
        attended, compared = attend(normed, lengths, wanted)
        tokens = self.place(tokens[:, :wanted] + attended)
        normed = LayerNorm(self.layer_norm_eps, name="norm2")(tokens)
        mlp = Mlp(self.mlp_width, self.dtype, self.place, name="mlp")
        tokens = self.place(tokens + mlp(normed))
        return tokens, compared


class Captured(NamedTuple):
    """What happened inside."""

    blocks: Array  # float32 [L, B, T, D]: what each block gave, before position tables are added.
    queries: Array  # float [B, T, H, d]: of the last block.
    keys: Array


class Blocks(NamedTuple):
    """A stack of blocks; their parameters are those of one, stacked on axis 0."""

    block: Block
    depth: int  # L
    scan: bool  # one compiled block, run L - 1 times, and the last; False: all in the program.
    # What the forward pass keeps for the backward pass: 'none' (everything), 'default' (a block's
    # input and its attention's output), 'full' (a block's input).
    remat: str

    def init(self, rng: Array, width: int) -> Params:
        """Draws parameters for tokens of width D."""
        block = self.block.clone(attend=lambda q, k, v, lengths: v, place=lambda tokens: tokens)
        tokens, lengths = jnp.zeros((1, 1, width)), jnp.ones((1,), jnp.int32)

        def draw(rng):
            return block.init(rng, tokens, lengths, 1)["params"]

        return jax.vmap(draw)(jax.random.split(rng, self.depth))

    def apply(
        self,
        params: Params,
        tokens: Array,
        lengths: Array,
        mid: Mid | None,
        *,
        wanted: int,
        capture: bool = False,
    ) -> tuple[Array, Captured | None]:
        """Runs all blocks; the last computes no more than is wanted of it.

        Where W is small, this saves 1 / L of nearly everything, in both passes: the last block's
        other tokens serve as keys and values only.

        Args:
          params: of all blocks.
          tokens: float32 [B, T, D].
          lengths: int32 [B].
          mid: position tables to add after all blocks but the last.
          wanted: W, how many of the first tokens are wanted.
          capture: also return what every block gave.

        Returns:
          float32 [B, W, D], and what was captured.
        """

        def run(tokens, index, wanted):
            own = {"params": _pick(params, index)}  # here, where rematerialisation picks them anew
            return self.block.apply(own, tokens, lengths, wanted)

        def inner(tokens, index):
            given, _ = run(tokens, index, tokens.shape[1])
            following = given if mid is None else given + mid.positions(index, self.block.place)
            return following, given if capture else None

        # Were its number known, the compiler would add the last block's gradient to all blocks' as
        # an array of that size; so it is added in place.
        number = jax.lax.optimization_barrier(jnp.int32(self.depth - 1))

        def last(tokens):
            given, compared = run(tokens, number, wanted)
            return given, compared if capture else None

        through = jax.lax.scan if self.scan or self.depth == 1 else _unrolled
        tokens, each = through(self._remat(inner), tokens, jnp.arange(self.depth - 1))
        tokens, compared = self._remat(last)(tokens)
        if not capture:
            return tokens, None
        return tokens, Captured(jnp.concatenate([each, tokens[None]]), *compared)

    def _remat(self, function):
        if self.remat == "none":
            return function
        policy = attention.save_attention if self.remat == "default" else None
        return jax.checkpoint(function, policy=policy, prevent_cse=not self.scan)


def _unrolled(function, carry, indices):
    """``jax.lax.scan`` as that many calls, whose residuals are arrays of their own.

    Unrolled by ``scan`` they would be joined into one array, and taken apart by the backward pass.
    """
    each = []
    for index in range(len(indices)):
        carry, given = function(carry, index)
        each.append(given)
    return carry, jax.tree.map(lambda *given: jnp.stack(given), *each)


def _pick(stacked: Any, index: Array | int) -> Any:
    """One of each array's, along axis 0."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stacked)
