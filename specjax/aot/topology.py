"""GPUs by name, and the deviceless topologies from which XLA compiles for them."""

from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import topologies

from specjax.errors import ConfigError
from specjax.pallas import device

# In the form of XLA's GpuTargetConfigProto. The driver's version is needed: without it XLA takes kernels, conditionals
# and cuBLAS calls out of command buffers.
_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_memory_per_sm}
  threads_per_core_limit: {threads_per_sm}
  core_count: {num_sms}
  fpus_per_core: {fpus_per_sm}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2_bytes}
  clock_rate_ghz: {clock_ghz}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {shared_memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  driver_version: "13.0.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{kind}"
"""


@dataclass(frozen=True, kw_only=True)
class Target(device.Gpu):
    """A GPU by its data sheet.

    Attributes:
        bandwidth: of its memory, bytes per second.
        memory: bytes.
        l2_bytes: second-level cache.
        clock_ghz: boost clock.
        fpus_per_sm: float32 lanes of a multiprocessor.
        threads_per_sm: threads that a multiprocessor holds.
    """

    bandwidth: float
    memory: float
    l2_bytes: int
    clock_ghz: float
    fpus_per_sm: int = 128
    threads_per_sm: int = 1536

    @property
    def sm(self) -> str:
        """The architecture as compilers name it, e.g. "sm_90a"."""
        major, minor = self.arch
        return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def _target(kind, arch, num_sms, bandwidth, memory, l2_bytes, clock_ghz, **others) -> Target:
    return Target(
        kind=kind,
        arch=arch,
        num_sms=num_sms,
        shared_memory=device.SHARED_MEMORY[arch],
        bandwidth=bandwidth,
        memory=memory,
        l2_bytes=l2_bytes,
        clock_ghz=clock_ghz,
        **others,
    )


_DATA_CENTRE = {"threads_per_sm": 2048}

TARGETS: dict[str, Target] = {
    "h200": _target("NVIDIA H200", (9, 0), 132, 4.8e12, 141e9, 50 << 20, 1.98, **_DATA_CENTRE),
    "h100": _target(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 3.35e12, 80e9, 50 << 20, 1.98, **_DATA_CENTRE
    ),
    "a100": _target(
        *("NVIDIA A100-SXM4-80GB", (8, 0), 108, 2.039e12, 80e9, 40 << 20, 1.41),
        fpus_per_sm=64,
        **_DATA_CENTRE,
    ),
    "rtx3090": _target("NVIDIA GeForce RTX 3090", (8, 6), 82, 936e9, 24e9, 6 << 20, 1.695),
    "rtx4090": _target("NVIDIA GeForce RTX 4090", (8, 9), 128, 1008e9, 24e9, 72 << 20, 2.52),
    "b200": _target("NVIDIA B200", (10, 0), 148, 8e12, 180e9, 126 << 20, 1.965, **_DATA_CENTRE),
    "rtx5090": _target("NVIDIA GeForce RTX 5090", (12, 0), 170, 1792e9, 32e9, 96 << 20, 2.407),
    "spark": _target("NVIDIA GB10", (12, 1), 48, 273e9, 128e9, 24 << 20, 2.418),
    "l40": _target("NVIDIA L40", (8, 9), 142, 864e9, 48e9, 96 << 20, 2.49),
}


def lookup(name: str) -> Target:
    """The target of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in TARGETS:
        raise ConfigError(f"target={name!r} is unknown; known targets: {', '.join(TARGETS)}")
    return TARGETS[name]


def target_config(target: Target) -> str:
    """The target in the text form that XLA's compiler reads."""
    major, minor = target.arch
    return _CONFIG.format(
        kind=target.kind,
        major=major,
        minor=minor,
        num_sms=target.num_sms,
        shared_memory=target.shared_memory,
        # One kilobyte of a multiprocessor's shared memory is the system's, per block.
        shared_memory_per_sm=target.shared_memory + 1024,
        threads_per_sm=target.threads_per_sm,
        fpus_per_sm=target.fpus_per_sm,
        bandwidth=int(target.bandwidth),
        l2_bytes=target.l2_bytes,
        clock_ghz=target.clock_ghz,
        memory=int(target.memory),
    )


def mesh(target: Target) -> jax.sharding.Mesh:
    """A mesh of one such GPU, for abstract arguments.

    Raises:
        ConfigError: the CUDA plugin of JAX is not installed here.
    """
    jax.devices()  # plugins are found when the first backend is made
    name = f"{target.kind} without a device".replace(" ", "_")
    try:
        found = topologies.get_topology_desc(
            name, "cuda", target_config=target_config(target), topology="1x1x1"
        )
    except (NotImplementedError, RuntimeError, KeyError) as error:
        raise ConfigError(
            f"compiling for {target.kind} needs JAX's CUDA plugin, in a virtual environment of its own: "
            f"`make aot` ({type(error).__name__}: {error})"
        ) from None
    return jax.sharding.Mesh(np.array(found.devices), ("x",))
