"""Finished layers of an unfinished quantization, on disk, so that an interrupted run resumes."""

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from specjax.quant.linear import QuantizedLinear
from specjax.quant.scheme import Scheme

_log = logging.getLogger(__name__)

_FIELDS = ("codes", "scales", "zeros", "minima", "channel_scales", "bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkDir:
    """A folder of layers; everything in it belongs to the run that `fingerprint` describes.

    Attributes:
        path: the folder.
    """

    path: Path

    @classmethod
    def open(cls, path: Path, fingerprint: dict) -> "WorkDir":
        """The folder of this run; one that another run (other settings, source or text) left is
        emptied.
        """
        marker = path / "run.json"
        text = json.dumps(fingerprint, indent=1, sort_keys=True)
        if path.exists() and not (marker.is_file() and marker.read_text() == text):
            _log.info("%s holds layers of another run: starting over", path)
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        marker.write_text(text)
        return cls(path=path)

    def finished_layers(self) -> int:
        """How many layers, from the first on, are complete."""
        count = 0
        while self._layer(count).is_file():
            count += 1
        return count

    def save_layer(
        self,
        index: int,
        linears: dict[str, QuantizedLinear],
        norms: dict[str, np.ndarray],
        hidden: np.ndarray | None,
    ) -> None:
        """Keeps a layer and the inputs of the next one; earlier inputs are dropped."""
        if hidden is not None:
            self._write(self._hidden(index + 1), {"hidden": hidden})
        arrays = {f"norm.{name}": np.asarray(gain) for name, gain in norms.items()}
        for name, linear in linears.items():
            for field in _FIELDS:
                value = getattr(linear, field)
                if value is not None:
                    arrays[f"{name}.{field}"] = _plain(value)
        self._write(self._layer(index), arrays)
        self._hidden(index).unlink(missing_ok=True)

    def load_layer(
        self, index: int, names: list[str], scheme: Scheme, group_size: int
    ) -> tuple[dict[str, QuantizedLinear], dict[str, np.ndarray]]:
        """Linears by name and norm gains of a finished layer."""
        with np.load(self._layer(index)) as file:
            arrays = dict(file)
        linears = {}
        for name in names:
            parts = {f: arrays[f"{name}.{f}"] for f in _FIELDS if f"{name}.{f}" in arrays}
            codes = parts.pop("codes")
            parts = {field: jnp.asarray(value) for field, value in parts.items()}
            size = codes.shape[1] if group_size == -1 else group_size
            dtype = scheme.weights.code_dtype
            linears[name] = QuantizedLinear(
                codes=jnp.asarray(codes.view(dtype)), scheme=scheme, group_size=size, **parts
            )
        norms = {k.removeprefix("norm."): v for k, v in arrays.items() if k.startswith("norm.")}
        return linears, norms

    def load_hidden(self, index: int) -> np.ndarray | None:
        """Inputs of layer `index`, or None where they were not kept."""
        if not self._hidden(index).is_file():
            return None
        with np.load(self._hidden(index)) as file:
            return file["hidden"]

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.path)

    def _layer(self, index: int) -> Path:
        return self.path / f"layer-{index:04d}.npz"

    def _hidden(self, index: int) -> Path:
        return self.path / f"hidden-{index:04d}.npz"

    def _write(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as stream:
            np.savez(stream, **arrays)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)


def _plain(array) -> np.ndarray:
    """A numpy array of a dtype that numpy files know; codes of other dtypes as bytes."""
    values = np.asarray(array)
    return (
        values
        if values.dtype.kind in "fiu" and values.dtype.isbuiltin == 1
        else values.view(np.uint8)
    )
