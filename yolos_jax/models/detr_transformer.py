"""DETR's transformer: an encoder over the cells of the features, a decoder over object queries.

Carion et al., "End-to-End Object Detection with Transformers" (2020); facebookresearch/detr,
models/transformer.py. Positions are added to queries and keys, never to values, in every layer.
The stream between layers is float32 whatever the type of the products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from yolos_jax.models import masked_attention, vit
from yolos_jax.models.heads import torch_linear_init
from yolos_jax.models.linear import Linear
from yolos_jax.models.norm import LayerNorm
from yolos_jax.models.relu import relu

Array = jax.Array

_XAVIER = nn.initializers.xavier_uniform()
# The original draws queries', keys' and values' weights as one matrix [3 * D, D].
_XAVIER_OF_THREE = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")


class Layer(NamedTuple):
    """What all layers of a transformer have in common."""

    heads: int
    mlp_width: int
    layer_norm_eps: float
    pre_norm: bool  # LayerNorm before each sublayer; False: after its sum
    dropout: float
    training: bool  # dropout is on; needs the random stream 'dropout'
    dtype: Any  # of products
    place: vit.Place
    capture: bool

    def drop(self) -> nn.Dropout:
        """A new dropout of tokens."""
        return nn.Dropout(self.dropout, deterministic=not self.training)

    def residual(self, sublayer: Callable[[Array], Array], tokens: Array, norm: str) -> Array:
        """A sublayer with its shortcut and LayerNorm; to be called inside of a module."""
        normalise = LayerNorm(self.layer_norm_eps, name=norm)
        if self.pre_norm:
            return self.place(tokens + self.drop()(sublayer(normalise(tokens))))
        return self.place(normalise(tokens + self.drop()(sublayer(tokens))))


class Attention(nn.Module):
    """Projections of queries, keys and values, attention, and the projection of its result."""

    layer: Layer

    @nn.compact
    def __call__(
        self, query: Array, key: Array, value: Array, real: Array
    ) -> tuple[Array, tuple[Array, Array]]:
        """float [B, T, D], [B, S, D] twice, bool [B, S] -> [B, T, D], queries and keys by head."""
        layer, width = self.layer, query.shape[-1]

        def project(x: Array, name: str, init: nn.initializers.Initializer) -> Array:
            return Linear(width, dtype=layer.dtype, kernel_init=init, name=name)(x)

        q, k, v = (
            project(x, name, _XAVIER_OF_THREE).reshape(*x.shape[:2], layer.heads, -1)
            for x, name in ((query, "query"), (key, "key"), (value, "value"))
        )
        rng = self.make_rng("dropout") if layer.training and layer.dropout else None
        out = masked_attention.attention(q, k, v, real, layer.dropout, rng)
        return project(out.reshape(query.shape), "out", _XAVIER), (q, k)


class FeedForward(nn.Module):
    """Two linear layers with ReLU and dropout between."""

    layer: Layer

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """float [..., D] -> the same."""
        layer, width = self.layer, tokens.shape[-1]

        def linear(features: int, fan_in: int, name: str) -> Linear:
            bias = torch_linear_init(fan_in)
            return Linear(
                features, dtype=layer.dtype, kernel_init=_XAVIER, bias_init=bias, name=name
            )

        # Weights come to few tokens, too: queries are fewer than an MLP is wide.
        hidden = layer.place(linear(layer.mlp_width, width, "linear1")(tokens))
        hidden = layer.drop()(relu(hidden))
        return linear(width, layer.mlp_width, "linear2")(hidden)


class EncoderLayer(nn.Module):
    """Self-attention among cells, then the MLP."""

    layer: Layer

    @nn.compact
    def __call__(self, cells: Array, position: Array, real: Array) -> tuple[Array, None]:
        """float32 [B, S, D] twice, bool [B, S] -> the next layer's cells."""

        def attend(cells: Array) -> Array:
            placed = cells + position
            return Attention(self.layer, name="self_attention")(placed, placed, cells, real)[0]

        cells = self.layer.residual(attend, cells, "norm1")
        mlp = FeedForward(self.layer, name="mlp")
        return self.layer.residual(mlp, cells, "norm2"), None


