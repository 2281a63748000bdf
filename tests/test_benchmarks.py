"""The benchmarks' own arithmetic, and that nothing is asked of a machine that it may lack."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import checks, flops, isolated, matching, mix, pictures, report, timing
from configs import yolos_s, yolos_ti
from yolos_jax.batch import Bucket
from yolos_jax.matching import assign_host

ROOT = Path(__file__).resolve().parent.parent
# What benchmarks.gpu may need, besides the standard library.
ON_A_CARD = {
    "jax", "flax", "optax", "numpy", "scipy", "torch", "transformers",
    "ml_collections",
}  # fmt: skip


def test_flops_by_hand():
    model = {"width": 4, "depth": 2, "mlp_width": 8, "num_queries": 3, "patch_size": 2}
    patches = 6  # tokens: 1 + 3 + 6 = 10
    embed = 6 * (2 * 12 * 4)
    qkv, out = 10 * (2 * 4 * 12), 10 * (2 * 4 * 4)
    mlp = 10 * (2 * 4 * 8) + 10 * (2 * 8 * 4)
    attention = 10 * 10 * (2 * 4) + 10 * 10 * (2 * 4)  # queries by keys, then weights by values
    # Of the last block, 4 tokens are read: class and detection tokens.
    last = 4 * (2 * 4 * 4) + 10 * (2 * 4 * 8) + 4 * (2 * 4 * 4) + 4 * (2 * 4 * 8) + 4 * (2 * 8 * 4)
    last += 4 * 10 * (2 * 4) + 4 * 10 * (2 * 4)
    class_head = 3 * (2 * 4 * 4 + 2 * 4 * 4 + 2 * 4 * 6)  # five classes and no-object
    box_head = 3 * (2 * 4 * 4 + 2 * 4 * 4 + 2 * 4 * 4)
    expected = embed + qkv + out + mlp + attention + last + class_head + box_head
    assert flops.forward_flops(model, 5, patches) == expected
    assert flops.training_flops(model, 5, patches) == 3 * expected
    np.testing.assert_array_equal(
        flops.forward_flops(model, 5, np.array([patches, 1])) > 0, [True, True]
    )


def test_speedup_is_of_rounds_that_belong_together():
    # Twice as fast in every round of a machine that slows down meanwhile.
    found = timing.speedup([1.0, 2.0, 4.0], [2.0, 4.0, 8.0])
    assert (found["speedup"], found["low"], found["high"]) == (2, 2, 2)
    assert (found["ours_s"], found["theirs_s"]) == (2, 4)
    assert timing.spread([1, 2, 3, 4, 5]) == (2, 3, 4)
    with pytest.raises(ValueError, match="2 rounds of ours and 1 of theirs"):
        timing.speedup([1, 2], [1])


def test_tasks_take_turns():
    order = []
    tasks = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = timing.interleaved(tasks, rounds=2, warmup=1)
    assert sorted(order) == list("aaabbb") and [len(seconds[name]) for name in "ab"] == [2, 2]
    assert all({*order[i : i + 2]} == {"a", "b"} for i in (0, 2, 4))


def test_a_device_is_never_far_behind():
    class Run:
        unfinished = 0

        def __init__(self):
            Run.unfinished += 1
            assert Run.unfinished <= timing.AHEAD + 1

        def block_until_ready(self):
            Run.unfinished -= 1

    assert 0 < timing.seconds_each(Run, at_least=60, most=9) < 1
    assert Run.unfinished == 0


def test_what_cannot_be_waited_for_is_not_timed():
    with pytest.raises(AttributeError, match="block_until_ready"):
        timing.seconds_each(lambda: {"loss": 1.0}, at_least=0)


def test_an_assignment_must_cost_what_the_cheapest_one_costs():
    rng = np.random.default_rng(0)
    cost = rng.normal(size=(1, 3, 5, 12)).astype(np.float32)  # fewer targets than queries
    cost[:, 0, 1] = cost[:, 0, 0]
    valid = np.arange(5) < np.array([[5], [2], [0]])
    cheapest, _ = assign_host(cost, valid)
    matching.check(cheapest, cost, valid)
    swapped = cheapest.copy()  # of two targets that are alike: as cheap
    swapped[0, 0, :2] = cheapest[0, 0, 1::-1]
    matching.check(swapped, cost, valid)
    dear, _ = assign_host(-cost, valid)
    with pytest.raises(RuntimeError, match="cost of the assignment"):
        matching.check(dear, cost, valid)
    with pytest.raises(RuntimeError, match="pairs"):
        matching.check(np.full_like(cheapest, -1), cost, valid)


def test_reports(tmp_path):
    rows = [{"name": "one", "share": 0.125, "count": 3}, {"name": "another", "share": None}]
    text = report.table(rows, {"name": "", "share": ".1%", "count": "d"})
    assert text.splitlines() == [
        "name     share  count",
        "one      12.5%      3",
        "another      -      -",
    ]
    path = tmp_path / "new" / "out.json"
    report.write(str(path), "trial", rows, note="kept")
    written = json.loads(path.read_text())
    assert written["rows"] == rows and written["benchmark"] == "trial" and written["note"] == "kept"
    assert written["machine"]["versions"]["numpy"] == np.__version__
    with pytest.raises(OSError, match=r"--out=.*cannot be written"):
        report.write(str(path / "below_a_file"), "trial", rows)


def test_checks_refuse_what_differs():
    assert checks.same("x", [1.0, 2.0], [1.0, 2.5], most=0.5) == 0.5
    for theirs in ([1.0, 2.6], [1.0, np.nan], [1.0]):
        with pytest.raises(RuntimeError, match="x: ours"):
            checks.same("x", [1.0, 2.0], theirs, most=0.5)
    checks.picture_shows([[0.0], [1.0]], least=0.5)
    with pytest.raises(RuntimeError, match="a wrong model would pass"):
        checks.picture_shows([[1.0], [1.0]], least=0.5)


def test_both_sides_see_the_same_pictures():
    found, targets = pictures.sample(3, 32, 48, num_classes=91)
    bucket = Bucket(patches=8, rows=2, cols=3)
    batch = pictures.as_sequences([*found, found[0][:16, :16]], 16, bucket)
    canvas = pictures.as_canvas([*found, found[0][:16, :16]], (0.0,) * 3, (1.0,) * 3)
    assert batch.patches.shape == (4, 8, 768) and canvas.shape == (4, 3, 32, 48)
    assert batch.grid.tolist() == [[2, 3]] * 3 + [[1, 1]]
    # The patch in the second row and third column, and the little picture's padding.
    patch = batch.patches[1, 5].reshape(16, 16, 3)
    np.testing.assert_allclose(patch.transpose(2, 0, 1) / 255, canvas[1, :, 16:, 32:], atol=1e-6)
    assert not batch.patches[3, 1:].any() and not canvas[3, :, 16:].any()
    assert 10 < found[0].std() < 90 and (found[0] != found[1]).any()
    labels = pictures.as_labels(targets)
    assert [len(each["boxes"]) for each in labels] == targets.target_valid.sum(axis=1).tolist()


def test_counts_are_those_of_coco():
    counts = pictures.box_counts(np.random.default_rng(0), 20_000)
    assert abs(counts.mean() - pictures.BOXES) < 0.7 and counts.max() <= pictures.MOST_BOXES


@pytest.mark.parametrize("config", [yolos_s.get_config(), yolos_ti.get_config()])
def test_the_mix_is_the_plan_of_coco_like_sizes(config):
    plan = mix.training_plan(config, batch_size=16, count=512)
    assert plan.steps == 32 and plan.waste() < 0.35
    batches = mix.padded_batches(plan, 16, steps=3)
    assert [batch.shape for batch in batches] == [(16, 2)] * 3
    known = {tuple(grid) for grid in plan.grid.reshape(-1, 2).tolist()}
    assert {tuple(grid) for grid in np.concatenate(batches).tolist()} <= known
    # Padded to the largest sides, most of a canvas is empty.
    canvas = np.mean([batch.max(axis=0).prod() for batch in batches])
    assert canvas > 1.3 * np.mean([batch.prod(axis=1).mean() for batch in batches])


def test_a_process_keeps_what_it_yielded_before_it_died():
    job = isolated.Job("tests.test_benchmarks:two_rows_and_an_error", {"first": 1})
    rows, error = job.result(timeout=100)
    assert [row["value"] for row in rows] == [1, 2] and "no third row" in error


def two_rows_and_an_error(first: int):
    yield {"value": first}
    yield {"value": first + 1}
    raise ValueError("no third row")


def imports_of(module: str, seen: set[str]) -> set[str]:
    """Top-level libraries that importing a module of ours brings, functions' own left out."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    if module in seen or not path.exists():
        return set()
    seen.add(module)
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            top = name.split(".")[0]
            ours = top in ("yolos_jax", "benchmarks", "configs")
            found |= imports_of(name, seen) if ours else {top}
    return found


