"""Everything that is no checkpoint is refused by name, and hostile pickles are never run."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests import convert_sources as sources
from yolos_jax.convert import weights
from yolos_jax.convert.conversion import Options

torch = pytest.importorskip("torch", reason="writing .pth files needs torch")
CLI = Path(__file__).resolve().parent.parent / "convert_torch_weights.py"


def converted(path):
    return weights.open_checkpoint(path, Options(num_heads=sources.HEADS))[0]


class Hostile:
    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def hostile(folder, legacy):
    thing = Hostile()
    thing.path = folder / "was_run"
    path = folder / "hostile.pth"
    torch.save({"model": thing}, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused(tmp_path, legacy):
    with pytest.raises(ValueError, match=r"hostile.pth: refused.*system") as caught:
        converted(hostile(tmp_path, legacy))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "was_run").exists()


def test_the_command_refuses_and_leaves_nothing(tmp_path):
    path = hostile(tmp_path, legacy=False)
    done = subprocess.run(
        [sys.executable, str(CLI), str(path), str(tmp_path / "new" / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(CLI.parent)},
    )
    assert done.returncode != 0
    assert "refused" in done.stderr and "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == [path]


def _half(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("cut.pth", lambda p: _half(sources.save(p, sources.yolos()))),
        ("cut_legacy.pth", lambda p: _half(sources.save(p, sources.yolos(), legacy=True))),
        ("empty.pth", lambda p: p.touch()),
        ("page.pth", lambda p: p.write_text("<html>404 not found</html>")),
        ("cut.safetensors", lambda p: p.write_bytes(b"\x40\0\0\0\0\0\0\0{")),
        ("cut.npz", lambda p: p.write_bytes(b"PK\x03\x04")),
        ("list.pth", lambda p: torch.save([1, 2], p)),
        ("none.pth", lambda p: torch.save({"epoch": 3}, p)),
        ("other.pth", lambda p: torch.save({"layer1.weight": torch.zeros(3)}, p)),
        ("plain.pkl", lambda p: p.write_bytes(pickle.dumps({"a": 1}))),
        ("folder", lambda p: p.mkdir()),
        ("absent.pth", lambda p: None),
        ("someone/absent", lambda p: None),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, name, make, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    if "/" not in name:
        make(tmp_path / name)
    with pytest.raises(ValueError, match=name.split("/")[-1]) as caught:
        converted(name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
