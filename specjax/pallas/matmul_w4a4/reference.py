"""Matmul of int4 inputs and 4-bit integer weights: the definition, and XLA backend.

int32 accumulators, exact. Two-level codes become int8 weights first, as under 8-bit inputs.
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
