"""The product with a quantized weight: its definition, and the XLA backend.

What codes mean is the format's (`formats/`); here is what the products of all formats have in
common. A correctness path: XLA does not fuse the decoding of codes into the product, the whole
weight is rebuilt on every call.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32, Shaped

from specjax.pallas import matmul_dense
from specjax.pallas.matmul.formats import registry
from specjax.pallas.matmul.weight import QuantizedWeight


def matmul(
    x: Shaped[Array, "... K"],
    weight: QuantizedWeight,
    *,
    x_scale: Float[Array, "... 1"] | None = None,
    x_sums: Float[Array, "... G"] | None = None,
    bias: Float[Array, "N"] | None = None,
    out_dtype=None,
) -> Float[Array, "... N"]:
    """See `api.matmul`: `weight_only` without `x_scale`, else `quantized`."""
    if x_scale is None:
        return weight_only(x, weight, bias)
    return quantized(x, x_scale, weight, x_sums=x_sums, bias=bias, out_dtype=out_dtype)


def runtime(weight: QuantizedWeight) -> tuple[Shaped[Array, "N K"], Float[Array, "N G"]]:
    """The weight that a quantized product multiplies, and its float32 scales (minima apart).

    Integer codes come back as int8, floating-point codes as they are. Two-level weights come back
    with one scale per output feature (G = 1).
    """
    return registry.of(weight).runtime(weight)


def dequantize(weight: QuantizedWeight, dtype=jnp.float32) -> Float[Array, "N K"]:
    """The weight in float32, rounded once to `dtype`; columns in the order of the codes."""
    return registry.of(weight).dequantize(weight, dtype)


def weight_only(
    x: Float[Array, "... K"], weight: QuantizedWeight, bias: Float[Array, "N"] | None = None
) -> Float[Array, "... N"]:
    """x W^T + bias in the dtype of x, W dequantized to that dtype, sums in float32."""
    out = matmul_dense.matmul(x, dequantize(weight, x.dtype), jnp.float32)
    return (out if bias is None else out + bias.astype(jnp.float32)).astype(x.dtype)


def accumulate(x: Shaped[Array, "M K"], codes: Shaped[Array, "N K"]) -> Shaped[Array, "M N"]:
    """sum_k x[m, k] codes[n, k]: exact int32 for integer codes, float32 for float codes.

    int32 cannot overflow below K = 2^31 / 2^14 = 131072.
    """
    contract = (((1,), (1,)), ((), ()))
    if jnp.issubdtype(codes.dtype, jnp.integer):
        x, codes = x.astype(jnp.int8), codes.astype(jnp.int8)
        return jax.lax.platform_dependent(x, codes, cpu=_at_least_two_rows, default=_integer_dot)
    x, codes = x.astype(jnp.float32), codes.astype(jnp.float32)
    return jax.lax.dot_general(x, codes, contract, precision=jax.lax.Precision.HIGHEST)


def _integer_dot(x: Int8[Array, "M K"], codes: Int8[Array, "N K"]) -> Int32[Array, "M N"]:
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, codes, contract, preferred_element_type=jnp.int32)


def _at_least_two_rows(x: Int8[Array, "M K"], codes: Int8[Array, "N K"]) -> Int32[Array, "M N"]:
    """XLA's CPU library multiplies int8 with the processor's dot instructions, but a single row one by one.

    Measured for the layers of a small model: one row took 18 times as long as two.
    """
    padding = ((0, 1 if len(x) == 1 else 0), (0, 0))
    return _integer_dot(jnp.pad(x, padding), codes)[: len(x)]


def _sum_groups(
    x: Shaped[Array, "M K"], codes: Shaped[Array, "N K"], scales: Float[Array, "N G"]
) -> Float[Array, "M N"]:
    """sum_g accumulate(group g) * scales[:, g], in order of g."""
    size = codes.shape[1] // scales.shape[1]

    # A loop, because all accumulators at once take G times the memory of the result, and because
    # XLA compiles it several times faster than the same products written out.
    def add_group(group, out):
        parts = [jax.lax.dynamic_slice_in_dim(a, group * size, size, axis=1) for a in (x, codes)]
        scale = jax.lax.dynamic_index_in_dim(scales, group, axis=1, keepdims=False)
        return out + accumulate(*parts).astype(jnp.float32) * scale

    start = jnp.zeros((len(x), len(codes)), jnp.float32)
    return jax.lax.fori_loop(0, scales.shape[1], add_group, start)


def quantized(
    x_codes: Shaped[Array, "... K"],
    x_scale: Float[Array, "... 1"],
    weight: QuantizedWeight,
    *,
    x_sums: Float[Array, "... G"] | None = None,
    bias: Float[Array, "N"] | None = None,
    out_dtype=None,
) -> Float[Array, "... N"]:
    """Product of quantized inputs and quantized weights.

    out[n] = (sum_g float32(acc[n, g]) * scales[n, g]) * x_scale + sum_g minima[n, g] * x_sums[g] +
    bias[n], where acc[n, g] = sum over the group of x_codes[k] * runtime_weight[n, k]
    (`accumulate`) and x_sums are the group sums of the inputs before they were quantized;
    everything after the accumulators is float32, then rounded to `out_dtype` (default: not).
    """
    codes, scales = runtime(weight)
    outputs, groups = scales.shape
    rows = x_codes.reshape(math.prod(x_codes.shape[:-1]), x_codes.shape[-1])
    if groups == 1:
        out = accumulate(rows, codes).astype(jnp.float32) * scales[:, 0]
    else:
        out = _sum_groups(rows, codes, scales)
    out = out.reshape(*x_codes.shape[:-1], outputs) * x_scale.astype(jnp.float32)
    if weight.minima is not None:
        minima = weight.minima.astype(jnp.float32)
        out += jnp.einsum(
            "...g,ng->...n", x_sums.astype(jnp.float32), minima, precision=jax.lax.Precision.HIGHEST
        )
    out = out if bias is None else out + bias.astype(jnp.float32)
    return out.astype(jnp.float32 if out_dtype is None else out_dtype)
