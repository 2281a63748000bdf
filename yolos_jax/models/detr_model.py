"""From ``config.model`` to a DETR: parameters and a pure function, nothing of flax outside."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from yolos_jax.batch import Canvas, Outputs
from yolos_jax.data.layout import Canvases
from yolos_jax.models import detr_position, resnet, vit
from yolos_jax.models.detr import Detr
from yolos_jax.parameter_groups import DETR_RULES, Rule

Params = dict[str, Any]  # nested; leaves are float32 arrays

_SHARED = (
    "width",
    "heads",
    "mlp_width",
    "num_queries",
    "layer_norm_eps",
    "dtype",
    "scan",
    "remat",
)


class DetrConfig(NamedTuple):
    """The keys of ``config.model`` and ``config.model.detr`` that a DETR is made of."""

    width: int
    heads: int
    mlp_width: int
    num_queries: int
    layer_norm_eps: float
    dtype: str
    scan: bool
    remat: str
    blocks: tuple[int, int, int, int]
    stem_width: int
    dilation: bool
    encoder_depth: int
    decoder_depth: int
    pre_norm: bool
    position: str
    dropout: float


class DetrModel(NamedTuple):
    """A DETR as two pure functions, called as ``build.Model`` is.

    Parameters are a plain nested dict of float32 arrays. Those of frozen batch normalisation are
    constants: see ``constants``.
    """

    config: DetrConfig
    num_classes: int  # K; logits have one more, for no-object.
    mesh: Mesh | None = None  # devices that batches are sharded over, all axes; None: one.

    @property
    def name(self) -> str:
        """``config.model.name``."""
        return "detr"

    @property
    def layout(self) -> Canvases:
        """How it wants its pictures."""
        if self.config.position == "sine":
            return Canvases()
        return Canvases(most=detr_position.LEARNED_SIDE * resnet.stride(self.config.dilation))

    @property
    def constants(self) -> tuple[str, ...]:
        """Regular expressions of paths of parameters that are never trained."""
        return (resnet.CONSTANTS,)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Which of its parameters decay, and which are the backbone's."""
        return DETR_RULES

    def init(self, rng: jax.Array) -> Params:
        """Draws parameters; jit or ``jax.eval_shape`` it as needed."""
        canvas = Canvas(
            pixels=jnp.zeros((1, 32, 32, 3), jnp.float32),
            size=jnp.full((1, 2), 32, jnp.int32),
            image_valid=jnp.ones((1,), bool),
        )
        return self._module(training=False, capture=False).init(rng, canvas)["params"]

    def apply(
        self,
        params: Params,
        batch: Canvas,
        *,
        bounds: tuple[int, int] | None = None,
        rng: jax.Array | None = None,
        capture: bool = False,
    ) -> Outputs | tuple[Outputs, dict[str, jax.Array]]:
        """Predicts; differentiable in ``params``.

        Args:
          params: from ``init`` or a checkpoint.
          batch: with normalised pixels, float32 [B, H, W, 3].
          bounds: of no use here; what canvases hold is in their sizes.
          rng: key of dropout, which is for training; None: no dropout.
          capture: also return what happened inside.

        Returns:
          The outputs, A = decoder layers, and when capturing a dict of ``feature`` [B, h, w, C]
          (of the last stage), ``real`` bool [B, h, w] (cells that look at the image), ``position``
          [B, h, w, D], ``memory`` [B, h, w, D] (the encoder's), ``decoder`` [A, B, Q, D] (after
          the LayerNorm that its layers share), ``attention`` float32 [B, H, Q, h * w] (of the
          last decoder layer, to the memory).
        """
        del bounds
        module = self._module(training=rng is not None, capture=capture)
        rngs = {} if rng is None else {"dropout": rng}
        outputs, captured = module.apply({"params": params}, batch, rngs=rngs)
        return (outputs, captured) if capture else outputs

    def _module(self, *, training: bool, capture: bool) -> Detr:
        place = functools.partial(vit.on_its_device, mesh=self.mesh)
        return Detr(self.config, self.num_classes, place, training, capture)


def config_of(values: Mapping[str, Any]) -> DetrConfig:
    """Reads and checks the keys that a DETR is made of; those of other models are passed over.

    Args:
      values: ``config.model``, or the part of it that a checkpoint keeps.

    Raises:
      ValueError: missing or unknown keys, or a value that makes no model.
    """
    own = dict(values["detr"].items()) if "detr" in values else {}
    wanted = set(DetrConfig._fields) - set(_SHARED)
    missing = [key for key in _SHARED if key not in values]
    missing += [f"detr.{key}" for key in sorted(wanted - set(own))]
    unknown = [f"detr.{key}" for key in sorted(set(own) - wanted)]
    if missing or unknown:
        raise ValueError(f"model config: missing keys {missing}, unknown keys {unknown}.")
    if values.get("attention", "auto") != "auto":
        raise ValueError(
            f"model.attention is {values['attention']!r}; that of a DETR has one form: expected "
            "'auto' (of a checkpoint: --set model.attention=auto)."
        )
    own["blocks"] = tuple(own["blocks"])  # a list, when it comes from a checkpoint's JSON
    config = DetrConfig(**{key: values[key] for key in _SHARED}, **own)
    _check(config)
    return config


def _check(config: DetrConfig) -> None:
    choices = {
        "dtype": ("float32", "bfloat16"),
        "remat": vit.REMAT,
        "detr.position": detr_position.POSITIONS,
    }
    for key, allowed in choices.items():
        value = getattr(config, key.removeprefix("detr."))
        if value not in allowed:
            raise ValueError(f"model.{key} is {value!r}; expected one of {allowed}.")
    if len(config.blocks) != resnet.STAGES or min(config.blocks) < 1:
        raise ValueError(
            f"model.detr.blocks is {config.blocks}; expected {resnet.STAGES} numbers, each at "
            "least 1."
        )
    for key in ("encoder_depth", "decoder_depth", "stem_width"):
        if getattr(config, key) < 1:
            raise ValueError(f"model.detr.{key} is {getattr(config, key)}; expected at least 1.")
    if config.width % config.heads:
        raise ValueError(
            f"model.width {config.width} is not a multiple of model.heads {config.heads}."
        )
    if config.width % 4:
        raise ValueError(
            f"model.width {config.width}: positions need a width divisible by 4, sines and cosines "
            "of rows and of columns."
        )
    if not 0 <= config.dropout < 1:
        raise ValueError(f"model.detr.dropout is {config.dropout}; expected 0 to less than 1.")
