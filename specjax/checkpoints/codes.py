"""Codes and scales of one linear between files, host and device; vectorised numpy on whole tensors."""

from collections.abc import Iterator

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Int, Integer, Shaped, UInt8

from specjax.errors import CheckpointError
from specjax.quant.scheme import Scheme

_FOUR_BITS = tuple(
    np.dtype(dtype) for dtype in (ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.float4_e2m1fn)
)


# Rows are worked on in blocks that stay in the cache: seven times faster than whole arrays (measured on [4096, 4096]).
_BLOCK_BYTES = 1 << 20


def split_nibbles(packed: Shaped[np.ndarray, "R Cb"]) -> UInt8[np.ndarray, "R C"]:
    """Nibbles of bytes (or little-endian words) along the last axis, the low one first."""
    packed = np.ascontiguousarray(packed).view(np.uint8)
    pairs = np.empty(packed.shape, np.uint16)
    for rows in _blocks(packed):
        # Bits 0 .. 3 of a byte stay, bits 4 .. 7 move to the next byte.
        np.left_shift(packed[rows], 4, out=pairs[rows], dtype=np.uint16, casting="unsafe")
        pairs[rows] |= packed[rows]
        pairs[rows] &= np.uint16(0x0F0F)
    return pairs.view(np.uint8)


def join_nibbles(codes: UInt8[np.ndarray, "R C"]) -> UInt8[np.ndarray, "R Cb"]:
    """Inverse of `split_nibbles`; the codes are 0 .. 15 and even in number."""
    pairs = np.ascontiguousarray(codes).view(np.uint16)
    packed = np.empty(pairs.shape, np.uint8)
    for rows in _blocks(packed):
        np.bitwise_or(pairs[rows], pairs[rows] >> 4, out=packed[rows], casting="unsafe")
    return packed


def _blocks(packed: Shaped[np.ndarray, "R Cb"]) -> Iterator[slice]:
    step = max(1, _BLOCK_BYTES // max(1, packed.shape[1] * packed.itemsize))
    for start in range(0, packed.shape[0], step):
        yield slice(start, start + step)


def unpack_words(
    words: Int[np.ndarray, "R Cw"], bits: int, symmetric: bool
) -> UInt8[np.ndarray, "R C"]:
    """Codes of int32 words packed along the last axis, lowest bits first, as bytes.

    They are unsigned; if `symmetric`, the two's complement of code - 2^(bits - 1) (of four bits, in the low nibble).
    """
    flip = np.uint8((0x88 if bits == 4 else 0x80) if symmetric else 0)
    codes = np.empty((words.shape[0], words.shape[1] * 32 // bits), np.uint8)
    for rows in _blocks(words):
        packed = _copied(words[rows]).view(np.uint8)
        packed ^= flip
        codes[rows] = split_nibbles(packed) if bits == 4 else packed
    return codes


def _copied(block: Int[np.ndarray, "R Cw"]) -> Int[np.ndarray, "R Cw"]:
    copy = np.empty(block.shape, block.dtype)
    # Formats store words transposed: 16 rows of theirs (64 bytes of ours) at a time, five times faster than all.
    for start in range(0, block.shape[1], 16):
        copy[:, start : start + 16] = block[:, start : start + 16]
    return copy


def pack_words(
    codes: Shaped[np.ndarray, "R C"], bits: int, symmetric: bool
) -> Int[np.ndarray, "R Cw"]:
    """Inverse of `unpack_words`; pads the last word with zero bits."""
    unsigned = np.ascontiguousarray(codes).view(np.uint8)
    if symmetric:
        unsigned = (unsigned ^ np.uint8(2 ** (bits - 1))) & np.uint8(2**bits - 1)
    padded = np.pad(unsigned, ((0, 0), (0, -codes.shape[1] % (32 // bits))))
    packed = join_nibbles(padded) if bits == 4 else padded
    return np.ascontiguousarray(packed).view(np.int32)


def typed(codes: Shaped[np.ndarray, "N K"], scheme: Scheme) -> Shaped[Array | np.ndarray, "N K"]:
    """Codes, given as bytes, in the scheme's dtype; of 4-bit codes the low nibble is the bit pattern, the rest is zero.

    4-bit codes stay on the host until their layer is complete (`specjax.models.llama.build` uploads it): projections
    are fused there, since XLA moves 4-bit elements one by one on CPUs.
    """
    codes = np.ascontiguousarray(codes).view(scheme.weights.code_dtype)
    return codes if codes.dtype in _FOUR_BITS else jnp.asarray(codes)


def to_host(codes: Shaped[Array | np.ndarray, "N K"]) -> Shaped[np.ndarray, "N K"]:
    """Downloads codes; 4-bit ones come as uint8 bit patterns 0..15, others in their own dtype."""
    host = np.asarray(codes)
    return host.view(np.uint8) & 15 if host.dtype in _FOUR_BITS else host


def narrow_zeros(zeros: Shaped[np.ndarray, "N G"]) -> Int[np.ndarray, "N G"]:
    """Zero points 0 .. 2^bits - 1 as int8, or as int16 where they do not fit."""
    return zeros.astype(np.int8 if zeros.max(initial=0) < 128 else np.int16)


def zero_points(zeros: Shaped[Array, "N G"], bits: int, name: str) -> UInt8[np.ndarray, "N G"]:
    """Downloads zero points for a format that packs them like codes.

    Raises:
        CheckpointError: one is not in 0 .. 2^bits - 1.
    """
    host = np.asarray(zeros)
    outside = (host < 0) | (host >= 2**bits)
    if outside.any():
        raise CheckpointError(
            f"{name}: the zero point {host[outside][0]} does not fit {bits} bits, in which this format stores it; "
            "choose another format"
        )
    return host.astype(np.uint8)


def to_half(array: Shaped[Array, "..."], name: str) -> Shaped[np.ndarray, "..."]:
    """float16 copy of scales for a format that stores them so.

    Raises:
        CheckpointError: a value overflows, or vanishes.
    """
    wide = np.asarray(array).astype(np.float32)
    with np.errstate(over="ignore"):
        half = wide.astype(np.float16)
    lost = ~np.isfinite(half) | ((half == 0) & (wide != 0))
    if lost.any():
        raise CheckpointError(
            f"{name}: the value {wide[lost][0]:g} does not fit float16, which this format stores; "
            "choose another format"
        )
    return half


def group_order(
    g_idx: Int[np.ndarray, "K"], group_size: int, name: str
) -> Integer[np.ndarray, "K"] | None:
    """The permutation that makes groups contiguous: new column j is input channel perm[j]; None if they already are.

    Raises:
        CheckpointError: a group index is out of range, or the groups do not have equal sizes.
    """
    groups = g_idx.size // group_size
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        bad = low if low < 0 else high
        raise CheckpointError(
            f"{name}: holds group {bad}, but group_size={group_size} gives groups 0..{groups - 1}"
        )
    sizes = np.bincount(g_idx, minlength=groups)
    if np.any(sizes != group_size):
        group = int(np.argmax(sizes != group_size))
        raise CheckpointError(
            f"{name}: group {group} has {sizes[group]} channels, expected group_size={group_size}"
        )
    perm = np.argsort(g_idx, kind="stable").astype(np.int32)
    return None if np.array_equal(perm, np.arange(g_idx.size)) else perm
