"""AdamW as torch does it, over parameter groups chosen by path; freezing; an average of parameters.

The learning rate is no part of the transformation: it is an argument of ``apply_updates``, so that
one compiled step serves every rate and ``schedules.py`` stays plain Python.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from yolos_jax.batch import Array
from yolos_jax.parameter_groups import YOLOS_RULES, Rule

Tree = Any  # nested dicts of arrays, or of their shapes


def paths(params: Tree) -> list[str]:
    """The path of every parameter, names joined by '/', in the order of ``jax.tree.leaves``."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]


def group_table(params: Tree, rules: Sequence[Rule] = YOLOS_RULES) -> dict[str, Rule]:
    """The rule of every parameter.

    Args:
      params: nested dict; only its structure matters.
      rules: of the model.

    Returns:
      Path -> rule.

    Raises:
      ValueError: naming every path that no rule matches, or more than one.
    """
    table, wrong = {}, []
    for path in paths(params):
        matches = [rule for rule in rules if re.fullmatch(rule.pattern, path)]
        if len(matches) == 1:
            table[path] = matches[0]
        else:
            found = ", ".join(rule.pattern for rule in matches) or "none"
            wrong.append(f"{path} (rules that match: {found})")
    if wrong:
        raise ValueError(
            "each parameter needs exactly one optimizer group rule, but: " + "; ".join(wrong)
        )
    return table


def describe_groups(
    trainable: Tree,
    frozen: Tree,
    config: Mapping[str, Any],
    rules: Sequence[Rule] = YOLOS_RULES,
) -> str:
    """Says, a line per group, how many parameters it has, whether they decay, and their rate.

    Args:
      trainable, frozen: of ``partition``.
      config: the ``optimizer`` part of the configuration.
      rules: of the model.
    """
    table = group_table(trainable, rules)
    tensors: dict[tuple[str, float, float], list[int]] = {}
    for path, leaf in zip(paths(trainable), jax.tree.leaves(trainable), strict=True):
        rule = table[path]
        decay = config["weight_decay"] if rule.decay else 0.0
        key = (rule.group, decay, config["lr"] * lr_factor(config, rule))
        tensors.setdefault(key, []).append(int(np.prod(leaf.shape)))
    lines = [
        f"{group:<18} {sum(sizes):>12,} parameters in {len(sizes):>3} arrays, decay {decay:g}"
        + (f", learning rate {lr:g}" if lr != config["lr"] else "")
        for (group, decay, lr), sizes in tensors.items()
    ]
    leaves = jax.tree.leaves(frozen)
    if leaves:
        size = sum(int(np.prod(leaf.shape)) for leaf in leaves)
        lines.append(f"{'frozen':<18} {size:>12,} parameters in {len(leaves):>3} arrays")
    return "\n".join(lines)


def partition(params: Tree, freeze: Sequence[str]) -> tuple[Tree, Tree]:
    """Splits parameters into those that are trained and those that are not.

    Args:
      params: nested dict of anything.
      freeze: regular expressions of whole paths that are not trained.

    Returns:
      (trainable, frozen): nested dicts without each other's entries; ``merge`` undoes it.

    Raises:
      ValueError: when an expression is none, or matches nothing, or nothing is left to train.
    """
    known = paths(params)
    frozen_paths = set()
    for pattern in freeze:
        try:
            matches = [path for path in known if re.fullmatch(pattern, path)]
        except (re.error, TypeError) as error:
            raise ValueError(
                f"optimizer.freeze: {pattern!r} is no regular expression: {error}"
            ) from error
        if not matches:
            raise ValueError(
                f"optimizer.freeze: {pattern!r} matches no parameter; their paths are: "
                + ", ".join(known)
            )
        frozen_paths.update(matches)
    if frozen_paths == set(known):
        raise ValueError(f"optimizer.freeze: {tuple(freeze)!r} leaves nothing to train")
    return _select(params, "", frozen_paths, False), _select(params, "", frozen_paths, True)


def merge(trainable: Tree, frozen: Tree) -> Tree:
    """Puts the two halves of ``partition`` together again."""
    merged = dict(trainable)
    for name, value in frozen.items():
        merged[name] = merge(merged[name], value) if name in merged else value
    return merged


