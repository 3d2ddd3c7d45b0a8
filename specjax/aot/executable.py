"""Executables as files: compiled here, loaded where the GPU is."""

import json
import pickle
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from specjax.errors import CheckpointError
from specjax.version import __version__

_PACKAGES = ("jax", "jaxlib")


def versions() -> dict[str, str]:
    """What an executable and the process that loads it must have in common."""
    # This package may be a folder that was copied there, of which no installer knows.
    return {name: metadata.version(name) for name in _PACKAGES} | {"specjax": __version__}


def save(compiled: Any, path: Path, *, target: str) -> dict[str, Any]:
    """Writes a `jax.stages.Compiled` to `path` and what it is for to `path`.json; returns the latter with the size."""
    payload, _, _ = serialize_executable.serialize(compiled)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(payload)
    partial.replace(path)
    facts = {"executable": path.name, "executable_bytes": len(payload)}
    path.with_name(f"{path.name}.json").write_text(
        json.dumps(facts | {"target": target, "versions": versions()}, indent=1)
    )
    return facts


def load(path: Path, arguments: dict[str, Any], result: Any) -> Any:
    """The executable in a file that `save` wrote, for a process with that GPU.

    The file is a pickle, which can run anything: load none that you did not make.

    Args:
        arguments: keyword arguments as those that it was compiled for; only their structure is read.
        result: something of the structure of what it returns.
    Raises:
        FileNotFoundError: the file, or what `save` wrote beside it, is missing.
        CheckpointError: it was made with other versions, for another GPU, or cannot be read here.
    """
    facts = json.loads(path.with_name(f"{path.name}.json").read_text())
    kind = jax.devices()[0].device_kind
    if facts["versions"] != versions() or facts["target"] != kind:
        raise CheckpointError(
            f"{path} was compiled for {facts['target']} with {facts['versions']}; here are {kind} and {versions()}: "
            "compile it again with experiments.aot_compile"
        )
    structures = jax.tree.structure(((), arguments)), jax.tree.structure(result)
    try:
        return serialize_executable.deserialize_and_load(path.read_bytes(), *structures)
    except (ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: cannot be loaded here: {error}") from None
