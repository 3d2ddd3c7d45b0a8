"""Matmul of float inputs and 8-bit weights: the definition, and XLA backend.

Codes are int8, uint8 or e4m3. A correctness path: XLA does not fuse the dequantization into the
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
