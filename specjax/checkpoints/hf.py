"""Checkpoint folders in the Hugging Face layout: config.json, generation_config.json, weights;
dense or quantized."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from specjax.checkpoints import stored_settings
from specjax.checkpoints.base import LinearFormat
from specjax.checkpoints.names import Names, Place
from specjax.config import DTYPES, ModelConfig
from specjax.config.fields import homes, settle
from specjax.errors import CheckpointError, ConfigError
from specjax.files import base as file_base
from specjax.files import source as sources
from specjax.quant import view
from specjax.quant.dense_linear import Linear
from specjax.quant.linear import QuantizedLinear

_EMBEDDING = "model.embed_tokens.weight"
_DTYPES = ("dtype", "torch_dtype")
_FLOATS = ("float32", "float16", "bfloat16", "float64")

logger = logging.getLogger(__name__)


class HFCheckpoint:
    """A Hugging Face folder, or any tensors under Hugging Face names.

    Attributes:
        path: the folder.
        config: the model's configuration.
        format: "hf", or the quantized format's name.
        source: the tensors as stored.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        source: file_base.TensorSource,
        linear_format: LinearFormat | None = None,
    ):
        self.path = path
        self.config = config
        self.source = source
        self.format = "hf" if linear_format is None else linear_format.name
        self._linear_format = linear_format
        self._names = Names(config, source.names())
        self._last_fused: tuple[Place, Linear | QuantizedLinear] | None = None

    def has(self, name: str) -> bool:
        return self._names(name) in self._names.stored

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A dense tensor in the dtype it is stored in, possibly a read-only view of the file."""
        return self._tensor(self._names(name), shape)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """As `tensor`, by the name in the file."""
        if self._linear_format is not None:
            array = self._linear_format.tensor(self.source, name)
            if array is not None:
                file_base.check_shape(array.shape, shape, name, self.path)
                return array
        if name not in self._names.stored:
            raise CheckpointError(f"{name} is missing from {self.path}")
        file_base.check_shape(self.source.shape(name), shape, name, self.path)
        dtype = self.source.dtype(name)
        if dtype.name not in _FLOATS:
            raise CheckpointError(
                f"{name} in {self.path} has dtype {dtype.name}, expected floating point: the "
                f"weights are quantized, but config.json describes the format as {self.format!r}"
            )
        return self.source.read(name)

    def linear(
        self, prefix: str, out_features: int, in_features: int, bias: bool
    ) -> Linear | QuantizedLinear:
        place = self._names.place(prefix)
        if place.total is None:
            return self._linear(place.prefix, out_features, in_features, bias)
        if self._last_fused is None or self._last_fused[0].prefix != place.prefix:
            whole = self._linear(place.prefix, place.total, in_features, bias)
            self._last_fused = place, whole
        return rows_of(self._last_fused[1], slice(place.start, place.start + out_features))

    def _linear(
        self, prefix: str, out_features: int, in_features: int, bias: bool
    ) -> Linear | QuantizedLinear:
        """As `linear`, by the prefix in the file."""
        if self._linear_format is not None:
            shape = (out_features, in_features)
            linear = self._linear_format.linear(self.source, prefix, *shape, bias)
            if linear is not None:
                return linear
        weight = self._dense_weight(prefix, out_features, in_features)
        values = self._bias(f"{prefix}.bias", out_features, bias)
        return Linear(jnp.asarray(weight), None if values is None else jnp.asarray(values))

    def _dense_weight(self, prefix: str, out_features: int, in_features: int) -> np.ndarray:
        name = f"{prefix}.weight"
        if self._names.layout.transposed and prefix != self._names("lm_head"):
            return self._tensor(name, (in_features, out_features)).T
        return self._tensor(name, (out_features, in_features))

    def _bias(self, name: str, out_features: int, expected: bool) -> np.ndarray | None:
        if not expected and name not in self._names.stored:
            return None
        values = self._tensor(name, (out_features,))
        if expected:
            return values
        # Some converters write zeros for layers without a bias.
        if np.any(values != 0):
            raise CheckpointError(
                f"{name} in {self.path} is not zero, but the configuration states no such bias"
            )
        return None


def rows_of(linear: Linear | QuantizedLinear, rows: slice) -> Linear | QuantizedLinear:
    """Some outputs of a linear."""
    if isinstance(linear, Linear):
        bias = None if linear.bias is None else linear.bias[...][rows]
        return Linear(linear.weight[...][rows], bias)
    cut = {
        name: getattr(linear, name)[rows]
        for name in view.ARRAYS_ALONG_N
        if getattr(linear, name) is not None
    }
    return dataclasses.replace(linear, **cut)


def open_folder(path: Path) -> HFCheckpoint:
    """Opens a folder with a config.json; no weight is read before the configuration has been
    accepted.

    Raises:
        FileNotFoundError: config.json or the weights are missing.
        ConfigError: the configuration asks for something not implemented.
        CheckpointError: a file is malformed or truncated, or the quantized format is not supported.
    """
    from specjax.checkpoints import formats
    from specjax.files import manifest

    gguf_files = sorted(file.name for file in path.glob("*.gguf"))
    if gguf_files and not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} has no config.json; pass one of {', '.join(gguf_files)}")
    hf_config = file_base.read_json(path / "config.json")
    generation = path / "generation_config.json"
    generation_config = file_base.read_json(generation) if generation.is_file() else None
    try:
        config = ModelConfig.from_hf(hf_config, generation_config)
    except ConfigError as error:
        raise ConfigError(f"{path / 'config.json'}: {error}") from error
    manifest.read(path)
    source = sources.open_source(path)
    config = stored_settings.settled(path, config, hf_config, source)
    if not any(fields.get(name) for fields in homes(hf_config) for name in _DTYPES):
        config = _stored_dtype(config, source)
    linear_format = formats.detect(_quantization_config(path, hf_config), source, hf_config)
    checkpoint = HFCheckpoint(path, config, source, linear_format)
    logger.info("%s: %s, format %s", path, config.architecture, checkpoint.format)
    return checkpoint


def _quantization_config(path: Path, hf_config: dict[str, Any]) -> dict[str, Any] | None:
    """`quantization_config` of config.json, or the separate file of older tools (AutoGPTQ, AutoAWQ).

    Where both are there, config.json is followed, as by transformers; fields that the file states otherwise are warned
    about.
    """
    found = [home.get("quantization_config") for home in homes(hf_config)]
    stated = next((value for value in found if value), None)
    files = (path / name for name in ("quantize_config.json", "quant_config.json"))
    file = next((file for file in files if file.is_file()), None)
    beside = None if file is None else file_base.read_json(file)
    if not isinstance(stated, dict | None):
        raise ConfigError(f"quantization_config = {stated!r}: expected an object")
    if stated is None or beside is None:
        return stated or beside
    for key in sorted(stated.keys() & beside.keys()):
        settle({f"quantization_config.{key}": stated[key], f"{file.name}: {key}": beside[key]})
    return stated


def _stored_dtype(config: ModelConfig, source: file_base.TensorSource) -> ModelConfig:
    """Fills in a dtype that config.json does not state: the embedding's, as transformers does."""
    name = Names(config, source.names())(_EMBEDDING)
    if name not in source.names() or source.dtype(name).name not in DTYPES:
        return config
    return dataclasses.replace(config, dtype=source.dtype(name).name)