class DecoderLayer(nn.Module):
    """Self-attention among queries, attention to the memory, then the MLP."""

    layer: Layer

    @nn.compact
    def __call__(
        self, tokens: Array, query_embed: Array, memory: Array, position: Array, real: Array
    ) -> tuple[Array, tuple[Array, tuple[Array, Array] | None]]:
        """One layer.

        Args:
          tokens: float32 [B, Q, D].
          query_embed: float32 [B, Q, D], the queries' positions.
          memory, position: float32 [B, S, D].
          real: bool [B, S].

        Returns:
          The next layer's tokens, and what every layer gives: the same tokens and, when capturing,
          queries and keys of the attention to the memory, else None.
        """
        layer, captured = self.layer, []

        def attend_to_queries(tokens: Array) -> Array:
            placed, all_real = tokens + query_embed, jnp.ones(tokens.shape[:2], bool)
            attend = Attention(layer, name="self_attention")
            return attend(placed, placed, tokens, all_real)[0]

        def attend_to_memory(tokens: Array) -> Array:
            attend = Attention(layer, name="cross_attention")
            out, queries_keys = attend(tokens + query_embed, memory + position, memory, real)
            captured.append(queries_keys)
            return out

        tokens = layer.residual(attend_to_queries, tokens, "norm1")
        tokens = layer.residual(attend_to_memory, tokens, "norm2")
        tokens = layer.residual(FeedForward(layer, name="mlp"), tokens, "norm3")
        return tokens, (tokens, captured[0] if layer.capture else None)


class Encoder(nn.Module):
    """Cells among themselves; with pre-norm normalised at the end."""

    layer: Layer
    depth: int
    scan: bool
    remat: str

    @nn.compact
    def __call__(self, cells: Array, position: Array, real: Array) -> Array:
        """float32 [B, S, D] twice, bool [B, S] -> the memory, float32 [B, S, D]."""
        layers = _stack(EncoderLayer, self.layer, self.depth, 2, self.scan, self.remat)
        memory, _ = layers(cells, position, real)
        if self.layer.pre_norm:
            memory = LayerNorm(self.layer.layer_norm_eps, name="norm")(memory)
        return memory


class Decoder(nn.Module):
    """Object queries, from zeros, looking at the memory."""

    layer: Layer
    depth: int
    scan: bool
    remat: str

    @nn.compact
    def __call__(
        self, query_embed: Array, memory: Array, position: Array, real: Array
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """What every layer says.

        Args:
          query_embed: float32 [B, Q, D].
          memory, position: float32 [B, S, D].
          real: bool [B, S].

        Returns:
          float32 [A, B, Q, D], through one LayerNorm that the layers share and the next layer
          does not see; and captured queries and keys with A on axis 0, or None.
        """
        layers = _stack(DecoderLayer, self.layer, self.depth, 4, self.scan, self.remat)
        zeros = jnp.zeros_like(query_embed)
        _, (tokens, captured) = layers(zeros, query_embed, memory, position, real)
        place = jax.vmap(self.layer.place)  # of every layer, where images are on axis 1
        return place(LayerNorm(self.layer.layer_norm_eps, name="norm")(place(tokens))), captured


def _stack(
    kind: type[nn.Module], layer: Layer, depth: int, inputs: int, scan: bool, remat: str
) -> nn.Module:
    """``depth`` layers named ``layers`` with parameters stacked on axis 0.

    Args:
      kind: of layer; carries tokens and gives something per layer.
      layer: what they have in common.
      depth: how many.
      inputs: how many arguments every layer gets besides the tokens.
      scan: one compiled layer, run ``depth`` times; False: all of them in the program.
      remat: as of ``vit.Blocks``; 'default' keeps what attentions gave.
    """
    if remat != "none":
        save = jax.checkpoint_policies.save_only_these_names(masked_attention.SAVED)
        policy = save if remat == "default" else None
        kind = nn.remat(kind, policy=policy, prevent_cse=not scan)
    stack = nn.scan(
        kind,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast,) * inputs,
        length=depth,
        unroll=1 if scan else depth,
    )
    return stack(layer, name="layers")
