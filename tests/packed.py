"""safetensors files kept small: `NAME.planes.xz` holds the bytes of NAME, sorted by their place in a value.

The high bytes of floats are much alike, so that LZMA takes a third of bfloat16 weights and an eighth of float16 ones
away. `python -m tests.packed FILE ...` packs files in place; `paths` unpacks them where a test asks for one.
"""

import json
import lzma
import sys
from pathlib import Path

SUFFIX = ".planes.xz"
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


def pack(data: bytes) -> bytes:
    """A safetensors file, packed."""
    start, parts = 8 + int.from_bytes(data[:8], "little"), []
    for begin, end, size in _layout(data[:start]):
        block = data[start + begin : start + end]
        parts += [block[place::size] for place in range(size)]
    return lzma.compress(data[:start] + b"".join(parts))


def unpack(packed: bytes) -> bytes:
    """The bytes that were packed."""
    data = lzma.decompress(packed)
    start = 8 + int.from_bytes(data[:8], "little")
    made = bytearray(data)
    for begin, end, size in _layout(data[:start]):
        length = (end - begin) // size
        for place in range(size):
            plane = data[start + begin + place * length : start + begin + (place + 1) * length]
            made[start + begin + place : start + end : size] = plane
    return bytes(made)


def _layout(head: bytes) -> list[tuple[int, int, int]]:
    """First and last byte of each tensor, and the bytes of its values, in the order of the file."""
    header = json.loads(head[8:])
    header.pop("__metadata__", None)
    found = [(*entry["data_offsets"], _BYTES.get(entry["dtype"], 1)) for entry in header.values()]
    return sorted(found)


def main(files: list[Path]) -> None:
    for file in files:
        data = file.read_bytes()
        packed = pack(data)
        assert unpack(packed) == data, file
        file.with_name(file.name + SUFFIX).write_bytes(packed)
        file.unlink()


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
