"""The backward pass between two compiled programs: ``jax.vjp``'s closure without what is known.

The closure is a tree whose leaves are the residuals. As it stands it holds a copy of every
parameter that the backward pass needs. ``strip`` leaves out those leaves that *are* inputs of the
forward pass; ``restore`` puts them back in the other program. Should a version of jax hand out
copies, they are not recognised and travel: larger, never wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """How to put a pullback together again: a tree without leaves, which crosses ``jax.jit``."""

    treedef: Any
    sources: tuple[int | None, ...]  # of each leaf: which known array it is; None: a residual


def strip(pullback: Callable, known: Any) -> tuple[list[jax.Array], Structure]:
    """Takes out of a pullback what the program that runs it has anyway.

    Args:
      pullback: of ``jax.vjp``, under the trace of the first program.
      known: tree of unchanged inputs of the first program.

    Returns:
      The residuals, and what ``restore`` needs besides.
    """
    places = {id(leaf): place for place, leaf in enumerate(jax.tree.leaves(known))}
    leaves, treedef = jax.tree.flatten(pullback)
    sources = tuple(places.get(id(leaf)) for leaf in leaves)
    residuals = [leaf for leaf, source in zip(leaves, sources, strict=True) if source is None]
    return residuals, Structure(treedef, sources)


def restore(residuals: list[jax.Array], structure: Structure, known: Any) -> Callable:
    """Returns the pullback, under the trace of the second program.

    Args:
      residuals: from ``strip``.
      structure: likewise. A later trace of the first function makes another one, which is equal
        in all but identity: keep the first, or the second program is compiled again.
      known: the tree that ``strip`` was given, with the same values.
    """
    inputs, rest = jax.tree.leaves(known), iter(residuals)
    leaves = [next(rest) if source is None else inputs[source] for source in structure.sources]
    return jax.tree.unflatten(structure.treedef, leaves)
