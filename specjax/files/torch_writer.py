"""Zip archives as `torch.save` writes them, without torch: for tools that read nothing else.

`specjax.files.pickle` reads them back. The pickle is a fixed sequence of opcodes (protocol 2)
that builds an ordered dictionary of contiguous tensors over storages `<root>/data/<index>`.
"""

import math
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from specjax.errors import CheckpointError
from specjax.files.pickle import STORAGES

_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
_EMPTY_DICT = b"ccollections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE


def save(tensors: dict[str, Shaped[np.ndarray, "..."]], path: Path) -> None:
    """Writes named arrays to a .bin, .pt or .pth file, which appears complete or not at all.

    Raises:
        CheckpointError: an array has a dtype that torch has no storage for.
    """
    for name, array in tensors.items():
        if array.dtype not in _STORAGE_NAMES:
            raise CheckpointError(f"{name}: dtype {array.dtype} cannot be stored in {path.name}")
    root, temporary = path.stem, path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as stream:
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(f"{root}/data.pkl", _pickle(tensors))
            archive.writestr(f"{root}/byteorder", "little")
            for index, array in enumerate(tensors.values()):
                contiguous = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                archive.writestr(f"{root}/data/{index}", contiguous.data)
            archive.writestr(f"{root}/version", "3\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _pickle(tensors: dict[str, Shaped[np.ndarray, "..."]]) -> bytes:
    items = b"".join(
        _text(name) + _tensor(index, array) for index, (name, array) in enumerate(tensors.items())
    )
    return (
        pickle.PROTO + b"\x02" + _EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS + pickle.STOP
    )


def _tensor(index: int, array: Shaped[np.ndarray, "..."]) -> bytes:
    """torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())."""
    strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
    storage = (
        pickle.MARK
        + _text("storage")
        + f"ctorch\n{_STORAGE_NAMES[array.dtype]}\n".encode()
        + _text(str(index))
        + _text("cpu")
        + _integer(array.size)
        + pickle.TUPLE
        + pickle.BINPERSID
    )
    arguments = storage + _integer(0) + _integers(array.shape) + _integers(strides)
    arguments += pickle.NEWFALSE + _EMPTY_DICT
    call = b"ctorch._utils\n_rebuild_tensor_v2\n"
    return call + pickle.MARK + arguments + pickle.TUPLE + pickle.REDUCE


def _text(value: str) -> bytes:
    data = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    if value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    return pickle.LONG1 + b"\x08" + struct.pack("<q", value)


def _integers(values: tuple[int, ...]) -> bytes:
    return pickle.MARK + b"".join(_integer(int(value)) for value in values) + pickle.TUPLE
