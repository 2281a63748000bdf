"""The training loop: the only place that knows the order of things."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from yolos_jax import compilation, evaluation, launch, mesh, runlog, startup
from yolos_jax.batch import HostBatch
from yolos_jax.claim import Claim
from yolos_jax.health import Health
from yolos_jax.pictures import Sheet
from yolos_jax.progress import Progress
from yolos_jax.run import Run
from yolos_jax.watchdog import Watchdog


class StopRequested(Exception):
    """The run is to save and stop: what is under way is left."""


def train(
    config: ConfigDict,
    workdir: str,
    *,
    changeable_on_resume: tuple[str, ...] = (),
    defaults: Mapping[str, Any] | None = None,
    preemption: launch.Preemption | None = None,
) -> dict:
    """Trains from the configuration, or goes on from the last checkpoint in the work directory.

    Args:
      config: as ``configs/common.py`` describes.
      workdir: folder of the run; made when missing.
      changeable_on_resume: keys that may differ from those of the run that is resumed.
      defaults: of all keys: what an older run lacks counts as that; None: no notes, either.
      preemption: listens already; None: somebody who does until the run ends.

    Returns:
      ``AP``, ``AP50`` (of the last evaluation, None when stopped before one), ``seconds``,
      ``step``, ``finished``, and the paths ``checkpoint``, ``metrics`` and ``pictures``.

    Raises:
      ValueError: the configuration, the data or the work directory do not allow to start, or
        training met too many unreadable pictures or non-finite steps.
      OSError: not all processes of the run came, or a checkpoint could not be written.
      launch.Stopped: asked to stop before there was a state to save.
    """
    listening = contextlib.nullcontext(preemption) if preemption else launch.Preemption()
    defaults = defaults or {}
    with listening as preemption, Claim() as claim:
        try:
            run, progress = startup.prepare(config, workdir, changeable_on_resume, defaults, claim)
            preemption.ready()
        except launch.Stopped as reason:
            launch.stop(str(reason))
            raise
        log = runlog.RunLog(
            run.workdir,
            step=progress.step,
            evaluated=progress.evaluated,
            total_steps=run.total_steps,
            batch_size=run.config.batch_size,
            every=run.config.log.every_steps,
        )
        with log, Watchdog.of(run.config.log, run.workdir, launch.end) as watchdog:
            try:
                return Trainer(run, progress, preemption, log, watchdog).fit()
            except ValueError:
                # All processes stop for the same reason: a checkpoint that is being written will be
                # complete. Where one is gone or its disk is full it will not, and the wait is long.
                run.checkpoints.wait()
                raise


class Trainer:
    """The loop over steps, with what it carries from one to the next."""

    def __init__(
        self,
        run: Run,
        progress: Progress,
        preemption: launch.Preemption,
        log: runlog.RunLog,
        watchdog: Watchdog,
    ):
        self.run = run
        self.progress = progress
        self.preemption = preemption
        self.log = log
        self.watchdog = watchdog
        self.started = time.monotonic()
        self.unread = None  # the step whose metrics are still on the device, and what was read
        self.results: list[dict] | None = None  # COCO results of the last evaluation
        self.health = Health(
            run.workdir,
            num_images=len(run.data.train),
            max_bad_fraction=run.config.data.max_bad_fraction,
            max_skipped=run.config.optimizer.max_skipped,
            first_step=progress.step,
            counts=progress.health,
            writes=jax.process_index() == 0,
        )

    def fit(self) -> dict:
        """Runs to the end, or to a request to stop."""
        run = self.run
        run.train_step.compiled.meanwhile = run.predict_step.compiled.meanwhile = self.check_stop
        batches = run.train_batches(self.progress.step)
        try:
            return self.go_on(batches)
        except StopRequested:
            return self.stop()
        finally:
            batches.close()

    def go_on(self, batches: Iterator[HostBatch]) -> dict:
        """Runs to the end, or raises StopRequested."""
        # Order, on which exact resume rests: restore (done), compile if asked to, then repeat
        # {evaluate if due, save if due, next batch, step, log}; after the last step evaluate,
        # save, draw. Evaluating and saving see the state before a batch is taken, so a run that
        # dies in one of them does it again, and then takes the same batch.
        progress = self.progress
        if progress.step < self.run.total_steps:
            self.compile_ahead()
        while progress.step < self.run.total_steps:
            if self.evaluation_due():
                self.evaluate()
            if progress.due(self.run.save_every) or self.evaluated():
                self.save()
            self.check_stop()
            self.watchdog.watch("reading", step=progress.step)
            self.train_on(next(batches))
        batches.close()
        self.read_metrics()
        # A run that was finished before has its sheet of pictures: nothing is left to do.
        if not self.evaluated() or self.sheet().missing():
            self.evaluate()
        self.save()
        self.run.checkpoints.wait()
        pictures = self.sheet().draw(self.run.data.val, self.results)
        return self.summary(finished=True, pictures=pictures)

    def check_stop(self) -> None:
        """Raises StopRequested if it is so; all processes call it equally often."""
        if self.preemption.requested(self.progress.step):
            raise StopRequested

    def compile_ahead(self) -> None:
        """Compiles all programs, if the configuration says so."""
        run, params = self.run, self.progress.state.params
        if run.config.compile.ahead:
            for line in compilation.compile_ahead(run.train_step, run.predict_step, params):
                self.watchdog.watch("compiling", step=self.progress.step)
                self.log.say(line)
                self.check_stop()

    def evaluation_due(self) -> bool:
        """Whether this step is one to evaluate at, and not evaluated yet."""
        return self.progress.due(self.run.evaluate_every) and not self.evaluated()

    def evaluated(self) -> bool:
        """Whether this step is evaluated, on the validation set of now."""
        return self.progress.is_evaluated(self.run.data.validation_set)

    def train_on(self, host_batch: HostBatch) -> None:
        """One optimiser step; then reads the numbers of the step before, which is done by now."""
        run, step = self.run, self.progress.step
        run.checkpoints.check()
        self.watchdog.watch(
            "step",
            number=step,
            epoch=step // run.steps_per_epoch,
            bucket=host_batch.bucket,
            image_ids=host_batch.image_ids.tolist(),
        )
        parts = mesh.put_microbatches(host_batch, run.mesh, run.config.microbatches)
        self.progress.state, metrics = run.train_step(
            self.progress.state, parts, host_batch.bucket, run.schedule(step)
        )
        self.progress.step = step + 1
        self.read_metrics()
        self.unread = (step, host_batch.unreadable, metrics)

    def read_metrics(self) -> None:
        """Takes in the numbers of the last step but one: reading them waits for nothing."""
        if self.unread is None:
            return
        step, unreadable, metrics = self.unread
        self.unread = None
        # Numbers of the global batch: every process finds the same, and asks the others for words
        # when they do.
        run, batch_size = self.run, self.run.config.batch_size
        if metrics["images"] < batch_size:
            self.name_unreadable(unreadable)
        image_ids = () if metrics["finite"] else run.image_ids(step)
        self.health.check(step, batch_size, image_ids, metrics)
        self.log.step(step, metrics, lr=run.schedule(step), epoch=step / run.steps_per_epoch)

    def name_unreadable(self, messages: Sequence[str], *, training: bool = True) -> list[str]:
        """Collects from all processes why pictures could not be read; each must call it."""
        said = mesh.gather_texts(messages)
        for message in self.health.note_unreadable(said, training=training):
            self.log.say(f"not read: {message}")
        return said

    def evaluate(self) -> None:
        """Scores the validation split."""
        run, progress, state = self.run, self.progress, self.progress.state
        self.read_metrics()
        started = time.monotonic()
        with contextlib.closing(self.watched(run.eval_batches())) as batches:
            result = evaluation.evaluate(
                run.predict_step,
                state.params if state.ema is None else state.ema,
                run.data.val,
                run.data.eval_plan,
                batches,
                run.mesh,
                run.data.ground_truth,
            )
        if result.unreadable:
            said = self.name_unreadable(result.messages, training=False)
            self.health.check_validation(len(result.unreadable), len(run.data.val), said)
        progress.take_evaluation(result.metrics, run.data.validation_set)
        self.results = result.results
        self.log.evaluation(progress.step, result.metrics, time.monotonic() - started)

    def watched(self, batches: Iterator[HostBatch]) -> Iterator[HostBatch]:
        """Passes batches on until there is a request to stop."""
        with contextlib.closing(batches):
            for batch in batches:
                self.run.checkpoints.check()
                self.check_stop()
                self.watchdog.watch(
                    "evaluating",
                    step=self.progress.step,
                    bucket=batch.bucket,
                    image_ids=batch.image_ids.tolist(),
                )
                yield batch

    def save(self) -> None:
        """Writes a checkpoint of this step in the background, unless there is one."""
        run, progress, evaluated = self.run, self.progress, self.evaluated()
        if progress.saved == progress.step:
            # A run that was stopped while evaluating saved first, and evaluates when it goes on.
            if evaluated and progress.noted < progress.step:
                run.checkpoints.note(progress.step, progress.evaluation, progress.evaluated_on)
                progress.noted = progress.step
            return
        self.watchdog.watch("saving", step=progress.step)
        self.read_metrics()
        metadata = run.metadata | progress.of_evaluation()
        metadata |= {
            "epoch": progress.step / run.steps_per_epoch,
            "health": self.health.counts(),
        }
        run.checkpoints.save(
            progress.step,
            progress.state,
            metadata,
            ap=progress.evaluation["AP"] if evaluated else None,
        )
        progress.saved = progress.step
        progress.noted = progress.step if evaluated else progress.noted

    def stop(self) -> dict:
        """Saves and leaves; the same command goes on from here."""
        self.save()
        self.run.checkpoints.wait()
        self.log.say(
            f"stopped at step {self.progress.step} of {self.run.total_steps} as asked and saved; "
            "the same command goes on"
        )
        return self.summary(finished=False, pictures=())

    def sheet(self) -> Sheet:
        """The pictures of this step."""
        run = self.run
        return Sheet(run.workdir, self.progress.step, run.config.log.pictures)

    def summary(self, *, finished: bool, pictures: Sequence[str]) -> dict:
        """What ``train`` returns."""
        return {
            "AP": self.progress.evaluation.get("AP"),
            "AP50": self.progress.evaluation.get("AP50"),
            "seconds": round(time.monotonic() - self.started, 1),
            "step": self.progress.step,
            "finished": finished,
            "checkpoint": str(self.run.workdir),
            "metrics": str(self.log.path),
            "pictures": list(pictures),
        }
