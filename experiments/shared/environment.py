"""What a result was made with, for the rows of result files."""

import functools
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import specjax


def record() -> dict[str, Any]:
    """Versions, device and command line."""
    device = jax.devices()[0]
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    name = Path(sys.argv[0]).stem
    return {
        **versions,
        "specjax": specjax.__version__,
        "git": _git_revision(),
        "python": platform.python_version(),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(),
        "cpu": _cpu_model(),
        "num_cpus": os.cpu_count(),
        "command": shlex.join(["python", "-m", f"experiments.{name}", *sys.argv[1:]]),
    }


@functools.cache
def _git_revision() -> str | None:
    """Commit of the source tree, "-dirty" where it has changes; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


@functools.cache
def _cpu_model() -> str:
    """Marketing name of the processor where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
