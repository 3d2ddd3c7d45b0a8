"""Every binary of experiments, as tests go through them."""

import importlib
import os
import subprocess
import sys
from types import ModuleType

from absl import flags

from tests import paths


def process(name: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs a binary as users do."""
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *arguments],
        cwd=paths.REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


def names() -> list[str]:
    """Modules at the top of experiments; each of them runs with `python -m`."""
    found = (paths.REPOSITORY / "experiments").glob("*.py")
    return sorted(path.stem for path in found if path.stem != "__init__")


def with_flags() -> list[str]:
    """Those whose command line is flags: all but the evaluation harness's, whose arguments are its own."""
    return [name for name in names() if name != "lm_eval_adapter"]


def load(name: str) -> ModuleType:
    return importlib.import_module(f"experiments.{name}")


def flags_of(binary: ModuleType) -> flags.FlagValues:
    values = flags.FlagValues()
    binary.define_flags(values)
    return values
