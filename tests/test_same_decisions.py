"""What goes wrong on one of two processes is decided upon, and told, alike by both."""

from __future__ import annotations

import json
import signal

import pytest

from tests import dying_train, small_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("compiled"))


def run(folder, cache, plans=({}, {}), **changes):
    """Two processes on pictures of their own; returns exit codes and what each printed."""
    noted = folder / "batches" / "attempt"
    noted.mkdir(parents=True, exist_ok=True)
    plans = [plan | {"batches": str(noted / f"{i}.jsonl")} for i, plan in enumerate(plans)]
    changes |= {"compile.cache": cache}
    flags = small_run.flags(folder / "pictures", folder / "run", **changes)
    with dying_train.Group(folder / "printed", flags, plans) as group:
        codes = group.wait(small_run.PATIENCE)
        assert None not in codes, group.printed()
        return codes, [out.read_text() for out in group.outputs]


@pytest.mark.parametrize("asked", [0, 1])
def test_a_request_to_stop_before_jax_listens(tmp_path, cache, asked):
    small_run.write_pictures(tmp_path / "pictures")
    plans = [{}, {}]
    plans[asked] = {"place": "joining", "seconds": 0, "signal": signal.SIGTERM}
    codes, printed = run(tmp_path, cache, plans, **{"mesh.stopped_code": 143})
    assert codes == [143, 143], printed
    assert "asked to stop, before the first step; nothing to save" in printed[asked]
    assert f"process {asked} was asked to stop, before the first step" in printed[1 - asked]
    assert not (tmp_path / "run").exists()


def error(printed: str) -> str:
    """What a process ended with, and all that follows."""
    return printed[printed.index("train.py: ") :]


def test_pictures_that_one_process_cannot_read(tmp_path, cache):
    root = small_run.write_pictures(tmp_path / "pictures")
    broken = sorted((root / "train2017").iterdir())[:3]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    codes, printed = run(tmp_path, cache, **{"data.max_bad_fraction": 0.5, "epochs": 2})
    assert codes == [0, 0], printed
    for path in broken:
        assert printed[0].count(f"not read: {path}") == 1
    named = (tmp_path / "run" / "unreadable.txt").read_text()
    assert sorted(line.split(":")[0] for line in named.splitlines()) == list(map(str, broken))
    steps = [line for line in small_run.metrics(tmp_path / "run") if line["kind"] == "train"]
    assert sum(16 - line["images"] for line in steps) == 2 * len(broken)

    # Once more, where so many are too many: both stop at the same step, and name the same.
    codes, printed = run(tmp_path / "strict", cache, **{"data.root": root})
    assert codes == [1, 1], printed
    assert error(printed[0]) == error(printed[1])
    assert "pictures could not be read, more than data.max_bad_fraction=0.01" in error(printed[0])
    assert str(broken[0]) in error(printed[0]) or str(broken[1]) in error(printed[0])


def test_steps_that_are_not_finite(tmp_path, cache):
    small_run.write_pictures(tmp_path / "pictures")
    changes = {"optimizer.lr": 1e30, "optimizer.max_skipped": 4}
    codes, printed = run(tmp_path, cache, **changes)
    assert codes == [1, 1], printed
    assert error(printed[0]) == error(printed[1])
    assert "4 steps in a row had a loss or a gradient that is not finite" in error(printed[0])
    records = [
        json.loads(line)
        for line in (tmp_path / "run" / "skipped_steps.jsonl").read_text().splitlines()
    ]
    images = small_run.batches(tmp_path / "batches")
    assert len(records) == 4
    for record in records:  # each once, with the images of both processes
        assert images[record["step"]] == {tuple(sorted(record["image_ids"]))}
    # Begun again it goes on from a checkpoint, with the steps in a row that were counted by then.
    again, printed = run(tmp_path, cache, **changes)
    assert again == [1, 1]
    assert "4 steps in a row" in error(printed[0])
    assert [
        json.loads(line)["step"]
        for line in (tmp_path / "run" / "skipped_steps.jsonl").read_text().splitlines()
    ] == [record["step"] for record in records]
