"""safetensors files: named tensors, read one at a time without loading a file whole.

Files are memory-mapped by a parser of our own, which gives bfloat16 and float8 through
ml_dtypes and finds a truncated file when it is opened. Format: 8 bytes little-endian header length,
a JSON header {name: {dtype, shape, data_offsets}}, then the data, tensor after tensor without gaps
(https://huggingface.co/docs/safetensors).
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from specjax.errors import CheckpointError
from specjax.files import base

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_MAX_HEADER_BYTES = 100 << 20


class SafetensorsFile:
    """One memory-mapped safetensors file.

    Raises:
        CheckpointError: the header is malformed, or the file ends before a tensor's data does.
    """

    def __init__(self, path: Path):
        self.path = path
        self._data = base.map_file(path)
        header, start = _parse_header(self._data, path)
        header.pop("__metadata__", None)
        self._entries = {name: _entry(name, entry, path) for name, entry in header.items()}
        available, reached = self._data.size - start, 0
        for name, (_, _, begin, end) in sorted(self._entries.items(), key=lambda item: item[1][2:]):
            if begin != reached:
                raise CheckpointError(
                    f"{path}: the data of tensor {name} begin at byte {begin} of all data, where the tensor before "
                    f"ends at {reached}; the header is damaged"
                )
            reached = end
            if end > available:
                raise CheckpointError(
                    f"{path} is truncated at tensor {name}: its data ends at byte {start + end}, "
                    f"the file has {self._data.size} bytes; copy or download it again"
                )
        if reached != available:
            raise CheckpointError(
                f"{path}: its tensors take {reached} bytes, but {available} follow the header; it is damaged"
            )
        self._start = start

    def names(self) -> Sequence[str]:
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name)[1]

    def dtype(self, name: str) -> np.dtype:
        tag = self._entry(name)[0]
        if tag not in DTYPES:
            raise CheckpointError(
                f"{name} in {self.path} has dtype {tag}, which is not supported "
                f"(supported: {', '.join(DTYPES)})"
            )
        return DTYPES[tag]

    def read(self, name: str) -> np.ndarray:
        dtype = self.dtype(name)
        _, shape, begin, end = self._entry(name)
        raw = self._data[self._start + begin : self._start + end]
        array = raw.view(dtype).reshape(shape)
        base.check_finite(array, name, self.path)
        return array

    def _entry(self, name: str) -> tuple[str, tuple[int, ...], int, int]:
        if name not in self._entries:
            raise CheckpointError(f"{name} is missing from {self.path}")
        return self._entries[name]


def _parse_header(data: np.ndarray, path: Path) -> tuple[dict[str, Any], int]:
    """Returns the JSON header and the offset of the data section."""
    length = int.from_bytes(data[:8].tobytes(), "little") if data.size >= 8 else 0
    if data.size < 8 or 8 + length > data.size or length > _MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file: its header would take {length} bytes, "
            f"the file has {data.size}"
        )
    try:
        header = json.loads(data[8 : 8 + length].tobytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not an object")
    return header, 8 + length


def _entry(name: str, entry: Any, path: Path) -> tuple[str, tuple[int, ...], int, int]:
    """Checks one header entry; returns dtype tag, shape, first and last byte within the data."""
    try:
        tag, shape = str(entry["dtype"]), tuple(entry["shape"])
        begin, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: malformed header entry of tensor {name}") from error
    if any(type(n) is not int for n in (begin, end, *shape)):
        raise CheckpointError(f"{path}: malformed header entry of tensor {name}: {entry}")
    if min((0, begin, *shape)) < 0 or end < begin:
        raise CheckpointError(f"{path}: malformed header entry of tensor {name}: {entry}")
    expected = math.prod(shape) * DTYPES[tag].itemsize if tag in DTYPES else end - begin
    if end - begin != expected:
        raise CheckpointError(
            f"{path}: tensor {name} of shape {list(shape)} and dtype {tag} takes {expected} bytes, "
            f"but its header gives it {end - begin}"
        )
    return tag, shape, begin, end
