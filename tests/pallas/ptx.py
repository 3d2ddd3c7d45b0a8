"""A few PTX instructions in numpy, enough to run the dequantization snippets on arrays of words."""

import re

import ml_dtypes
import numpy as np

_PAIRS = {"f16x2": np.float16, "bf16x2": ml_dtypes.bfloat16}


def run(asm: str, results: int, *words: np.ndarray) -> list[np.ndarray]:
    """The result words of a snippet `{ ... }` whose `$i` are results, then inputs."""
    registers = {f"${results + i}": word.astype(np.uint32) for i, word in enumerate(words)}
    for line in asm.strip().strip("{}").split(";"):
        parts = line.split(None, 1)
        if not parts or parts[0] == ".reg":
            continue
        name, arguments = parts[0], re.split(r"\s*,\s*", parts[1].strip())
        values = [_value(registers, argument) for argument in arguments[1:]]
        registers[arguments[0]] = np.asarray(_execute(name, values), np.uint32)
    return [registers[f"${i}"] for i in range(results)]


def _value(registers: dict, argument: str):
    if argument in registers:
        return registers[argument]
    return np.uint32(int(argument, 0))


def _execute(name: str, values: list):
    operation, *suffixes = name.split(".")
    match operation:
        case "mov":
            return values[0]
        case "and":
            return values[0] & values[1]
        case "xor":
            return values[0] ^ values[1]
        case "shr":
            return values[0] >> values[1]
        case "shl":
            return values[0] << values[1]
        case "lop3":
            return _lop3(*values)
        case "prmt":
            return _prmt(*values)
        case "sub" | "fma":
            return _pairwise(operation, _PAIRS[suffixes[-1]], values)
    raise NotImplementedError(name)


def _lop3(a, b, c, table):
    """Bit by bit: the entry of `table` at 4 a + 2 b + c."""
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    for index in range(8):
        if int(table) >> index & 1:
            terms = [v if index >> shift & 1 else ~v for v, shift in ((a, 2), (b, 1), (c, 0))]
            out |= terms[0] & terms[1] & terms[2]
    return out


def _prmt(a, b, selector):
    both = a.astype(np.uint64) | (np.uint64(b) << np.uint64(32))
    out = np.zeros(a.shape, np.uint64)
    for byte in range(4):
        chosen = int(selector) >> 4 * byte & 7
        out |= (both >> np.uint64(8 * chosen) & np.uint64(255)) << np.uint64(8 * byte)
    return out


def _pairwise(operation: str, dtype, values: list):
    """Both halves of a word in float64, which holds the exact result, rounded once."""
    words = np.broadcast_arrays(*(np.asarray(value, np.uint32) for value in values))
    halves = [
        np.ascontiguousarray(word).reshape(-1, 1).view(np.uint16).view(dtype).astype(np.float64)
        for word in words
    ]
    result = halves[0] - halves[1] if operation == "sub" else halves[0] * halves[1] + halves[2]
    return result.astype(dtype).view(np.uint16).view(np.uint32)[:, 0]
