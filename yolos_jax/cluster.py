"""Which process of how many this is: as the configuration says, or as the cluster does."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

SLURM_TASK = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)
# Launchers that may give each process of a node one of its accelerators: variable with the number
# of the process on its node.
LOCAL_NUMBERS = ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")


BY_CONFIG = "mesh.coordinator"


class Place(NamedTuple):
    """One process' place among the processes of a run."""

    address: str  # host:port of process 0, where all meet
    count: int  # processes, at least 2
    number: int  # of this one, from 0
    local_devices: tuple[int, ...] | None  # of the node's that this process uses; None: all
    found_by: str  # BY_CONFIG, or the cluster's name: for messages


def find(
    config: ConfigDict,
    environ: Mapping[str, str] = os.environ,
    say: Callable[[str], None] = print,
) -> Place | None:
    """Returns this process' place, or None where it is on its own.

    Args:
      config: ``config.mesh``.
      environ: environment variables.
      say: told what is worth knowing about a start alone.

    Raises:
      ValueError: values that make no start, or a cluster that does not say what it must.
    """
    if config.distributed not in ("auto", "off", ""):
        raise ValueError(f"mesh.distributed is {config.distributed!r}; expected 'auto' or 'off'")
    if config.wait_seconds < 1:
        raise ValueError(f"mesh.wait_seconds is {config.wait_seconds}; expected at least 1")
    if config.coordinator:
        return _from_config(config, environ)
    if (config.num_processes, config.process_id) != (1, 0):
        raise ValueError(
            f"mesh.num_processes is {config.num_processes} and mesh.process_id "
            f"{config.process_id}, but mesh.coordinator is empty; expected host:port of process 0"
        )
    if config.distributed != "auto":
        return None
    return _from_cluster(config.wait_seconds, environ, say)


def _from_config(config: ConfigDict, environ: Mapping[str, str]) -> Place | None:
    host, _, port = config.coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(
            f"mesh.coordinator is {config.coordinator!r}; expected host:port of process 0"
        )
    if not 0 <= config.process_id < config.num_processes:
        raise ValueError(
            f"mesh.process_id is {config.process_id} and mesh.num_processes "
            f"{config.num_processes}; expected numbers from 0 to num_processes - 1"
        )
    if config.num_processes == 1:
        return None
    return Place(
        config.coordinator,
        config.num_processes,
        config.process_id,
        local_devices(environ),
        BY_CONFIG,
    )


def _from_cluster(
    seconds: int, environ: Mapping[str, str], say: Callable[[str], None]
) -> Place | None:
    """Asks jax which cluster this is; a cluster of one process is none."""
    if _single_tpu_host(environ):
        return None
    name = "jax"
    try:
        environment = _recognised(environ)
        lonely = outside_slurm_step(environ)
        if environment is not None and environment.name == "slurm" and lonely:
            environment = None
        if environment is None:
            if lonely:
                say(
                    f"SLURM job {environ['SLURM_JOB_ID']}, but {lonely}: starting alone; a run of "
                    "several processes is started with srun"
                )
            return None
        name = environment.name
        if name == "k8s" and "JOB_COMPLETION_INDEX" not in environ:
            return None  # A pod that is no member of an indexed job is on its own.
        count = int(environment.get_process_count())
        if count == 1:
            return None
        number = int(environment.get_process_id())
        address = environ.get("JAX_COORDINATOR_ADDRESS") or environment.get_coordinator_address(
            timeout_secs=seconds,
            override_coordinator_port=environ.get("JAX_COORDINATOR_PORT"),
        )
    except Exception as error:  # Whatever a cluster's own library raises.
        raise ValueError(
            f"this looks like a cluster ({name}), which did not say what it must: {error!r}; "
            "--config.mesh.distributed=off starts alone, --config.mesh.coordinator, num_processes "
            "and process_id start without asking it"
        ) from error
    if not 0 <= number < count:
        raise ValueError(f"{name} says that this is process {number} of {count}")
    devices = None if "tpu" in name else local_devices(environ)
    return Place(address, count, number, devices, name)


def _recognised(environ: Mapping[str, str]):
    # jax tells nobody but jax.distributed.initialize which cluster it recognises, and that starts
    # a service and waits even for a single process, or for processes that will never come.
    from jax._src.clusters import ClusterEnv

    with warnings.catch_warnings():
        if "JOB_COMPLETION_INDEX" not in environ:
            # In any pod, jax advises to install the package kubernetes for the case that it is one
            # of several.
            warnings.simplefilter("ignore")
        types = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
        return next((kind for kind in types if kind.is_env_present()), None)


def _single_tpu_host(environ: Mapping[str, str]) -> bool:
    # Answered from the environment, a single host asks no metadata server.
    if "TPU_PROCESS_ADDRESSES_PATH" in environ:  # Later versions of jax read a file.
        return False
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    slices = environ.get("MEGASCALE_NUM_SLICES", "1")
    return bool(hosts) and "," not in hosts and slices == "1"


def outside_slurm_step(environ: Mapping[str, str]) -> str | None:
    """Why a process in a SLURM job is not one of several tasks; None: it is, or is in no job.

    The shells of sbatch and salloc have the job's variables without being tasks of it.
    """
    if "SLURM_JOB_ID" not in environ:
        return None
    missing = [name for name in SLURM_TASK if name not in environ]
    if missing:
        return f"not in one of its steps ({', '.join(missing)} not set)"
    # salloc may open its shell as a step of one task that has the number of the job's tasks.
    if environ.get("SLURM_STEP_NUM_TASKS") == "1" != environ["SLURM_NTASKS"]:
        return "this step has one task (SLURM_STEP_NUM_TASKS=1)"
    return None


def local_devices(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """Returns which of the node's GPUs this process uses; None: all that it sees.

    One process per node uses all of them; of several, the n-th uses the n-th, unless the launcher
    (or JAX_LOCAL_DEVICE_IDS, which jax reads itself) has dealt them out.
    """
    number = next((int(environ[name]) for name in LOCAL_NUMBERS if name in environ), None)
    if number is None or "JAX_LOCAL_DEVICE_IDS" in environ:
        return None
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and "," not in visible:
        return None
    return (number,) if tasks_on_this_node(environ) != 1 else None


def tasks_on_this_node(environ: Mapping[str, str]) -> int | None:
    """Returns how many processes the launcher started on this node; None: it does not say."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environ:
        return int(environ["OMPI_COMM_WORLD_LOCAL_SIZE"])
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # such as 8(x3),4
    counts: list[int] = []
    for tasks, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(repeated or 1)
    node = int(environ.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else None
