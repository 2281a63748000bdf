"""What a step of training computes: pure functions of arrays, to be compiled by ``step``.

The forward pass and the backward pass are two programs. Between them the backward pass exists as
the residuals of ``jax.vjp``'s closure, which stay on the devices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from yolos_jax import losses, matching, pullback
from yolos_jax.batch import Array, Batch, Canvas, Outputs, Targets
from yolos_jax.metrics import Metrics
from yolos_jax.optimizer import merge
from yolos_jax.train_state import TrainState, Updater


class Microbatch(NamedTuple):
    """A part of a global batch, and what of the other parts its losses depend on."""

    index: Array  # int32 []: which part.
    batch: Batch | Canvas
    targets: Targets
    whole: tuple[tuple[Targets, Array], ...]  # targets and image_valid of every part.


class Forward(NamedTuple):
    """A forward pass that waits for its assignment."""

    outputs: Outputs
    cost: Array | None  # float32 [A, B, M, Q], where the host matches.
    matched_query: Array | None  # int32 [A, B, M], where the device does.
    nonfinite_costs: Array  # int32 []: costs of real targets that are not finite.
    residuals: list[Array]  # what the backward pass needs besides parameters and batch.
    structure: pullback.Structure


class Passes(NamedTuple):
    """The algorithm of a step, cut where the host matches."""

    model: Any  # of ``models.build.build_model``
    updater: Updater
    config: Any  # of the run

    def forward(
        self, params: Any, step: Array, part: Microbatch, bounds: tuple[int, int]
    ) -> Forward:
        """Predictions, costs and residuals of a microbatch.

        Args:
          params: of the model, frozen ones included.
          step: int32 [].
          part: pictures uint8.
          bounds: rows and columns of its bucket. Static.
        """
        config = self.config
        trainable, frozen = self.updater.partition(params)
        batch = part.batch.normalised(config.preprocess.mean, config.preprocess.std)
        rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), step), part.index)

        def predict(trainable: Any) -> Outputs:
            params = merge(trainable, frozen)
            return self.model.apply(params, batch, bounds=bounds, rng=rng)

        outputs, backward = jax.vjp(predict, trainable)
        residuals, structure = pullback.strip(backward, (params, part.batch))

        weights = matching.MatcherWeights(
            config.matcher.class_cost, config.matcher.l1_cost, config.matcher.giou_cost
        )
        cost = matching.costs(outputs, part.targets, weights)
        real = part.targets.target_valid[:, :, None]
        nonfinite = jnp.sum(~jnp.isfinite(cost) & real)
        matched_query = None
        if config.matcher.where == "device":
            matched_query, _ = matching.assign_device(
                cost, part.targets.target_valid, self.model.mesh
            )
            cost = None
        return Forward(outputs, cost, matched_query, nonfinite, residuals, structure)

    def gradients(
        self, params: Any, part: Microbatch, forward: Forward, matched_query: Array
    ) -> tuple[Any, dict[str, Array]]:
        """Gradients of the trainable parameters and metrics of a microbatch: parts of sums."""
        loss = self.config.loss
        targets, image_valid = jax.tree.map(lambda *parts: jnp.stack(parts), *part.whole)
        normalisers = losses.normalisers(
            targets,
            image_valid,
            num_queries=forward.outputs.pred_logits.shape[2],
            eos_coef=loss.eos_coef,
            class_loss_group=loss.class_loss_group,
            reference_processes=loss.reference_processes,
        )

        def criterion(outputs: Outputs) -> tuple[Array, dict[str, Array]]:
            return losses.set_criterion(
                outputs,
                part.targets,
                matched_query,
                part.batch.image_valid,
                losses.LossWeights(
                    loss.class_weight, loss.l1_weight, loss.giou_weight, loss.eos_coef
                ),
                normalisers.part(part.index),
            )

        (total, metrics), cotangent = jax.value_and_grad(criterion, has_aux=True)(forward.outputs)
        known = (params, part.batch)
        (gradients,) = pullback.restore(forward.residuals, forward.structure, known)(cotangent)
        valid = part.batch.image_valid
        return gradients, metrics | {
            "loss": total,
            "nonfinite_costs": forward.nonfinite_costs,
            "num_boxes": jnp.sum(part.targets.target_valid & valid[:, None]),
            "images": jnp.sum(valid),
        }

    def update(
        self,
        state: TrainState,
        part: Microbatch,
        forward: Forward,
        matched_query: Array,
        lr: Array,
    ) -> tuple[TrainState, Metrics]:
        """A step whose batch is one microbatch, after its forward pass."""
        gradients, metrics = self.gradients(state.params, part, forward, matched_query)
        return self.apply(state, gradients, [metrics], lr)

    def accumulate(
        self, sums: Any, params: Any, part: Microbatch, forward: Forward, matched_query: Array
    ) -> tuple[Any, dict[str, Array]]:
        """Adds a microbatch's gradients to the sums, and gives its metrics."""
        gradients, metrics = self.gradients(params, part, forward, matched_query)
        return jax.tree.map(jnp.add, sums, gradients), metrics

    def apply(
        self, state: TrainState, gradients: Any, metrics: list[dict[str, Array]], lr: Array
    ) -> tuple[TrainState, Metrics]:
        """Takes a step along gradients; metrics are of its microbatches."""
        summed = jax.tree.map(lambda *parts: sum(parts), *metrics)
        state, more = self.updater.apply(state, gradients, summed["loss"], lr)
        return state, Metrics.of(summed | more)
