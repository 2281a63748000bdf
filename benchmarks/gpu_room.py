"""How many images of a training step there is room for on the card, before anything is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks import ours, two_programs
from yolos_jax.passes import Passes
from yolos_jax.step import TrainStep

# Of what this process may hold. The rest is for the other processes, who wait with their weights
# and their libraries on the card.
SHARE = 0.85
BESIDES = 1.3  # what a step takes per image, over what it keeps between its two programs


def room() -> int | None:
    """Bytes that a step may take; None where the device does not say."""
    limit = ours.memory_limit()
    return None if limit is None else int(SHARE * limit)


def fitting(train_step: TrainStep, grid: tuple[int, int], images: int) -> int:
    """How many images fit: as many as asked for, or what is left of them by halving.

    Nothing is compiled and nothing put on the device: what the forward pass keeps for the backward
    pass is known from shapes. The programs tell later what they need indeed.
    """
    limit = room()
    if limit is None:
        return images
    state = two_programs.bytes_of(train_step.abstract_state)
    gradients = two_programs.bytes_of(train_step.abstract_state.params)
    each = residual_bytes(train_step, grid)
    while images > 1 and state + gradients + BESIDES * each * images > limit:
        images //= 2
    return images


def residual_bytes(train_step: TrainStep, grid: tuple[int, int]) -> int:
    """What the forward pass of one more image keeps."""
    passes = Passes(train_step.model, train_step.updater, train_step.config)

    def kept(images: int) -> int:
        part, bucket = ours.make_host_part(train_step.config, images, grid)
        state = train_step.abstract_state
        forward = jax.eval_shape(
            lambda params, part: (
                passes.forward(params, np.int32(0), part, (bucket.rows, bucket.cols)).residuals
            ),
            state.params,
            ours.microbatch(part),
        )
        return two_programs.bytes_of(forward)

    return kept(2) - kept(1)


def with_fewer(
    attempt: Callable[[int], Iterator[dict[str, Any]]], images: int
) -> Iterator[dict[str, Any]]:
    """Rows of an attempt with so many images, or half as many where it runs out of memory.

    Attempts run alone: it is the card's limit that they find.

    Args:
      attempt: gives rows; what goes wrong after the first is not tried again.
      images: at first.
    """
    while True:
        rows = attempt(images)
        try:
            first = next(rows)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or images == 1:
                raise
            images //= 2
        else:
            yield first
            yield from rows
            return
