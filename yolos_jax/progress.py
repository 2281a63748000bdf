"""How far a run has come: what changes from step to step, and what a checkpoint keeps of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from yolos_jax.train_state import TrainState


@dataclasses.dataclass
class Progress:
    """What changes from step to step."""

    state: TrainState
    step: int = 0  # optimiser steps done
    saved: int = -1  # step of the newest checkpoint
    evaluated: int = -1  # step of the last evaluation
    noted: int = -1  # step of the last evaluation that its checkpoint knows of
    evaluation: dict = dataclasses.field(default_factory=dict)  # its metrics
    health: dict = dataclasses.field(default_factory=dict)  # of Health.counts, when it was saved
    evaluated_on: str = ""  # Data.validation_set of the last evaluation; "": not known

    def due(self, every: int) -> bool:
        """Whether something done every so many steps is to be done now; 0: never."""
        return every > 0 and self.step > 0 and self.step % every == 0

    def is_evaluated(self, validation_set: str) -> bool:
        """Whether this step is, on this set; one that is not known counts as this."""
        return self.evaluated == self.step and self.evaluated_on in ("", validation_set)

    def take_evaluation(self, metrics: Mapping[str, Any], validation_set: str) -> None:
        """Notes what an evaluation of this step has found; its checkpoint does not know it yet."""
        self.evaluated, self.evaluation = self.step, dict(metrics)
        self.evaluated_on, self.noted = validation_set, -1

    def of_evaluation(self) -> dict:
        """What checkpoints say about the last evaluation."""
        return {
            "evaluated": self.evaluated,
            "evaluated_on": self.evaluated_on,
            "evaluation": self.evaluation,
        }

    def other_set(self, validation_set: str) -> str:
        """A line for people where the last evaluation was on another set than the next; or ""."""
        if self.evaluated < 0 or self.evaluated_on in ("", validation_set):
            return ""
        return (
            f"note: the validation set is not that of the evaluation at step {self.evaluated}: AP "
            "before and after do not compare, and the best checkpoint will be the best of those "
            "evaluated on this set"
        )
