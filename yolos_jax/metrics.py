"""The numbers of a step, which leave the devices side by side in one array."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from yolos_jax.batch import Array


@jax.tree_util.register_pytree_node_class
class Metrics(Mapping[str, float]):
    """Numbers by name, in the order of the alphabet; a pytree with one leaf.

    The first one that is read waits for the step and fetches all: one transfer instead of 11 of
    YOLOS or 31 of DETR, each of which costs the host as much.
    """

    def __init__(self, names: tuple[str, ...], array: Array):
        """Takes the names and float32 [len(names)]; see ``of``."""
        self.names, self.array = names, array

    @classmethod
    def of(cls, numbers: Mapping[str, Array]) -> Metrics:
        """Packs arrays [] of any type, inside a compiled program; integers up to 2 ** 24."""
        names = tuple(sorted(numbers))
        return cls(names, jnp.stack([jnp.float32(numbers[name]) for name in names]))

    def __getitem__(self, name: str) -> float:
        if name not in self.names:
            raise KeyError(name)
        return float(np.asarray(self.array)[self.names.index(name)])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"Metrics({', '.join(self.names)})"

    def block_until_ready(self) -> Metrics:
        """Waits for the step, as an array's does."""
        self.array.block_until_ready()
        return self

    def tree_flatten(self) -> tuple[tuple[Array], tuple[str, ...]]:
        """Its leaf, and its names, which are static."""
        return (self.array,), self.names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], leaves: tuple[Array]) -> Metrics:
        """The opposite of ``tree_flatten``."""
        return cls(names, *leaves)
