"""A run from its first step to its last: what does not change, and the batches of any step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from yolos_jax import datasets, mesh, step
from yolos_jax.batch import HostBatch
from yolos_jax.checkpoint import Checkpoints
from yolos_jax.data import pipeline
from yolos_jax.data import plan as plan_lib
from yolos_jax.predict_step import PredictStep

MIN_STEPS_READ = 64


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last."""

    config: ConfigDict
    workdir: Path
    data: datasets.Data
    mesh: jax.sharding.Mesh
    train_step: step.TrainStep
    predict_step: PredictStep
    schedule: Callable[[int], float]
    steps_per_epoch: int
    checkpoints: Checkpoints | None  # None until nothing is left that could refuse the run
    metadata: dict  # what every checkpoint of this run says about itself

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.config.epochs

    @property
    def save_every(self) -> int:
        """Steps between checkpoints."""
        return self.config.checkpoint.every_steps or self.steps_per_epoch

    @property
    def evaluate_every(self) -> int:
        """Steps between evaluations; 0: only after the last step."""
        return self.config.eval.every_epochs * self.steps_per_epoch

    def train_plan(self, epoch: int) -> plan_lib.Plan:
        """The plan of an epoch: a pure function of the data, the recipe and the seed."""
        return plan_lib.make_plan(
            self.data.train,
            self.data.recipe,
            self.data.buckets,
            seed=self.config.seed,
            epoch=epoch,
            batch_size=self.config.batch_size,
            grouped=self.config.buckets.grouped,
            microbatches=self.config.microbatches,
        )

    def image_ids(self, step: int) -> list[int]:
        """The images of a step, of all hosts."""
        epoch, offset = divmod(step, self.steps_per_epoch)
        return self.data.train.image_ids[self.train_plan(epoch).rows[offset]].tolist()

    def train_batches(self, first_step: int) -> Iterator[HostBatch]:
        """This host's batches from a step to the end of the run, epoch after epoch."""

        # Epochs of few steps are read together: beginning to read costs as much as many steps.
        together = -(-MIN_STEPS_READ // self.steps_per_epoch)

        def open_epochs(first: int, offset: int = 0):
            numbers = range(first, min(first + together, self.config.epochs))
            if not numbers:
                return None
            plan = plan_lib.join([self.train_plan(number) for number in numbers])
            return self._batches(self.data.train, plan, self.config.microbatches, offset)

        epoch, offset = divmod(first_step, self.steps_per_epoch)
        opened = [open_epochs(epoch, offset)]
        try:
            while opened[0] is not None:
                # The next epochs begin to be read while these train: no pause between them.
                epoch += together
                opened.append(open_epochs(epoch))
                yield from opened[0]
                del opened[0]
        finally:
            for batches in filter(None, opened):
                batches.close()

    def eval_batches(self) -> Iterator[HostBatch]:
        """This host's batches of the validation split."""
        return self._batches(self.data.val, self.data.eval_plan, 1, 0)

    def _batches(self, index, plan, microbatches, first_step):
        return pipeline.host_batches(
            index,
            plan,
            start_step=first_step,
            host_rows=mesh.host_rows(self.mesh, plan.batch_size, microbatches),
            workers=self.config.data.workers,
            prefetch=self.config.data.prefetch,
        )
