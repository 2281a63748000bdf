"""Every program is compiled once: counted, announced, kept for the next start."""

from __future__ import annotations

import os
import re
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests import test_trainer
from yolos_jax import checkpoint, compilation, launch, startup
from yolos_jax import programs as programs_lib
from yolos_jax.data import shapes
from yolos_jax.programs import Programs, UnexpectedProgram
from yolos_jax.trainer import StopRequested

COMPILED = "/jax/core/compile/backend_compile_duration"
FOUND = "/jax/compilation_cache/cache_hits"


@pytest.fixture
def own_cache(monkeypatch):
    """Nobody else's compiled programs, here and afterwards."""
    monkeypatch.delenv(compilation.VARIABLE, raising=False)
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


@pytest.fixture
def heard():
    """Names of what jax says that it does, while the test runs."""
    names, listening = [], [True]

    def listen(name, *unused, **also_unused):
        if listening[0]:
            names.append(name)

    jax.monitoring.register_event_listener(listen)
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    listening[0] = False


def two_buckets(root, **overrides):
    """A run of two epochs with pictures of 9 and of 16 patches, frozen but for the heads."""
    return test_trainer.tiny(
        root,
        **{
            "model.depth": 1,
            "optimizer.freeze": ("backbone/.*",),
            "augment.scales": (24, 32),
            "buckets.count": 2,
            "log.pictures": 0,
            **overrides,
        },
    )


def test_programs_are_those_that_were_announced_and_are_found_again(
    tmp_path, monkeypatch, own_cache, heard, capfd
):
    root, workdir = tmp_path / "data", tmp_path / "run"
    shapes.write(root, seed=3, train=48, val=10, size=32)
    runs, prepare = [], startup.prepare

    def prepare_and_remember(*args):
        run, progress = prepare(*args)
        runs.append(run)
        return run, progress

    monkeypatch.setattr(startup, "prepare", prepare_and_remember)
    compiled_in = {}

    def requested(self, now):
        compiled_in[now] = heard.count(COMPILED)
        return now >= 5

    with monkeypatch.context() as patch:
        patch.setattr(launch.Preemption, "requested", requested)
        config = two_buckets(root, **{"compile.ahead": True})
        assert test_trainer.train(config, workdir)["step"] == 5
    (first,) = runs
    assert len(first.data.buckets) == 2 and len(first.data.eval_plan.buckets) == 1
    assert first.train_step.programs() == {"forward": 2, "update": 2}
    assert first.predict_step.programs() == {"predict": 1}
    # An epoch and an evaluation have met everything: from then on not even a sum is compiled.
    assert compiled_in[4] == compiled_in[5]
    line = r"(9|16) +\d +\d  (forward|update|predict) +\d+\.\d .* \d+\.\d\n"
    assert len(re.findall(line, capfd.readouterr().err)) == 5

    def kept():
        names = [path.name for path in (tmp_path / "compiled").iterdir()]
        return [x for x in names if x.startswith(("jit_forward", "jit_update", "jit__predict"))]

    before = kept()
    assert len(before) == 4  # with a frozen backbone the update knows nothing of lengths
    heard.clear()
    jax.clear_caches()
    assert test_trainer.train(two_buckets(root), workdir)["finished"]
    assert runs[1].train_step.programs()["forward"] == 1
    assert runs[1].predict_step.programs() == {"predict": 1}
    assert sorted(kept()) == sorted(before)
    assert heard.count(FOUND) >= 3
    assert checkpoint.load_params(workdir)[1]["step"] == 6


def test_a_program_that_nobody_announced_is_an_error_here():
    programs = Programs()
    programs.check_expected("anything")
    programs.expect(["a", "b"])
    programs.check_expected("b")
    with pytest.raises(UnexpectedProgram, match="compiling for c, which is none of the 2 shapes"):
        programs.check_expected("c")


def test_a_folder_that_cannot_be_used_costs_a_warning(tmp_path, own_cache):
    (tmp_path / "compiled").write_text("a file")
    with pytest.warns(UserWarning, match=r"not kept: .*compiled cannot be written"):
        compilation.keep_programs("compiled", tmp_path)
    assert jax.config.jax_compilation_cache_dir is None
    compilation.keep_programs("", tmp_path)
    assert jax.config.jax_compilation_cache_dir is None


