"""Planning for slices: the arithmetic, and what is read from compiled programs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from benchmarks import forecast, planned, scale, slices
from tests.tiny import BUCKET, CLASSES, TARGETS, make_config, mesh_of
from yolos_jax import step
from yolos_jax.data.plan import Recipe, make_plan

V5E = slices.CHIPS["v5e"]
REDUCE = {
    "kind": "all-reduce", "arrays": [["f32", [25, 1000, 1000]]], "bytes": 10**8, "group": 0,
    "asynchronous": False, "in_loop": True, "times": 3, "source": "",
}  # fmt: skip


def test_slices_have_names_and_links():
    assert slices.topology("v5p", 64) == "v5p:4x4x4"
    with pytest.raises(ValueError, match=r"a slice of 7 v5e chips; expected one of 8, 64, 256"):
        slices.topology("v5e", 7)
    with pytest.raises(ValueError, match=r"the chip is 'v9'; expected one of v5e, v5p, v6e"):
        slices.topology("v9", 8)
    # 400 GB/s both ways over four links. Only sixteen in a row close to a ring.
    assert slices.group_bandwidth(V5E, 256, 256) == 200e9
    assert slices.group_bandwidth(V5E, 64, 64) == 100e9
    assert slices.group_bandwidth(V5E, 64, 8) == 50e9
    assert slices.link_bandwidth(V5E, 8) == 50e9
    assert slices.hops(V5E, 256) == 16 and slices.hops(V5E, 8) == 4
    # 4 x 8 x 8: every axis is a ring.
    assert slices.group_bandwidth(slices.CHIPS["v5p"], 256, 256) == 600e9


def test_work_by_hand():
    model = ConfigDict(
        dict(patch_size=2, width=4, depth=2, heads=1, mlp_width=8, num_queries=1,
             position_grid=(2, 3), mid_position_grid=(), remat="default")
    )  # fmt: skip
    embed = 2 * 6 * 12 * 4
    # T = 8: all tokens through the first block, two through the last, keys and values of all.
    linear = 2 * 8 * 4 * 4 * (4 + 4) + 2 * 8 * 4 * 4 * 2 + 2 * 2 * 4 * 4 * (2 + 4)
    product = 2 * 8 * 8 * 4 + 2 * 2 * 8 * 4
    positions = 2 * 4 * (2 * 2 * 3 + 2 * 3 * 3)
    work = forecast.work(model, 2, (6, 2, 3), systolic=8)
    # Heads of 4 fill half of 8.
    assert work.forward == embed + linear + 4 * product + 6 * positions
    again = linear - 2 * (8 + 2) * 4 * 8  # not the second layer of an MLP
    assert work.update == embed + 2 * linear + again + 14 * product + 6 * positions
    heads = 2 * 4 * (16 + 2 + 5)
    assert work.model == 3 * (embed + linear + 2 * product + heads)
    model.mid_position_grid = (2, 3)  # one more table
    assert forecast.work(model, 2, (6, 2, 3), 8).update == work.update + 6 * positions
    model.remat = "none"
    without = work.update + 6 * positions - again
    assert forecast.work(model, 2, (6, 2, 3), 8).update == without


def test_collectives_take_bytes_over_bandwidth_and_hops():
    once = 2 * 1e8 * 7 / 8 / 100e9 + 2 * 4e-6
    assert forecast.collective_seconds(REDUCE, V5E, 8) == pytest.approx(3 * once)
    gather = REDUCE | {"kind": "all-gather", "group": 4, "times": 1}
    assert forecast.collective_seconds(gather, V5E, 8) == pytest.approx(0.75e8 / 50e9 + 4e-6)
    permute = REDUCE | {"kind": "collective-permute", "times": 1}
    assert forecast.collective_seconds(permute, V5E, 8) == pytest.approx(1e8 / 50e9 + 1e-6)


def test_a_program_needs_its_parts_or_its_peak():
    program = {"argument": 10, "output": 7, "alias": 6, "temp": 5, "generated_code": 2}
    assert forecast.peak(program | {"peak": 15}) == 18
    assert forecast.peak(program | {"peak": 20}) == 22


def test_asynchronous_collectives_hide_behind_computing():
    work = forecast.Work(forward=V5E.flops * 1e-3, update=V5E.flops * 2e-3, model=0)
    program = {"argument": 1, "output": 1, "temp": 1, "collectives": []}
    beside = REDUCE | {"asynchronous": True}
    lasting = forecast.collective_seconds(REDUCE, V5E, 8)

    def seconds(*collectives):
        programs = {"forward": program, "update": program | {"collectives": collectives}}
        return forecast.step_seconds(programs, work, 1, V5E, 8)

    assert seconds().efficiency == 1 and seconds().step == pytest.approx(3e-3)
    alone = seconds(REDUCE)
    assert alone.step == pytest.approx(3e-3 + lasting)
    assert alone.efficiency == pytest.approx(3e-3 / (3e-3 + lasting))
    assert seconds(beside).exposed == pytest.approx(lasting - 2e-3)
    slow = {"forward": program, "update": program | {"temp": 819e9}}  # written and read again
    assert forecast.step_seconds(slow, work, 1, V5E, 8).step == pytest.approx(1e-3 + 2)


@pytest.mark.parametrize("first", [1, 7, 100])
@pytest.mark.parametrize("most", [0, 1, 12, 57])
def test_the_most_images_that_fit(first, most):
    asked = []

    def need(images):
        asked.append(images)
        return None if images > 2 * most + 40 else 1000 + 100 * images + images**2 // 50

    limit = 1000 + 100 * most + most**2 // 50 + 60
    assert forecast.largest(need, limit, first, tries=12) == most
    assert len(asked) == len(set(asked)) <= 8


@pytest.mark.parametrize(
    ("first", "known"),
    [(28, {28: 1497, 29: 1488}), (24, {24: 1419, 26: 1423})],  # of B on v5e, in hundredths of GiB
)
def test_needs_that_hardly_grow_or_fall_do_not_mislead_the_search(first, known):
    asked = []

    def need(images):
        asked.append(images)
        return known.get(images, 1330 + 7 * images) if images < 60 else None

    found = forecast.largest(need, 1575, first)
    assert found >= 29 and need(found) <= 1575
    assert max(asked) <= 2 * max(known)


def test_facts_of_a_compiled_step_and_their_report(tmp_path, capsys, monkeypatch):
    config, mesh = make_config(), mesh_of(8)
    found = planned.describe(config, mesh, step.StepShape(BUCKET, 16, TARGETS), CLASSES)
    forward, update = found["programs"]["forward"], found["programs"]["update"]
    assert found["batch_bytes"] == 2 * 12 * 192  # two images a device
    # Parameters come back, with both moments; whatever else comes back is small.
    assert found["state_bytes"] > 2.9 * found["params_bytes"]
    assert update["output"] >= found["state_bytes"] and forward["output"] > found["residual_bytes"]
    assert min(forward["peak"], update["peak"]) > 0
    assert forecast.memory(found) == found["batch_bytes"] + max(
        forecast.peak(forward) + found["state_bytes"] - found["params_bytes"],
        forecast.peak(update),
    )
    kinds = {one["kind"] for one in update["collectives"]}
    assert kinds == {"all-reduce"}

    # Of a case that was compiled before, the command says all this, and that it does not fit.
    case = planned.Case("v5e", 8, "yolos_ti", 1, 2)
    monkeypatch.setattr(planned, "slice_mesh", lambda *_: mesh)
    monkeypatch.setattr(planned, "longest", lambda _: (BUCKET, TARGETS))
    monkeypatch.setattr(planned, "read_recipe", lambda _: config)
    monkeypatch.setattr(planned, "describe", lambda *_: found)
    row = scale.examine(case, tmp_path)
    printed = capsys.readouterr().out
    assert "yolos_ti on v5e:2x4, fsdp 1, 2 images per chip" in printed
    assert "x all-reduce, synchronous, over 8 chips, in a loop" in printed
    assert 0 < row["efficiency"] < 1 and "error" not in row
    monkeypatch.setattr(planned, "describe", None)  # The second time nothing is compiled.
    small = slices.CHIPS | {"v5e": V5E._replace(memory=1000)}
    monkeypatch.setattr(slices, "CHIPS", small)
    assert scale.examine(case, tmp_path)["error"] == "needs 0.00 GiB of 0.00 GiB"

    # Where jax cannot read what the compiler wrote, nothing is said of collectives.
    unread = {kind: program | {"unread": "INTERNAL"} for kind, program in found["programs"].items()}
    monkeypatch.setattr(scale, "facts", lambda *_: found | {"programs": unread})
    capsys.readouterr()
    row = scale.examine(case, tmp_path)
    printed = capsys.readouterr().out + scale.table([row])
    assert "collectives are not known: INTERNAL" in printed and "all-reduce" not in printed
    assert "collectives not counted, model" in printed and "0.0 ms         -" not in printed
    assert printed.endswith(f"{'-':>9s} {'-':>10s}")
    assert scale.table([row]).count("\n") == 2


def canned(case, cache, memory=2**30):
    """What the compiler might say of a case: a gibibyte of temporaries per image."""
    program = {
        "argument": 0, "output": 0, "alias": 0, "temp": 0, "generated_code": 0, "seconds": 1.0,
        "peak": memory * case.images, "collectives": [REDUCE], "unread": "",
    }  # fmt: skip
    sizes = dict.fromkeys(("params_bytes", "state_bytes", "batch_bytes", "residual_bytes"), 0)
    programs = {"forward": program, "update": program}
    return {"programs": programs, "bucket": [2459, 63, 63], "seconds": 2.0, **sizes}


@pytest.fixture
def environment(monkeypatch):
    """The command sets variables for its own process, which here is that of all tests."""
    monkeypatch.setattr(scale, "ENVIRONMENT", {})


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(("images", "code"), [(15, 0), (16, 1)])
def test_the_command_fails_when_a_case_does_not_fit(images, code, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "libtpu", SimpleNamespace())
    monkeypatch.setattr(scale, "facts", canned)
    out = tmp_path / "out.json"
    command = ["scale", "--chips", "v5e", "--sizes", "8", "64", "--recipes", "yolos_ti"]
    monkeypatch.setattr(sys, "argv", [*command, "--images", str(images), "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        scale.main()
    assert ended.value.code == code
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"] for row in rows] == [
        dataclasses.asdict(planned.Case("v5e", chips, "yolos_ti", 1, images)) for chips in (8, 64)
    ]
    error = "does not fit: yolos_ti on v5e:8x8, fsdp 1, 16 images per chip: needs 16.00 GiB of 15.7"
    assert (error in capsys.readouterr().err) == bool(code)


@pytest.mark.usefixtures("environment")
def test_the_search_makes_the_table_of_the_documentation(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "libtpu", SimpleNamespace())
    monkeypatch.setattr(scale, "facts", canned)
    monkeypatch.setattr(sys, "argv", ["scale", "--largest", "--chips", "v5e", "v6e"])
    with pytest.raises(SystemExit) as ended:
        scale.main()
    assert ended.value.code == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| yolos")]
    assert len(table) == 8  # B also with fsdp 8
    row = "| yolos_s | v5e | 1 | 15 | 15.00 GiB of 15.75 GiB | 120, 960, 3,840 |"
    assert table[2] == row
    assert table[1].startswith("| yolos_ti | v6e | 1 | 31 |")


def test_without_any_choice_representative_cases_are_compiled():
    assert scale.cases(arguments()) == list(scale.CHOICE)
    assert {case.chip for case in scale.CHOICE} == set(slices.TPUS)
    assert {case.recipe for case in scale.CHOICE} == set(scale.RECIPES)
    assert scale.cases(arguments(quick=True)) == [scale.CHOICE[0]]
    assert len(scale.cases(arguments(all=True))) == 3 * 3 * 3 * 2
    # A slice has no more than its own sizes, and no more chips share parameters than there are.
    found = scale.cases(arguments(all=True, chips=["h200"], recipes=["yolos_s"]))
    assert [(case.chips, case.fsdp) for case in found] == [(1, 1), (8, 1), (8, 8)]


def arguments(**given):
    empty = dict(quick=False, all=False, chips=None, sizes=None, recipes=None, fsdp=None, images=0)
    return SimpleNamespace(**(empty | given))


def test_the_longest_bucket_takes_every_picture_of_the_recipe():
    bucket, max_boxes = planned.longest("yolos_ti")
    config = planned.read_recipe("yolos_ti")
    index = planned.coco_like(2000, 14_000, seed=3)
    plan = make_plan(
        index,
        Recipe.from_config(config, config.model.patch_size),
        (bucket,),
        seed=0,
        epoch=0,
        batch_size=8,
    )
    assert (plan.grid.prod(axis=-1) <= bucket.patches).all() and plan.max_boxes <= max_boxes
    assert (1 + config.model.num_queries + bucket.patches) % config.buckets.multiple == 0


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install -e '.[scale]'"
)
def test_a_tiny_model_compiles_for_a_slice_that_is_not_here():
    program = (
        "import jax; from benchmarks import planned; from tests import tiny; "
        "from yolos_jax import step; "
        "config = tiny.make_config(**{'model.dtype': 'bfloat16', 'model.attention': 'splash'}); "
        "mesh = planned.slice_mesh('v5e', 8, 2); "
        "found = planned.describe(config, mesh, step.StepShape(tiny.BUCKET, 8, 8), 3); "
        "print(found['programs']['update']['peak'], jax.default_backend())"
    )
    environment = os.environ | scale.ENVIRONMENT | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=planned.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak, backend = done.stdout.split()[-2:]
    assert int(peak) > 0 and backend == "cpu"