def make_optimizer(
    config: Mapping[str, Any], trainable: Tree, rules: Sequence[Rule] = YOLOS_RULES
) -> optax.GradientTransformationExtraArgs:
    """Clipping, Adam and decoupled weight decay: what is subtracted, before the learning rate.

    Its ``update`` takes ``finite``, as that of ``scale_by_adam``.

    Args:
      config: the ``optimizer`` part of the configuration.
      trainable: the parameters that are trained; only their structure matters.
      rules: of the model.

    Raises:
      ValueError: from ``group_table``.
    """
    table = group_table(trainable, rules)
    decays = [table[path].decay for path in paths(trainable)]
    mask = jax.tree.unflatten(jax.tree.structure(trainable), decays)
    clip = clip_by_global_norm(config["clip_norm"]) if config["clip_norm"] else optax.identity()
    parts = [
        clip,
        scale_by_adam(config["b1"], config["b2"], config["eps"]),
        optax.add_decayed_weights(config["weight_decay"], mask),
    ]
    factors = [lr_factor(config, table[path]) for path in paths(trainable)]
    if set(factors) != {1.0}:
        tree = jax.tree.unflatten(jax.tree.structure(trainable), factors)
        parts.append(scale_by(tree))
    return optax.chain(*parts)


def lr_factor(config: Mapping[str, Any], rule: Rule) -> float:
    """By what a group's learning rate differs from the schedule's: a constant over the run."""
    if not rule.backbone or not config["backbone_lr"]:
        return 1.0
    return config["backbone_lr"] / config["lr"]


def scale_by(factors: Tree) -> optax.GradientTransformation:
    """Multiplies each update by a number of its own, from a tree of numbers."""

    def scale(updates: Tree, params: Tree | None = None) -> Tree:
        del params
        return jax.tree.map(lambda update, factor: update * factor, updates, factors)

    return optax.stateless(scale)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales gradients by min(1, max_norm / (norm + 1e-6)), as torch's clip_grad_norm_ does.

    optax.clip_by_global_norm leaves out the 1e-6.
    """

    def clip(gradients: Tree, params: Tree | None = None) -> Tree:
        del params
        scale = jnp.minimum(max_norm / (optax.tree.norm(gradients) + 1e-6), 1.0)
        return jax.tree.map(lambda gradient: gradient * scale, gradients)

    return optax.stateless(clip)


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """Adam's direction as torch has it, with the state of optax.scale_by_adam.

    ``update`` takes ``finite``, bool []: where it is False, the state stays as it is and what comes
    out means nothing.

    optax computes the bias corrections as 1 - b ** count in float32: with b2 = 0.999 the first
    steps are 6e-6 too short in every parameter at once, which ten steps at a learning rate of 1e-3
    turn into losses 4e-4 from torch's. expm1 keeps all digits.
    """

    def update(
        gradients: Tree,
        state: Any,
        params: Tree | None = None,
        *,
        finite: Array | bool = True,
        **others: Any,
    ) -> tuple[Tree, Any]:
        del params, others
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(gradients, state.mu, b1, 1)
        nu = optax.tree.update_moment(gradients, state.nu, b2, 2)
        after = optax.ScaleByAdamState(count=count, mu=mu, nu=nu)
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
        # XLA would compute the moments once more for the parameters, on the CPU from copies of the
        # old ones, since the new ones are put in their place.
        mu, nu = jax.lax.platform_dependent(
            (after.mu, after.nu), cpu=jax.lax.optimization_barrier, default=lambda moments: moments
        )
        rest1, rest2 = (-jnp.expm1(count * (math.log(b) if b else -math.inf)) for b in (b1, b2))
        updates = jax.tree.map(lambda m, v: m / rest1 / (jnp.sqrt(v / rest2) + eps), mu, nu)
        return updates, after

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam(b1, b2, eps).init, update)


def apply_updates(trainable: Tree, updates: Tree, lr: Array) -> Tree:
    """Subtracts ``lr`` times what the optimiser made of the gradients."""
    return jax.tree.map(lambda param, update: param - lr * update, trainable, updates)


def update_ema(average: Tree, params: Tree, decay: float) -> Tree:
    """Moves an exponential average of the parameters towards them, by ``1 - decay`` of the way."""
    return jax.tree.map(lambda mean, param: mean + (1 - decay) * (param - mean), average, params)


def _select(tree: Tree, prefix: str, chosen: set[str], keep: bool) -> Tree:
    """The part of a nested dict whose paths are (keep) or are not (not keep) chosen."""
    result = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            inside = _select(value, f"{path}/", chosen, keep)
            if inside:
                result[name] = inside
        elif (path in chosen) == keep:
            result[name] = value
    return result
