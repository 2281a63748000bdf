"""Splash against stock attention as the compiler for TPUs sees them, without that compiler."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

from benchmarks import planned, scale, tpu_memory
from tests.test_scale import canned
from tests.tiny import BUCKET, TARGETS


def test_temporaries_of_two_forms_of_attention_are_compared(monkeypatch, tmp_path, capsys):
    def of_so_much(case, cache):
        found = canned(case, cache)
        size = {"splash": 2, "stock": 8}[case.attention] * case.images * 2**20
        programs = {
            kind: found["programs"][kind] | {"temp": factor * size}
            for kind, factor in (("forward", 1), ("update", 3))
        }
        return found | {"programs": programs}

    monkeypatch.setattr(scale, "ENVIRONMENT", {})  # of this process, which is that of all tests
    monkeypatch.setitem(sys.modules, "libtpu", SimpleNamespace())
    monkeypatch.setattr(planned, "facts", of_so_much)
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["tpu_memory", "--out", str(out)])
    tpu_memory.main()
    rows = json.loads(out.read_text())["rows"]
    assert [(row["recipe"], row["program"]) for row in rows] == [
        (recipe, program) for recipe in ("yolos_s", "yolos_b") for program in ("forward", "update")
    ]
    assert [row["splash_MiB"] for row in rows] == [2, 6] * 2
    assert {row["ratio"] for row in rows} == {0.25}
    assert rows[0]["tokens"] == 1 + 100 + 2459
    assert (
        "yolos_s on v5e:2x4, fsdp 1, 2 images per chip, attention 'stock'"
        in capsys.readouterr().out
    )


def test_a_case_compiles_with_its_attention(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(planned, "slice_mesh", lambda *_: None)
    monkeypatch.setattr(planned, "longest", lambda _: (BUCKET, TARGETS))
    monkeypatch.setattr(planned, "describe", lambda config, *_: seen.append(config) or {})
    for attention in ("auto", "stock"):
        planned.facts(planned.Case("v5e", 8, "yolos_s", 1, 2, attention), tmp_path)
    assert [config.model.attention for config in seen] == ["auto", "stock"]
