"""Real processes: who is missing, who differs, and who starts in which cluster."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests import dying_train, quick
from tests.processes import ROOT, Processes, free_address, train_commands
from yolos_jax.data import shapes

pytestmark = pytest.mark.slow


def busy():
    """How many times longer things take on a machine that is not ours alone."""
    return max(os.getloadavg()[0] / os.cpu_count(), 1)


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pods")
    for name, seed in (("data", 3), ("other", 4)):
        shapes.write(folder / name, seed=seed, train=48, val=10, size=32)
    return folder


@pytest.fixture(scope="module")
def environment(tmp):
    return {
        "JAX_COMPILATION_CACHE_DIR": str(tmp / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def flags(tmp, workdir, *more):
    small = {
        "data.root": tmp / "data", "epochs": 1, "batch_size": 16, "eval.batch_size": 8,
        "model.width": 32, "model.depth": 2, "model.heads": 2, "model.mlp_width": 64,
        "model.position_grid": "(4,4)", "preprocess.size": 32, "preprocess.max_size": 32,
        "augment.scales": "(32,)", "augment.max_size": 32, "optimizer.warmup_steps": 2,
        "log.every_steps": 1, "log.pictures": 2, "mesh.wait_seconds": 60,
    }  # fmt: skip
    keys = [f"--config.{key}={value}" for key, value in small.items()]
    return ["--config=configs/shapes.py", f"--workdir={workdir}", *keys, *more]


def errors(group, member):
    """What a process printed of what went wrong."""
    lines = group.output(member).splitlines()
    return [line for line in lines if line.startswith(("train.py: ", "this run is over: "))]


def run(commands, folder, environment, devices=2):
    with Processes(commands, folder, devices=devices, **environment) as group:
        codes = group.wait(240 * busy())
    return codes, group


def forked(folder, *flags, second=()):
    """Likewise, without starting Python and its libraries: processes that meet as they should."""
    with dying_train.Group(folder, flags, [{}, {"flags": second}], devices=2) as group:
        codes = group.wait(240 * busy())
    return codes, group


def test_a_missing_process_is_counted_on_all_that_came(tmp, tmp_path, environment):
    commands = train_commands(3, *flags(tmp, tmp_path / "run"), "--config.mesh.wait_seconds=10")
    started = time.monotonic()
    codes, group = run(commands[:2], tmp_path, environment)
    assert codes == [1, 1]
    assert time.monotonic() - started < 10 + 30 * busy()  # imports
    for member in range(2):
        (error,) = errors(group, member)
        assert "2 of 3 processes came" in error and "in 10 s; missing: 2;" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("both", "second", "message"),
    [
        ([], ["--config.seed=1"], "  seed: 0 on process 0, 1 on process 1"),
        ([], ["--workdir={tmp}/elsewhere"], "/elsewhere on "),
        ([], ["--config.data.root={tmp}/other"], "  training pictures and annotations: '"),
        ([], ["--config.data.root={tmp}/missing"], "no such folder: '{tmp}/missing'"),
        (["--config.batch_size=18"], [], "a batch of 18 images does not divide among 4 devices"),
        (["--config.mesh.fsdp=3"], [], "mesh.fsdp is 3: it must divide the number of devices, 4"),
    ],
)
def test_what_does_not_fit_is_one_error_on_all(tmp, tmp_path, both, second, message):
    other = [text.format(tmp=tmp_path if "workdir" in text else tmp) for text in second]
    common = [*flags(tmp, tmp_path / "run"), *both]
    codes, group = forked(tmp_path / "printed", *common, second=other)
    assert codes == [1, 1]
    for member in range(2):
        assert len(errors(group, member)) == 1, group.printed()
        assert message.format(tmp=tmp) in group.output(member)
        assert "Traceback" not in group.output(member)
    assert not (tmp_path / "run").exists()


TASK = """
import os, runpy, sys
number, job, *sys.argv = sys.argv[1:]
os.environ.update(
    SLURM_JOB_ID=job, SLURM_STEP_NODELIST="localhost", SLURM_NTASKS="2", SLURM_PROCID=number,
    SLURM_LOCALID=number, SLURM_STEP_NUM_TASKS="2", SLURM_STEP_TASKS_PER_NODE="2",
)
runpy.run_path("train.py", run_name="__main__")
"""


def test_slurm_tasks_find_each_other(tmp, tmp_path, environment):
    job = str(os.getpid())  # jax makes a port of it
    train = ["train.py", *flags(tmp, tmp_path / "run", "--config.batch_size=18")]
    commands = [["-c", TASK, str(number), job, *train] for number in range(2)]
    codes, group = run(commands, tmp_path / "printed", environment)
    assert codes == [1, 1]
    for member in range(2):
        assert "18 images does not divide among 4 devices" in group.output(member)


def test_a_shell_of_a_slurm_job_trains_alone(tmp, tmp_path, environment):
    shell = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    train = ["train.py", *flags(tmp, tmp_path / "run", "--config.batch_size=17")]
    codes, group = run([train], tmp_path / "printed", environment | shell)
    assert codes == [1]
    assert "SLURM job 77, but not in one of its steps (SLURM_STEP_NODELIST" in group.output(0)
    assert "17 images does not divide among 2 devices" in group.output(0)


@pytest.fixture(scope="module")
def finished(tmp):
    codes, group = forked(tmp / "printed", *flags(tmp, tmp / "finished"))
    assert codes == [0, 0], group.printed()
    assert json.loads(group.output(0).splitlines()[-1])["finished"]
    assert "finished" not in group.output(1)  # one process prints what all know
    return tmp / "finished"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--config.model.depth=3", "model.depth: was 2, is 3"),
        ("--config.batch_size=32", "batch_size: was 16, is 32"),
        ("--config.data.labels=coco91", "data.labels: was dataset, is coco91"),
        ("--config.data.root={tmp}/other", "was begun with other pictures or annotations"),
    ],
)
def test_another_run_may_not_resume(finished, tmp, tmp_path, change, message):
    codes, group = forked(tmp_path, *flags(tmp, finished), change.format(tmp=tmp))
    assert codes == [1, 1]
    for member in range(2):
        assert len(errors(group, member)) == 1, group.printed()
        assert message in group.output(member)


def test_two_processes_evaluate_as_one_and_print_once(finished, tmp, tmp_path, environment):
    outs, kept = [], []
    address = free_address()
    # Hosts may have the same data in different places, and read it by their own numbers of threads.
    places = [tmp / "data", tmp_path / "data"]
    places[1].symlink_to(places[0])
    for count in (1, 2):
        base = ["eval.py", "--checkpoint", str(finished), "--batch_size", "4", "--set"]
        base += [f"mesh.coordinator={address}", f"mesh.num_processes={count}"]
        own = [[f"mesh.process_id={i}", f"data.workers={i + 1}"] for i in range(count)]
        commands = [[*base, *own[i], "--data_root", str(places[i])] for i in range(count)]
        codes, group = run(commands, tmp_path / str(count), environment, devices=2 // count)
        assert codes == [0] * count, group.printed()
        outs.append(json.loads(group.output(0).splitlines()[-1]))
        assert all("AP" not in group.output(member) for member in range(1, count))
        kept.append({path.name for path in (tmp / "cache").iterdir()})
    one, two = outs
    assert one.keys() == two.keys()
    assert one["AP"] == pytest.approx(two["AP"], abs=1e-6)
    # Read back, a program has lost the order of its exchanges between two processes on CPUs.
    assert any(name.startswith("jit__predict") for name in kept[0]) and kept[1] == kept[0]
    assert not (tmp / "compiled").exists()  # of the training
    commands[1] += ["--split", "train"]
    codes, group = run(commands, tmp_path / "differing", environment)
    assert codes == [1, 1]
    assert all("split: 'val' on process 0, 'train' on" in group.output(i) for i in range(2))


def wait_for(group, member, text):
    deadline = time.monotonic() + 240 * busy()
    while text not in group.output(member):
        assert time.monotonic() < deadline, group.printed()
        assert group.members[member].poll() is None, group.printed()
        time.sleep(0.1)


@pytest.mark.parametrize("asked", [0, 1])
def test_a_request_to_stop_while_waiting_for_others_stops_all(tmp, tmp_path, environment, asked):
    code = "--config.mesh.stopped_code=143"
    commands = train_commands(3, *flags(tmp, tmp_path / "run"), code)
    with Processes(commands[:2], tmp_path / "printed", **environment) as group:
        wait_for(group, 1, "connected to process 0")
        group.signal(signal.SIGTERM, asked)
        assert group.wait(20 * busy()) == [143, 143], group.printed()
    for member in range(2):
        assert "asked to stop, before the first step; nothing to save" in group.output(member)
    assert not (tmp_path / "run").exists()


def test_ctrl_c_ends_both_processes_in_a_line(tmp, tmp_path, environment):
    # Where tests run in the background, programs are started deaf to it.
    program = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.path.insert(0, ''); sys.argv = sys.argv[1:]; "
        "runpy.run_path('train.py', run_name='__main__')"
    )
    commands = train_commands(2, *flags(tmp, tmp_path / "run"), "--config.epochs=1000")
    commands = [["-c", program, *command] for command in commands]
    with Processes(commands, tmp_path / "printed", **environment) as group:
        wait_for(group, 0, ", loss ")
        group.signal(signal.SIGINT, 1)
        assert group.wait(60 * busy()) == [1, 1], group.printed()
    assert errors(group, 1) == ["train.py: interrupted"]
    assert "process 1 of 2" in group.output(0) and "failed: train.py: interrupted" in group.output(
        0
    )
    assert all("Traceback" not in group.output(member) for member in range(2))


def test_the_page_starts_two_processes_as_written(tmp_path):
    page = (ROOT / "docs" / "pods.md").read_text()
    section = page.split("## Two processes on one machine")[1].split("\n## ")[0]
    (script,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    for name in ("train.py", "configs", "yolos_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
        env=os.environ | quick.ENVIRONMENT | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert json.loads(line)["finished"]
    assert "devices: 4 x cpu" in done.stdout
