"""Matmul of float inputs and 4-bit weights: the definition, and XLA backend.

Codes are int4, uint4 or e2m1. A correctness path: XLA does not fuse the dequantization into the
product, the whole weight is rebuilt on every call.
"""

from jaxtyping import Array, Float

from specjax.pallas import weights


def matmul(
    x: Float[Array, "... K"],
    weight: weights.QuantizedWeight,
    *,
    bias: Float[Array, "N"] | None = None,
) -> Float[Array, "... N"]:
    """See `weights.weight_only`."""
    return weights.weight_only(x, weight, bias)
