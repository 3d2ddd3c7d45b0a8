"""Checked reading of one linear's tensors, shared by the quantized formats.

Everything here is vectorised numpy on whole tensors; arrays become JAX arrays in `codes_to_device`.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Int, Integer, Shaped, UInt8

from specjax.checkpoints.source import TensorSource
from specjax.errors import CheckpointError
from specjax.quant.scheme import Scheme

FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))

_FOUR_BITS = tuple(
    np.dtype(dtype) for dtype in (ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.float4_e2m1fn)
)


def has(source: TensorSource, name: str) -> bool:
    """Whether the checkpoint holds a tensor of this name."""
    return name in source.names()


def is_dense(source: TensorSource, prefix: str) -> bool:
    """Whether `<prefix>.weight` holds a floating-point weight, i.e. this linear was left unquantized."""
    name = f"{prefix}.weight"
    return has(source, name) and np.dtype(source.dtype(name)) in FLOATS


def read(
    source: TensorSource,
    name: str,
    dtypes: Sequence[np.dtype | type],
    shape: tuple[int | None, ...],
) -> Shaped[np.ndarray, "..."]:
    """Reads a tensor and checks its dtype and shape (None matches any extent); sources refuse NaN and infinity.

    Raises:
        CheckpointError: missing, or of another dtype or shape; the message names the tensor and both values.
    """
    if not has(source, name):
        raise CheckpointError(f"{name}: missing from the checkpoint")
    dtype, found = np.dtype(source.dtype(name)), tuple(source.shape(name))
    if dtype not in [np.dtype(d) for d in dtypes]:
        wanted = ", ".join(np.dtype(d).name for d in dtypes)
        raise CheckpointError(f"{name}: dtype is {dtype.name}, expected {wanted}")
    fits = len(found) == len(shape) and all(w in (None, f) for f, w in zip(found, shape))
    if not fits:
        wanted = ", ".join("any" if w is None else str(w) for w in shape)
        raise CheckpointError(f"{name}: shape is {list(found)}, expected [{wanted}]")
    return source.read(name)


def read_bias(
    source: TensorSource, prefix: str, out_features: int, expected: bool
) -> Shaped[Array, "N"] | None:
    """The bias of a linear. Old AutoGPTQ files store zeros for layers without one; those are ignored.

    Raises:
        CheckpointError: the configuration promises a bias that is missing, or a non-zero one is there without it.
    """
    name = f"{prefix}.bias"
    if not expected and not has(source, name):
        return None
    bias = read(source, name, FLOATS, (out_features,))
    if expected:
        return jnp.asarray(bias)
    if np.any(bias != 0):
        raise CheckpointError(
            f"{name}: not zero, but the configuration says this linear has no bias"
        )
    return None


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


def codes_to_device(codes: Shaped[np.ndarray, "N K"], scheme: Scheme) -> Shaped[Array, "N K"]:
    """Uploads codes, given as bytes; of 4-bit codes the low nibble is the bit pattern, the rest is zero."""
    return jnp.asarray(np.ascontiguousarray(codes).view(scheme.weights.code_dtype))


def codes_to_host(codes: Shaped[Array, "N K"]) -> Shaped[np.ndarray, "N K"]:
    """Downloads codes; 4-bit ones come as uint8 bit patterns 0..15, others in their own dtype."""
    host = np.asarray(jax.device_get(codes))
    return host.view(np.uint8) & 15 if host.dtype in _FOUR_BITS else host


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


def matches(pattern: str, prefix: str) -> bool:
    """Whether a module pattern names `prefix`: `re:REGEX` is matched from the start, other text as a whole path."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], prefix) is not None
    return prefix == pattern


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Where the outputs of a linear lie in a file that may have fused it with its neighbours.

    Attributes:
        prefix: of the stored, possibly fused, linear.
        start: first output of ours in it.
        count: outputs of ours.
        total: outputs stored.
    """

    prefix: str
    start: int
    count: int
    total: int

    def tiles(self, size: int) -> tuple[slice, slice]:
        """The whole tiles of `size` outputs that cover ours, and ours within them."""
        first = self.start // size * size
        last = -(-(self.start + self.count) // size) * size
        return slice(first, last), slice(self.start - first, self.start - first + self.count)


_FUSED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", -2),
    "v_proj": ("qkv_proj", -1),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", -1),
}


def locate(source: TensorSource, prefix: str, part: str, out_features: int) -> Rows:
    """Finds a linear under its own name, or as rows of `qkv_proj` or `gate_up_proj` (q, k, v or gate, up stacked).

    Args:
        part: a tensor of the linear whose last axis counts outputs; it tells the fused size.

    Raises:
        CheckpointError: neither is there, or the fused one has another size than its parts.
    """
    name = f"{prefix}.{part}"
    if has(source, name):
        return Rows(prefix=prefix, start=0, count=out_features, total=source.shape(name)[-1])
    parent, _, leaf = prefix.rpartition(".")
    if leaf not in _FUSED:
        raise CheckpointError(f"{name}: missing from the checkpoint")
    fused_leaf, position = _FUSED[leaf]
    fused = f"{parent}.{fused_leaf}"
    if not has(source, f"{fused}.{part}"):
        raise CheckpointError(f"{name}: missing from the checkpoint, and so is {fused}.{part}")
    total = source.shape(f"{fused}.{part}")[-1]
    start = total + position * out_features if position else 0
    paired = fused_leaf != "gate_up_proj" or total == 2 * out_features
    if start < 0 or start + out_features > total or not paired:
        raise CheckpointError(
            f"{fused}.{part}: has {total} outputs, too few or too many for {leaf} with {out_features}"
        )
    return Rows(prefix=fused, start=start, count=out_features, total=total)


def one_of(value: Any, supported: tuple, field: str) -> Any:
    """Returns `value`; raises CheckpointError naming `quantization_config.<field>` unless it is supported."""
    if value not in supported:
        raise CheckpointError(
            f"quantization_config.{field}={value!r} is not supported; supported: "
            f"{', '.join(map(str, supported))}"
        )
    return value


def group_size(value: Any, field: str) -> int:
    """As `one_of`, for a group size: a positive integer, or -1 for one group."""
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise CheckpointError(
            f"quantization_config.{field}={value!r} is not supported; supported: positive integers, -1"
        )
    return value


def divisible(prefix: str, by: int, reason: str, **sizes: int) -> None:
    """Raises CheckpointError unless all of `sizes` (name=value) are multiples of `by`."""
    for field, size in sizes.items():
        if size % by:
            raise CheckpointError(f"{prefix}: {field}={size} is not a multiple of {by} ({reason})")
