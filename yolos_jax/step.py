"""One step of training: forward, match, update.

    forward        compiled, one program per bucket: predictions, costs, residuals
    match          on the host, by scipy (or on the device, at the end of forward)
    update         compiled, one program per bucket: losses, gradients, optimiser

No Python runs inside a compiled program, and the host waits for one thing only: the costs of its
own images. Programs are compiled from shapes, so that they can be made before a first batch, and
for devices that are not there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from yolos_jax import matching
from yolos_jax import mesh as mesh_lib
from yolos_jax.batch import Array, Batch, Bucket, Canvas, Targets
from yolos_jax.metrics import Metrics
from yolos_jax.passes import Forward, Microbatch, Passes
from yolos_jax.programs import (
    Program,
    Programs,
    abstract,
    abstract_batch,
    abstract_tree,
    bytes_of_shards,
    jit,
)
from yolos_jax.train_state import TrainState, Updater


class StepShape(NamedTuple):
    """The static shape of a step: what its programs are made for."""

    bucket: Bucket
    batch_size: int  # images of all microbatches, over all devices
    max_boxes: int  # M
    microbatches: int = 1


class TrainStep:
    """The step of a run: ``state, metrics = train_step(state, microbatches, bucket, lr)``.

    Compiles two programs per bucket, ``forward`` and ``update``. With several microbatches these
    are ``forward`` and ``accumulate``, and ``zeros`` and ``apply`` once for all buckets.
    """

    def __init__(
        self, model: Any, optimizer: optax.GradientTransformationExtraArgs, mesh: Any, config: Any
    ):
        """Compiles nothing yet.

        Args:
          model: of ``models.build.build_model``.
          optimizer: of ``optimizer.make_optimizer``, for the trainable parameters.
          mesh: of ``mesh.make_mesh``, or of devices of ``jax.experimental.topologies``, for which
            programs can be compiled and not run.
          config: of the run.

        Raises:
          ValueError: if the configuration makes no step.
        """
        if config.matcher.where not in ("host", "device"):
            raise ValueError(f"matcher.where is {config.matcher.where!r}: not 'host' or 'device'")
        self.model, self.config, self.mesh = model, config, mesh
        freeze = (*model.constants, *config.optimizer.freeze)
        self.updater = Updater(optimizer, freeze, config.optimizer.ema_decay)
        self.abstract_state = jax.eval_shape(
            lambda: self.updater.start(model.init(jax.random.key(0)))
        )
        self.shardings = mesh_lib.shardings(self.abstract_state, mesh)
        self.compiled = Programs()
        self._of_shape: dict[StepShape, dict[str, Program]] = {}

        self._images = mesh_lib.batch_sharding(mesh, axis=1)
        one = mesh_lib.replicated(mesh)
        trainable, _ = self.updater.partition(self.shardings.params)
        # Residuals (None) stay where the compiler has computed them.
        of_forward = Forward(self._images, self._images, self._images, one, None, None)
        of_update, of_part = (self.shardings, one), (trainable, one)
        passes = Passes(model, self.updater, config)
        backward = functools.partial(jit, mesh=mesh, backward=True)
        self._jitted = {
            "forward": jit(passes.forward, mesh, static_argnums=3, out_shardings=of_forward),
            "update": backward(passes.update, donate_argnums=0, out_shardings=of_update),
            "zeros": jit(self._zeros, mesh, out_shardings=trainable),
            "accumulate": backward(passes.accumulate, donate_argnums=0, out_shardings=of_part),
            "apply": jit(passes.apply, mesh, donate_argnums=0, out_shardings=of_update),
        }

    def __call__(
        self,
        state: TrainState,
        microbatches: Sequence[tuple[Batch | Canvas, Targets]],
        bucket: Bucket,
        lr: float,
    ) -> tuple[TrainState, Metrics]:
        """Takes one step and uses the state up.

        A step whose loss or gradient is not finite changes nothing but the step counter.

        Args:
          state: before the step.
          microbatches: parts of equal size of the global batch, on the mesh; pictures uint8. Losses
            and gradients are those of the whole, however many parts there are.
          bucket: of the batch.
          lr: learning rate.

        Returns:
          The state after the step, and metrics that nobody has waited for: ``loss`` and what it is
          made of (``losses.set_criterion``), ``grad_norm`` before clipping, ``finite`` (1: the step
          was taken), ``nonfinite_costs``, ``num_boxes`` and ``images`` (valid ones), all of the
          global batch.
        """
        lr = np.float32(lr)
        whole = tuple((targets, batch.image_valid) for batch, targets in microbatches)
        parts = [Microbatch(np.int32(i), *part, whole) for i, part in enumerate(microbatches)]
        images, boxes = parts[0].targets.labels.shape
        programs = self.compile(StepShape(bucket, images * len(parts), boxes, len(parts)))

        following = programs["forward"](state.params, state.step, parts[0])
        if len(parts) == 1:
            matched_query = self.match(following, parts[0].targets)
            return programs["update"](state, parts[0], following, matched_query, lr)

        gradients, sums = programs["zeros"](), []
        for i, part in enumerate(parts):
            forward = following
            if i + 1 < len(parts):  # Before match waits: devices work while the host matches.
                following = programs["forward"](state.params, state.step, parts[i + 1])
            matched_query = self.match(forward, part.targets)
            gradients, metrics = programs["accumulate"](
                gradients, state.params, part, forward, matched_query
            )
            sums.append(metrics)
        return programs["apply"](state, gradients, sums, lr)

    def match(self, forward: Forward, targets: Targets) -> Array:
        """Assigns queries to targets, int32 [A, B, M]; waits for this host's costs."""
        if forward.cost is None:
            return forward.matched_query
        arrays = forward.cost, targets.target_valid
        for array in arrays:  # all begin to travel before the first is waited for
            array.copy_to_host_async()
        assigned = {}
        for cost, valid in zip(*(array.addressable_shards for array in arrays), strict=True):
            matched_query, _ = matching.assign_host(np.asarray(cost.data), np.asarray(valid.data))
            assigned[cost.index[1].start] = matched_query
        return jax.make_array_from_callback(
            forward.cost.shape[:3], forward.cost.sharding, lambda index: assigned[index[1].start]
        )

    def compile(self, shape: StepShape) -> dict[str, Program]:
        """The programs of a step of some shape, by kind, compiled when first asked for.

        Needs no batch and puts nothing on a device.
        """
        if shape not in self._of_shape:
            self.compiled.check_expected(shape)
            self._of_shape[shape] = self._compile(shape)
        return self._of_shape[shape]

    def _compile(self, shape: StepShape) -> dict[str, Program]:
        one = mesh_lib.replicated(self.mesh)
        state = abstract_tree(self.abstract_state, self.shardings)
        lr = abstract((), np.float32, one)
        part = self._abstract_part(shape)
        bucket = shape.bucket

        def make(kind: str, key: Any, *args: Any) -> Program:
            return self.compiled.make(kind, key, self._jitted[kind], *args)

        bounds = (bucket.rows, bucket.cols)
        forward = make("forward", shape, state.params, state.step, part, bounds)
        cost, matched_query = forward.outputs.cost, forward.outputs.matched_query
        if matched_query is None:
            matched_query = abstract(cost.shape[:3], np.int32, self._images)
        rest = (part, forward.outputs, matched_query)
        if shape.microbatches == 1:
            return {"forward": forward, "update": make("update", shape, state, *rest, lr)}
        zeros = make("zeros", None)
        accumulate = make("accumulate", shape, zeros.outputs, state.params, *rest)
        sums, metrics = accumulate.outputs
        apply = make("apply", shape.microbatches, state, sums, [metrics] * shape.microbatches, lr)
        return {"forward": forward, "accumulate": accumulate, "zeros": zeros, "apply": apply}

    def _abstract_part(self, shape: StepShape) -> Microbatch:
        rows = mesh_lib.batch_sharding(self.mesh)
        images, boxes = shape.batch_size // shape.microbatches, shape.max_boxes
        batch = abstract_batch(shape.bucket, images, self.model.layout.patch_size, rows)
        targets = Targets(
            labels=abstract((images, boxes), np.int32, rows),
            boxes_cxcywh=abstract((images, boxes, 4), np.float32, rows),
            target_valid=abstract((images, boxes), bool, rows),
        )
        index = abstract((), np.int32, mesh_lib.replicated(self.mesh))
        whole = ((targets, batch.image_valid),) * shape.microbatches
        return Microbatch(index, batch, targets, whole)

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
        return self.compiled.counts()

    def residual_bytes(self) -> dict[Bucket, int]:
        """What the backward pass of a microbatch keeps on each device, by compiled bucket."""
        return {
            shape.bucket: bytes_of_shards(programs["forward"].outputs.residuals)
            for shape, programs in self._of_shape.items()
        }

    def _zeros(self) -> Any:
        trainable, _ = self.updater.partition(self.abstract_state.params)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), trainable)
