"""What orbax's manager of checkpoints is told: which steps to keep, and what not to ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from yolos_jax.checkpoint_files import AP, best


class KeepBest(checkpoint_managers.PreservationPolicy):
    """Preserves the steps of the highest AP, as ``best`` chooses them.

    Orbax's own BestN needs a metrics file in every step, and a damaged one of those stops the
    manager from opening at all; our metadata holds the AP.
    """

    def __init__(self, ap: Mapping[int, AP | None], count: int):
        self._ap, self._count = ap, count

    def should_preserve(self, checkpoints: Sequence, *, context: Any) -> list[bool]:
        kept = best({info.step: self._ap.get(info.step) for info in checkpoints}, self._count)
        return [info.step in kept for info in checkpoints]


class Manager(ocp.CheckpointManager):
    """Orbax's, which leaves it to the loop to ask whether to stop.

    It would ask jax with the step's number. Processes stop at the number after the last that one
    has asked with; among those of the loop, which counts questions, it may never come.
    """

    def reached_preemption(self, step: int) -> bool:
        return False
