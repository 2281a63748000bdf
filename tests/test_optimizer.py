from __future__ import annotations

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from tests.golden_losses import GOLDENS
from yolos_jax import optimizer, parameter_groups
from yolos_jax.models import build
from yolos_jax.schedules import make_schedule

# The names of hustvl/YOLOS, as in goldens/optim_groups.json, as ours: a position table is three of
# ours, the parameters of blocks are stacked.
NAMES = (
    (r"(class|bbox)_embed\.layers\.(\d)\.weight", r"\1_head/layers_\2/kernel"),
    (r"(class|bbox)_embed\.layers\.(\d)\.bias", r"\1_head/layers_\2/bias"),
    (r"backbone\.cls_token", "backbone/cls_token"),
    (r"backbone\.det_token", "backbone/det_tokens"),
    (r"backbone\.pos_embed", "backbone/position/*"),
    (r"backbone\.mid_pos_embed", "backbone/mid_position/*"),
    (r"backbone\.patch_embed\.proj\.weight", "backbone/patch_embed/kernel"),
    (r"backbone\.patch_embed\.proj\.bias", "backbone/patch_embed/bias"),
    (r"backbone\.(blocks\.\d+\.)?norm(\d?)\.weight", r"backbone/\1norm\2/scale"),
    (r"backbone\.(blocks\.\d+\.)?norm(\d?)\.bias", r"backbone/\1norm\2/bias"),
    (r"backbone\.blocks\.\d+\.attn\.qkv\.weight", "backbone/blocks/attention/qkv/kernel"),
    (r"backbone\.blocks\.\d+\.attn\.qkv\.bias", "backbone/blocks/attention/qkv/bias"),
    (r"backbone\.blocks\.\d+\.attn\.proj\.weight", "backbone/blocks/attention/out/kernel"),
    (r"backbone\.blocks\.\d+\.attn\.proj\.bias", "backbone/blocks/attention/out/bias"),
    (r"backbone\.blocks\.\d+\.mlp\.(fc\d)\.weight", r"backbone/blocks/mlp/\1/kernel"),
    (r"backbone\.blocks\.\d+\.mlp\.(fc\d)\.bias", r"backbone/blocks/mlp/\1/bias"),
)


def our_names(name: str) -> list[str]:
    found = [
        re.sub(f"^{theirs}$", ours, name) for theirs, ours in NAMES if re.fullmatch(theirs, name)
    ]
    assert len(found) == 1, (name, found)
    path = re.sub(r"blocks\.\d+\.", "blocks/", found[0]).replace("bbox_head", "box_head")
    if path.endswith("/*"):
        return [path.replace("*", part) for part in ("cls", "det", "grid")]
    return [path]


def shapes(*, mid: bool, scan: bool = True):
    config = common.get_config().model
    config.update({"width": 12, "heads": 3, "depth": 3, "mlp_width": 24, "scan": scan})
    config.position_grid, config.mid_position_grid = (4, 5), (4, 5) if mid else ()
    return jax.eval_shape(build.build_model(config, 5).init, jax.random.key(0))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("variant", ["nomid", "mid", "distilled", "dwr"])
def test_groups_are_the_original_s(variant, scan):
    groups = json.loads((GOLDENS / "optim_groups.json").read_text())[variant]
    expected = {
        path: (group["name"], group["weight_decay"] > 0)
        for group in groups
        for name in group["params"]
        for path in our_names(name)
    }
    table = optimizer.group_table(shapes(mid=variant != "nomid", scan=scan))
    assert {path: (rule.group, rule.decay) for path, rule in table.items()} == expected


def test_every_parameter_needs_exactly_one_rule():
    params = {"backbone": {"scale": 1, "mystery": 2}, "kernel": 3}
    with pytest.raises(ValueError, match=r"backbone/mystery .*none.*; kernel .*none"):
        optimizer.group_table(params)
    twice = (
        *parameter_groups.YOLOS_RULES,
        parameter_groups.Rule(".*/mystery|kernel|backbone/scale", "all", True),
    )
    with pytest.raises(ValueError, match=r"backbone/scale \(rules that match: .*bias.*mystery"):
        optimizer.group_table(params, twice)


def test_groups_are_described_with_counts():
    layer = {"kernel": np.ones((30, 40)), "bias": np.ones(40)}
    params = {"backbone": {"a": layer}, "box_head": {"b": np.ones(7)}}
    trainable, frozen = optimizer.partition(params, [r"backbone/a/bias"])
    text = optimizer.describe_groups(trainable, frozen, common.get_config().optimizer)
    assert [line.split()[:2] for line in text.splitlines()] == [
        ["backbone_decay", "1,200"],
        ["head", "7"],
        ["frozen", "40"],
    ]


