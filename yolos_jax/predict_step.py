"""The step of prediction, compiled once per bucket."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from yolos_jax import losses
from yolos_jax import mesh as mesh_lib
from yolos_jax.batch import Array, Batch, Bucket, Canvas, Detections
from yolos_jax.programs import Program, Programs, abstract, abstract_batch, jit


class PredictStep:
    """``predict_step(params, batch, original_size, bucket)``, one compiled program per bucket."""

    def __init__(self, model: Any, mesh: jax.sharding.Mesh, preprocess: Mapping[str, Any]):
        """Compiles nothing yet.

        Args:
          model: of ``models.build.build_model``.
          mesh: that batches are split over.
          preprocess: mean and std of the pictures the model knows, as ``config.preprocess``.
        """
        self.model, self.mesh, self.preprocess = model, mesh, preprocess
        self.compiled = Programs()
        self._of_shape: dict[tuple[Bucket, int], Program] = {}
        self._jitted = jit(
            self._predict, mesh, static_argnums=3, out_shardings=mesh_lib.batch_sharding(mesh)
        )

    def __call__(
        self, params: Any, batch: Batch | Canvas, original_size: Array, bucket: Bucket
    ) -> Detections:
        """Predicts.

        Args:
          params: on the mesh.
          batch: pictures uint8; on the mesh.
          original_size: int32 [B, 2], likewise.
          bucket: of the batch.

        Returns:
          Detections, split over the mesh as the batch is.
        """
        program = self.compile(params, bucket, len(batch.image_valid))
        return program(params, batch, original_size)

    def compile(self, params: Any, bucket: Bucket, batch_size: int) -> Program:
        """The program of a bucket, compiled when first asked for.

        Args:
          params: on the mesh, or abstract ones that say where they will be.
          bucket: of the batches.
          batch_size: images over all devices.
        """
        shape = (bucket, batch_size)
        if shape in self._of_shape:
            return self._of_shape[shape]
        self.compiled.check_expected(shape)
        rows = mesh_lib.batch_sharding(self.mesh)
        batch = abstract_batch(bucket, batch_size, self.model.layout.patch_size, rows)
        size = abstract((batch_size, 2), np.int32, rows)
        params = jax.tree.map(lambda leaf: abstract(leaf.shape, leaf.dtype, leaf.sharding), params)
        args = (params, batch, size, bucket)
        self._of_shape[shape] = self.compiled.make("predict", shape, self._jitted, *args)
        return self._of_shape[shape]

    def programs(self) -> dict[str, int]:
        """Returns how many programs were compiled, as ``TrainStep.programs`` does."""
        return self.compiled.counts()

    def _predict(
        self, params: Any, batch: Batch | Canvas, original_size: Array, bucket: Bucket
    ) -> Detections:
        batch = batch.normalised(self.preprocess["mean"], self.preprocess["std"])
        outputs = self.model.apply(params, batch, bounds=(bucket.rows, bucket.cols))
        return losses.postprocess(outputs, original_size)
