"""The step is the algorithm: same losses and gradients however it is cut up."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import (
    BATCHES,
    BUCKET,
    CLASSES,
    LR,
    QUERIES,
    TARGETS,
    WIDE,
    host_copy,
    losses_of,
    make_batch,
    make_config,
    make_step,
    mesh_of,
    parts_of,
    run,
    start,
    without,
)
from yolos_jax import losses, matching, step
from yolos_jax import mesh as mesh_lib
from yolos_jax import optimizer as optimizer_lib
from yolos_jax.batch import normalise
from yolos_jax.models.build import build_model
from yolos_jax.predict_step import PredictStep

FROZEN = "backbone/.*"  # nothing to differentiate there: compiles faster


@pytest.fixture(scope="module")
def single():
    """The step of one device that most tests share: compiled once."""
    mesh = mesh_of(1)
    return make_step(mesh), mesh


@pytest.fixture(scope="module")
def accumulating():
    """Likewise, for batches in four parts."""
    mesh = mesh_of(1)
    return make_step(mesh), mesh


@pytest.fixture(scope="module")
def reference(single):
    return run(*single)


def assert_same_run(got, reference):
    """Same losses; parameters as far as Adam, which normalises noise where a gradient is 0."""
    (state, history), (expected_state, expected) = got, reference
    np.testing.assert_allclose(losses_of(history), losses_of(expected), rtol=1e-5)
    for name in expected[0]:
        values, wanted = ([metrics[name] for metrics in run] for run in (history, expected))
        np.testing.assert_allclose(values, wanted, rtol=1e-4, atol=1e-6, err_msg=name)
    for a, b in zip(*map(jax.tree.leaves, (state.params, expected_state.params)), strict=True):
        np.testing.assert_allclose(a, b, atol=LR * len(BATCHES))
        assert np.mean(np.abs(a - b)) < 0.01 * LR


def assert_unchanged_but_counted(after, before):
    assert after.step == before.step + 1
    for name in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))


def whole_loss(params, host, config):
    """The loss in one piece: model, matching, criterion."""
    model = build_model(config.model, CLASSES)
    patches = normalise(host.batch.patches, config.preprocess.mean, config.preprocess.std)
    batch = host.batch._replace(patches=patches)
    outputs = model.apply(params, batch, bounds=(BUCKET.rows, BUCKET.cols))
    weights = matching.MatcherWeights(1.0, 5.0, 2.0)
    cost = matching.costs(jax.lax.stop_gradient(outputs), host.targets, weights)
    matched_query, _ = matching.assign_device(cost, host.targets.target_valid)
    norms = losses.normalisers(
        host.targets, host.batch.image_valid, num_queries=QUERIES, eos_coef=0.1,
        class_loss_group=2, reference_processes=8,
    )  # fmt: skip
    return losses.set_criterion(
        outputs, host.targets, matched_query, host.batch.image_valid,
        losses.LossWeights(1.0, 5.0, 2.0, 0.1), norms,
    )[0]  # fmt: skip


def test_gradients_are_those_of_the_whole_loss_and_parameters_do_not_travel(accumulating):
    train_step, mesh = accumulating
    host = BATCHES[1]
    programs = train_step.compile(step.StepShape(host.bucket, 8, TARGETS, 4))
    state, gradients, loss = start(train_step), programs["zeros"](), 0.0
    for part in parts_of(host, mesh, 4):
        forward = programs["forward"](state.params, state.step, part)
        matched_query = train_step.match(forward, part.targets)
        gradients, metrics = programs["accumulate"](
            gradients, state.params, part, forward, matched_query
        )
        loss += float(metrics["loss"])
        for residual in forward.residuals:
            for leaf in jax.tree.leaves(state.params):
                # Whole, of all blocks but the last, or of that one.
                for part in (leaf, leaf[:-1], leaf[-1]):
                    assert residual.shape != part.shape or not np.array_equal(residual, part)
        residual_bytes = sum(leaf.nbytes for leaf in forward.residuals)
        assert train_step.residual_bytes() == {host.bucket: residual_bytes}

    arrays = jax.tree.map(jnp.asarray, host._replace(bucket=None, unreadable=None))
    value_and_grad = jax.value_and_grad(functools.partial(whole_loss, config=train_step.config))
    expected_loss, expected = jax.jit(value_and_grad)(state.params, arrays)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * largest), gradients, expected
    )


def test_two_programs_per_bucket_and_no_callbacks(single, reference):
    train_step, mesh = single
    run(train_step, mesh, batches=[make_batch(9)])
    assert train_step.programs() == {"forward": 1, "update": 1}
    programs = train_step.compile(step.StepShape(BUCKET, 8, TARGETS))
    for program in programs.values():
        assert "callback" not in program.compiled.as_text()
    assert train_step.programs() == {"forward": 1, "update": 1}


@pytest.mark.parametrize(
    ("devices", "fsdp"),
    [
        (8, 2),
        pytest.param(4, 1, marks=pytest.mark.slow),
        pytest.param(4, 2, marks=pytest.mark.slow),
        pytest.param(8, 1, marks=pytest.mark.slow),
    ],
)
def test_devices_do_not_change_the_run(devices, fsdp, reference, monkeypatch):
    monkeypatch.setattr(mesh_lib, "SHARDED_FROM", 256)  # The model is small.
    mesh = mesh_of(devices, fsdp)
    train_step = make_step(mesh)
    kernel = train_step.shardings.params["backbone"]["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.is_fully_replicated == (fsdp == 1)
    assert_same_run(run(train_step, mesh), reference)
    assert train_step.programs() == {"forward": 1, "update": 1}
    state = start(train_step)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == train_step.shardings


def test_microbatches_do_not_change_the_run(accumulating, reference):
    train_step, mesh = accumulating
    state, history = run(train_step, mesh, microbatches=4)
    np.testing.assert_allclose(losses_of(history), losses_of(reference[1]), rtol=1e-6)
    assert_same_run((state, history), reference)
    once_per_bucket = {"forward": 1, "accumulate": 1}
    assert train_step.programs() == once_per_bucket | {"zeros": 1, "apply": 1}


@pytest.mark.slow
def test_a_second_bucket_costs_two_programs(single):
    train_step, mesh = single
    batches = [make_batch(0), make_batch(1, bucket=WIDE), make_batch(2), make_batch(3, bucket=WIDE)]
    _, history = run(train_step, mesh, batches=batches)
    assert np.isfinite(losses_of(history)).all()
    assert train_step.programs() == {"forward": 2, "update": 2}
    assert set(train_step.residual_bytes()) == {BUCKET, WIDE}


def test_matching_on_the_device_freezing_and_averaging(reference):
    config = make_config(
        **{"matcher.where": "device", "optimizer.ema_decay": 0.9, "optimizer.freeze": (FROZEN,)}
    )
    mesh = mesh_of(1)
    train_step = make_step(mesh, config)
    before = host_copy(start(train_step))
    state, history = run(train_step, mesh, batches=BATCHES[:1])
    # The first loss is that of the host's matching of all parameters.
    np.testing.assert_allclose(history[0]["loss"], reference[1][0]["loss"], rtol=1e-6)
    frozen, trained = (set(), set())
    for path, old, new in zip(
        optimizer_lib.paths(before.params),
        *map(jax.tree.leaves, (before.params, state.params)),
        strict=True,
    ):
        (frozen if np.array_equal(old, new) else trained).add(path)
    assert frozen == {path for path in frozen | trained if path.startswith("backbone/")}
    assert frozen and trained
    assert not any("backbone" in path for path in optimizer_lib.paths(state.opt_state))
    jax.tree.map(
        lambda average, old, new: np.testing.assert_allclose(
            average, 0.9 * old + 0.1 * new, rtol=1e-5, atol=1e-7
        ),
        state.ema, before.params, state.params,
    )  # fmt: skip


def test_a_batch_without_boxes_is_trained_on(single):
    state, history = run(*single, batches=[make_batch(4, boxes=False)])
    (metrics,) = history
    assert metrics["num_boxes"] == 0 and metrics["images"] == 8 and metrics["finite"]
    assert metrics["loss_bbox"] == metrics["loss_giou"] == 0 < metrics["loss_ce"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_a_batch_without_readable_pictures_has_no_loss(single):
    state, history = run(*single, batches=[without(make_batch(4), slice(None))])
    (metrics,) = history
    assert metrics["images"] == metrics["num_boxes"] == metrics["loss"] == 0
    assert metrics["grad_norm"] == 0 and metrics["finite"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_unreadable_pictures_do_not_count(single):
    host = without(make_batch(6), [1, 4])
    noise = np.random.default_rng(0).integers(0, 256, host.batch.patches.shape).astype(np.uint8)
    spoilt = np.where(host.batch.image_valid[:, None, None], host.batch.patches, noise)
    other = host._replace(batch=host.batch._replace(patches=spoilt))
    state, history = run(*single, batches=[host])
    other_state, other_history = run(*single, batches=[other])
    assert history == other_history and history[0]["images"] == 6
    jax.tree.map(np.testing.assert_array_equal, state, other_state)


@pytest.mark.parametrize("where", ["box_head", "backbone"])
def test_a_step_that_is_not_finite_is_skipped(single, where):
    train_step, mesh = single
    state, _ = run(train_step, mesh, batches=BATCHES[:1])
    jax.tree.leaves(state.params[where])[0][:] = np.nan
    state = jax.tree.map(mesh_lib.put_whole, state, train_step.shardings)
    before = host_copy(state)
    after, history = run(train_step, mesh, batches=BATCHES[:1], state=state)
    assert not history[0]["finite"] and history[0]["nonfinite_costs"] > 0
    assert_unchanged_but_counted(after, before)


def test_predictions_come_in_pixels_and_rows_keep_their_places(single):
    mesh = mesh_of(8)
    config = make_config()
    model = build_model(config.model, CLASSES, mesh)
    predict = PredictStep(model, mesh, config.preprocess)
    host = make_batch(3)
    params = host_copy(start(single[0]).params)
    params = jax.tree.map(lambda leaf: mesh_lib.put_whole(leaf, mesh_lib.replicated(mesh)), params)
    batch, size = mesh_lib.put_batch((host.batch, host.original_size), mesh)
    found = mesh_lib.gather_rows(predict(params, batch, size, BUCKET))
    turned = jax.tree.map(lambda array: array[::-1], (host.batch, 2 * host.original_size))
    batch, size = mesh_lib.put_batch(turned, mesh)
    again = mesh_lib.gather_rows(predict(params, batch, size, BUCKET))
    np.testing.assert_allclose(again.scores[::-1], found.scores, atol=1e-6)
    np.testing.assert_allclose(again.boxes_xyxy_px[::-1], 2 * found.boxes_xyxy_px, atol=1e-4)
    assert found.scores.shape == (8, QUERIES) and predict.programs() == {"predict": 1}


def test_unknown_matcher_is_refused():
    with pytest.raises(ValueError, match=r"matcher\.where is 'moon': not 'host' or 'device'"):
        make_step(mesh_of(1), make_config(**{"matcher.where": "moon"}))