def test_partition_and_merge():
    params = {"a": {"x": 1, "y": {"z": 2}}, "b": {"x": 3}}
    trainable, frozen = optimizer.partition(params, ["a/y/.*", "b/x"])
    assert trainable == {"a": {"x": 1}} and frozen == {"a": {"y": {"z": 2}}, "b": {"x": 3}}
    assert optimizer.merge(trainable, frozen) == params
    assert optimizer.partition(params, ()) == (params, {})
    for freeze, message in (
        (["a"], "'a' matches no parameter"),
        (["a/("], "no regular expression"),
        ([".*"], "nothing to train"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            optimizer.partition(params, freeze)


def settings(**changes):
    config = common.get_config().optimizer
    config.update(changes)
    return config


@pytest.mark.parametrize("clip", [0.0, 0.1, 1e-6, 100.0])
def test_steps_are_torch_s(clip):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)}
    start = {"backbone": {"fc": jax.tree.map(np.float32, start)}}
    config = settings(clip_norm=clip, weight_decay=0.3, b2=0.95)
    chain = optimizer.make_optimizer(config, start)
    theirs = {
        name: torch.nn.Parameter(torch.tensor(x)) for name, x in start["backbone"]["fc"].items()
    }
    torch_optimizer = torch.optim.AdamW(
        [{"params": [theirs["kernel"]]}, {"params": [theirs["bias"]], "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.3,
    )

    @jax.jit
    def step(params, state, gradients, lr):
        updates, state = chain.update(gradients, state, params)
        return optimizer.apply_updates(params, updates, lr), state

    params, state = start, chain.init(start)
    for number in range(10):
        size = 1e-6 * 10**number  # from far below to far above every threshold
        normal = {name: rng.normal(size=x.shape) for name, x in start["backbone"]["fc"].items()}
        gradients = {"backbone": {"fc": {name: np.float32(size * x) for name, x in normal.items()}}}
        lr = 0.01 * (number + 1)
        params, state = step(params, state, gradients, lr)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradients["backbone"]["fc"][name])
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
        for group in torch_optimizer.param_groups:
            group["lr"] = lr
        torch_optimizer.step()
        for name, parameter in theirs.items():
            ours = params["backbone"]["fc"][name]
            np.testing.assert_allclose(ours, parameter.detach(), rtol=1e-5, atol=1e-6)


def test_first_steps_have_the_length_of_the_learning_rate():
    gradients = {"a": jnp.array([2.0, -3.0])}
    adam = optimizer.scale_by_adam(0.9, 0.999, 1e-8)
    state = adam.init(gradients)
    for _ in range(3):  # a constant gradient: its mean over the root of its mean square
        updates, state = jax.jit(adam.update)(gradients, state)
        np.testing.assert_allclose(updates["a"], [1, -1], rtol=3e-7)
    assert int(state.count) == 3
    plain = optimizer.scale_by_adam(0.0, 0.0, 0.0)
    updates, _ = plain.update(gradients, plain.init(gradients))
    np.testing.assert_allclose(updates["a"], [1, -1], rtol=3e-7)


def test_moments_stay_where_gradients_are_not_finite():
    adam = optimizer.scale_by_adam(0.9, 0.999, 1e-8)
    _, state = adam.update({"a": jnp.array([2.0, -3.0])}, adam.init({"a": jnp.zeros(2)}))
    broken = {"a": jnp.array([jnp.nan, 1.0])}
    _, after = jax.jit(adam.update)(broken, state, finite=jnp.array(False))
    jax.tree.map(np.testing.assert_array_equal, after, state)
    _, after = jax.jit(adam.update)(broken, state, finite=jnp.array(True))
    assert int(after.count) == 2 and np.isnan(after.mu["a"][0])


def test_clipping_leaves_short_gradients_alone():
    clip = optimizer.clip_by_global_norm(5.0)
    for gradient, expected in (([3.0, 4.0], 1 / (1 + 2e-7)), ([0.3, 0.4], 1), ([30, 40], 0.1)):
        gradients = {"a": jnp.array(gradient)}
        result, _ = clip.update(gradients, clip.init(gradients))
        np.testing.assert_allclose(result["a"], np.array(gradient) * expected, rtol=3e-7)


def test_average_of_parameters_by_hand():
    average = optimizer.update_ema({"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, 2.0])}, 0.9)
    np.testing.assert_allclose(average["a"], [1.2, 2.0], rtol=1e-6)


@pytest.mark.parametrize("case", ["warmupcos_w0", "warmupcos_w5", "step", "warmupcos_tiny300"])
def test_published_schedules_are_the_original_s(case):
    golden = json.loads((GOLDENS / "optim_lr.json").read_text())[case]
    arguments = dict(golden["args"])
    epochs = arguments.pop("epochs")
    name = {"warmupcos": "published", "step": "published_step"}[arguments.pop("sched")]
    config = settings(schedule=name, **arguments)
    schedule = make_schedule(config, steps_per_epoch=7, total_steps=7 * epochs, epochs=epochs)
    for place in (0, 6):  # first and last step of an epoch
        rates = [schedule(7 * epoch + place) for epoch in range(epochs)]
        np.testing.assert_allclose(rates, golden["lr_during_epoch"], rtol=1e-12)


def test_cosine_is_optax_s_and_ends_at_its_least():
    config = settings(schedule="cosine", lr=2e-3, min_lr=1e-5, warmup_steps=10)
    schedule = make_schedule(config, steps_per_epoch=9, total_steps=110, epochs=12)
    assert schedule(0) == 0 and schedule(5) == 1e-3 and schedule(10) == 2e-3
    assert math.isclose(schedule(60), (2e-3 + 1e-5) / 2)
    assert math.isclose(schedule(110), 1e-5) and math.isclose(schedule(500), 1e-5)
    reference = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 10, 110, 1e-5)
    for step in range(0, 110, 7):
        assert math.isclose(schedule(step), float(reference(step)), rel_tol=1e-5, abs_tol=1e-9)


def test_schedules_that_make_no_sense():
    arguments = {"steps_per_epoch": 1, "total_steps": 1, "epochs": 1}
    with pytest.raises(ValueError, match="'linear'; expected 'published'"):
        make_schedule(settings(schedule="linear"), **arguments)
    with pytest.raises(ValueError, match="lr_drop is 0"):
        make_schedule(settings(schedule="published_step", lr_drop=0), **arguments)
