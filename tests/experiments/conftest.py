"""Runs binaries inside the test process, on models that are loaded (and their programs compiled) once."""

import functools
import json

import pytest

import specjax
from experiments.shared import common
from tests import paths

_load = functools.cache(specjax.load)


@pytest.fixture(autouse=True)
def shared_models(monkeypatch):
    """`specjax.load` with the same arguments gives the same model."""
    monkeypatch.setattr(specjax, "load", _load)


@pytest.fixture
def tiny() -> str:
    """Path of the tiny model."""
    return str(paths.fixture("tiny-fp16"))


@pytest.fixture
def run(capsys):
    """run(binary, *arguments) -> (exit code, stdout, stderr)."""

    def call(binary, *arguments: str):
        capsys.readouterr()
        code = common.guarded(binary.main, common.parse(binary.define_flags, arguments))
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def write_rows(tmp_path):
    """write_rows(name, rows) -> path of a JSON-lines file."""

    def write(name: str, rows: list) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write
