"""Neither processes nor devices change a run: twenty steps, whoever has the boxes."""

from __future__ import annotations

import numpy as np
import pytest

from tests import mathematics, shared_programs, tiny
from tests.processes import Processes, free_address
from yolos_jax import mesh as mesh_lib

REACH = tiny.LR * mathematics.STEPS  # Adam moves no parameter further


@pytest.fixture(scope="module")
def reference():
    """On one device."""
    return mathematics.run(tiny.mesh_of(1), "yolos:1:1:host")


def assert_same(found, reference):
    np.testing.assert_allclose(found["losses"], reference["losses"], rtol=1e-5)
    assert found.keys() == reference.keys()
    for path in found.keys() - {"losses"}:
        gap = np.abs(found[path] - reference[path])
        # Keys that all move by as much change no attention: their biases' true gradient is zero,
        # and Adam makes full steps of what rounding leaves.
        if path.endswith("key/bias"):
            assert gap.max() <= REACH
            continue
        if path.endswith("qkv/bias"):
            _, keys, _ = np.split(gap, 3, axis=1)
            assert keys.max() <= REACH
            keys[:] = 0
        assert gap.max() <= 0.01 * REACH, path


def on_four_devices(variant, monkeypatch):
    model, fsdp, *_ = variant.split(":")
    monkeypatch.setattr(mesh_lib, "SHARDED_FROM", mathematics.SHARDED_FROM[model])
    return mathematics.run(tiny.mesh_of(4, int(fsdp)), variant)


@pytest.mark.slow
@pytest.mark.parametrize("variant", mathematics.YOLOS)
def test_one_process_with_four_devices(reference, variant, monkeypatch):
    assert_same(on_four_devices(variant, monkeypatch), reference)


def on_processes(processes, devices, variants, folder):
    """What each variant comes to."""
    meet = [str(folder), free_address(), str(processes)]
    commands = [
        ["-m", "tests.mathematics", *meet, str(number), *variants] for number in range(processes)
    ]
    with Processes(commands, folder, devices=devices) as group:
        assert group.wait(1200) == [0] * processes, group.printed()
    return {variant: dict(np.load(folder / f"{variant}.npz")) for variant in variants}


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (4, 1)])
def test_several_processes(reference, processes, devices, tmp_path):
    for found in on_processes(processes, devices, mathematics.YOLOS, tmp_path).values():
        assert_same(found, reference)


@pytest.mark.slow
def test_a_detr_on_four_devices_and_two_processes(tmp_path, monkeypatch, quick_to_compile):
    """Dropout is that of the whole batch, wherever its images are."""
    shared_programs.same_names(monkeypatch.setattr)
    reference = mathematics.run(tiny.mesh_of(1), mathematics.DETR[0])
    assert reference["losses"][-1] < reference["losses"][0]
    for variant in mathematics.DETR:
        assert_same(on_four_devices(variant, monkeypatch), reference)
    (found,) = on_processes(2, 2, mathematics.DETR[1:], tmp_path).values()
    assert_same(found, reference)
