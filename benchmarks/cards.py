"""GPUs as XLA's compiler wants them described, so that it compiles for them where there are none.

Figures are those of NVIDIA's CUDA C++ Programming Guide for compute capability 9.0 and of the
H200's data sheet. Autotuning needs a card: without one XLA takes the libraries' first choice.
"""

from __future__ import annotations

import os
from typing import Any

from jax.experimental import topologies

# What is compiled depends on their versions, besides jax's.
PACKAGES = ("jax-cuda13-pjrt", "nvidia-cudnn-cu13")
ENVIRONMENT = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}  # it asks a driver, which is not here
_HOPPER = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
  %s
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 24 }
runtime_version { major: 13 }
device_description_str: "%s"
"""
_CARDS = {
    "h200": _HOPPER
    % (
        "memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 "
        "device_memory_size: 141000000000",
        "NVIDIA H200",
    ),
}


def devices(card: str, count: int) -> list[Any]:
    """The GPUs of one machine that is not here.

    Args:
      card: a key of ``slices.CHIPS`` whose platform is 'cuda'.
      count: of GPUs.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    shape = {"target_config": _CARDS[card], "topology": f"1x1x{count}"}
    return topologies.get_topology_desc(platform="cuda", **shape).devices
