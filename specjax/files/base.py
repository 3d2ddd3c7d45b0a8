"""What every source of named tensors has in common: the interface, checks of values and shapes, JSON beside them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from specjax.errors import CheckpointError

# A value is not finite exactly when all of these bits are set.
_NOT_FINITE_BITS = {
    np.dtype(np.float16): 0x7C00,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(np.float32): 0x7F800000,
    np.dtype(np.float64): 0x7FF0000000000000,
    np.dtype(ml_dtypes.float8_e4m3fn): 0x7F,
    np.dtype(ml_dtypes.float8_e5m2): 0x7C,
    np.dtype(ml_dtypes.float8_e8m0fnu): 0xFF,
}
_CHUNK = 1 << 20


@runtime_checkable
class TensorSource(Protocol):
    """Tensors by name. `read` may return a read-only view of a memory-mapped file."""

    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype: ...

    def read(self, name: str) -> np.ndarray: ...


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file as a read-only memory map."""
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty; copy or download it again")
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))


def read_json(path: Path) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
        FileNotFoundError: the file does not exist.
        CheckpointError: it is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        # Windows editors put a byte order mark before a text.
        parsed = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} holds a JSON {type(parsed).__name__}, expected an object")
    return parsed


def check_finite(array: np.ndarray, name: str, path: Path) -> None:
    """Raises CheckpointError, naming the tensor, if a floating-point array has a NaN or
    infinity."""
    mask = _NOT_FINITE_BITS.get(array.dtype)
    if mask is None or array.size == 0:
        return
    flat = array.reshape(-1).view(np.dtype(f"u{array.dtype.itemsize}"))
    mask = flat.dtype.type(mask)
    for start in range(0, flat.size, _CHUNK):
        found = np.flatnonzero((flat[start : start + _CHUNK] & mask) == mask)
        if found.size:
            index = tuple(int(i) for i in np.unravel_index(start + found[0], array.shape))
            raise CheckpointError(
                f"{name} in {path} has the value {array[index]} at {index}: "
                "weights must be finite; the file is damaged or was written by a diverged run"
            )


def check_shape(found: Sequence[int], expected: Sequence[int], name: str, path: Path) -> None:
    """Raises CheckpointError, naming the tensor and both shapes, if they differ."""
    if tuple(found) != tuple(expected):
        raise CheckpointError(
            f"{name} in {path} has shape {list(found)}, "
            f"but the configuration asks for {list(expected)}"
        )
