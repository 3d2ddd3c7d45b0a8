"""Matmul of float inputs and 8-bit weights: the public op."""

from jaxtyping import Array, Float

from specjax.pallas import dispatch, weights
from specjax.pallas.matmul import backends, packed
from specjax.pallas.matmul_w8a16 import reference

IMPLEMENTATIONS = backends.of_floats("matmul_w8a16", 8, reference.matmul)


def matmul(
    x: Float[Array, "... K"],
    weight: weights.QuantizedWeight | packed.PackedWeight,
    *,
    bias: Float[Array, "N"] | None = None,
    backend: dispatch.Backend = "auto",
) -> Float[Array, "... N"]:
    """x W^T + bias in the dtype of x, columns of x in the order of the codes.

    Raises:
        SpecjaxError: `backend` is unknown, not implemented for this op, or refuses these arguments.
    """
    return dispatch.run("matmul_w8a16", backend, IMPLEMENTATIONS, x, weight, bias=bias)
