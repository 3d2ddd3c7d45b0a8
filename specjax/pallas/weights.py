"""What quantized weights mean, and their products: shared by all matmul references.

With group g(k) of input feature k (indices n, k of the weight are left out where they are plain):

| levels | runtime weight | weight in floats |
|---|---|---|
| single, zeros | c - zeros[g] | (c - zeros[g]) * scales[g] |
| single, minima | c | c * scales[g] + minima[g] |
| qqq, channel_scales | r = round_half_even(c * scales[g]), an int8 | r * channel_scales |
| qoq, channel_scales | r = int8(c * scales[g] + zeros[g]), wrapping | r * channel_scales |

(c is a stored code; without `channel_scales` the two-level schemes are per channel and read as
"single". QoQ per channel has minima = -s1_szeros; QQQ per channel has scales = 16 * s_channel,
because its kernel leaves nibbles shifted by four bits.)
"""

import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Shaped

from specjax.pallas import matmul_dense


@runtime_checkable
class QuantizedWeight(Protocol):
    """A quantized weight [N, K] as the ops read it, e.g. a `quant.linear.QuantizedLinear`.

    Attributes:
        codes: [N, K], stored codes.
        scales: [N, G], of the first level.
        zeros: [N, G] or None, integers.
        minima: [N, G] or None.
        channel_scales: [N] or None, of the second level.
        group_size: input features that share an entry of scales.
        levels: "single", "qqq" or "qoq".
    """

    codes: Array
    scales: Array
    zeros: Array | None
    minima: Array | None
    channel_scales: Array | None
    group_size: int

    @property
    def levels(self) -> str: ...


def _grouped(codes: Shaped[Array, "N K"], group_size: int) -> Shaped[Array, "N G g"]:
    return codes.reshape(codes.shape[0], -1, group_size)


def runtime(weight: QuantizedWeight) -> tuple[Shaped[Array, "N K"], Float[Array, "N G"]]:
    """The weight that a quantized product multiplies, and its float32 scales (minima apart).

    Integer codes come back as int8, floating-point codes as they are. Two-level weights come back
    with one scale per output feature (G = 1).
    """
    if weight.channel_scales is not None:
        codes = _second_level(weight)
        return codes, weight.channel_scales.astype(jnp.float32)[:, None]
    codes, scales = jnp.asarray(weight.codes), weight.scales.astype(jnp.float32)
    if jnp.issubdtype(codes.dtype, jnp.integer):
        codes = codes.astype(jnp.int8)
    if weight.zeros is not None:
        zeros = weight.zeros.astype(jnp.int8)[..., None]
        codes = (_grouped(codes, weight.group_size) - zeros).reshape(codes.shape)
    return codes, scales


def _second_level(weight: QuantizedWeight) -> Int8[Array, "N K"]:
    if weight.levels == "qqq":
        product = _grouped(jnp.asarray(weight.codes).astype(jnp.float32), weight.group_size)
        product = jnp.round(product * weight.scales.astype(jnp.float32)[..., None])
        codes = jnp.clip(product, -128, 127)
    else:
        product = _grouped(jnp.asarray(weight.codes).astype(jnp.int32), weight.group_size)
        product = product * weight.scales.astype(jnp.int32)[..., None]
        product += weight.zeros.astype(jnp.int32)[..., None]
        codes = (product + 128) % 256 - 128
    return codes.astype(jnp.int8).reshape(weight.codes.shape)


def dequantize(weight: QuantizedWeight, dtype=jnp.float32) -> Float[Array, "N K"]:
    """The weight in float32, rounded once to `dtype`; columns in the order of the codes."""
    if weight.channel_scales is None:
        values, scales = (
            jnp.asarray(weight.codes).astype(jnp.float32),
            weight.scales.astype(jnp.float32),
        )
        if weight.zeros is not None:
            values = _grouped(values, weight.group_size)
            values = values - weight.zeros.astype(jnp.float32)[..., None]
    else:
        values, scales = runtime(weight)
        values = values.astype(jnp.float32)
    values = values.reshape(values.shape[0], scales.shape[1], -1) * scales[..., None]
    if weight.minima is not None:
        values = values + weight.minima.astype(jnp.float32)[..., None]
    return values.reshape(weight.codes.shape).astype(dtype)


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
        return jax.lax.dot_general(x, codes, contract, preferred_element_type=jnp.int32)
    x, codes = x.astype(jnp.float32), codes.astype(jnp.float32)
    return jax.lax.dot_general(x, codes, contract, precision=jax.lax.Precision.HIGHEST)


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
    out_dtype=jnp.float32,
) -> Float[Array, "... N"]:
    """Product of quantized inputs and quantized weights.

    out[n] = (sum_g float32(acc[n, g]) * scales[n, g]) * x_scale + sum_g minima[n, g] * x_sums[g] +
    bias[n], where acc[n, g] = sum over the group of x_codes[k] * runtime_weight[n, k]
    (`accumulate`) and x_sums are the group sums of the inputs before they were quantized;
    everything after the accumulators is float32, then rounded to `out_dtype`.
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
    return (out if bias is None else out + bias.astype(jnp.float32)).astype(out_dtype)
