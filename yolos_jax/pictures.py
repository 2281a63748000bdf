"""The sheet of validation pictures that a run leaves at its end."""

from __future__ import annotations

from pathlib import Path

import jax
from jax.experimental import multihost_utils

from yolos_jax import interrupt, visualize
from yolos_jax.data.index import Index


class Sheet:
    """Pictures with ground truth beside predictions; drawn by the first process."""

    def __init__(self, workdir: Path, step: int, count: int):
        """Draws nothing yet.

        Args:
          workdir: of the run.
          step: whose predictions are drawn.
          count: of pictures; 0: no sheet.
        """
        self.path, self.count = workdir / "pictures" / f"step_{step}.png", count

    def missing(self) -> bool:
        """Whether it is wanted and not there, on the first process; ask on all of them."""
        missing = self.count > 0 and not self.path.exists()
        return bool(multihost_utils.broadcast_one_to_all(missing))

    def draw(self, index: Index, results: list[dict] | None) -> list[str]:
        """Draws it, unless there are no results; returns the paths of its files."""
        if not self.count:
            return []
        if jax.process_index() == 0 and results is not None:
            sheet = visualize.split_sheet(index, results, self.count)
            with interrupt.complete_or_nothing(self.path) as path:
                sheet.save(path, format="PNG")
        return [str(self.path)]
