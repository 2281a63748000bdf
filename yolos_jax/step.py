"""One step of training: forward, match, update. And one of prediction.

    forward        compiled, one program per bucket: predictions, costs, residuals
    match          on the host, by scipy (or on the device, at the end of forward)
    update         compiled, one program per bucket: losses, gradients, optimiser

Between the two programs the backward pass exists as the residuals of ``jax.vjp``'s closure, which
stay on the devices. No Python runs inside a compiled program, and the host waits for one thing
only: the costs of its own images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from yolos_jax import losses, matching, pullback
from yolos_jax import mesh as mesh_lib
from yolos_jax.batch import Array, Batch, Bucket, Detections, Outputs, Targets, normalise
from yolos_jax.optimizer import merge
from yolos_jax.train_state import TrainState, Updater


class Microbatch(NamedTuple):
    """A part of a global batch, and what of the other parts its losses depend on."""

    index: Array  # int32 []: which part.
    batch: Batch
    targets: Targets
    whole: tuple[tuple[Targets, Array], ...]  # targets and image_valid of every part.


class Forward(NamedTuple):
    """A forward pass that waits for its assignment."""

    outputs: Outputs
    cost: Array | None  # float32 [A, B, Q, M], where the host matches.
    matched_query: Array | None  # int32 [A, B, M], where the device does.
    nonfinite_costs: Array  # int32 []: costs of real targets that are not finite.
    residuals: list[Array]  # what the backward pass needs besides parameters and batch.
    structure: pullback.Structure


class TrainStep:
    """The step of a run: ``state, metrics = train_step(state, microbatches, bucket, lr)``.

    Compiles two programs per bucket, ``forward`` and ``update``. With several microbatches these
    are ``forward`` and ``accumulate``, and ``zeros`` and ``apply`` once for all buckets.
    """

    def __init__(self, model: Any, optimizer: optax.GradientTransformation, mesh: Any, config: Any):
        """Compiles nothing yet.

        Args:
          model: of ``models.build.build_model``.
          optimizer: of ``optimizer.make_optimizer``, for the trainable parameters.
          mesh: of ``mesh.make_mesh``.
          config: of the run.

        Raises:
          ValueError: if the configuration makes no step.
        """
        if config.matcher.where not in ("host", "device"):
            raise ValueError(f"matcher.where is {config.matcher.where!r}: not 'host' or 'device'")
        self.model, self.config = model, config
        self.updater = Updater(optimizer, config.optimizer.freeze, config.optimizer.ema_decay)
        self.abstract_state = jax.eval_shape(
            lambda: self.updater.start(model.init(jax.random.key(0)))
        )
        self.shardings = mesh_lib.shardings(self.abstract_state, mesh)
        self.residual_bytes: dict[Bucket, int] = {}  # over all devices; known after a first step
        self._structures: dict[Any, pullback.Structure] = {}

        images = mesh_lib.batch_sharding(mesh, axis=1)
        one = mesh_lib.replicated(mesh)
        trainable, _ = self.updater.partition(self.shardings.params)
        # Residuals (None) stay where the compiler has computed them.
        of_forward = Forward(images, images, images, one, None, None)
        of_update, of_part = (self.shardings, one), (trainable, one)
        self._jitted = {
            "forward": jax.jit(self._forward, static_argnums=3, out_shardings=of_forward),
            "update": jax.jit(self._update, donate_argnums=0, out_shardings=of_update),
            "zeros": jax.jit(self._zeros, out_shardings=trainable),
            "accumulate": jax.jit(self._accumulate, donate_argnums=0, out_shardings=of_part),
            "apply": jax.jit(self._apply, donate_argnums=0, out_shardings=of_update),
        }

    def __call__(
        self,
        state: TrainState,
        microbatches: Sequence[tuple[Batch, Targets]],
        bucket: Bucket,
        lr: float,
    ) -> tuple[TrainState, dict[str, Array]]:
        """Takes one step and uses the state up.

        A step whose loss or gradient is not finite changes nothing but the step counter.

        Args:
          state: before the step.
          microbatches: parts of equal size of the global batch, on the mesh; patches uint8. Losses
            and gradients are those of the whole, however many parts there are.
          bucket: of the batch.
          lr: learning rate.

        Returns:
          The state after the step, and metrics, arrays [] on the devices that nobody has waited
          for: ``loss`` and what it is made of (``losses.set_criterion``), ``grad_norm`` before
          clipping, ``finite`` (bool: the step was taken), ``nonfinite_costs``, ``num_boxes`` and
          ``images`` (valid ones), all of the global batch.
        """
        lr = np.float32(lr)
        whole = tuple((targets, batch.image_valid) for batch, targets in microbatches)
        parts = [Microbatch(np.int32(i), *part, whole) for i, part in enumerate(microbatches)]

        if len(parts) == 1:
            forward = self.forward(state, parts[0], bucket)
            matched_query = self.match(forward, parts[0].targets)
            return self._jitted["update"](state, parts[0], forward, matched_query, lr)

        gradients, sums = self._jitted["zeros"](), []
        following = self.forward(state, parts[0], bucket)
        for i, part in enumerate(parts):
            forward = following
            if i + 1 < len(parts):  # Before match waits: devices work while the host matches.
                following = self.forward(state, parts[i + 1], bucket)
            matched_query = self.match(forward, part.targets)
            gradients, metrics = self._jitted["accumulate"](
                gradients, state.params, part, forward, matched_query
            )
            sums.append(metrics)
        return self._jitted["apply"](state, gradients, sums, lr)

    def forward(self, state: TrainState, part: Microbatch, bucket: Bucket) -> Forward:
        """Starts a forward pass."""
        bounds = (bucket.rows, bucket.cols)
        forward = self._jitted["forward"](state.params, state.step, part, bounds)
        shapes = (bucket, part.targets.labels.shape)
        if shapes not in self._structures:
            self._structures[shapes] = forward.structure
            self.residual_bytes[bucket] = sum(leaf.nbytes for leaf in forward.residuals)
        return forward._replace(structure=self._structures[shapes])

    def match(self, forward: Forward, targets: Targets) -> Array:
        """Assigns queries to targets, int32 [A, B, M]; waits for this host's costs."""
        if forward.cost is None:
            return forward.matched_query
        shards = forward.cost.addressable_shards
        valid = targets.target_valid.addressable_shards
        on_host = jax.device_get([(a.data, b.data) for a, b in zip(shards, valid, strict=True)])
        assigned = [matching.assign_host(*arrays)[0] for arrays in on_host]
        layers, images, _, columns = forward.cost.shape
        return jax.make_array_from_single_device_arrays(
            (layers, images, columns),
            forward.cost.sharding,
            jax.device_put(assigned, [shard.device for shard in shards]),
        )

    def init_state(self, rng: Array, params: Any = None) -> TrainState:
        """Returns the state before the first step, on the mesh.

        Args:
          rng: key that the parameters are drawn with.
          params: nested dict of arrays to start from instead; copied.
        """
        if params is None:
            return jax.jit(
                lambda rng: self.updater.start(self.model.init(rng)), out_shardings=self.shardings
            )(rng)
        params = jax.tree.map(mesh_lib.put_whole, params, self.shardings.params)
        return jax.jit(self.updater.start, out_shardings=self.shardings)(params)

    def programs(self) -> dict[str, int]:
        """Returns how many programs of each kind were compiled; kinds without any are left out."""
        counts = {kind: jitted._cache_size() for kind, jitted in self._jitted.items()}
        return {kind: count for kind, count in counts.items() if count}

    # What is compiled.

    def _forward(
        self, params: Any, step: Array, part: Microbatch, bounds: tuple[int, int]
    ) -> Forward:
        config = self.config
        trainable, frozen = self.updater.partition(params)
        patches = normalise(part.batch.patches, config.preprocess.mean, config.preprocess.std)
        batch = part.batch._replace(patches=patches)
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
        real = part.targets.target_valid[:, None, :]
        nonfinite = jnp.sum(~jnp.isfinite(cost) & real)
        matched_query = None
        if config.matcher.where == "device":
            matched_query, _ = matching.assign_device(cost, part.targets.target_valid)
            cost = None
        return Forward(outputs, cost, matched_query, nonfinite, residuals, structure)

    def _gradients(
        self, params: Any, part: Microbatch, forward: Forward, matched_query: Array
    ) -> tuple[Any, dict[str, Array]]:
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

    def _update(
        self,
        state: TrainState,
        part: Microbatch,
        forward: Forward,
        matched_query: Array,
        lr: Array,
    ) -> tuple[TrainState, dict[str, Array]]:
        gradients, metrics = self._gradients(state.params, part, forward, matched_query)
        return self._apply(state, gradients, [metrics], lr)

    def _accumulate(
        self, sums: Any, params: Any, part: Microbatch, forward: Forward, matched_query: Array
    ) -> tuple[Any, dict[str, Array]]:
        gradients, metrics = self._gradients(params, part, forward, matched_query)
        return jax.tree.map(jnp.add, sums, gradients), metrics

    def _apply(
        self, state: TrainState, gradients: Any, metrics: list[dict[str, Array]], lr: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        summed = jax.tree.map(lambda *parts: sum(parts), *metrics)
        state, more = self.updater.apply(state, gradients, summed["loss"], lr)
        return state, summed | more

    def _zeros(self) -> Any:
        trainable, _ = self.updater.partition(self.abstract_state.params)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), trainable)


def make_predict_step(
    model: Any, mesh: jax.sharding.Mesh, preprocess: Mapping[str, Any]
) -> Callable[[Any, Batch, Array, Bucket], Detections]:
    """Returns ``predict(params, batch, original_size, bucket)``, one compiled program per bucket.

    Args:
      model: of ``models.build.build_model``.
      mesh: that batches are split over.
      preprocess: mean and std of the pictures the model knows, as ``config.preprocess``.

    Returns:
      A function of parameters and of a batch (patches uint8) and original_size, int32 [B, 2], on
      the mesh; what it returns is split over the mesh likewise.
    """

    def predict(params: Any, batch: Batch, original_size: Array, bucket: Bucket) -> Detections:
        patches = normalise(batch.patches, preprocess["mean"], preprocess["std"])
        bounds = (bucket.rows, bucket.cols)
        outputs = model.apply(params, batch._replace(patches=patches), bounds=bounds)
        return losses.postprocess(outputs, original_size)

    return jax.jit(predict, static_argnums=3, out_shardings=mesh_lib.batch_sharding(mesh))
