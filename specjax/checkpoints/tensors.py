"""Checked reading of one linear's tensors and of the settings that describe them, shared by the quantized formats."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Shaped

from specjax.errors import CheckpointError
from specjax.files.base import TensorSource

FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def has(source: TensorSource, name: str) -> bool:
    """Whether the checkpoint holds a tensor of this name."""
    return name in source.names()


def is_dense(source: TensorSource, prefix: str) -> bool:
    """Whether `<prefix>.weight` holds a floating-point weight, i.e. this linear was left unquantized."""
    name = f"{prefix}.weight"
    return has(source, name) and np.dtype(source.dtype(name)) in FLOATS


def read(
    source: TensorSource,
    name: str,
    dtypes: Sequence[np.dtype | type],
    shape: tuple[int, ...],
) -> Shaped[np.ndarray, "..."]:
    """Reads a tensor and checks its dtype and shape; sources refuse NaN and infinity.

    Raises:
        CheckpointError: missing, or of another dtype or shape; the message names the tensor and both values.
    """
    if not has(source, name):
        raise CheckpointError(f"{name}: missing from the checkpoint")
    dtype, found = np.dtype(source.dtype(name)), tuple(source.shape(name))
    if dtype not in [np.dtype(d) for d in dtypes]:
        wanted = ", ".join(np.dtype(d).name for d in dtypes)
        raise CheckpointError(f"{name}: dtype is {dtype.name}, expected {wanted}")
    if found != shape:
        raise CheckpointError(f"{name}: shape is {list(found)}, expected {list(shape)}")
    return source.read(name)


def read_bias(
    source: TensorSource, prefix: str, out_features: int, expected: bool
) -> Shaped[Array, "N"] | None:
    """The bias of a linear. Old AutoGPTQ files store zeros for layers without one; those are ignored.

    Raises:
        CheckpointError: the configuration promises a bias that is missing, or a non-zero one is there without it.
    """
    name = f"{prefix}.bias"
    if not expected and not has(source, name):
        return None
    bias = read(source, name, FLOATS, (out_features,))
    if expected:
        return jnp.asarray(bias)
    if np.any(bias != 0):
        raise CheckpointError(
            f"{name}: not zero, but the configuration says this linear has no bias"
        )
    return None


def one_of(value: Any, supported: tuple, field: str) -> Any:
    """Returns `value`; raises CheckpointError naming `quantization_config.<field>` unless it is supported."""
    if value not in supported:
        raise CheckpointError(
            f"quantization_config.{field}={value!r} is not supported; supported: "
            f"{', '.join(map(str, supported))}"
        )
    return value


def group_size(value: Any, field: str) -> int:
    """As `one_of`, for a group size: a positive integer, or -1 for one group."""
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise CheckpointError(
            f"quantization_config.{field}={value!r} is not supported; supported: positive integers, -1"
        )
    return value


def divisible(prefix: str, by: int, reason: str, **sizes: int) -> None:
    """Raises CheckpointError unless all of `sizes` (name=value) are multiples of `by`."""
    for field, size in sizes.items():
        if size % by:
            raise CheckpointError(f"{prefix}: {field}={size} is not a multiple of {by} ({reason})")
