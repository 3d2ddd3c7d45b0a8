"""Four-bit codes in bytes and words: packings of files, and the step to device arrays.

Nibbles are counted from the least significant one. `np.int8` holds signed codes and `np.uint8`
unsigned ones on the host; the host has no dense 4-bit type (`ml_dtypes.int4` takes a byte per
element). On the device jnp.int4, jnp.uint4 and jnp.float4_e2m1fn take half a byte per element
(measured on CPU: 64 MiB for 2^27 codes; `.nbytes` reports twice that), which is the narrowest
representation and so the one QuantizedLinear keeps. `codes_from_bytes` reaches it from packed bytes
without ever holding a byte per code.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped, UInt8

from specjax import errors


def pack_nibbles(codes: Shaped[np.ndarray, "... K"]) -> UInt8[np.ndarray, "... K/2"]:
    """Two codes per byte along the last axis, low nibble first; signed as two's complement.

    Raises:
        SpecjaxError: the last axis is odd.
    """
    _check_multiple(codes.shape, -1, 2)
    nibbles = codes.view(np.uint8) if codes.dtype == np.int8 else codes.astype(np.uint8)
    return (nibbles[..., 0::2] & 15) | (nibbles[..., 1::2] << 4)


def unpack_nibbles(packed: Shaped[np.ndarray, "... J"], signed: bool = False) -> np.ndarray:
    """Inverse of `pack_nibbles`: uint8 codes 0..15, or int8 codes -8..7 if `signed`."""
    data = packed.view(np.uint8)
    codes = np.empty((*data.shape[:-1], 2 * data.shape[-1]), np.uint8)
    np.bitwise_and(data, 15, out=codes[..., 0::2])
    np.right_shift(data, 4, out=codes[..., 1::2])
    return sign_extend(codes) if signed else codes


def sign_extend(codes: UInt8[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    """Nibbles 0..15 read as two's complement -8..7, in int8."""
    return ((codes ^ 8).view(np.int8)) - np.int8(8)


def pack_words(codes: Shaped[np.ndarray, "..."], axis: int) -> Int[np.ndarray, "..."]:
    """Eight nibbles per int32 along `axis`: element 8r + j in bits 4j .. 4j + 3 of word r.

    Raises:
        SpecjaxError: the axis is not a multiple of eight.
    """
    _check_multiple(codes.shape, axis, 8)
    last = np.ascontiguousarray(np.moveaxis(codes, axis, -1))
    return np.moveaxis(pack_nibbles(last).view("<i4"), -1, axis)


def unpack_words(words: Int[np.ndarray, "..."], axis: int) -> UInt8[np.ndarray, "..."]:
    """The inverse of `pack_words`: uint8 codes 0..15, `axis` eight times as long."""
    return np.moveaxis(unpack_nibbles(bytes_of_words(words, axis)), -1, axis)


def bytes_of_words(words: Int[np.ndarray, "..."], axis: int) -> UInt8[np.ndarray, "... J"]:
    """Words packed along `axis` as bytes packed along the last: e.g. [K/8, N] to [N, K/2].

    With `signed_nibbles` and `codes_from_bytes` this takes GPTQ-like tensors to device codes at
    memory speed.
    """
    last = np.ascontiguousarray(np.moveaxis(words, axis, -1)).astype("<i4", copy=False)
    return last.view(np.uint8)


def signed_nibbles(packed: UInt8[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Packed u in 0..15 to packed two's complement u - 8, and back: flips each top bit."""
    return packed ^ np.uint8(0x88)


@functools.partial(jax.jit, static_argnames="dtype")
def codes_from_bytes(packed: Shaped[Array, "N J"], dtype) -> Shaped[Array, "N K"]:
    """Packed bytes (low nibble first) as device codes of a 4-bit dtype, never unpacked."""
    pairs = jax.lax.bitcast_convert_type(packed.astype(jnp.uint8), dtype)
    return pairs.reshape(*packed.shape[:-1], -1)


@jax.jit
def bytes_from_codes(codes: Shaped[Array, "N K"]) -> Shaped[Array, "N J"]:
    """Device codes of a 4-bit dtype as packed bytes: inverse of `codes_from_bytes`."""
    pairs = codes.reshape(*codes.shape[:-1], -1, 2)
    return jax.lax.bitcast_convert_type(pairs, jnp.uint8)


def to_device(codes: Shaped[np.ndarray, "N K"], dtype) -> Shaped[Array, "N K"]:
    """Host codes, one per byte (int8 signed, uint8 unsigned), as a device array of `dtype`.

    Raises:
        SpecjaxError: a code does not fit `dtype`.
    """
    if codes.size and jnp.issubdtype(dtype, jnp.integer):
        info, found = jnp.iinfo(dtype), (int(codes.min()), int(codes.max()))
        if found[0] < info.min or found[1] > info.max:
            raise errors.SpecjaxError(
                f"codes run from {found[0]} to {found[1]}; "
                f"{jnp.dtype(dtype)} holds {info.min} to {info.max}"
            )
    if jnp.dtype(dtype) in (jnp.int4, jnp.uint4) and codes.shape[-1] % 2 == 0:
        return codes_from_bytes(pack_nibbles(codes), dtype)
    return jnp.asarray(codes.astype(dtype))


def _check_multiple(shape: tuple[int, ...], axis: int, count: int) -> None:
    if shape[axis] % count:
        raise errors.SpecjaxError(
            f"axis {axis} of shape {shape} must be a multiple of {count} to pack 4-bit codes"
        )
