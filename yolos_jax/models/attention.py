"""Attention over sequences whose valid tokens are a prefix, by several backends.

Every backend computes the same function on valid tokens: softmax over the first ``lengths[b]``
keys. What a padding token gets is finite and means nothing.

    stock    the textbook form: short sequences
    chunked  queries in chunks, recomputed in the backward pass: accelerators without a fused kernel
    heads    one head at a time, head_attention.py: the CPU
    cudnn    fused, GPU, bfloat16
    splash   fused, TPU, bfloat16: splash_attention.py
    auto     the one of these that fits platform, type and length
"""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from yolos_jax.models import head_attention, precision, splash_attention

Array = jax.Array

BACKENDS = ("auto", "stock", "chunked", "heads", "cudnn", "splash")
KERNELS = ("cudnn", "splash")  # of one platform, and of bfloat16
_SHORT = 256  # tokens; up to here the textbook form is the fastest everywhere
_CHUNK = 256  # queries
_TILE = 128  # queries that cuDNN's kernel takes at a time
_MASKED = np.float32(-1e30)  # a logit whose softmax is 0; finite, so that no gradient is NaN
_SAVED = "attention_out"
_heads = head_attention.make(_SAVED)
_splash = functools.partial(splash_attention.attend, saved=_SAVED)


def attention(
    q: Array, k: Array, v: Array, lengths: Array, backend: str, mesh: Mesh | None = None
) -> Array:
    """Softmax attention, scaled by ``d ** -0.5``, over the first ``lengths[b]`` keys.

    Args:
      q: float [B, T, H, d], T up to S.
      k, v: float [B, S, H, d].
      lengths: int32 [B], at least 1.
      backend: one of BACKENDS but 'auto' (see ``resolve``).
      mesh: the devices that B is sharded over, all of its axes; 'splash' and 'heads' must know:
        the compiler does not partition a kernel, and no device shall wait for what the logits of
        another are like. B is a multiple of its size then. None: one device.

    Returns:
      [B, T, H, d] in the inputs' type.
    """
    if backend in ("splash", "heads"):
        attend = {"splash": _splash, "heads": _heads}[backend]
        if mesh is not None and mesh.size > 1:
            rows = PartitionSpec(mesh.axis_names)
            attend = jax.shard_map(
                attend, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False
            )
        return attend(q, k, v, lengths)
    if backend == "cudnn":
        return _cudnn(q, k, v, lengths)
    function = {"stock": _attend, "chunked": _chunked}[backend]
    out = _swap(function(_swap(q), _swap(k), _swap(v), lengths))
    return checkpoint_name(out, _SAVED)


def attention_map(q: Array, k: Array, lengths: Array) -> Array:
    """The softmax itself, float32 [B, H, T, S] (query, key), of [B, T, H, d] and [B, S, H, d]."""
    return jax.nn.softmax(_logits(_swap(q), _swap(k), lengths), axis=-1)


def save_attention(primitive, *args, **params) -> bool:
    """A rematerialisation policy: keep what attention gave, and what its backward kernels need."""
    if primitive.name == "dot_product_attention_fwd_wrapper":  # cuDNN's output and statistics
        return True
    return jax.checkpoint_policies.save_only_these_names(_SAVED)(primitive, *args, **params)


def portable(backend: str) -> str:
    """The backend for a model that was trained with this one, on whatever machine it is now."""
    return "auto" if backend in KERNELS else backend


def resolve(backend: str, *, platform: str, dtype: str, tokens: int) -> str:
    """Turns 'auto' into the backend for a program; prints each choice once.

    Args:
      backend: one of BACKENDS; all but 'auto' come back as they are.
      platform: 'cpu', 'gpu' or 'tpu'.
      dtype: of queries, keys and values, 'float32' or 'bfloat16'.
      tokens: T, padding included.
    """
    if backend != "auto":
        return backend
    choice = "heads" if platform == "cpu" else "chunked"
    if tokens <= _SHORT:
        choice = "stock"
    elif platform == "tpu" and dtype == "bfloat16":
        choice = "splash"
    elif platform == "gpu" and dtype == "bfloat16" and _cudnn_works():
        choice = "cudnn"
    length = "short" if tokens <= _SHORT else "long"
    _print_once(f"attention: '{choice}' for {length} sequences in {dtype} on {platform}")
    return choice


