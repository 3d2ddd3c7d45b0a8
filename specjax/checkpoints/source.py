"""Named tensors in files, read one at a time without loading a file whole.

safetensors files are memory-mapped by a parser of our own, which gives bfloat16 and float8 through
ml_dtypes and finds a truncated file when it is opened. Format: 8 bytes little-endian header length,
a JSON header {name: {dtype, shape, data_offsets}}, then the data
(https://huggingface.co/docs/safetensors).
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from specjax.errors import CheckpointError

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
STANDARD_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model_gptq.safetensors",
    "model_gptq_marlin.safetensors",
    "gptq_model-4bit-128g.safetensors",
    "quant_model.safetensors",
    "quant_model.pt",
)

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
_MAX_HEADER_BYTES = 100 << 20


@runtime_checkable
class TensorSource(Protocol):
    """Tensors by name. `read` may return a read-only view of a memory-mapped file."""

    def names(self) -> Sequence[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype: ...

    def read(self, name: str) -> np.ndarray: ...


class SafetensorsFile:
    """One memory-mapped safetensors file.

    Raises:
        CheckpointError: the header is malformed, or the file ends before a tensor's data does.
    """

    def __init__(self, path: Path):
        self.path = path
        self._data = map_file(path)
        header, start = _parse_header(self._data, path)
        header.pop("__metadata__", None)
        self._entries = {name: _entry(name, entry, path) for name, entry in header.items()}
        available = self._data.size - start
        for name, (_, _, _, end) in sorted(self._entries.items(), key=lambda item: item[1][3]):
            if end > available:
                raise CheckpointError(
                    f"{path} is truncated at tensor {name}: its data ends at byte {start + end}, "
                    f"the file has {self._data.size} bytes; copy or download it again"
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
        check_finite(array, name, self.path)
        return array

    def _entry(self, name: str) -> tuple[str, tuple[int, ...], int, int]:
        if name not in self._entries:
            raise CheckpointError(f"{name} is missing from {self.path}")
        return self._entries[name]


class ShardedSource:
    """Files listed in an index {"weight_map": {tensor: file}}; nothing else in the folder is looked
    at.

    Raises:
        CheckpointError: the index is malformed, a shard is missing, or a shard lacks a tensor that
            the index puts there.
    """

    def __init__(self, index: Path):
        self.path = index
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map")
        shards: dict[str, TensorSource] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{index}: weight_map[{name}] = {file!r} is not a file name")
            if file not in shards:
                if not (index.parent / file).is_file():
                    raise CheckpointError(f"shard {file} is missing: {index} puts {name} there")
                shards[file] = open_file(index.parent / file)
        held = {file: frozenset(shard.names()) for file, shard in shards.items()}
        for name, file in weight_map.items():
            if name not in held[file]:
                raise CheckpointError(
                    f"{name} is missing from {index.parent / file} ({index.name})"
                )
        self._files = {name: shards[file] for name, file in weight_map.items()}

    def names(self) -> Sequence[str]:
        return tuple(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(name).shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._file(name).dtype(name)

    def read(self, name: str) -> np.ndarray:
        return self._file(name).read(name)

    def _file(self, name: str) -> TensorSource:
        if name not in self._files:
            raise CheckpointError(f"{name} is missing from {self.path}")
        return self._files[name]


def open_source(directory: Path, names: Sequence[str] = STANDARD_NAMES) -> TensorSource:
    """Opens a folder's Orbax checkpoint, or the first of `names` that exists: a weight file or an index of shards.

    Raises:
        FileNotFoundError: none of them exists.
        CheckpointError: the one that exists is malformed or incomplete.
    """
    if (directory / "orbax").is_dir():
        from specjax.checkpoints import orbax_store

        return orbax_store.OrbaxSource(directory / orbax_store.FOLDER)
    for name in names:
        if (directory / name).is_file():
            return open_file(directory / name)
    raise FileNotFoundError(f"no weights in {directory}: looked for {', '.join(names)}")


def open_file(path: Path) -> TensorSource:
    """Opens a weight file by its suffix: .safetensors, .bin / .pt / .pth (zip pickle), or
    .index.json.

    Raises:
        FileNotFoundError: the file does not exist.
        CheckpointError: it is malformed, or its suffix is none of these.
    """
    from specjax.checkpoints import pickle

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.name.endswith(".index.json"):
        return ShardedSource(path)
    match path.suffix:
        case ".safetensors":
            return SafetensorsFile(path)
        case ".bin" | ".pt" | ".pth":
            return pickle.TorchFile(path)
    raise CheckpointError(
        f"{path}: unknown kind of weight file (.safetensors, .bin, .pt, .pth or .index.json)"
    )


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
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
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
    except ValueError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not an object")
    return header, 8 + length


def _entry(name: str, entry: Any, path: Path) -> tuple[str, tuple[int, ...], int, int]:
    """Checks one header entry; returns dtype tag, shape, first and last byte within the data."""
    try:
        tag, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: malformed header entry of tensor {name}") from error
    if min((0, begin, *shape)) < 0 or end < begin:
        raise CheckpointError(f"{path}: malformed header entry of tensor {name}: {entry}")
    expected = math.prod(shape) * DTYPES[tag].itemsize if tag in DTYPES else end - begin
    if end - begin != expected:
        raise CheckpointError(
            f"{path}: tensor {name} of shape {list(shape)} and dtype {tag} takes {expected} bytes, "
            f"but its header gives it {end - begin}"
        )
    return tag, shape, begin, end
