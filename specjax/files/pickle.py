"""Zip archives written by `torch.save` (.bin, .pt, .pth), read without torch and without running
their code.

A pickle is a program; this reader lets it call only the handful of names that tensors need and
refuses any other by name. Layout: `<root>/data.pkl` refers to storages `<root>/data/<key>`, stored
uncompressed, by persistent ids ("storage", type, key, location, number of elements).
"""

import collections
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from specjax.errors import CheckpointError
from specjax.files import base

STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
SINGLE = "tensor"
_LOCAL_HEADER_BYTES = 30


# Tuples, because a pickle may call __setstate__ or fill __dict__ of what it built: a tuple has
# neither.
class _StorageType(NamedTuple):
    dtype: np.dtype


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str
    size: int


class _Tensor(NamedTuple):
    """A strided window into a storage; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFile:
    """Tensors of one `torch.save` archive. Nested dictionaries give dotted names; a file that is
    one bare tensor has the single name `SINGLE`. Values that are not tensors (step counters and the
    like) are left out.

    Raises:
        CheckpointError: not such an archive, truncated, or its pickle asks for anything but
            tensors.
    """

    def __init__(self, path: Path):
        self.path = path
        if not zipfile.is_zipfile(path):
            raise CheckpointError(_not_a_zip(path))
        with zipfile.ZipFile(path) as archive:
            self._members = {info.filename: info for info in archive.infolist()}
            pickles = [n for n in self._members if n == "data.pkl" or n.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise CheckpointError(f"{path} is a zip without one data.pkl: not from torch.save")
            self._root = pickles[0].removesuffix("data.pkl")
            order = f"{self._root}byteorder"
            if order in self._members and archive.read(order) != b"little":
                raise CheckpointError(f"{path} was saved on a big-endian machine: save it again")
            with archive.open(pickles[0]) as stream:
                self._tensors = _load(stream, path)
        self._data = base.map_file(path)
        for name, tensor in self._tensors.items():
            self._check(name, tensor)

    def names(self) -> Sequence[str]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> np.dtype:
        return self._tensor(name).storage.dtype

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensor(name)
        dtype = tensor.storage.dtype
        values = self._bytes(tensor.storage).view(dtype)[tensor.offset :]
        steps = tuple(n * dtype.itemsize for n in tensor.strides)
        view = np.lib.stride_tricks.as_strided(values, tensor.shape, steps, writeable=False)
        array = np.ascontiguousarray(view).reshape(tensor.shape)
        base.check_finite(array, name, self.path)
        return array

    def _tensor(self, name: str) -> _Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"{name} is missing from {self.path}")
        return self._tensors[name]

    def _check(self, name: str, tensor: _Tensor) -> None:
        """Refuses a tensor that reaches outside its storage, or a storage that is not as long as
        stated."""
        storage = tensor.storage
        info = self._members.get(f"{self._root}data/{storage.key}")
        if info is None:
            raise CheckpointError(f"{self.path}: the data of tensor {name} is missing")
        if info.file_size != storage.size * storage.dtype.itemsize:
            raise CheckpointError(
                f"{self.path}: tensor {name} has {info.file_size} bytes of data, its storage of "
                f"{storage.size} x {storage.dtype} takes {storage.size * storage.dtype.itemsize}"
            )
        pairs = zip(tensor.shape, tensor.strides, strict=True)
        last = tensor.offset + sum((n - 1) * stride for n, stride in pairs)
        inside = tensor.offset <= storage.size and (
            last < storage.size or math.prod(tensor.shape) == 0
        )
        if min((tensor.offset, *tensor.shape, *tensor.strides)) < 0 or not inside:
            raise CheckpointError(
                f"{self.path}: tensor {name} of shape {list(tensor.shape)}, strides "
                f"{list(tensor.strides)} and offset {tensor.offset} is not within its storage of "
                f"{storage.size}"
            )

    def _bytes(self, storage: _Storage) -> np.ndarray:
        info = self._members[f"{self._root}data/{storage.key}"]
        if info.compress_type != zipfile.ZIP_STORED:
            with zipfile.ZipFile(self.path) as archive:
                return np.frombuffer(archive.read(info), np.uint8)
        # The local header repeats the name and pads for alignment; the zip's directory does not say
        # by how much.
        head = self._data[info.header_offset : info.header_offset + _LOCAL_HEADER_BYTES].tobytes()
        lengths = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        begin = info.header_offset + _LOCAL_HEADER_BYTES + lengths
        if head[:4] != b"PK\x03\x04" or begin + info.file_size > self._data.size:
            raise CheckpointError(f"{self.path} is damaged: no data at {info.filename}")
        return self._data[begin : begin + info.file_size]


class _Unpickler(pickle.Unpickler):
    """Builds dictionaries of `_Tensor`; every name outside the allow-list is an error."""

    def __init__(self, stream, path: Path):
        super().__init__(stream)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in STORAGES:
            return _StorageType(dtype=STORAGES[name])
        function = _CALLABLES.get((module, name))
        if function is None:
            raise CheckpointError(
                f"{self._path} is refused: its pickle asks for {module}.{name}, and only plain "
                "tensors are read. If you trust it, save its state dict as safetensors instead"
            )
        # A fresh closure each time: a pickle can set attributes of what it was given.
        return lambda *args: function(*args)

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, size = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise ValueError(f"unknown persistent id {pid!r}")
        return _Storage(dtype=storage_type.dtype, key=str(key), size=int(size))


def _load(stream, path: Path) -> dict[str, _Tensor]:
    try:
        return dict(_flatten(_Unpickler(stream, path).load(), ""))
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path}: malformed pickle: {error}") from error


def _flatten(value: Any, prefix: str) -> Iterator[tuple[str, _Tensor]]:
    if isinstance(value, _Tensor):
        yield prefix or SINGLE, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))


def _rebuild_tensor(storage, offset, shape, strides, *_unused) -> _Tensor:
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise ValueError("a tensor is not built from a storage")
    return _Tensor(
        storage=storage,
        offset=int(offset),
        shape=tuple(int(n) for n in shape),
        strides=tuple(int(n) for n in strides),
    )


def _rebuild_parameter(tensor, *_unused) -> Any:
    return tensor


_CALLABLES: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


def _not_a_zip(path: Path) -> str:
    with path.open("rb") as stream:
        start = stream.read(1)
    if start == b"\x80":
        return (
            f"{path} is a pickle in the format of torch < 1.6, which is not read; save it again "
            "by torch.save(torch.load(path, weights_only=True), path), or convert it to safetensors"
        )
    return f"{path} is truncated or was not written by torch.save; copy or download it again"