def test_the_card_needs_few_libraries():
    seen: set[str] = set()
    modules = ("gpu", "gpu_ours", "gpu_mix_ours", "gpu_theirs", "gpu_mix_theirs", "two_programs")
    needed = set().union(*(imports_of(f"benchmarks.{module}", seen) for module in modules))
    assert needed - set(sys.stdlib_module_names) <= ON_A_CARD
    assert "yolos_jax.data.plan" in seen and "torch" in needed  # the walk does find what there is


def test_every_script_is_listed_and_says_what_it_needs():
    helpers = {"__init__", "__main__"} | {
        path.stem
        for path in (ROOT / "benchmarks").glob("*.py")
        if 'if __name__ == "__main__":\n    main()' not in path.read_text()
    }
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - helpers
    assert scripts <= set(command.BENCHMARKS)
    described = command.describe().splitlines()
    assert len(described) == len(command.BENCHMARKS)
    documented = (ROOT / "docs" / "benchmarks.md").read_text()
    assert all(f"`{name}`" in documented for name in command.BENCHMARKS)


def test_the_command_line():
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "benchmarks", *arguments],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip

    listed = run("--list")
    assert listed.returncode == 0 and "two_programs" in listed.stdout
    refused = run("nonsense")
    assert refused.returncode == 2 and "unknown: nonsense; there are padding" in refused.stderr


@pytest.mark.slow
def test_both_sides_of_a_comparison_agree(tmp_path):
    command = [sys.executable, "-m", "benchmarks.forward", "--quick", "--threads", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "forward.json")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "forward.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["ti", "s"]
    assert all(row["difference"] < 1e-4 and row["speedup"] > 0 for row in rows)