def test_the_environment_has_the_last_word(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv(compilation.VARIABLE, "/elsewhere")
    compilation.keep_programs("compiled", tmp_path)
    assert not (tmp_path / "compiled").exists()
    assert jax.config.jax_compilation_cache_dir == before


@pytest.fixture
def written_long_ago(monkeypatch):
    monkeypatch.setattr(compilation, "BEING_WRITTEN", 0)


def test_a_program_that_may_be_being_written_is_left_alone(tmp_path):
    program = tmp_path / "a-cache"
    program.write_bytes(b"the first half")
    compilation.remove_cut_off(tmp_path)
    assert program.exists()
    long_ago = time.time() - 2 * compilation.BEING_WRITTEN
    os.utime(program, (long_ago, long_ago))
    compilation.remove_cut_off(tmp_path)
    assert not program.exists()


@pytest.mark.usefixtures("written_long_ago")
def test_a_program_that_was_cut_off_is_compiled_again(tmp_path, own_cache, heard, capsys):
    compilation.keep_programs("kept", tmp_path)

    def f(x):
        return jnp.tanh(x) @ x

    x = np.eye(3, dtype=np.float32)
    expected = np.asarray(jax.jit(f)(x))
    whole = {path: path.read_bytes() for path in (tmp_path / "kept").glob("*-cache")}
    (name,) = [path for path in whole if path.name.startswith("jit_f-")]
    name.write_bytes(whole[name][: len(whole[name]) // 2])
    jax.clear_caches()
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
        np.testing.assert_array_equal(jax.jit(f)(x), expected)
    assert len(name.read_bytes()) < len(whole[name])  # jax leaves it as it is
    # The next start removes it and nothing else; then it is compiled once more, and found again.
    compilation.keep_programs("kept", tmp_path)
    assert not name.exists() and all(path.exists() for path in whole.keys() - {name})
    assert (
        capsys.readouterr().err == f"{name}: a program that was not written to its end; removed\n"
    )
    for found in (0, 1):
        jax.clear_caches()
        heard.clear()
        np.testing.assert_array_equal(jax.jit(f)(x), expected)
        assert heard.count(FOUND) == found and name.exists()
    compilation.keep_programs("kept", tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("written_long_ago")
def test_programs_that_were_looked_at_are_not_read_again(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(compilation, "_whole", lambda path: read.append(path.name) or True)
    long_ago = time.time() - 2 * compilation.CLOCKS_DIFFER
    for name in ("a-cache", "b-cache"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (long_ago, long_ago))
    compilation.remove_cut_off(tmp_path)
    (tmp_path / "c-cache").touch()
    compilation.remove_cut_off(tmp_path)
    assert sorted(read) == ["a-cache", "b-cache", "c-cache"]


class Lowered:
    """What ``jax.jit`` would give, whose compilation lasts until it is let go."""

    out_info = ()

    def __init__(self, error=None):
        self.go, self.error = threading.Event(), error

    def lower(self):
        return self

    def compile(self):
        self.go.wait(60)
        if self.error:
            raise self.error
        return SimpleNamespace(output_shardings=())


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(programs_lib, "BETWEEN_QUESTIONS", 0.01)
    monkeypatch.setattr(Programs, "abandoned", False)


@pytest.mark.usefixtures("impatient")
def test_while_it_compiles_it_is_asked_whether_to_go_on():
    programs, lowered, asked = Programs(), Lowered(), []

    def ask():
        asked.append(1)
        if len(asked) == 3:
            lowered.go.set()

    programs.meanwhile = ask
    program = programs.make("forward", 1, lowered)
    assert program.compiled.output_shardings == () and len(asked) >= 3
    assert programs.make("forward", 1, None) is program
    assert not Programs.abandoned


@pytest.mark.usefixtures("impatient")
def test_a_program_that_nobody_waits_for_is_abandoned():
    programs, lowered = Programs(), Lowered()

    def stop():
        raise StopRequested

    programs.meanwhile = stop
    with pytest.raises(StopRequested):
        programs.make("forward", 1, lowered)
    assert Programs.abandoned and not programs.counts()
    lowered.go.set()


@pytest.mark.usefixtures("impatient")
def test_what_the_compiler_refuses_is_said_where_it_was_asked():
    programs, lowered = Programs(), Lowered(ValueError("no room"))
    programs.meanwhile = lowered.go.set
    with pytest.raises(ValueError, match="no room"):
        programs.make("forward", 1, lowered)
    assert not Programs.abandoned
