"""Matmul of e4m3 inputs and e4m3 weights: the definition, and XLA backend.

Products of codes are exact in float32 and accumulate in float32.
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
