"""What goes wrong during a run without ending it, and when it becomes too much."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

SHOWN = 10  # of a list of offenders, as many as a person reads.


class Health:
    """Counts unreadable pictures and skipped steps; raises ValueError when there are too many.

    Everything that decides to stop comes from numbers that are the same on every host: they are
    sums over the global batch.
    """

    def __init__(
        self, workdir: Path, *, num_images: int, max_bad_fraction: float, max_skipped: int
    ):
        """Args:
        workdir: where ``skipped_steps.jsonl`` and ``unreadable.txt`` are written.
        num_images: images of the training set.
        max_bad_fraction: ``config.data.max_bad_fraction``.
        max_skipped: ``config.optimizer.max_skipped``.
        """
        self.workdir = workdir
        self.num_images = num_images
        self.max_bad_fraction = max_bad_fraction
        self.max_skipped = max_skipped
        self.images = 0  # rows seen, of all hosts
        self.unreadable = 0  # of them could not be read
        self.messages: list[str] = []  # this host's unreadable pictures, each once
        self.skipped = 0  # steps whose loss or gradient was not finite
        self.skipped_in_a_row = 0

    def note_unreadable(self, messages: Sequence[str]) -> list[str]:
        """Records this host's unreadable pictures of a step; returns those not seen before."""
        new = [message for message in messages if message not in self.messages]
        self.messages += new
        if new:
            with open(self.workdir / "unreadable.txt", "a", encoding="utf-8") as file:
                file.writelines(message + "\n" for message in new)
        return new

    def check_validation(self, unreadable: int, images: int) -> None:
        """Raises ValueError when too many pictures of the validation split could not be read."""
        if unreadable > self.max_bad_fraction * images:
            raise ValueError(
                f"{unreadable} of {images} validation pictures could not be read, more than "
                f"data.max_bad_fraction={self.max_bad_fraction}:\n  "
                + "\n  ".join(self.messages[-unreadable:][:SHOWN] or ["(none on this host)"])
            )

    def check(
        self, step: int, batch_size: int, image_ids: Sequence[int], metrics: Mapping[str, float]
    ) -> None:
        """Takes a finished step's numbers into account.

        Args:
          step: which step.
          batch_size: rows of the global batch.
          image_ids: this host's images of the step.
          metrics: of the step, on the host: ``images`` (valid rows), ``finite``, ``loss``,
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
                "are:\n  " + "\n  ".join(self.messages[:SHOWN] or ["(none on this host)"])
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
        with open(self.workdir / "skipped_steps.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.skipped_in_a_row >= self.max_skipped:
            raise ValueError(
                f"{self.skipped_in_a_row} steps in a row had a loss or a gradient that is not "
                f"finite (optimizer.max_skipped={self.max_skipped}), the last one step {step} "
                f"with image ids {ids[:SHOWN]}; all are in {self.workdir / 'skipped_steps.jsonl'}"
            )
