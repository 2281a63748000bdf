"""Checkpoints: orbax folders that carry everything needed to resume, or to predict.

    DIRECTORY/<step>/params, optimizer, ema (if any), metadata, SHA256SUMS

``params`` and ``metadata`` alone make a detector. Writing is asynchronous and atomic: a step
folder appears under its name only when it is complete. Orbax restores flipped bytes without a
word, so every step carries the hashes of its files.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers, multihost

from yolos_jax import checkpoint_files as files
from yolos_jax import mesh
from yolos_jax.checkpoint_manager import KeepBest, Manager
from yolos_jax.checkpoint_read import FOLDER, FORMAT, load_params, report, report_damage

__all__ = ["FOLDER", "FORMAT", "Checkpoints", "load_params", "save_params"]


class Checkpoints:
    """The checkpoints of a run: the last few, and the best by AP.

    Every process of a run makes one and calls the same methods in the same order. What steps say
    about themselves process 0 reads for all: what a run does next follows from it.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keep_last: int,
        keep_best: int,
        wait_seconds: int = 300,
    ):
        """Opens a folder, which is made where it is missing.

        Args:
          directory: of the step folders; local or gs://.
          keep_last: newest steps to keep, at least 1.
          keep_best: steps with the highest AP to keep besides.
          wait_seconds: how long a process that has written its part waits for the others.
        """
        self.directory = files.absolute(directory)
        self._keep_best = keep_best
        self._saving: int | None = None  # the step that is being written in the background
        self._failure: BaseException | None = None  # what went wrong there
        self._whole: int | None = None  # the newest step found whole, until one is saved
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            for name in files.unfinished(self.directory):
                report(f"{self.directory / name}: a checkpoint that was not finished; removed")
            for name in files.unreadable_late_evaluations(self.directory):
                report(f"{self.directory / name}: not an evaluation; left out")
        multihost_utils.sync_global_devices("checkpoint folder made")
        known = mesh.from_first(self._read_ap)
        self._ap = {step: ap and files.AP(*ap) for step, ap in known}
        policies = [checkpoint_managers.LatestN(keep_last), KeepBest(self._ap, keep_best)]
        self._manager = Manager(
            self.directory,
            item_names=(*files.ARRAYS, "metadata"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(
                    timeout_secs=wait_seconds,
                    barrier_sync_fn=self._meet,
                    post_finalization_callback=self._write_sums,
                ),
            ),
        )

    @property
    def last_step(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, metadata: Mapping, ap: float | None = None) -> bool:
        """Starts to write a checkpoint; returns as soon as the arrays are copied to the host.

        Args:
          step: number of updates behind the state.
          state: a NamedTuple with step, params, opt_state and ema (None: none).
          metadata: what the checkpoint says about itself, JSON; ``step`` and ``ap`` are added.
          ap: the state's AP, if it was evaluated, on the set ``metadata["evaluated_on"]``.

        Returns:
          False if this step was already there; nothing is written then.

        Raises:
          ValueError: if the folder holds later steps.
          OSError: if the previous checkpoint could not be written, or this one not be begun.
        """
        self.wait()
        if self.last_step is not None and step <= self.last_step:
            if step in self._manager.all_steps():
                return False
            raise ValueError(
                f"{self.directory} holds step {self.last_step}; step {step} cannot be saved after "
                "it: resume from it or use another folder"
            )
        items = {name: ocp.args.StandardSave(item) for name, item in files.items(state).items()}
        self._start(step, items, metadata, ap)
        return True

    def note(self, step: int, evaluation: Mapping[str, Any], evaluated_on: str = "") -> None:
        """Adds the evaluation of a step that was saved before it was evaluated.

        Beside the step's folder: what is in it, hashes included, stays as it was written.

        Args:
          step: of a checkpoint that is kept.
          evaluation: its metrics, ``AP`` among them, on the validation set ``evaluated_on``.
        """
        self.wait()
        late = {"evaluated": step, "evaluated_on": evaluated_on, "evaluation": dict(evaluation)}
        late["ap"] = None if math.isnan(evaluation["AP"]) else float(evaluation["AP"])
        self._ap[step] = files.ap_of(late)
        if jax.process_index() == 0:
            files.write_late_evaluation(self.directory / str(step), late)
        multihost_utils.sync_global_devices("evaluation noted")

    def restore(self, abstract_state: Any, shardings: Any) -> tuple[Any, dict] | None:
        """Reads the newest checkpoint that is not damaged.

        Damaged steps are named on stderr and renamed, out of the way, to ``<step>.damaged``. The
        best ones are looked at too: a damaged one must not be kept in the place of a whole one.

        Args:
          abstract_state: a state of arrays or ``jax.ShapeDtypeStruct``: what is expected.
          shardings: a state of shardings: where the arrays go.

        Returns:
          (state, metadata), or None if there is no checkpoint.

        Raises:
          ValueError: if all are damaged, or naming every entry that is missing, superfluous, or
            of another shape or type than expected.
        """
        self.wait()
        step = self._newest_whole()
        if step is None:
            return None
        expected, targets = files.items(abstract_state), files.items(shardings)
        folder = self.directory / str(step)
        files.refuse_differences(folder, files.stored(folder), expected)
        abstract = jax.tree.map(_abstract, expected, targets)
        wanted = {name: ocp.args.StandardRestore(item) for name, item in abstract.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**wanted))
        opt_state = files.named_leaves(restored["optimizer"]["state"])
        structure = jax.tree.structure(abstract_state.opt_state)
        in_order = [opt_state[path] for path in files.named_leaves(abstract_state.opt_state)]
        state = abstract_state._replace(
            step=restored["optimizer"]["step"],
            params=restored["params"],
            opt_state=jax.tree.unflatten(structure, in_order),
            ema=restored["ema"] if "ema" in abstract else None,
        )
        return state, mesh.from_first(lambda: files.read_metadata(folder))

    def metadata(self) -> dict | None:
        """What the checkpoint that ``restore`` would read says about itself; None without any.

        Raises:
          ValueError: if all are damaged.
        """
        self.wait()
        step = self._newest_whole()
        if step is None:
            return None
        return mesh.from_first(lambda: files.read_metadata(self.directory / str(step)))

    def wait(self) -> None:
        """Waits until the checkpoint being written is complete.

        Raises:
          OSError: if it could not be written (disk full, folder gone, ...).
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # Whatever the file system's driver raises.
            raise self._not_written(self._failure or error) from error
        self._saving = None

    def check(self) -> None:
        """Does not wait, but raises OSError if the checkpoint being written has already failed."""
        if self._failure is not None:
            raise self._not_written(self._failure) from self._failure

    def close(self) -> None:
        """Waits, and ends the threads that write."""
        self.wait()
        self._manager.close()

    def _start(self, step: int, items: dict, metadata: Mapping, ap: float | None = None) -> None:
        self._saving, self._failure, self._whole = step, None, None
        if jax.process_index() == 0:
            files.drop_late_evaluations(self.directory, kept=self._manager.all_steps())
        metadata = {**metadata, "step": step, "ap": None if math.isnan(ap or 0) else ap}
        self._ap[step] = files.ap_of(metadata)
        items = items | {"metadata": ocp.args.JsonSave(metadata)}
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        except OSError as error:
            raise self._not_written(error) from error

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        # Where orbax's threads wait for those of the other processes. One that has failed comes
        # here too, from a ``finally``: it would wait in vain, and nobody be told why.
        if threading.current_thread() is not threading.main_thread():
            self._failure = self._failure or sys.exception()
            if self._failure is not None:
                raise self._failure
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def _not_written(self, error: BaseException) -> OSError:
        self._ap.pop(self._saving, None)
        return OSError(
            f"checkpoint {self._saving} could not be written to {self.directory}: {error}\n"
            f"intact there: steps {files.steps(self.directory)}"
        )

    def _write_sums(self) -> None:
        # Orbax calls this on one process, when all have written their files and before the folder
        # gets its final name, so that the hashes appear with the step or not at all.
        step = str(self._saving)
        for folder in self.directory.iterdir():
            if folder.name == step or folder.name.startswith(f"{step}.orbax-checkpoint-tmp"):
                files.write_sums(folder)

    def _read_ap(self) -> list[tuple[int, files.AP | None]]:
        found = files.steps(self.directory)
        return [(step, files.read_ap(self.directory / str(step))) for step in found]

    def _newest_whole(self) -> int | None:
        if self._whole is not None:
            return self._whole
        # One process reads the bytes; the others take its word, or the run would read every
        # checkpoint as often as it has hosts and might choose different ones.
        steps = sorted(mesh.from_first(lambda: list(self._manager.all_steps())), reverse=True)
        if not steps:
            return None
        found: dict[int, str] = {}
        if jax.process_index() == 0:
            found = files.find_damage(self.directory, steps, self._ap, self._keep_best)
        damaged = multihost_utils.broadcast_one_to_all(np.isin(steps, list(found)))
        if damaged.all():
            raise ValueError(
                f"every checkpoint in {self.directory} is damaged (steps {sorted(steps)}): move "
                f"the folder away to start anew{''.join(f'; {why}' for why in found.values())}"
            )
        report_damage(found)
        for step in np.array(steps)[damaged].tolist():
            if jax.process_index() == 0:
                files.set_aside(self.directory / str(step))
            del self._ap[step]
        multihost_utils.sync_global_devices("damaged steps set aside")
        self._manager.reload()
        self._whole = mesh.from_first(lambda: self.last_step)
        return self._whole


def save_params(directory: str | os.PathLike, params: Mapping, metadata: Mapping) -> None:
    """Writes parameters that come from elsewhere as step 0 of a new folder.

    Args:
      directory: where the step folder goes; must hold no checkpoint yet.
      params: nested dict of arrays.
      metadata: as for ``Checkpoints.save``.

    Raises:
      ValueError: if the folder holds checkpoints.
      OSError: if it cannot be written.
    """
    steps = files.steps(files.absolute(directory))
    if steps:
        raise ValueError(
            f"{directory} already holds checkpoints (steps {steps}): choose another folder"
        )
    checkpoints = Checkpoints(directory, keep_last=1, keep_best=0)
    item = ocp.args.StandardSave(jax.tree.map(np.asarray, dict(params)))
    checkpoints._start(0, {"params": item}, {"format": FORMAT, **metadata})
    checkpoints.close()


def _abstract(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
