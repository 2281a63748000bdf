"""What a wrong command line gets: one line that names the key, the value and what was expected."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run_train(*arguments, **options):
    return subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optimizer.lrr=3"], "the nearest is --config.optimizer.lr"),
        (["--config.lr=3"], "the nearest is --config.optimizer.lr"),
        (["--config.batchsize=3"], "the nearest is --config.batch_size"),
        (
            ["--config.augment.scales=(80,96)", "--config.augment.scales", "(64,)"],
            "--config.augment.scales is given 2 times; expected one list",
        ),
        (["--config=configs/yolos_s.py"], "--config is given 2 times; expected one of them"),
        (["--config.optimizer.lr=abc"], "could not convert string to float: 'abc'"),
        (["--config.batch_size=2.5"], "config.batch_size=2.5"),
        (["--config.augment.scales=(480,a)"], "expected a list of int"),
        (["--confg.seed=1"], "Unknown command line flag 'confg.seed'"),
        (["extra"], "unexpected arguments: extra"),
    ],
)
def test_a_wrong_flag_is_one_line(arguments, message, tmp_path):
    done = run_train("--config=configs/shapes.py", f"--workdir={tmp_path / 'run'}", *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_missing_flags_are_named(tmp_path):
    assert "--config is missing" in run_train(f"--workdir={tmp_path}").stderr
    assert "--workdir is missing" in run_train("--config=configs/shapes.py").stderr
    assert "nowhere.py" in run_train("--config=configs/nowhere.py", "--workdir=x").stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def get_config(:", "invalid syntax"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("x = 1", "has no function get_config"),
        (
            "from configs import common\n"
            "def get_config():\n c = common.get_config()\n c.optimizer.lrr = 1\n return c",
            'Key "lrr" does not exist and cannot be added since the config is locked. '
            'Did you mean "lr" instead of "lrr"?\n',
        ),
        (
            "from configs import common\n"
            "def get_config():\n c = common.get_config()\n c.nothing_like_it = 1\n return c",
            "does not exist and cannot be added since the config is locked.\n",
        ),
        ("def get_config():\n\n raise ValueError", "mine.py, line 3: ValueError"),
        ("def get_config(): open('/no/where')", "No such file or directory: '/no/where'"),
        (None, "no such file; expected one of configs/"),
    ],
)
def test_what_is_no_configuration(content, message, tmp_path):
    path = tmp_path / "mine.py" if content else tmp_path
    if content:
        path.write_text(content)
    done = run_train(f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        ("RuntimeError('RESOURCE_EXHAUSTED: no room for 9 bytes\\nmore')", 1, "less: RESOURCE_"),
        ("ImportError('No module named pycocotools')", 1, "train.py: No module named pycocotools"),
        ("KeyboardInterrupt", 130, "train.py: interrupted"),  # as the second Ctrl-C
    ],
)
def test_what_ends_a_run_is_one_line(error, code, message, tmp_path):
    program = (
        "import train; from yolos_jax import trainer\n"
        f"def fail(*args, **kwargs): raise {error}\n"
        "trainer.train = fail\n"
        "train.app.run(train.main, flags_parser=train.parse_flags)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--config=configs/shapes.py", f"--workdir={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("library", "stub", "code", "message"),
    [
        ("flax", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 143, "asked to stop"),
        # As numpy's C code does for whoever imports it from C.
        (
            "flax",
            "import os, signal\ntry: os.kill(os.getpid(), signal.SIGINT)\n"
            "except BaseException: raise ImportError('failed to import')",
            143,
            "asked to stop",
        ),
        ("tensorflow", "raise ImportError('No module named tensorflow')", 1, "named tensorflow"),
        ("jax", "raise ImportError('No module named jax')", 1, "No module named jax"),
    ],
)
def test_what_ends_it_while_it_imports_is_one_line(library, stub, code, message, tmp_path):
    (tmp_path / f"{library}.py").write_text(stub)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    data = (f"--config.data.root={tmp_path}", "--config.mesh.stopped_code=143")
    workdir = f"--workdir={tmp_path / 'run'}"
    done = run_train(
        "--config=configs/shapes.py", workdir, *data, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == code, done.stderr
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
