"""Alone or one of several: what the configuration and the cluster's variables say."""

from __future__ import annotations

import os

import pytest

from configs import common
from yolos_jax import cluster

TASK = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
MPI = {
    "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
}


@pytest.fixture
def find(monkeypatch):
    """What a process with these variables and keys is; jax looks at the real environment."""

    def look(variables=(), **keys):
        for name in [name for name in os.environ if name.startswith(("SLURM", "OMPI", "TPU_"))]:
            monkeypatch.delenv(name)
        for name, value in dict(variables).items():
            monkeypatch.setenv(name, value)
        config = common.get_config().mesh
        config.update(keys)
        said = []
        return cluster.find(config, dict(variables), said.append), "\n".join(said)

    return look


def test_a_machine_on_its_own_is_alone_and_says_nothing(find):
    assert find() == (None, "")


def test_a_slurm_task_is_one_of_several(find):
    place, said = find(TASK)
    assert place == ("gpu03:61517", 4, 3, (1,), "slurm")  # jax's port for job 77
    assert not said
    assert find(TASK | {"JAX_COORDINATOR_ADDRESS": "10.0.0.9:1234"})[0].address == "10.0.0.9:1234"


@pytest.mark.parametrize("keys", [{"distributed": "off"}, {"distributed": ""}])
def test_off_is_alone_whatever_the_cluster(find, keys):
    assert find(TASK, **keys) == (None, "")


@pytest.mark.parametrize("gone", [name for name in cluster.SLURM_TASK if name != "SLURM_JOB_ID"])
def test_a_partial_slurm_environment_is_alone_and_says_why(find, gone):
    place, said = find({name: value for name, value in TASK.items() if name != gone})
    assert place is None
    assert "SLURM job 77" in said and f"{gone} not set" in said and "\n" not in said


def test_a_shell_of_a_job_is_alone_and_says_why(find):
    # salloc's shell as an interactive step: one task, and yet the number of the job's.
    place, said = find(TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    assert place is None
    assert "SLURM_STEP_NUM_TASKS=1" in said and "\n" not in said


def test_a_step_of_one_task_is_alone(find):
    alone = {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert find(TASK | alone) == (None, "")


def test_open_mpi(find):
    assert find(MPI)[0] == ("10.96.0.1:61441", 2, 1, None, "ompi")


def test_a_cluster_that_makes_no_sense_is_an_error_with_the_way_out(find, monkeypatch):
    def no_answer(environ):
        raise ConnectionError("no metadata server")

    with pytest.raises(ValueError, match=r"slurm.*mesh\.distributed=off"):
        find(TASK | {"SLURM_NTASKS": "four"})
    monkeypatch.setattr(cluster, "_recognised", no_answer)
    with pytest.raises(ValueError, match=r"jax.*no metadata server.*mesh\.distributed=off"):
        find({})


def test_a_process_beyond_the_count_is_an_error(find):
    with pytest.raises(ValueError, match="process 9 of 4"):
        find(TASK | {"SLURM_PROCID": "9"})


@pytest.mark.parametrize(
    ("variables", "alone"),
    [
        ({"TPU_WORKER_HOSTNAMES": "t0"}, True),
        ({"TPU_PROCESS_ADDRESSES": "t0:8476"}, True),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t0", "MEGASCALE_NUM_SLICES": "2"}, False),
    ],
)
def test_a_single_tpu_host_asks_nobody(find, monkeypatch, variables, alone):
    asked = []
    monkeypatch.setattr(cluster, "_recognised", lambda environ: asked.append(1))
    assert find(variables)[0] is None
    assert bool(asked) == (not alone)


def test_a_tpu_slice_uses_all_of_a_hosts_chips(find, monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr("socket.gethostbyname", lambda name: "10.0.0.2")
    slices = {"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}
    host = {
        "TPU_WORKER_HOSTNAMES": "t0,t1,t2",
        "TPU_WORKER_ID": "2",
        "TPU_SKIP_MDS_QUERY": "1",  # as GKE sets it
    }
    monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value", (slices | host).get)
    assert find(host | slices)[0] == ("t0:8482", 3, 2, None, "gketpu")


def test_explicit_values_win_over_the_cluster(find):
    place, _ = find(TASK, coordinator="h:99", num_processes=2, process_id=1)
    assert place == ("h:99", 2, 1, (1,), "mesh.coordinator")
    assert find({}, coordinator="h:99", num_processes=1)[0] is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"distributed": "maybe"}, "distributed is 'maybe'; expected 'auto' or 'off'"),
        ({"coordinator": "host", "num_processes": 2}, "'host'; expected host:port"),
        ({"coordinator": ":80", "num_processes": 2}, "':80'; expected host:port"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "process_id is 2"),
        ({"wait_seconds": 0}, "wait_seconds is 0"),
        ({"num_processes": 4, "process_id": 3}, "is 4 and mesh.process_id 3, but mesh.coordinator"),
    ],
)
def test_values_that_make_no_start_are_named(find, keys, message):
    with pytest.raises(ValueError, match=message):
        find({}, **keys)


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        ({}, (1,)),  # several processes on the node: one GPU each
        ({"SLURM_STEP_TASKS_PER_NODE": "2,1"}, None),  # alone on its node: all GPUs
        ({"CUDA_VISIBLE_DEVICES": "5"}, None),  # dealt out by srun --gpus-per-task=1
        ({"CUDA_VISIBLE_DEVICES": "4,5"}, (1,)),
        ({"JAX_LOCAL_DEVICE_IDS": "0,1"}, None),  # jax reads it itself
        ({"SLURM_STEP_TASKS_PER_NODE": "3"}, (1,)),  # not said for this node: as jax does
    ],
)
def test_which_gpus_of_the_node_a_process_uses(changes, devices):
    assert cluster.local_devices(TASK | changes) == devices


def test_without_a_launcher_all_devices_are_used():
    assert cluster.local_devices({}) is None
