"""Programs are compiled for the width of this machine's vector registers."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import make_step, mesh_of
from yolos_jax import programs
from yolos_jax.models import registers
from yolos_jax.predict_step import PredictStep


@pytest.mark.parametrize("avx2", [True, False])
def test_programs_for_cpus_alone_are_made_for_their_registers(avx2, monkeypatch):
    told, jit = [], jax.jit

    def note(function, **options):
        told.append(options.get("compiler_options"))
        return jit(function, **options)

    monkeypatch.setattr(jax, "jit", note)
    monkeypatch.setattr(registers, "are_avx2", lambda: avx2)
    train_step = make_step(mesh_of(1))
    preprocess = train_step.config.preprocess
    predict_step = PredictStep(train_step.model, train_step.mesh, preprocess)
    whole = {"xla_cpu_prefer_vector_width": 512}
    eigen = whole | {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    backward = eigen if avx2 else whole
    assert told == [whole, backward, whole, backward, whole, whole]
    told.clear()
    chip = SimpleNamespace(platform="tpu")
    programs.jit(predict_step.compile, SimpleNamespace(devices=np.array([[chip]])), backward=True)
    assert told == [None]


def test_with_avx2_products_of_a_backward_pass_are_eigen_s(monkeypatch):
    monkeypatch.setattr(registers, "are_avx2", lambda: True)
    a, b = jnp.ones((64, 32)), jnp.ones((32, 512))
    for backward in (False, True):
        product = programs.jit(jnp.matmul, backward=backward).lower(a, b).compile()
        np.testing.assert_array_equal(product(a, b), 32)
        assert ("ynn_fusion" in product.as_text()) == (not backward)


@pytest.mark.parametrize(
    ("text", "avx2"),
    [
        ("flags\t\t: fpu avx avx2 fma\n", True),
        ("flags\t\t: fpu avx avx2 avx512f\n", False),
        ("flags\t\t: fpu avx\n", False),
        ("Features\t: fp asimd sve\n", False),
        (None, False),
    ],
)
def test_registers_are_as_wide_as_the_system_says(text, avx2, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(registers, "CPUINFO", path)
    assert registers.are_avx2.__wrapped__() == avx2
