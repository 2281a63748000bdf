"""What a run leaves to be read: a line of numbers every so many steps, and a progress bar."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from yolos_jax import answers
from yolos_jax.data import files

_ABSENT = "(no such key)"


def local_folder(workdir: str) -> Path:
    """The work directory's absolute path.

    Raises:
      ValueError: it is in an object store, or cannot be made.
    """
    if files.is_remote(workdir):
        raise ValueError(
            f"--workdir {workdir}: expected a folder of a file system that is mounted; only the "
            "pictures may be in an object store"
        )
    folder = Path(workdir).expanduser().resolve()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        problem = "cannot be written to" if there.is_dir() else "is a file"
        raise ValueError(f"--workdir {workdir}: {there} {problem}")
    return folder


class RunLog:
    """``metrics.jsonl`` of a work directory, and the progress bar on stderr.

    Each line is a JSON object with ``kind`` ('train' or 'eval') and ``step`` (optimiser steps done
    when it was written); numbers that are not finite are null. Lines are on the disk when a method
    returns. Only the first process writes and shows anything.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        step: int,
        evaluated: int,
        total_steps: int,
        batch_size: int,
        every: int,
    ) -> None:
        """Opens nothing yet: use it in a ``with`` statement.

        Args:
          workdir: folder of the run, which exists.
          step: optimiser steps done; later lines of an earlier attempt are dropped.
          evaluated: step of the last evaluation that counts; later ones will be made again.
          total_steps: of the run.
          batch_size: images per step.
          every: steps between lines.
        """
        self.path = Path(workdir) / "metrics.jsonl"
        self._first, self._evaluated, self._total = step, evaluated, total_steps
        self._batch_size, self._every = batch_size, every
        self._active = jax.process_index() == 0
        self._ap: float | None = None

    def __enter__(self) -> RunLog:
        if self._active:
            kept = _lines_until(self.path, self._first, self._evaluated)
            evaluated = [line["AP"] for line in kept if line.get("AP") is not None]
            self._ap = evaluated[-1] if evaluated else None
            _replace(self.path, kept)
        self._bar = tqdm(
            total=self._total,
            initial=self._first,
            unit="step",
            file=sys.stderr,
            disable=not self._active,
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 10,  # a log file needs fewer
        )
        self._since(self._first)
        return self

    def __exit__(self, *unused: object) -> None:
        self._bar.close()

    def step(self, step: int, metrics: Mapping[str, float], *, lr: float, epoch: float) -> None:
        """Notes a step of training.

        Args:
          step: which one, from 0; the line says how many are done then.
          metrics: of the step.
          lr: its learning rate.
          epoch: where it begins, in epochs.
        """
        done = step + 1
        ap = "" if self._ap is None else f", AP {self._ap:.3f}"
        rate = (self._bar.format_dict["rate"] or 0) * self._batch_size
        self._bar.set_postfix_str(
            f"loss {metrics['loss']:.3f}{ap}, {rate:.0f} images/s", refresh=False
        )
        self._bar.update(done - self._bar.n)
        if done % self._every and done != self._total:
            return
        elapsed = time.monotonic() - self._then
        rate = (done - self._then_step) * self._batch_size / max(elapsed, 1e-9)
        self._write("train", done, {"epoch": epoch, "lr": lr, "images_per_s": rate} | dict(metrics))
        self._since(done)

    def evaluation(self, step: int, metrics: Mapping[str, Any], seconds: float) -> None:
        """Notes an evaluation, after ``step`` optimiser steps, that took so many seconds."""
        self._ap = metrics["AP"]
        self._write("eval", step, {"seconds": seconds} | dict(metrics))
        shown = ", ".join(f"{name} {metrics[name]:.3f}" for name in ("AP", "AP50", "AP75"))
        self.say(f"step {step}: {shown} ({seconds:.0f} s)")
        for note in answers.notes(metrics):
            self.say(note)
        self._since(step)  # The time belongs to no step.

    def say(self, message: str) -> None:
        """Prints a line to stderr without tearing the progress bar."""
        if self._active:
            tqdm.write(message, file=sys.stderr)

    def _since(self, step: int) -> None:
        self._then, self._then_step = time.monotonic(), step

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if not self._active:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_dumps({"kind": kind, "step": step} | dict(values)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(f"{self.path}: cannot be written: {error}") from error


def refuse_changes(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    changeable: Iterable[str],
    workdir: Path,
    defaults: Mapping[str, Any],
) -> None:
    """Compares the configuration of a run with the one it was begun with.

    Args:
      old: of the run, nested dicts as they come from JSON.
      new: likewise, of the command that resumes it.
      changeable: dotted keys that may differ.
      workdir: of the run, for the message.
      defaults: nested likewise: what keys count as that there were not yet when it was begun.

    Raises:
      ValueError: naming every key that differs and may not, with both values.
    """
    before, after = _flat(defaults) | _flat(old), _flat(new)
    lines = [
        f"{key}: was {before.get(key, _ABSENT)}, is {after.get(key, _ABSENT)}"
        for key in sorted((before.keys() | after.keys()) - set(changeable))
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]
    if lines:
        raise ValueError(
            f"{workdir} was begun with another configuration; go on with the old values or choose "
            f"another --workdir (--config.init={workdir} starts from what this one has learnt):\n  "
            + "\n  ".join(lines)
        )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = list(value) if isinstance(value, tuple) else value
    return found


def _lines_until(path: Path, step: int, evaluated: int) -> list[dict]:
    """The lines up to a step, of evaluations up to another.

    The last one may be torn: the run may have died writing it.
    """
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if not isinstance(line, dict):
            continue
        last = evaluated if line.get("kind") == "eval" else step
        if line.get("step", last + 1) <= last:
            kept.append(line)
    return kept


def _replace(path: Path, lines: list[dict]) -> None:
    """Writes a file anew; whoever looks sees the old one or the new one, whole."""
    new = path.with_suffix(".new")
    with open(new, "w", encoding="utf-8") as file:
        file.writelines(_dumps(line) for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _dumps(line: Mapping[str, Any]) -> str:
    return json.dumps(_finite(line), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
