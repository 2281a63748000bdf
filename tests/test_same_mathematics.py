"""Neither processes nor devices change a run: twenty steps, whoever has the boxes."""

from __future__ import annotations

import numpy as np
import pytest

from tests import mathematics, tiny
from tests.processes import Processes, free_address
from yolos_jax import mesh as mesh_lib

KEY_BIAS = "backbone/blocks/attention/qkv/bias"
REACH = tiny.LR * mathematics.STEPS  # Adam moves no parameter further


@pytest.fixture(scope="module")
def reference():
    """On one device."""
    return mathematics.run(tiny.mesh_of(1), 1, "host")


def assert_same(found, reference):
    np.testing.assert_allclose(found["losses"], reference["losses"], rtol=1e-5)
    assert found.keys() == reference.keys()
    for path in found.keys() - {"losses"}:
        gap = np.abs(found[path] - reference[path])
        if path == KEY_BIAS:
            # Their true gradient is zero; Adam makes full steps of what rounding leaves.
            _, keys, _ = np.split(gap, 3, axis=1)
            assert keys.max() <= REACH
            keys[:] = 0
        assert gap.max() <= 0.01 * REACH, path


@pytest.mark.slow
@pytest.mark.parametrize("variant", mathematics.VARIANTS)
def test_one_process_with_four_devices(reference, variant, monkeypatch):
    monkeypatch.setattr(mesh_lib, "SHARDED_FROM", 256)
    fsdp, microbatches, where = variant.split(":")
    found = mathematics.run(tiny.mesh_of(4, int(fsdp)), int(microbatches), where)
    assert_same(found, reference)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Compiled like this it agrees with the reference, too; compiling is most of what it takes."""
    cache = tmp_path_factory.mktemp("compiled")
    return {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": str(cache)}


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (4, 1)])
def test_several_processes(reference, processes, devices, tmp_path, quick):
    meet = [str(tmp_path), free_address(), str(processes)]
    commands = [
        ["-m", "tests.mathematics", *meet, str(number), *mathematics.VARIANTS]
        for number in range(processes)
    ]
    with Processes(commands, tmp_path, devices=devices, **quick) as group:
        assert group.wait(1200) == [0] * processes, group.printed()
    for variant in mathematics.VARIANTS:
        assert_same(dict(np.load(tmp_path / f"{variant}.npz")), reference)
