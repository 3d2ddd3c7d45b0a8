"""GGUF files, versions 2 and 3: metadata, tensor table, and the formats F64, F32, F16, BF16, Q4_0, Q4_1, Q8_0.

Layout: magic "GGUF", version, counts; metadata (key, type, value); tensor table (name, dimensions
fastest first, type, offset); data aligned to `general.alignment`
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Quantized rows are runs of blocks: a
half-precision scale (and minimum), then the codes; byte j of a 4-bit block holds elements j and j +
16. All other block formats are decoded by the optional `gguf` package.

Texts are not checked when the file is opened: one that is not UTF-8 is an error when its key is read.
"""

import importlib.util
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped, UInt8

from specjax.errors import CheckpointError
from specjax.files import base as file_base

# Type number in the file: (name, elements per block, bytes per block).
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    30: ("BF16", 1, 2),
    28: ("F64", 1, 8),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}
# Types of other uses (integers, products in flight, layouts that llama.cpp dropped), to be refused by name.
_OTHER_TYPES = {
    **{4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64"},
    **{31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8"},
    **{38: "IQ4_NL_8_8", 41: "Q1_0"},
}
BLOCK_TYPES = ("Q4_0", "Q4_1", "Q8_0")
GROUP_SIZE = 32
_FLOATS = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16},
}
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
# What decoding by surrogateescape makes of bytes that are not UTF-8.
_ESCAPED = re.compile("[\udc80-\udcff]")
_MAX_DIMENSIONS = 4


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One entry of the tensor table.

    Attributes:
        shape: slowest dimension first, so a linear's is (out, in).
        type_id: number of the type in the file.
        offset: of the data, in bytes from the start of the file.
    """

    shape: tuple[int, ...]
    type_id: int
    offset: int

    @property
    def type_name(self) -> str:
        return TENSOR_TYPES[self.type_id][0]

    @property
    def row_bytes(self) -> int:
        _, elements, size = TENSOR_TYPES[self.type_id]
        return self.shape[-1] // elements * size

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


class Metadata(dict):
    """Values by key; reading one whose text is not UTF-8 is an error, since nothing can be right about it.

    Raises:
        CheckpointError: on reading such a value (by index or `get`).
    """

    def __init__(self, path: Path):
        super().__init__()
        self._path = path

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        texts = value if isinstance(value, list) else [value]
        for position, text in enumerate(texts):
            if not isinstance(text, str):
                break
            if not text.isascii() and _ESCAPED.search(text):
                where = f"{key}[{position}]" if isinstance(value, list) else key
                raw = text.encode("utf-8", "surrogateescape")
                raise CheckpointError(f"{self._path}: metadata key {where} = {raw!r} is not UTF-8")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default


class GGUFFile:
    """A memory-mapped GGUF file.

    Attributes:
        path: the file.
        metadata: every key with its value; strings are str, arrays are lists.

    Raises:
        CheckpointError: malformed, truncated, or a tensor of a type that cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self._data = file_base.map_file(path)
        reader = _Reader(self._data, path)
        num_tensors, num_keys = _parse_start(reader)
        self.metadata = _parse_metadata(reader, num_keys, path)
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointError(f"{path}: general.alignment = {alignment!r} is not positive")
        entries = [_parse_tensor(reader) for _ in range(num_tensors)]
        start = -(-reader.position // alignment) * alignment
        self._tensors: dict[str, TensorInfo] = {}
        for name, shape, type_id, offset in entries:
            if name in self._tensors:
                raise CheckpointError(f"{path}: tensor {name} stands in the file more than once")
            self._tensors[name] = TensorInfo(shape=shape, type_id=type_id, offset=start + offset)
        self._read: set[str] = set()
        self._check_tensors()

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise CheckpointError(f"{name} is missing from {self.path}")
        return self._tensors[name]

    def rows(self, name: str) -> UInt8[np.ndarray, "rows row_bytes"]:
        """The encoded bytes of a tensor, one row per run of its last dimension; a view of the
        file."""
        info = self.info(name)
        self._read.add(name)
        raw = self._data[info.offset : info.offset + info.num_bytes]
        return raw.reshape(math.prod(info.shape[:-1]), info.row_bytes)

    def unread(self) -> tuple[str, ...]:
        """Names of tensors whose rows nobody has asked for."""
        return tuple(name for name in self._tensors if name not in self._read)

    def _check_tensors(self) -> None:
        for name, info in sorted(self._tensors.items(), key=lambda item: item[1].offset):
            if info.offset + info.num_bytes > self._data.size:
                raise CheckpointError(
                    f"{self.path} is truncated at tensor {name}: its data ends at byte "
                    f"{info.offset + info.num_bytes}, the file has {self._data.size} bytes; "
                    "copy or download it again"
                )
        other = {t.type_name for t in self._tensors.values()} - {*_FLOATS, *BLOCK_TYPES}
        if other and importlib.util.find_spec("gguf") is None:
            raise CheckpointError(
                f"{self.path} has tensors of type {', '.join(sorted(other))}, which need the gguf "
                "package: pip install specjax[gguf]"
            )


class _Reader:
    """A cursor over the header; running past the end is a CheckpointError that says where."""

    def __init__(self, data: UInt8[np.ndarray, "N"], path: Path):
        self._data = memoryview(data)
        self._path = path
        self.position = 0
        self.place = "the header"

    def bytes(self, count: int) -> memoryview:
        end = self.position + count
        if end > len(self._data):
            raise CheckpointError(
                f"{self._path} is truncated at {self.place}: it needs {end} bytes, the file has "
                f"{len(self._data)}; copy or download it again"
            )
        begin, self.position = self.position, end
        return self._data[begin:end]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.bytes(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return str(self.bytes(self.scalar("Q")), "utf-8", "surrogateescape")

    def name(self) -> str:
        """A text that messages can show."""
        return self.string().encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

    def value(self, type_id: int) -> Any:
        if type_id in _SCALARS:
            return self.scalar(_SCALARS[type_id])
        if type_id == _STRING:
            return self.string()
        if type_id != _ARRAY:
            raise self.malformed(f"unknown value type {type_id}")
        item, count = self.scalar("I"), self.scalar("Q")
        if item in _SCALARS:
            width = struct.calcsize("<" + _SCALARS[item])
            dtype = np.dtype("<" + _SCALARS[item])
            return np.frombuffer(self.bytes(count * width), dtype).tolist()
        if item != _STRING:
            raise self.malformed(f"unknown array item type {item}")
        return [self.string() for _ in range(count)]

    def unsupported(self, name: str, type_id: int) -> CheckpointError:
        kind = f"type {_OTHER_TYPES.get(type_id, 'unknown to specjax')} (number {type_id})"
        known = ", ".join(entry[0] for entry in TENSOR_TYPES.values())
        return CheckpointError(
            f"{self._path}: tensor {name} has {kind}, which is not supported (supported: {known})"
        )

    def malformed(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is malformed at {self.place}: {reason}")


def _parse_start(reader: _Reader) -> tuple[int, int]:
    """Returns the numbers of tensors and of metadata keys."""
    if bytes(reader.bytes(4)) != b"GGUF":
        raise reader.malformed("it does not start with GGUF")
    version = reader.scalar("I")
    if version not in (2, 3):
        hint = " (a big-endian file)" if version in (2 << 24, 3 << 24) else ""
        raise reader.malformed(f"version {version}{hint} is not supported (supported: 2, 3)")
    return reader.scalar("Q"), reader.scalar("Q")


def _parse_metadata(reader: _Reader, count: int, path: Path) -> Metadata:
    metadata = Metadata(path)
    for _ in range(count):
        key = reader.name()
        reader.place = f"metadata key {key}"
        if key in metadata:
            raise reader.malformed("the key stands in the file more than once")
        metadata[key] = reader.value(reader.scalar("I"))
    return metadata


def _parse_tensor(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    """Returns name, shape (slowest first), type number and offset within the data."""
    name = reader.name()
    reader.place = f"tensor {name}"
    dimensions = reader.scalar("I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise reader.malformed(f"{dimensions} dimensions")
    shape = tuple(reader.scalar("Q") for _ in range(dimensions))[::-1]
    type_id, offset = reader.scalar("I"), reader.scalar("Q")
    if type_id not in TENSOR_TYPES:
        raise reader.unsupported(name, type_id)
    if shape[-1] % TENSOR_TYPES[type_id][1]:
        raise reader.malformed(
            f"rows of {shape[-1]} elements in {TENSOR_TYPES[type_id][0]} blocks of "
            f"{TENSOR_TYPES[type_id][1]}"
        )
    return name, shape, type_id, offset


def decode_blocks(
    rows: UInt8[np.ndarray, "N row_bytes"], type_name: str
) -> tuple[Shaped[np.ndarray, "N K"], Shaped[np.ndarray, "N G"], Shaped[np.ndarray, "N G"] | None]:
    """Splits rows of `BLOCK_TYPES` into codes, float16 scales and (Q4_1) float16 minima, in groups
    of 32.

    Codes are int8 for Q8_0, int8 in -8..7 for Q4_0 and uint8 in 0..15 for Q4_1: w = codes * scales
    (+ minima).
    """
    size = next(size for name, _, size in TENSOR_TYPES.values() if name == type_name)
    blocks = rows.reshape(rows.shape[0], -1, size)
    num_floats = 2 if type_name == "Q4_1" else 1
    floats = np.ascontiguousarray(blocks[..., : 2 * num_floats]).view("<f2")
    codes = blocks[..., 2 * num_floats :]
    if type_name == "Q8_0":
        codes = np.ascontiguousarray(codes).view(np.int8)
    else:
        codes = np.concatenate([codes & 15, codes >> 4], axis=-1)
        if type_name == "Q4_0":
            codes = codes.view(np.int8) - np.int8(8)
    minima = floats[..., 1] if type_name == "Q4_1" else None
    return codes.reshape(rows.shape[0], -1), floats[..., 0], minima


def dequantize(
    rows: UInt8[np.ndarray, "N row_bytes"], info: TensorInfo
) -> Float[np.ndarray, "N K"]:
    """Rows of any supported type as floats: F16 and BF16 as they are, the others in float32."""
    if info.type_name in _FLOATS:
        values = np.ascontiguousarray(rows).view(_FLOATS[info.type_name])
        return values.astype(np.float32) if info.type_name == "F64" else values
    if info.type_name in BLOCK_TYPES:
        codes, scales, minima = decode_blocks(rows, info.type_name)
        groups = codes.reshape(*scales.shape, GROUP_SIZE)
        values = np.multiply(groups, scales[..., None], dtype=np.float32)
        if minima is not None:
            values += minima[..., None]
        return values.reshape(codes.shape)
    import gguf

    return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(info.type_id))
