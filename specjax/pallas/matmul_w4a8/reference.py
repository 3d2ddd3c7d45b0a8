"""Matmul of int8 inputs and 4-bit integer weights: the definition, and XLA backend.

Single-level codes keep their (group) scales in the product; the two-level codes of QQQ and QoQ
become int8 weights first and are then multiplied as one int32 accumulator per output. Accumulators
are exact.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from specjax.pallas import weights


def matmul(
    x_codes: Shaped[Array, "... K"],
    x_scale: Float[Array, "... 1"],
    weight: weights.QuantizedWeight,
    *,
    x_sums: Float[Array, "... G"] | None = None,
    bias: Float[Array, "N"] | None = None,
    out_dtype=jnp.float32,
) -> Float[Array, "... N"]:
    """`weights.quantized` has the formula; `x_sums` is read only where the weight has minima."""
    return weights.quantized(
        x_codes, x_scale, weight, x_sums=x_sums, bias=bias, out_dtype=out_dtype
    )
