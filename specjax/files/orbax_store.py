"""Tensors by name in an Orbax checkpoint: the sharded layout of specjax's own format.

Orbax users can restore the same folder with `orbax.checkpoint` and their own shardings: it is a flat dictionary of
the names that a safetensors file of the format would have. Importing Orbax takes a second, so it happens on first
use.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from specjax.errors import CheckpointError
from specjax.files import base

FOLDER = "orbax"
"""Name of the Orbax checkpoint inside a model folder."""


class OrbaxSource:
    """Reads tensors one at a time.

    Raises:
        CheckpointError: the folder is not a complete Orbax checkpoint.
    """

    def __init__(self, path: Path):
        from orbax.checkpoint.experimental import v1 as orbax

        self.path = path
        if not orbax.is_orbax_checkpoint(path):
            raise CheckpointError(
                f"{path} is not a complete Orbax checkpoint; export or copy it again"
            )
        self._entries = orbax.metadata(path).metadata

    def names(self) -> Sequence[str]:
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name).shape)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(self._entry(name).dtype)

    def read(self, name: str) -> np.ndarray:
        from orbax.checkpoint.experimental import v1 as orbax

        entry, context = self._entry(name), orbax.Context()
        context.pytree.loading.partial_load = True
        with context:
            array = np.asarray(orbax.load(self.path, {name: entry})[name])
        base.check_finite(array, name, self.path)
        return array

    def _entry(self, name: str):
        if name not in self._entries:
            raise CheckpointError(f"{name} is missing from {self.path}")
        return self._entries[name]


def save(path: Path, tensors: dict[str, Shaped[np.ndarray, "..."]]) -> None:
    """Writes all tensors, which are in memory together (Orbax saves trees, not streams)."""
    from orbax.checkpoint.experimental import v1 as orbax

    orbax.save(path, tensors)
