"""What goes wrong during a run without ending it, and when it becomes too much."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

SHOWN = 10  # of a list of offenders, as many as a person reads.
COUNTED = ("images", "unreadable", "skipped", "skipped_in_a_row")


class Health:
    """Counts unreadable pictures and skipped steps; raises ValueError when there are too many.

    Everything that decides to stop comes from numbers that are the same on every host: they are
    sums over the global batch. What a run counts travels with its checkpoints, so that one that
    was interrupted stops where an unbroken one would.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        num_images: int,
        max_bad_fraction: float,
        max_skipped: int,
        first_step: int = 0,
        counts: Mapping[str, int] | None = None,
        writes: bool = True,
    ):
        """Args:
        workdir: where ``skipped_steps.jsonl`` and ``unreadable.txt`` are written.
        num_images: images of the training set.
        max_bad_fraction: ``config.data.max_bad_fraction``.
        max_skipped: ``config.optimizer.max_skipped``.
        first_step: that this process takes; later ones on file will be taken again.
        counts: of the steps before, as the method of that name gave them.
        writes: whether this process is the one that writes the files.
        """
        self.num_images = num_images
        self.max_bad_fraction = max_bad_fraction
        self.max_skipped = max_skipped
        self.images = 0  # rows seen, of all hosts
        self.unreadable = 0  # of them could not be read
        self.skipped = 0  # steps whose loss or gradient was not finite
        self.skipped_in_a_row = 0
        for name in COUNTED:
            setattr(self, name, (counts or {}).get(name, 0))
        self.writes = writes
        self.skipped_file = workdir / "skipped_steps.jsonl"
        self.unreadable_file = workdir / "unreadable.txt"
        self.messages: list[str] = []  # why training pictures could not be read, each once
        self._told: set[str] = set()  # of all splits
        self.on_file = set(_lines(self.unreadable_file)) if writes else set()
        if writes and self.skipped_file.exists():
            kept = [line for line in _lines(self.skipped_file) if _step_of(line) < first_step]
            self.skipped_file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def counts(self) -> dict[str, int]:
        """What to go on from when the run is resumed."""
        return {name: getattr(self, name) for name in COUNTED}

    def note_unreadable(self, messages: Sequence[str], *, training: bool = True) -> list[str]:
        """Records why pictures, of training or of validation, could not be read.

        Returns:
          What is new.
        """
        new = [message for message in dict.fromkeys(messages) if message not in self._told]
        self._told.update(new)
        if training:
            self.messages += [text for text in dict.fromkeys(messages) if text not in self.messages]
        self._append(self.unreadable_file, [text for text in new if text not in self.on_file])
        return new

    def check_validation(self, unreadable: int, images: int, messages: Sequence[str]) -> None:
        """Raises ValueError when too many pictures of the validation split could not be read.

        Args:
          unreadable: of this evaluation.
          images: of the split.
          messages: why they could not be read.
        """
        if unreadable > self.max_bad_fraction * images:
            raise ValueError(
                f"{unreadable} of {images} validation pictures could not be read, more than "
                f"data.max_bad_fraction={self.max_bad_fraction}:\n  "
                + "\n  ".join(messages[:SHOWN])
            )

    def check(
        self, step: int, batch_size: int, image_ids: Sequence[int], metrics: Mapping[str, float]
    ) -> None:
        """Takes a finished step's numbers into account.

        Args:
          step: which step.
          batch_size: rows of the global batch.
          image_ids: the images of the step, for the record of one that is not finite.
          metrics: of the step: ``images`` (valid rows), ``finite``, ``loss``,
            ``grad_norm``.

        Raises:
          ValueError: too many pictures could not be read, or too many steps in a row were not
            finite.
        """
        self.images += batch_size
        self.unreadable += batch_size - round(metrics["images"])
        # Early in the first epoch a single picture is a large fraction of those seen.
        fraction = self.unreadable / max(self.images, self.num_images)
        if fraction > self.max_bad_fraction:
            raise ValueError(
                f"{self.unreadable} of {self.images} pictures could not be read, more than "
                f"data.max_bad_fraction={self.max_bad_fraction} of the {self.num_images} there "
                "are:\n  " + "\n  ".join(self.messages[:SHOWN])
            )
        if metrics["finite"]:
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        ids = [int(i) for i in image_ids]
        record = {
            "step": step,
            "image_ids": ids,
            "loss": str(metrics["loss"]),
            "grad_norm": str(metrics["grad_norm"]),
        }
        self._append(self.skipped_file, [json.dumps(record)])
        if self.skipped_in_a_row >= self.max_skipped:
            raise ValueError(
                f"{self.skipped_in_a_row} steps in a row had a loss or a gradient that is not "
                f"finite (optimizer.max_skipped={self.max_skipped}), the last one step {step} "
                f"with image ids {ids[:SHOWN]}; all are in {self.skipped_file}"
            )

    def _append(self, path: Path, lines: Sequence[str]) -> None:
        if not (lines and self.writes):
            return
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in lines)
        except OSError as error:
            raise OSError(f"{path}: cannot be written: {error}") from error


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _step_of(line: str) -> float:
    """Which step a record is of; a torn one is of none that is kept."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return float("inf")