@functools.cache
def _print_once(line: str) -> None:
    print(line, file=sys.stderr)


@functools.cache
def _cudnn_works() -> bool:
    """Runs it once, gradient included: drivers, libraries and cards differ in what they support.

    Now, whatever program is being traced; and beside the textbook form, on sequences that end
    within a tile and with it, from all of their tokens and from the first ones alone.
    """
    shape, lengths = (2, 192, 1, 64), np.array([100, 192], np.int32)
    draw = np.random.default_rng(0).normal
    q, k, v = (draw(size=shape).astype(jnp.bfloat16) for _ in range(3))
    wanted = draw(size=shape) * (np.arange(192) < lengths[:, None])[..., None, None]

    def run(attend, queries):
        def score(*qkv):
            out = attend(*qkv, lengths).astype(jnp.float32) * wanted[:, :queries]
            return out.sum(), out

        gradients, out = jax.jit(jax.grad(score, (0, 1, 2), has_aux=True))(q[:, :queries], k, v)
        return [np.asarray(array, np.float32) for array in (*gradients, out)]

    stock = functools.partial(attention, backend="stock")
    try:
        with jax.ensure_compile_time_eval():
            found, expected = (run(f, 192) + run(f, 101) for f in (_cudnn, stock))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
    else:
        if all(_close(a, b) for a, b in zip(found, expected, strict=True)):
            return True
        reason = "its results are wrong"
    _print_once(f"attention: no cuDNN attention here, using 'chunked' ({reason})")
    return False


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    """As far as bfloat16 tells; False for what is not finite."""
    return bool(np.abs(a - b).max() <= 0.05 * np.abs(b).max())


def _swap(x: Array) -> Array:
    """Tokens-major to heads-major and back."""
    return x.transpose(0, 2, 1, 3)


def _logits(q: Array, k: Array, lengths: Array) -> Array:
    """float32 [B, H, T, S] from heads-major queries and keys."""
    exact = precision.of(q.dtype)
    logits = jnp.einsum(
        "bhqd,bhkd->bhqk", q, k, precision=exact, preferred_element_type=jnp.float32
    )
    valid = jnp.arange(k.shape[2]) < lengths[:, None]
    return jnp.where(valid[:, None, None], logits * q.shape[-1] ** -0.5, _MASKED)


def _attend(q: Array, k: Array, v: Array, lengths: Array) -> Array:
    """Heads-major; the softmax's sum divides the small result, not the large map."""
    logits = _logits(q, k, lengths)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum(
        "bhqk,bhkd->bhqd",
        weights.astype(v.dtype),
        v,
        precision=precision.of(v.dtype),
        preferred_element_type=jnp.float32,
    )
    return (out / total).astype(v.dtype)


def _chunked(q: Array, k: Array, v: Array, lengths: Array) -> Array:
    """Heads-major; never more than _CHUNK rows of the map at a time, in either pass."""
    batch, heads, tokens, width = q.shape
    count = -(-tokens // _CHUNK)
    size = -(-tokens // count)  # equal chunks: the last is not nearly empty
    q = jnp.pad(q, ((0, 0), (0, 0), (0, count * size - tokens), (0, 0)))
    chunks = q.reshape(batch, heads, count, size, width).transpose(2, 0, 1, 3, 4)
    out = jax.lax.map(jax.checkpoint(lambda chunk: _attend(chunk, k, v, lengths)), chunks)
    return out.transpose(1, 2, 0, 3, 4).reshape(batch, heads, -1, width)[:, :, :tokens]


def _cudnn(q: Array, k: Array, v: Array, lengths: Array) -> Array:
    """Heads are padded to a multiple of 8, which the kernel asks for, and few queries to a tile."""
    tokens, width = q.shape[1], q.shape[-1]
    pad = [(0, 0)] * 3 + [(0, -width % 8)]
    q, k, v = (jnp.pad(x, pad) for x in (q, k, v))
    if tokens < k.shape[1]:
        q = jnp.pad(q, ((0, 0), (0, -tokens % _TILE), (0, 0), (0, 0)))
    out = jax.nn.dot_product_attention(
        q, k, v, scale=width**-0.5, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :tokens, :, :width]
