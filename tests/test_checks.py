"""Values that no run can have are refused, all at once and by name."""

from __future__ import annotations

import pytest

from configs import shapes
from yolos_jax import checks


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("epochs", 0, "epochs=0"),
        ("microbatches", 3, "batch_size=32: expected a multiple of microbatches=3"),
        ("data.root", "", "data.root=''"),
        ("data.on_error", "ignore", "'raise' or 'skip'"),
        ("data.max_bad_fraction", 2.0, "0 to 1"),
        ("loss.class_loss_group", 48, "divisor of the 32 images"),
        ("matcher.where", "gpu", "'host' or 'device'"),
        ("optimizer.lr", 0.0, "more than 0"),
        ("optimizer.ema_decay", 1.0, "less than 1"),
        ("optimizer.clip_norm", -1.0, "0 or more"),
        ("optimizer.lr", float("inf"), "a finite number"),
        ("optimizer.b1", 1.5, "0 to less than 1"),
        ("loss.eos_coef", -1.0, "0 or more"),
        ("optimizer.eps", 0.0, "more than 0"),  # an update of 0 / 0 where a gradient is 0
        ("matcher.giou_cost", -2.0, "0 or more"),
        ("seed", 2**63, "below 2"),
        ("preprocess.mean", (0.5,), "three numbers"),
        ("preprocess.mean", (123.0, 116.0, 103.0), "from 0 to 1"),
        ("preprocess.std", (0.2, 0.0, 0.2), "above 0"),
        ("preprocess.std", ("a", "b", "c"), "three numbers"),
        ("preprocess.size", 65, "no more than preprocess.max_size=64"),
        ("augment.scales", (64, 72), "no more than augment.max_size=64"),
        ("augment.max_size", -5, "0 or more"),
        ("model.heads", -2, "at least 1"),
        ("model.num_queries", 0, "at least 1"),
        ("model.position_grid", (8,), "rows, columns"),
        ("model.mid_position_grid", (8.5, 8), "rows, columns"),
        ("optimizer.freeze", (1,), "regular expressions"),
        ("mesh.stopped_code", 256, "an exit code, 0 to 255"),
        ("model.position_grid", (0, 8), "rows, columns"),
        ("model.mid_position_grid", (8,), "rows, columns"),
        ("model.layer_norm_eps", -1.0, "more than 0"),
    ],
)
def test_what_no_run_can_have_is_named(key, value, message):
    config = shapes.get_config()
    config.data.root = "here"
    checks.check_values(config)
    section, _, name = key.rpartition(".")
    (config[section] if section else config)[name] = value
    with pytest.raises(ValueError, match=message):
        checks.check_values(config)


def test_all_mistakes_are_named_at_once():
    config = shapes.get_config()
    config.epochs = 0
    config.log.every_steps = 0
    with pytest.raises(ValueError) as error:
        checks.check_values(config)
    assert all(key in str(error.value) for key in ("epochs", "log.every_steps", "data.root"))


@pytest.mark.parametrize(("section", "kind"), [("loss", "weight"), ("matcher", "cost")])
def test_one_of_the_losses_and_of_the_costs_must_count(section, kind):
    config = shapes.get_config()
    config.data.root = "here"
    config[section][f"class_{kind}"] = config[section][f"l1_{kind}"] = 0.0
    checks.check_values(config)
    config[section][f"giou_{kind}"] = 0.0
    with pytest.raises(ValueError, match=rf"{section}.class_{kind}=0.0: .* or one of l1_{kind}"):
        checks.check_values(config)


def test_no_limit_of_the_longer_side_is_0():
    config = shapes.get_config()
    config.data.root = "here"
    config.preprocess.size, config.augment.scales = 512, (512,)
    config.preprocess.max_size = config.augment.max_size = 0
    checks.check_values(config)
