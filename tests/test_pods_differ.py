"""Real processes that would go separate ways, each with what it finds on its own host."""

from __future__ import annotations

import shutil

import pytest

from tests import small_run, tiny_checkpoint
from tests.processes import ROOT, Processes, free_address
from yolos_jax.data.coco import read_coco
from yolos_jax.labels import LabelMap

pytestmark = pytest.mark.slow

ANNOTATIONS = "annotations/instances_val2017.json"
# The code of one process only, then the program.
BOTH = """
import os, runpy, sys
own, *sys.argv = sys.argv[1:]
exec(own)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FEWER_DEVICES = "os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=1'"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Pictures, and two hosts' folders with different checkpoints of one name."""
    folder = tmp_path_factory.mktemp("hosts")
    small_run.write_pictures(folder / "data")
    label_map = LabelMap.from_categories(read_coco(folder / "data" / ANNOTATIONS)["categories"])
    for number in range(2):
        tiny_checkpoint.write(folder / str(number) / "start", label_map, seed=number)
    return folder


def run(command, folder, of_each, devices=2):
    """Two processes; returns the error that each printed, from its first line on."""
    commands = [["-c", BOTH, own, *map(str, command(i))] for i, own in enumerate(of_each)]
    with Processes(commands, folder / "printed", devices=devices) as group:
        codes = group.wait(small_run.PATIENCE)
        assert codes == [1, 1], group.printed()
    found = []
    for member in range(2):
        said = [line for line in group.output(member).splitlines() if "[Gloo]" not in line]
        said = "\n".join(["", *said]).partition(f"\n{command(0)[0].name}: ")
        assert said[1], group.printed()
        found.append(said[2])
    return found


def evaluating(hosts, *more):
    address = free_address()
    of_both = ["--checkpoint", "start", "--data_root", hosts / "data", "--batch_size", "4", "--set"]
    meet = [f"mesh.coordinator={address}", "mesh.num_processes=2", *more]
    return lambda i: [ROOT / "eval.py", *of_both, *meet, f"mesh.process_id={i}"]


def training(hosts, folder, **changes):
    address = free_address()
    _, *flags = small_run.flags(hosts / "data", folder / "run", **changes)
    meet = [f"--config.mesh.coordinator={address}", "--config.mesh.num_processes=2"]
    of_both = [f"--config={ROOT / 'configs' / 'shapes.py'}", *flags, *meet]
    return lambda i: [ROOT / "train.py", *of_both, f"--config.mesh.process_id={i}"]


@pytest.mark.parametrize(
    ("second", "changes", "message"),
    [
        (FEWER_DEVICES, {}, "  devices: 2 on process 0, 1 on process 1"),
        ("os.environ['JAX_THREEFRY_PARTITIONABLE'] = '0'", {}, "  jax_threefry_partitionable: "),
        ("", {"init": "start"}, "  parameters in start: '"),
    ],
)
def test_training_does_not_begin(hosts, tmp_path, second, changes, message):
    of_each = [f"os.chdir({str(hosts / '0')!r})", f"os.chdir({str(hosts / '1')!r}); {second}"]
    one, other = run(training(hosts, tmp_path, **changes), tmp_path, of_each)
    assert one == other and message in one
    assert not (tmp_path / "run").exists()


def test_nothing_is_evaluated_of_two_checkpoints(hosts, tmp_path):
    of_each = [f"os.chdir({str(hosts / str(number))!r})" for number in range(2)]
    one, other = run(evaluating(hosts), tmp_path, of_each)
    assert one == other and "  parameters in the checkpoint: '" in one


def test_unreadable_pictures_are_counted_over_all_processes(hosts, tmp_path):
    shutil.copytree(hosts / "data", tmp_path / "data")
    (tmp_path / "start").symlink_to(hosts / "0" / "start")
    pictures = sorted((tmp_path / "data" / "val2017").iterdir())
    for path in pictures:
        path.write_bytes(b"nothing")  # 2 of the first batch are of each process
    own = f"os.chdir({str(tmp_path)!r})"
    command = evaluating(tmp_path, "data.max_bad_fraction=0.25")
    one, other = run(command, tmp_path, [own, own], devices=1)
    assert one == other and one.startswith("4 or more of 10 pictures cannot be read, over")
    assert sum(path.name in one for path in pictures) >= 4
