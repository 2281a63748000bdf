"""The command for a card, without one: its order, its checks, and what there is room for."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import (
    gpu,
    gpu_cases,
    gpu_checks,
    gpu_room,
    gpu_tables,
    ours,
    report,
    two_programs,
)

ROOT = Path(__file__).resolve().parent.parent


def results_of_a_card():
    def row(kind, side, **values):
        return {"row": kind, "side": side, "model": "s", **values}

    speed = {"what": "equal", "images": 8, "loss": 5.0, "grad_norm": 2.0}
    return [
        row("train", "ours", **speed, images_per_s=30.0, mfu=0.3, peak_bytes=None),
        row("train", "theirs", **speed, images_per_s=20.0, form="compiled", peak_bytes=None),
        row("train", "ours", what="mix", images=8, images_per_s=44.0, mfu=0.25),
        *(
            row(
                "memory", side, remat=remat, images=images, peak_bytes=base + slope * images * 2**30
            )
            for side, remat, base, slope in (
                ("ours", "default", 500, 1),
                ("ours", "none", 500, 2),
                ("theirs", "none", 900, 4),
            )
            for images in (4, 8)
        ),
    ]


def test_tables_of_a_card():
    tables, failures = gpu_tables.summary(results_of_a_card())
    found = {title: rows for title, rows, _ in tables}
    equal, mixed = found["Training step, images per second"]
    assert equal["ratio"] == 1.5 and equal["their_mfu"] == pytest.approx(0.2)
    assert mixed["our_rate"] == 44 and mixed["ratio"] is None
    memory = {(row["ours"], row["theirs"]): row for row in found["Memory of one more image in a "
                                                                "training step"]}  # fmt: skip
    assert memory["none", "none"]["ratio"] == 0.5 and memory["default", "none"]["ratio"] == 0.25
    assert memory["full", "full"]["ratio"] is None
    assert not failures
    for title, rows, columns in tables:
        assert len(report.table(rows, columns).splitlines()) == 1 + len(rows), title


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("loss", 5.02, ""),
        ("loss", 5.03, "loss of s: ours 5.0000, theirs 5.0300"),
        ("loss", float("nan"), "loss of s is nan: theirs"),
        ("grad_norm", 1.95, ""),
        ("grad_norm", 2.1, "grad_norm of s: ours 2.0000, theirs 2.1000"),
    ],
)
def test_a_card_that_computes_something_else_is_found_out(key, value, said):
    results = results_of_a_card()
    results[1][key] = value
    assert (gpu_checks.differences(results) or [""])[0] == said
    if np.isfinite(value):  # another number of images has another loss
        results[1]["images"] = 4
        assert not gpu_checks.differences(results)


def test_images_are_as_many_as_there_is_room_for(monkeypatch):
    train_step = ours.make_train_step(ours.recipe("ti", tiny=True, dtype="float32"))
    state = train_step.abstract_state
    fixed = two_programs.bytes_of(state) + two_programs.bytes_of(state.params)
    each = gpu_room.BESIDES * gpu_room.residual_bytes(train_step, (4, 6))
    # At least every block's input and its products' inputs, float32, of 125 tokens.
    assert each > train_step.config.model.depth * 125 * 4 * (48 * 4 + 96)

    def fitting(room):
        monkeypatch.setattr(gpu_room, "room", lambda: room)
        return gpu_room.fitting(train_step, (4, 6), 32)

    assert fitting(None) == 32 and fitting(int(fixed + 33 * each)) == 32
    assert fitting(int(fixed + 31 * each)) == 16 and fitting(1) == 1


def test_memory_that_runs_out_means_fewer_images():
    def attempt(images):
        if images > 8:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        yield {"images": images}
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: later")

    rows = gpu_room.with_fewer(attempt, 32)
    assert next(rows) == {"images": 8}
    with pytest.raises(jax.errors.JaxRuntimeError, match="later"):
        next(rows)

    def other(images):
        raise jax.errors.JaxRuntimeError("INTERNAL")
        yield

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        next(gpu_room.with_fewer(other, 32))


def boxes(**values):
    common = {"row": "forward", "model": "s", "what": "batch 1"}
    one = {"boxes": np.zeros((10, 4)).tolist(), "all_boxes": np.zeros((2, 100, 4)).tolist()}
    return [{**common, **one, "side": "ours"}, {**common, **one, **values, "side": "theirs"}]


def test_boxes_of_both_sides_are_held_against_each_other():
    assert not gpu_checks.differences(boxes())
    one_off = np.zeros((10, 4))
    one_off[3, 2] = 0.02
    (found,) = gpu_checks.differences(boxes(boxes=one_off.tolist()))
    assert "boxes of s, batch 1: 0.0200 apart (most" in found
    # Every box a little: no single one is far away.
    (found,) = gpu_checks.differences(boxes(all_boxes=np.full((2, 100, 4), 0.005).tolist()))
    assert "0.0050 apart (mean" in found
    assert gpu_checks.differences(boxes(boxes=np.full((10, 4), np.nan).tolist()))
    other = {"what": "batch 1, CUDA graph", "against": "batch 1", "boxes": one_off.tolist()}
    assert gpu_checks.differences(boxes(**other))  # another way to run theirs, the same of ours


def test_only_the_fused_attention_passes_on_a_card():
    row = {"side": "ours", "model": "s", "platform": "gpu", "dtype": "bfloat16", "tokens": 4352}
    assert not gpu_checks.wrong_attention({**row, "attention": "cudnn"})
    assert "'chunked' on a GPU" in gpu_checks.wrong_attention({**row, "attention": "chunked"})
    others = ({"platform": "cpu"}, {"dtype": "float32"}, {"tokens": 128})
    assert not any(
        gpu_checks.wrong_attention({**row, "attention": "chunked", **other}) for other in others
    )
    results = [{**results_of_a_card()[0], **row, "attention": "chunked"}]
    assert gpu_tables.summary(results)[1]


def options_of(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    return gpu.read_options()


def test_cases_of_a_card_are_calls_that_exist(monkeypatch):
    found = gpu_cases.cases(options_of(monkeypatch, "--images", "s=128"), lock="path")
    for case in found:
        module, _, function = case.target.partition(":")
        body = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text()).body
        (node,) = [each for each in body if getattr(each, "name", "") == function]
        assert {argument.arg for argument in node.args.args} == set(case.arguments), case.name
    assert {case.part for case in found} == set(gpu_cases.PARTS)
    images = {case.model: case.arguments["images"] for case in found if case.part == "train"}
    assert images == {"s": 128, "b": 48, "ti": 384}
    for wrong in (("--images", "l=1"), ("--rows", "trian"), ("--sides", "mine")):
        with pytest.raises(SystemExit):
            options_of(monkeypatch, *wrong)


def test_what_is_cut_first_is_worth_least(monkeypatch):
    found = gpu_cases.cases(options_of(monkeypatch), lock="path")
    for side in ("ours", "theirs"):
        order = [(case.part, case.model) for case in found if case.side == side]
        assert order[:3] == [("train", "s"), ("train", "b"), ("forward", "s")]
        assert order[-1][1] == "ti" and order.index(("mix", "s")) < order.index(("memory", "s"))
    forms = [case.arguments["form"] for case in found if case.part == "programs"]
    assert set(forms) == {"device", "one"}  # 'host' comes out of the training step's process
    alone = gpu_cases.cases(options_of(monkeypatch, "--rows", "programs,idle"), lock="path")
    assert {case.arguments.get("form") for case in alone} == {"host", "device", "one", None}
    assert [c.arguments["microbatches"] for c in alone if c.part == "idle"] == [1, 2]
