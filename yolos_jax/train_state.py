"""What a step of training changes, and how gradients change it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from yolos_jax import optimizer as optimizer_lib
from yolos_jax.batch import Array


class TrainState(NamedTuple):
    """What a step changes."""

    step: Array  # int32 []: steps taken, skipped ones included.
    params: Any  # nested dict of float32 arrays, frozen ones included.
    opt_state: Any  # of the trainable parameters.
    ema: Any  # like params: an exponential average of them; None without.


class Updater(NamedTuple):
    """The rules by which a run's state changes; pure functions, to be compiled by others."""

    optimizer: optax.GradientTransformationExtraArgs  # of ``optimizer.make_optimizer``
    freeze: Sequence[str]  # regular expressions of the paths of the others
    ema_decay: float  # 0: no average

    def partition(self, tree: Any) -> tuple[Any, Any]:
        """Splits a tree like the parameters into the trainable part and the frozen one."""
        return optimizer_lib.partition(tree, self.freeze)

    def start(self, params: Any) -> TrainState:
        """The state before the first step; shares no buffer with the parameters passed in."""
        opt_state = self.optimizer.init(self.partition(params)[0])
        ema = jax.tree.map(jnp.copy, params) if self.ema_decay else None
        return TrainState(jnp.int32(0), jax.tree.map(jnp.copy, params), opt_state, ema)

    def apply(
        self, state: TrainState, gradients: Any, loss: Array, lr: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        """Clips and applies gradients, unless they or the loss are not finite.

        Args:
          state: before the step.
          gradients: of the trainable parameters.
          loss: float32 [].
          lr: float32 [].

        Returns:
          The state after the step, of which only the counter differs when it was skipped; and
          ``grad_norm`` (before clipping) and ``finite`` (the step was taken).
        """
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        trainable, frozen = self.partition(state.params)
        updates, opt_state = self.optimizer.update(
            gradients, state.opt_state, trainable, finite=finite
        )
        trainable = optimizer_lib.apply_updates(trainable, updates, lr)
        params = optimizer_lib.merge(trainable, frozen)
        ema = state.ema
        if ema is not None:
            ema = optimizer_lib.update_ema(ema, params, self.ema_decay)
        params, ema = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, ema), (state.params, state.ema)
        )
        after = TrainState(state.step + 1, params, opt_state, ema)
        return after, {"grad_norm": norm, "finite": finite}
