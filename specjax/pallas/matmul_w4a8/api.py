"""Matmul of int8 inputs and 4-bit integer weights: the public op."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from specjax.pallas import dispatch, weights
from specjax.pallas.matmul import backends, packed
from specjax.pallas.matmul_w4a8 import reference

IMPLEMENTATIONS = backends.of_integers("matmul_w4a8", 4, reference.matmul)


def matmul(
    x_codes: Shaped[Array, "... K"],
    x_scale: Float[Array, "... 1"],
    weight: weights.QuantizedWeight | packed.PackedWeight,
    *,
    x_sums: Float[Array, "... G"] | None = None,
    bias: Float[Array, "N"] | None = None,
    out_dtype=jnp.float32,
    backend: dispatch.Backend = "auto",
) -> Float[Array, "... N"]:
    """(x_codes * x_scale) W^T + bias in `out_dtype`, columns of x in the order of the codes.

    `x_sums` are the group sums of the inputs before they were quantized; needed where the weight
    has minima.

    Raises:
        SpecjaxError: `backend` is unknown, not implemented for this op, or refuses these arguments.
    """
    arguments = dict(x_sums=x_sums, bias=bias, out_dtype=out_dtype)
    return dispatch.run(
        "matmul_w4a8", backend, IMPLEMENTATIONS, x_codes, x_scale, weight, **arguments
    )
