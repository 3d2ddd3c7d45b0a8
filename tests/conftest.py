"""Settings of every test: shapes and dtypes checked at run time, strict promotion, exact matmuls."""

import gc
import itertools
from pathlib import Path

import jax
import jaxtyping
import pytest

from tests import typecheck

jaxtyping.install_import_hook("specjax", "tests.typecheck.check")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_report_header() -> list[str]:
    """Says so where arguments go unchecked."""
    if typecheck.beartype is None:
        return ["beartype is not installed: shapes and dtypes of arguments are not checked"]
    return []


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
