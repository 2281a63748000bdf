"""Cycles read from a program's text, by hand; the compiler itself is not asked."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import jax
import pytest

from benchmarks import planned, scale, tpu_cycles

PROGRAM = """HloModule jit_forward, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  ROOT %copy.9 = f32[8]{0:T(128)} copy(%p)
}

%body (t: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %copy.1 = bf16[4,8]{0,1:T(8,128)(2,1)} copy(%x), metadata={op_name="jit(f)/blocks/qkv/split"}, backend_config={"estimated_cycles":"300"}
  %kernel = bf16[4,8]{1,0} custom-call(%copy.1), custom_call_target="tpu_custom_call"
  ROOT %all = (s32[], bf16[4,8]{1,0}) tuple(%n, %kernel)
}

%condition (t: (s32[], bf16[4,8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %fusion = (f32[8]{0:T(128)}, f32[2]{0}) fusion(%a), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"1200"}
  %wait = f32[8]{0} call(%a), backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %while = (s32[], bf16[4,8]{1,0}) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"12"}}
}
"""  # noqa: E501


def test_loops_count_as_often_as_they_run_and_what_is_unknown_does_not():
    copy, fusion = tpu_cycles.costs(PROGRAM)
    assert (copy["kcycles"], copy["times"], copy["does"]) == (3.6, 12, "copy")
    assert (copy["gives"], copy["source"]) == ("bf16[4, 8]", "jit(f)/blocks/qkv/split")
    assert (fusion["kcycles"], fusion["times"], fusion["gives"]) == (1.2, 1, "f32[8]")
    assert copy["share"] == pytest.approx(0.75)


def test_what_cannot_be_compiled_or_read_is_one_line(monkeypatch):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room\nand much more")

    monkeypatch.setattr(planned, "arguments", lambda case: (case,))
    monkeypatch.setattr(planned, "compile_step", refuse)
    with pytest.raises(SystemExit, match=r"yolos_b on v5e.*RESOURCE_EXHAUSTED: no room$"):
        tpu_cycles.texts(planned.Case("v5e", 8, "yolos_b", 1, 999))


def test_command(monkeypatch, tmp_path, capsys):
    asked = []

    def compile_step(*case):
        asked.append(case)
        program = SimpleNamespace(compiled=SimpleNamespace(as_text=lambda: PROGRAM))
        return None, {"forward": program, "update": program}

    monkeypatch.setattr(scale, "prepare", lambda: None)
    monkeypatch.setattr(planned, "arguments", lambda case: (case,))
    monkeypatch.setattr(planned, "compile_step", compile_step)
    out = tmp_path / "cycles.json"
    monkeypatch.setattr(
        sys, "argv", f"tpu_cycles --recipe yolos_b --chip v6e --images 3 --out {out}".split()
    )
    tpu_cycles.main()
    assert asked == [(planned.Case("v6e", 8, "yolos_b", 1, 3),)]
    assert [row["program"] for row in json.loads(out.read_text())["rows"]] == [
        "forward", "forward", "update", "update",
    ]  # fmt: skip
    assert "update: 0.0 million cycles" in capsys.readouterr().out
