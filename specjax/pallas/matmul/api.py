"""The product of rows with a quantized weight: the public op."""

from jaxtyping import Array, Float, Shaped

from specjax.pallas import dispatch
from specjax.pallas.matmul import backends
from specjax.pallas.matmul.form import PackedWeight
from specjax.pallas.matmul.operand import dtype_bits
from specjax.pallas.matmul.weight import QuantizedWeight


def matmul(
    x: Shaped[Array, "... K"],
    weight: QuantizedWeight | PackedWeight,
    *,
    x_scale: Float[Array, "... 1"] | None = None,
    x_sums: Float[Array, "... G"] | None = None,
    bias: Float[Array, "N"] | None = None,
    out_dtype=None,
    backend: dispatch.Backend = "auto",
) -> Float[Array, "... N"]:
    """x W^T + bias for float inputs, (x * x_scale) W^T + bias for codes of inputs.

    Args:
        x: floats, or codes (int8, int4, e4m3, e2m1); columns in the order of the weight's codes.
        weight: in any registered format, packed or not.
        x_scale: of the codes, one per row; None: x are floats.
        x_sums: group sums of the inputs before they were quantized; needed where they are codes and the weight
            has minima.
        out_dtype: for codes, default float32; floats give their own dtype.

    Raises:
        SpecjaxError: `backend` is unknown, not implemented for this format and these inputs, or refuses these
            arguments.
    """
    format = backends.format_of(weight)
    input_bits = 16 if x_scale is None else dtype_bits(x.dtype)
    return dispatch.run(
        *(format.op(input_bits), backend, backends.implementations(format, input_bits)),
        *(x, weight),
        x_scale=x_scale,
        x_sums=x_sums,
        bias=bias,
        out_dtype=out_dtype,
    )
