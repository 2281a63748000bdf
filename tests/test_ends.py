"""How programs end: with one line, and at once where a thread compiles what nobody waits for."""

from __future__ import annotations

import signal
import sys
from types import SimpleNamespace

import pytest

import eval as eval_script
import train
from configs import common
from yolos_jax import demo, launch, trainer
from yolos_jax.data import shapes
from yolos_jax.programs import Programs


class Ended(BaseException):
    """Where the process would have ended at once."""


@pytest.fixture
def left_behind(monkeypatch):
    """The code that the process leaves with, and what it said; signals as they were afterwards."""
    ended = []

    def leave(code=1):
        ended.append(code)
        raise Ended

    monkeypatch.setattr(Programs, "abandoned", True)
    monkeypatch.setattr(launch, "_exit", leave)
    monkeypatch.setattr(train, "_CONFIG", SimpleNamespace(value=None))
    monkeypatch.setattr(train, "_WORKDIR", SimpleNamespace(value="run"))
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    yield ended
    for number, handler in before:
        signal.signal(number, handler)


def test_train_leaves_at_once_with_its_summary(left_behind, monkeypatch, capsys):
    config = common.get_config()
    config.mesh.stopped_code = 143
    monkeypatch.setattr(train, "_CONFIG", SimpleNamespace(value=config))
    monkeypatch.setattr(trainer, "train", lambda *_, **__: {"finished": False})
    with pytest.raises(Ended):
        train.main([])
    assert left_behind == [143]
    assert capsys.readouterr().out == '{"finished": false}\n'


def test_train_leaves_at_once_with_its_error(left_behind, monkeypatch, capsys):
    def fail(*_, **__):
        raise ValueError("too many steps are not finite")

    monkeypatch.setattr(trainer, "train", fail)
    with pytest.raises(Ended):
        train.main([])
    assert left_behind == [1]
    assert capsys.readouterr().err == "train.py: too many steps are not finite\n"


def test_a_demo_that_was_stopped_leaves_at_once(left_behind, monkeypatch, tmp_path, capsys):
    summary = {"finished": False, "checkpoint": "a", "metrics": "b", "pictures": []}
    monkeypatch.setattr(trainer, "train", lambda *_, **__: dict(summary))
    monkeypatch.setattr(shapes, "write", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["demo", f"--out={tmp_path}"])
    with pytest.raises(Ended):
        demo.main()
    assert left_behind == [1]
    assert '"finished": false' in capsys.readouterr().out


def test_a_demo_without_its_configuration_leaves_what_is_there(monkeypatch, tmp_path):
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(demo, "CONFIG", tmp_path / "shapes.py")
    monkeypatch.setattr(sys, "argv", ["demo", f"--out={tmp_path}"])
    with pytest.raises(SystemExit, match=r"shapes\.py: no such file; the demo is for a clone"):
        demo.main()
    assert (tmp_path / "run").exists()


def test_an_evaluation_without_room_is_one_line(left_behind, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: no room for 9 bytes\nand much more")

    monkeypatch.setattr(eval_script, "run", fail)
    with pytest.raises(Ended):
        eval_script.main(["--checkpoint=a", "--data_root=b"])
    assert left_behind == [1]
    assert capsys.readouterr().err.endswith("need less: RESOURCE_EXHAUSTED: no room for 9 bytes\n")
