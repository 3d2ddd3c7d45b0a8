"""Bits of registers as numbers and back: the types of PTX in numpy.

A register holds unsigned integers of its width, one per thread; an instruction's type says how they are meant.
"""

import re

import ml_dtypes
import numpy as np

from tests.ptx.faults import Unsupported

_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_FLOATS = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32, "f64": np.float64}


def bits(name: str) -> int:
    """Width of a type: "s32" -> 32, "f16x2" -> 32."""
    if name == "pred":
        return 1
    found = re.fullmatch(r"[a-z]+(\d+)(x2)?", name)
    if found is None:
        raise Unsupported(f"type .{name} is unknown")
    return int(found[1]) * (2 if found[2] else 1)


def storage(name: str):
    """dtype of a register of this type."""
    return np.bool_ if name == "pred" else _UNSIGNED[bits(name)]


def meant(raw: np.ndarray, name: str) -> np.ndarray:
    """Register contents as numbers; [n] -> [n], [n, 2] for packed pairs."""
    if raw.dtype != storage(name):
        raw = raw.astype(storage(name))
    if name in _FLOATS:
        return raw.view(_FLOATS[name])
    if name.endswith("x2"):
        return np.ascontiguousarray(raw).view(_FLOATS[name[:-2]]).reshape(-1, 2)
    return raw.view(_SIGNED[bits(name)]) if name[0] == "s" else raw


def raw(numbers: np.ndarray, name: str) -> np.ndarray:
    """Numbers, rounded to the type where they are wider, as register contents."""
    if name == "pred":
        return numbers
    if name.endswith("x2"):
        pairs = np.ascontiguousarray(numbers.astype(_FLOATS[name[:-2]]))
        return pairs.view(np.uint32).reshape(-1)
    wanted = _FLOATS.get(name) or (_SIGNED if name[0] == "s" else _UNSIGNED)[bits(name)]
    if numbers.dtype != wanted:
        numbers = numbers.astype(wanted)
    return numbers.view(storage(name))


def constant(text: str, name: str) -> np.ndarray:
    """A literal as register contents, [1]."""
    dtype = storage(name)
    if hexadecimal := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        number = int(hexadecimal[1], 16)
    elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        number = int(text.rstrip("U"), 0)
    else:
        raise Unsupported(f"{text!r} is neither a register nor a literal")
    if name == "pred":
        return np.array([number != 0])
    return np.array([number & ((1 << bits(name)) - 1)], dtype)


def words(register_list: list[np.ndarray], name: str) -> np.ndarray:
    """R registers of n threads -> elements [n, R, per register]: halves in their dtype, s8 and s4 as int32."""
    stacked = np.ascontiguousarray(np.stack(register_list, axis=1))
    if name in _FLOATS:
        return stacked.view(_FLOATS[name]).reshape(*stacked.shape, -1)
    octets = stacked.view(np.uint8).reshape(*stacked.shape, 4)
    if name == "s8":
        return octets.view(np.int8).astype(np.int32)
    if name == "s4":
        nibbles = np.stack([octets & 15, octets >> 4], axis=-1).reshape(*stacked.shape, 8)
        return (nibbles.astype(np.int32) ^ 8) - 8
    raise Unsupported(f"matrices of .{name}")
