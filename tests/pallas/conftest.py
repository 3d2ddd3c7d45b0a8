"""The interpreter's programs are many and small: they are compiled in a hurry."""

import pytest


@pytest.fixture(autouse=True)
def _hurry(hurried):
    """Kernels' numbers come from the interpreter, not from XLA's optimizer."""
    yield
