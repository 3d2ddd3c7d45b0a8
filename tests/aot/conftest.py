"""Runs binaries inside the test process."""

import pytest

from experiments.shared import common


@pytest.fixture
def run(capsys):
    """run(binary, *arguments) -> (exit code, stdout, stderr)."""

    def call(binary, *arguments: str):
        capsys.readouterr()
        code = common.guarded(binary.main, common.parse(binary.define_flags, arguments))
        return code, *capsys.readouterr()

    return call
