"""Ctrl-C in a command is one line and the shell's code; files are whole or not there."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import tiny_checkpoint
from yolos_jax import interrupt
from yolos_jax.labels import LabelMap

ROOT = Path(__file__).resolve().parent.parent
# command: (its module, what does its work, its arguments, what it is called)
COMMANDS = {
    "eval.py": ("eval", "eval.run", "--checkpoint c --data_root d", "eval.py"),
    "predict": ("yolos_jax.predict", "yolos_jax.predict.run", "c p --out o", "predict"),
    "attend": ("yolos_jax.attend", "yolos_jax.attend.run", "c p --out o.png", "attend"),
    "validate": ("yolos_jax.data.validate", "yolos_jax.data.validate.validate", None, "validate"),
    "records": ("yolos_jax.data.records", "yolos_jax.data.records.run", "a b", "records"),
    "convert": (
        "convert_torch_weights",
        "yolos_jax.convert.command.convert",
        "a b",
        "convert_torch_weights",
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_ends_with_one_line(command, monkeypatch, capsys, tmp_path):
    module, work, arguments, name = COMMANDS[command]
    if arguments is None:  # it looks for its folder before anything else
        arguments = f"{tmp_path} --annotations a --images b"

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(work, interrupted)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(module).main(arguments.split())
    assert stopped.value.code == 130
    assert capsys.readouterr().err == f"{name}: interrupted\n"


def test_an_interruption_that_c_code_swallows_comes_again(monkeypatch, capsys):
    class Deaf:
        def __del__(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "_exit", sys.exit)
    # Where tests run in the background, they are started deaf to it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stopped, interrupt.one_line("command"):
            Deaf()
            for _ in range(600):  # no long sleep: it would end before an interruption is looked for
                time.sleep(0.1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "command: interrupted\n"


@pytest.mark.slow
def test_predict_is_interrupted(tmp_path):
    checkpoint = tiny_checkpoint.write(tmp_path / "checkpoint", LabelMap((1,), ("apple",)))
    (tmp_path / "pictures").mkdir()
    for number in range(200):
        Image.new("RGB", (64, 64)).save(tmp_path / "pictures" / f"{number}.png")
    # Where tests run in the background, programs are started deaf to it.
    program = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('yolos_jax.predict', run_name='__main__')"
    )
    command = [sys.executable, "-c", program, checkpoint, tmp_path / "pictures"]
    with subprocess.Popen(
        [*command, "--out", tmp_path / "out"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert ".png: " in process.stdout.readline()
        os.kill(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and said.splitlines()[-1] == "predict: interrupted"
    assert "Traceback" not in said
    written = list((tmp_path / "out").iterdir())
    assert 0 < len(written) < 200 and {path.suffix for path in written} == {".png"}
    assert all(np.asarray(Image.open(path)).shape == (320, 320, 3) for path in written)


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("before", ["folder", "file"])
def test_what_was_there_stays_or_is_replaced(tmp_path, kind, before, monkeypatch):
    def make(path, what, text):
        if what == "file":
            return path.write_text(text)
        path.mkdir()
        return (path / "inside").write_text(text)

    def text(path):
        return (path if path.is_file() else path / "inside").read_text()

    target = tmp_path / "out"
    make(target, before, "old")

    def interrupted(self, to):
        raise KeyboardInterrupt

    for moment in ("while it is written", "before it gets its name"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", interrupted)
            with pytest.raises(KeyboardInterrupt), interrupt.complete_or_nothing(target) as path:
                make(path, kind, "new")
                if moment == "while it is written":
                    raise KeyboardInterrupt
        assert text(target) == "old" and list(tmp_path.iterdir()) == [target]
    with interrupt.complete_or_nothing(target) as path:
        make(path, kind, "new")
    assert text(target) == "new" and list(tmp_path.iterdir()) == [target]


def test_what_cannot_be_written_is_named_as_it_was_asked_for(tmp_path):
    (tmp_path / "file").write_text("")
    whole = interrupt.complete_or_nothing
    inside, target = tmp_path / "file" / "in" / "a.json", tmp_path / "a.json"
    with pytest.raises(OSError, match="file/in: no folder can be made there: "), whole(inside):
        pass
    with pytest.raises(OSError, match=f"{target}: cannot be written: Is a"), whole(target) as path:
        path.mkdir()
        path.write_text("")
    with pytest.raises(OSError, match=f"{target}: cannot be written: No space"), whole(target):
        raise OSError(errno.ENOSPC, "No space left on device")  # as PIL's save: without a name
    with pytest.raises(OSError, match="absent"), whole(target):  # of another file, as it is
        (tmp_path / "absent").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
