"""Settings of every test: shapes and dtypes checked at run time, strict promotion, exact matmuls."""

import gc
import itertools
import os
import shutil
import tempfile
from pathlib import Path

import jax
import jaxtyping
import pytest

from tests import typecheck  # noqa: F401  (the hook below names it)

jaxtyping.install_import_hook("specjax", "tests.typecheck.check")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")


# Executables that the processes of one run share: many tests compile the same programs of the same small models.
_EXECUTABLES = "SPECJAX_TEST_EXECUTABLES"


def pytest_configure(config: pytest.Config) -> None:
    """The process that starts the others makes the folder, whose name they inherit."""
    if not hasattr(config, "workerinput"):
        os.environ[_EXECUTABLES] = tempfile.mkdtemp(prefix="specjax-tests-")
    jax.config.update("jax_compilation_cache_dir", os.environ[_EXECUTABLES])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the folder with the run."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(_EXECUTABLES), ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests marked `gpu` where JAX has none."""
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture
def hurried():
    """Code that runs slower and compiles faster, for tests of logic rather than of numbers, memory or speed."""
    from tests import tiny

    with tiny.hurried_compiler():
        yield


# Every compiled program takes some memory mappings; Linux ends a process that has 65,530 of them.
_MAPPINGS = Path("/proc/self/maps")
_MOST_MAPPINGS = 40_000
_finished = itertools.count(1)


@pytest.fixture(autouse=True)
def _few_mappings():
    """Lets go of compiled programs once there are many; looks after every 20 tests."""
    yield
    looks = next(_finished) % 20 == 0 and _MAPPINGS.exists()
    if looks and _MAPPINGS.read_bytes().count(b"\n") > _MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()
