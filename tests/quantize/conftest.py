"""Quantizing a tiny model compiles much and computes little: it is compiled in a hurry."""

import pytest


@pytest.fixture(autouse=True)
def _hurry(hurried):
    """Codes are compared with codes of the same run, and with numpy."""
    yield
