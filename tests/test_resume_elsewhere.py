"""A run goes on with other processes and devices: the same batches, the same losses."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from tests import dying_train, small_run
from tests.test_checkpoint import data_file, flip_a_bit

STOP_AFTER = 6  # of 12 steps
DAMAGED = 8  # the newest checkpoint there
# Wide enough that parameters, moments and averages are sharded; evaluated once, at the end.
WIDE = {"model.width": 64, "model.mlp_width": 128, "eval.every_epochs": 0, "data.val_subset": 8}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return small_run.write_pictures(tmp_path_factory.mktemp("shapes"))


def attempt(folder, pictures, workdir, processes, devices, **changes):
    """Runs to the end of the configuration's epochs; returns the images of every step."""
    noted = folder / "batches" / "attempt"
    noted.mkdir(parents=True)
    plans = [{"batches": str(noted / f"{i}.jsonl")} for i in range(processes)]
    flags = small_run.flags(pictures, workdir, **WIDE, **changes)
    with dying_train.Group(folder, flags, plans, devices=devices) as group:
        codes = group.wait(small_run.PATIENCE)
        assert codes == [0] * processes, group.printed()
        printed = group.printed()
    return small_run.batches(folder / "batches"), printed


@pytest.fixture(scope="module")
def unbroken(pictures, tmp_path_factory):
    """Parameters in four parts, two on each of two processes, from the start to the end."""
    folder = tmp_path_factory.mktemp("unbroken")
    changes = {"mesh.fsdp": 4, "checkpoint.keep_last": 99}
    images, _ = attempt(folder, pictures, folder / "run", 2, 2, **changes)
    return folder / "run", images


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "devices", "fsdp"),
    [(1, 1, 1), (1, 4, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (4, 1, 1)],
)
def test_a_run_goes_on_elsewhere(unbroken, pictures, tmp_path, processes, devices, fsdp):
    workdir, images = unbroken
    half = tmp_path / "run"
    shutil.copytree(workdir, half)
    for step in (half / "checkpoints").iterdir():
        if int(step.name) > DAMAGED:
            shutil.rmtree(step)
    flip_a_bit(data_file(half / "checkpoints", DAMAGED, "optimizer"))
    again, printed = attempt(tmp_path, pictures, half, processes, devices, **{"mesh.fsdp": fsdp})
    assert printed.count(f"checkpoint {DAMAGED} is damaged") == 1
    assert f"resumed at step {STOP_AFTER} of {small_run.STEPS}" in printed
    assert again == {step: images[step] for step in range(STOP_AFTER, small_run.STEPS)}
    expected, found = small_run.losses(workdir), small_run.losses(half)
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-5, abs=1e-5)
    if (processes, devices, fsdp) == (2, 2, 4):
        left, right = small_run.arrays(workdir), small_run.arrays(half)
        assert all(np.array_equal(left[path], right[path]) for path in left.keys() | right.keys())
