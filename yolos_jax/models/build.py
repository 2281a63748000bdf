"""From ``config.model`` to a model: parameters and a pure function, nothing of flax outside."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from yolos_jax.batch import Batch, Outputs
from yolos_jax.data.layout import Layout, Sequences
from yolos_jax.models import attention, detr_model, vit
from yolos_jax.models.detr_model import DetrModel
from yolos_jax.models.yolos import Yolos
from yolos_jax.parameter_groups import YOLOS_RULES, Rule

Params = dict[str, Any]  # nested; leaves are float32 arrays


class YolosConfig(NamedTuple):
    """The keys of ``config.model`` that a YOLOS is made of; configs/common.py explains them."""

    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    num_queries: int
    position_grid: tuple[int, int]
    mid_position_grid: tuple[int, ...]
    position_init: str
    det_token_std: float
    layer_norm_eps: float
    dtype: str
    attention: str
    scan: bool
    remat: str


class Model(NamedTuple):
    """A detector as two pure functions.

    Parameters are a plain nested dict of float32 arrays, the same whether the blocks are scanned or
    unrolled, and the names in it are those of checkpoints.
    """

    config: YolosConfig
    num_classes: int  # K; logits have one more, for no-object.
    mesh: Mesh | None = None  # devices that batches are sharded over, all axes; None: one.

    @property
    def name(self) -> str:
        """``config.model.name``."""
        return "yolos"

    @property
    def layout(self) -> Sequences:
        """How it wants its pictures."""
        return Sequences(self.config.patch_size, 1 + self.config.num_queries)

    @property
    def constants(self) -> tuple[str, ...]:
        """Regular expressions of paths of parameters that are never trained."""
        return ()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Which of its parameters decay, and which are the backbone's."""
        return YOLOS_RULES

    def init(self, rng: jax.Array) -> Params:
        """Draws parameters; jit or ``jax.eval_shape`` it as needed."""
        config = self.config
        batch = Batch(
            patches=jnp.zeros((1, 1, 3 * config.patch_size**2), jnp.float32),
            grid=jnp.ones((1, 2), jnp.int32),
            image_valid=jnp.ones((1,), bool),
        )
        # Parameters do not depend on how attention is computed; one image is not spread over chips.
        alone = self._replace(config=config._replace(attention="stock"), mesh=None)
        return alone._module(batch, (1, 1), capture=False).init(rng, batch)["params"]

    def apply(
        self,
        params: Params,
        batch: Batch,
        *,
        bounds: tuple[int, int],
        rng: jax.Array | None = None,
        capture: bool = False,
    ) -> Outputs | tuple[Outputs, dict[str, jax.Array]]:
        """Predicts; differentiable in ``params``.

        Args:
          params: from ``init`` or a checkpoint.
          batch: with normalised patches, float32 [B, N, P].
          bounds: no image of the batch has more rows of patches, or more columns. Static.
          rng: randomness of the forward pass; YOLOS has none.
          capture: also return what happened inside.

        Returns:
          The outputs, and when capturing a dict of ``embed`` [B, T, D] (tokens before the first
          block), ``blocks`` [L, B, T, D] (after each block, before the mid table is added),
          ``norm`` [B, T, D] (after the last LayerNorm), ``attention`` float32 [B, H, T, T] (of the
          last block: query, key); T = 1 + Q + N: class, detection tokens, patches, padding.
        """
        del rng
        module = self._module(batch, bounds, capture=capture)
        outputs, captured = module.apply({"params": params}, batch)
        return (outputs, captured) if capture else outputs

    def _module(self, batch: Batch, bounds: tuple[int, int], *, capture: bool):
        config, mesh = self.config, self.mesh
        backend = attention.resolve(
            config.attention,
            platform=mesh.devices.flat[0].platform if mesh else jax.default_backend(),
            dtype=config.dtype,
            tokens=1 + config.num_queries + batch.patches.shape[1],
        )
        attend = functools.partial(attention.attention, backend=backend, mesh=self.mesh)
        place = functools.partial(vit.on_its_device, mesh=mesh)
        return Yolos(config, self.num_classes, attend, place, tuple(bounds), capture)


_NAMES = ("yolos", "detr")


def build_model(
    model_config: Mapping[str, Any], num_classes: int, mesh: Mesh | None = None
) -> Model | DetrModel:
    """Builds the model that ``config.model`` describes.

    Args:
      model_config: the keys of ``config.model`` in configs/common.py.
      num_classes: K, slots of the label map.
      mesh: the devices that batches are sharded over, all of its axes; None: one device.

    Raises:
      ValueError: unknown name, missing or unknown key, or a value that makes no model.
    """
    values = dict(model_config.items())
    name = values.pop("name", None)
    if name not in _NAMES:
        raise ValueError(f"model.name is {name!r}; known models: {', '.join(_NAMES)}.")
    if name == "detr":
        return DetrModel(detr_model.config_of(values), num_classes, mesh)
    values.pop("detr", None)  # of the other model; checkpoints need not have it
    return Model(_checked(values), num_classes, mesh)


def layout_of(model_config: Mapping[str, Any]) -> Layout:
    """How the model that ``config.model`` describes wants its pictures. Raises as build_model."""
    return build_model(model_config, num_classes=1).layout


def _checked(values: dict[str, Any]) -> YolosConfig:
    missing = sorted(set(YolosConfig._fields) - set(values))
    unknown = sorted(set(values) - set(YolosConfig._fields))
    if missing or unknown:
        raise ValueError(f"model config: missing keys {missing}, unknown keys {unknown}.")
    for key in ("position_grid", "mid_position_grid"):
        values[key] = tuple(values[key])  # lists, when they come from a checkpoint's JSON
    config = YolosConfig(**values)
    choices = {
        "position_init": ("normal", "sincos"),
        "dtype": ("float32", "bfloat16"),
        "attention": attention.BACKENDS,
        "remat": vit.REMAT,
    }
    for key, allowed in choices.items():
        if values[key] not in allowed:
            raise ValueError(f"model.{key} is {values[key]!r}; expected one of {allowed}.")
    if config.attention in attention.KERNELS and config.dtype != "bfloat16":
        raise ValueError(
            f"model.attention {config.attention!r} needs model.dtype 'bfloat16', "
            f"not {config.dtype!r}."
        )
    if config.width % config.heads:
        raise ValueError(
            f"model.width {config.width} is not a multiple of model.heads {config.heads}."
        )
    if config.position_init == "sincos" and config.width % 4:
        raise ValueError(
            f"model.position_init 'sincos' needs model.width divisible by 4, not {config.width}."
        )
    return config
