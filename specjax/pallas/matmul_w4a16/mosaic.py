"""Matmul of float inputs and 4-bit weights on NVIDIA GPUs, from packed weights."""

from jaxtyping import Array, Float

from specjax.pallas.mosaic import matmul as shared
from specjax.pallas.mosaic.packed import PackedWeight
from specjax.pallas.mosaic.plan import Config


def matmul(
    x: Float[Array, "M K"],
    weight: PackedWeight,
    *,
    arch: tuple[int, int],
    bias: Float[Array, "N"] | None = None,
    config: Config | None = None,
    interpret=None,
) -> Float[Array, "M N"]:
    """x W^T + bias in the dtype of x (float16 or bfloat16); see `mosaic.matmul.float_matmul`."""
    return shared.float_matmul(
        x, weight, name="matmul_w4a16", arch=arch, bias=bias, config=config, interpret=interpret
    )
