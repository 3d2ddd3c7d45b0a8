"""What a model needs from a checkpoint, whatever its format."""

from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from specjax.config import ModelConfig
from specjax.files.base import TensorSource
from specjax.quant.dense_linear import Linear
from specjax.quant.linear import QuantizedLinear


@runtime_checkable
class Checkpoint(Protocol):
    """Named parameters of a model, in Hugging Face names and orientation.

    Attributes:
        path: the folder or file, for messages.
        config: shape and constants of the model.
        format: "hf" (dense), "gguf", or the name of a quantized format.
    """

    path: Path
    config: ModelConfig
    format: str

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name, as stored."""
        ...

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A dense tensor.

        Raises:
            CheckpointError: missing, not of this shape, or not finite.
        """
        ...

    def linear(
        self, prefix: str, out_features: int, in_features: int, bias: bool
    ) -> Linear | QuantizedLinear:
        """A linear by its prefix ("model.layers.0.self_attn.q_proj"); a dense one keeps the dtype
        it is stored in.

        Raises:
            CheckpointError: a tensor of it is missing, not of the expected shape, or not finite.
        """
        ...


@runtime_checkable
class LinearFormat(Protocol):
    """A quantized layout of linears inside a Hugging Face folder; registered in
    `checkpoints/formats.py`."""

    name: str

    @classmethod
    def detect(
        cls, quantization_config: dict | None, source: TensorSource, hf_config: dict
    ) -> "LinearFormat | None":
        """The format with its settings if this checkpoint is of it; refuses settings by field
        name."""
        ...

    def linear(
        self, source: TensorSource, prefix: str, out_features: int, in_features: int, bias: bool
    ) -> Linear | QuantizedLinear | None:
        """A linear, or None where this one is stored dense."""
        ...

    def tensor(self, source: TensorSource, name: str) -> np.ndarray | None:
        """A tensor that the format renames or transforms, or None for a plain read."""
        ...
