"""Checked reading of one linear's tensors and of the settings that describe them, shared by the quantized formats."""

import re
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


def same_values(source: TensorSource, first: str, second: str) -> bool:
    """Whether two tensors are there and hold the same values, perhaps in two dtypes."""
    if not (has(source, first) and has(source, second)):
        return False
    if tuple(source.shape(first)) != tuple(source.shape(second)):
        return False
    arrays = [source.read(name) for name in (first, second)]
    if arrays[0].dtype != arrays[1].dtype:
        arrays = [array.astype(np.float32) for array in arrays]
    return np.array_equal(*arrays)


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
    # 4.0 and True equal integers, and are none.
    if not any(type(value) is type(item) and value == item for item in supported):
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


def flag(value: Any, field: str) -> bool | None:
    """Returns `value`, true, false or None; raises CheckpointError naming `quantization_config.<field>` else."""
    if value is None or isinstance(value, bool):
        return value
    raise CheckpointError(f"quantization_config.{field}={value!r}: expected true or false")


def mapping(value: Any, field: str) -> dict[str, Any]:
    """As `flag`, for an object; None is an empty one."""
    if value is None or isinstance(value, dict):
        return value or {}
    raise CheckpointError(f"quantization_config.{field}={value!r}: expected an object")


def names(value: Any, field: str) -> tuple[str, ...]:
    """As `flag`, for a list of texts; None is an empty one."""
    if value is None:
        return ()
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise CheckpointError(f"quantization_config.{field}={value!r}: expected a list of names")


def pattern(text: str, field: str) -> str:
    """Returns a regular expression; raises CheckpointError naming `quantization_config.<field>` if it is none."""
    try:
        re.compile(text)
    except re.error as error:
        raise CheckpointError(
            f"quantization_config.{field}: {text!r} is no regular expression ({error})"
        ) from error
    return text


def divisible(prefix: str, by: int, reason: str, **sizes: int) -> None:
    """Raises CheckpointError unless all of `sizes` (name=value) are multiples of `by`."""
    for field, size in sizes.items():
        if size % by:
            raise CheckpointError(f"{prefix}: {field}={size} is not a multiple of {by} ({reason})")
