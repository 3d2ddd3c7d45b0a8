"""Random quantized linears of every scheme, and what they mean in float64 and int64 numpy."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from specjax.quant import packing
from specjax.quant.linear import QuantizedLinear
from specjax.quant.scheme import Scheme, lookup

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def make(
    scheme: Scheme,
    outputs: int,
    inputs: int,
    group_size: int,
    seed: int = 0,
    *,
    minima: bool = False,
    perm: bool = False,
    bias: bool = False,
    second_level: bool | None = None,
    scale_dtype=jnp.float16,
) -> QuantizedLinear:
    """A linear of random parts; two-level where the scheme is and there are several groups."""
    rng = np.random.default_rng(seed)
    spec, groups = scheme.weights, inputs // group_size
    two_level = spec.levels != "single" and groups > 1
    two_level = two_level if second_level is None else second_level
    parts = dict(codes=_codes(rng, spec, outputs, inputs))
    scales = rng.uniform(0.005, 0.02, (outputs, groups))
    if two_level and spec.levels == "qqq":
        scales = rng.uniform(0.5, 15.8, (outputs, groups))
    parts["scales"] = jnp.asarray(scales).astype(scale_dtype)
    if two_level and spec.levels == "qoq":
        parts["scales"] = jnp.asarray(rng.integers(0, 18, (outputs, groups)).astype(np.int8))
        zeros = rng.integers(-128, 128, (outputs, groups)).astype(np.int8)
        parts["zeros"] = jnp.asarray(zeros)
    elif not spec.symmetric and minima:
        parts["minima"] = jnp.asarray(rng.normal(0, 0.1, scales.shape)).astype(scale_dtype)
    elif not spec.symmetric:
        top = 2**spec.bits
        parts["zeros"] = jnp.asarray(rng.integers(0, top, scales.shape).astype(np.uint8))
    if two_level:
        channel = rng.uniform(0.001, 0.003, outputs)
        parts["channel_scales"] = jnp.asarray(channel).astype(jnp.float32)
    if perm:
        parts["perm"] = jnp.asarray(rng.permutation(inputs).astype(np.int32))
    if bias:
        parts["bias"] = jnp.asarray(rng.normal(0, 1, outputs)).astype(scale_dtype)
    return QuantizedLinear(**parts, scheme=scheme, group_size=group_size)


def qoq(outputs: int, inputs: int):
    """QoQ codes whose int8 weights do not wrap around."""
    linear = make(lookup("w4a8-qoq"), outputs, inputs, 128)
    scales = jnp.clip(linear.scales, 1, 8)
    zeros = jnp.clip(linear.zeros, -128, 7)
    return dataclasses.replace(linear, scales=scales, zeros=zeros)


def _codes(rng, spec, outputs, inputs):
    if spec.kind == "float":
        values = rng.normal(0, spec.code_range[1] / 3, (outputs, inputs))
        return jnp.clip(jnp.asarray(values, jnp.float32), *spec.code_range).astype(spec.code_dtype)
    low, high = map(int, spec.code_range)
    host = rng.integers(low, high + 1, (outputs, inputs))
    return packing.to_device(host.astype(np.int8 if spec.symmetric else np.uint8), spec.code_dtype)


def numpy_of(array) -> np.ndarray:
    """A device array in float64 (exact for every dtype used here)."""
    return np.asarray(array.astype(jnp.float32)).astype(np.float64)


def runtime_weight(linear: QuantizedLinear) -> tuple[np.ndarray, np.ndarray]:
    """Code-ordered weight before the last scales, and those scales [N, G], by loops over groups."""
    codes, scales = numpy_of(linear.codes), numpy_of(linear.scales)
    zeros = np.zeros_like(scales) if linear.zeros is None else numpy_of(linear.zeros)
    values = np.empty_like(codes)
    for group in range(scales.shape[1]):
        part = slice(group * linear.group_size, (group + 1) * linear.group_size)
        scale, zero = scales[:, group, None], zeros[:, group, None]
        if linear.channel_scales is None:
            values[:, part] = codes[:, part] - zero
        elif linear.scheme.weights.levels == "qqq":
            values[:, part] = np.rint(codes[:, part] * scale)
        else:
            wide = (codes[:, part] * scale + zero).astype(np.int64)
            values[:, part] = (wide & 255).astype(np.uint8).view(np.int8)
    if linear.channel_scales is None:
        return values, scales
    return values, numpy_of(linear.channel_scales)[:, None]


def dense_weight(linear: QuantizedLinear) -> np.ndarray:
    """The weight [N, K] in float64, inputs in their original order."""
    values, scales = runtime_weight(linear)
    dense = values * np.repeat(scales, values.shape[1] // scales.shape[1], axis=1)
    if linear.minima is not None:
        dense += np.repeat(numpy_of(linear.minima), linear.group_size, axis=1)
    if linear.perm is None:
        return dense
    restored = np.empty_like(dense)
    restored[:, np.asarray(linear.perm)] = dense
    return restored


def round_rows(x: np.ndarray, spec) -> tuple[np.ndarray, np.ndarray]:
    """Codes (as float64 values) and float64 scales of float32 rows, one code at a time in numpy."""
    x = x.astype(np.float32)
    amax = np.abs(x).max(axis=-1, keepdims=True)
    bits = (spec.kind, spec.bits)
    levels = {("int", 8): 127, ("int", 4): 7, ("float", 8): 448, ("float", 4): 6}[bits]
    if spec.full_range:
        # compressed-tensors 0.20: calculate_qparams and quantize.
        scale = amax / np.float32(levels + 0.5)
        scaled = x / np.where(scale == 0, np.finfo(np.float32).eps, scale)
        low, high = -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1
        return np.rint(np.clip(scaled, low, high)).astype(np.float64), scale.astype(np.float64)
    levels = np.float32(levels)
    with np.errstate(divide="ignore"):
        inverse = np.where(amax == 0, np.float32(0), levels / amax)
    scaled = (x * inverse).astype(np.float64)
    scale = (amax * (np.float32(1) / levels)).astype(np.float64)
    if spec.kind == "int":
        return np.clip(np.rint(scaled), -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1), scale
    if spec.bits == 8:
        return _round_to_grid(scaled, _e4m3_grid()), scale
    return _round_to_grid(scaled, E2M1), scale


def _e4m3_grid() -> np.ndarray:
    subnormal = [m * 2.0**-9 for m in range(8)]
    normal = [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)]
    return np.array(subnormal + normal[:-1])


def _round_to_grid(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Nearest grid magnitude; a tie goes to the even neighbour (even index, as in the encoding)."""
    magnitude = np.abs(values)
    above = np.clip(np.searchsorted(grid, magnitude), 1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    tie_up = (above % 2 == 0) & (magnitude - low == high - magnitude)
    up = (magnitude - low > high - magnitude) | tie_up
    return np.sign(values) * np.where(up, high, low)
